"""Balance and rotation in the weights: the function stays, K and V become what they should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from calib_helpers import capture, rows_of
from hf_helpers import save_checkpoint, tiny_model, tokens
from torch import Tensor
from typer.testing import CliRunner

from calib import calibrate
from calib.derive import balance
from calib.rewrite import pair_balance, rewrite_model
from foldkv.cli.main import app
from foldkv.hf import load_model, swap_kv_cache
from quant.errors import ArgumentError, UnsupportedModelError
from quant.pages import BALANCE, MEAN, identity_params
from quant.reference import dequantize, hadamard, quantize
from quant.scales import KVScales
from quant.spec import Format

FAMILIES = ["llama", "qwen2", "mistral", "gemma2"]


def ready(family: str) -> tuple[Any, Tensor, KVScales]:
    model = tiny_model(family)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module.bias is not None:
            module.bias.data.normal_(generator=torch.Generator().manual_seed(1))
    ids = tokens(4, 40)
    return model, ids, calibrate(model, ids, num_samples=4, max_seq_len=40)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("k", "v"), [("balance", "none"), ("none", "balance"), ("none", "rotate"), ("balance", "rotate")]
)
def test_the_function_stays(family: str, k: str, v: str) -> None:
    """Each alone and together, with biases, RoPE and groups: the logits are those of before, K and V are not."""
    model, ids, scales = ready(family)
    before, old = model(ids).logits, capture(model, ids)
    rewrite_model(model, scales, k=k, v=v)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)
    new = capture(model, ids)
    for idx in old:
        changed = [
            not torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(old[idx][1:], new[idx][1:], strict=True)
        ]
        assert changed == [k != "none", v != "none"]


def test_what_is_cached_is_the_balanced_and_rotated_tensor() -> None:
    model, ids, scales = ready("llama")
    old = capture(model, ids)
    rewrite_model(model, scales)
    new = capture(model, ids)
    for idx in range(2):
        stats = scales[idx]
        wanted = hadamard(rows_of(old[idx][2]) / balance(stats.v))
        torch.testing.assert_close(rows_of(new[idx][2]), wanted, rtol=1e-3, atol=1e-4)
        partner = (torch.arange(16) + 8) % 16
        factor = pair_balance(stats.k, partner).float()
        assert torch.equal(factor, factor[:, partner])
        torch.testing.assert_close(rows_of(new[idx][1]), rows_of(old[idx][1]) / factor, rtol=1e-3, atol=1e-4)


def test_pair_balance_minimises_the_product_over_pairs() -> None:
    """Against random other balances that are equal on pairs."""
    _, _, scales = ready("llama")
    stats, partner = scales[0].k, (torch.arange(16) + 8) % 16

    def product(s: Tensor) -> Tensor:
        return (stats.var.double() / s**2).sum(-1) * (stats.weight.double() * s**2).sum(-1)

    best = pair_balance(stats, partner)
    generator = torch.Generator().manual_seed(0)
    for size in (0.05, 0.5):
        for _ in range(20):
            other = torch.randn(2, 8, generator=generator).repeat(1, 2).mul(size).exp()
            assert (product(best) <= product(best * other) * (1 + 1e-9)).all()


def test_a_rewritten_model_needs_no_balance() -> None:
    """Channels that were scaled apart are level again: int4 per token, plain, comes near to the balanced format."""
    model, ids, _ = ready("llama")
    for layer in model.model.layers:
        factor = torch.logspace(-1.2, 1.2, 16).repeat(2)
        layer.self_attn.v_proj.weight.data *= factor[:, None]
        layer.self_attn.o_proj.weight.data /= factor.view(2, 1, 16).expand(2, 2, 16).flatten()
    base = model(ids).logits.log_softmax(-1)

    def loss() -> float:
        with swap_kv_cache(model, "c16/c4r") as swap:
            mine = model(ids, past_key_values=swap.new_cache(*ids.shape)).logits.log_softmax(-1)
        return float((base.exp() * (base - mine)).sum(-1).mean())

    before = loss()
    rewrite_model(model, calibrate(model, ids, num_samples=4, max_seq_len=40), k="none", v="balance")
    assert loss() < before / 5


def test_what_cannot_be_rewritten_is_left_alone() -> None:
    for family, options, message in (
        ("phi3", {}, "its projections are fused"),
        ("qwen3", {}, "K without a norm behind its projection"),
        ("gpt2", {}, "its projections are fused"),
    ):
        model, _, scales = ready(family)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(UnsupportedModelError, match=message):
            rewrite_model(model, scales, **options)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ArgumentError, match="rewrite of v: expected one of none, balance, rotate, got 'full'"):
        rewrite_model(*ready("llama")[::2], v="full")


def test_v_alone_where_k_is_normalised() -> None:
    model, ids, scales = ready("qwen3")
    before = model(ids).logits
    rewrite_model(model, scales, k="none", v="rotate")
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)


def test_rewrite_on_the_command_line(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tiny_model(), tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{idx % 90 + 5}" for idx in range(400)))
    arguments = ["rewrite", str(checkpoint), "--data", str(text), "--num-samples", "4", "--max-seq-len", "64", "--out"]
    done = CliRunner().invoke(app, [*arguments, str(tmp_path / "new")])
    assert done.exit_code == 0, done.output
    (before, _), (after, _) = load_model(checkpoint), load_model(tmp_path / "new")
    ids = tokens(2, 30)
    torch.testing.assert_close(after(ids).logits, before(ids).logits, rtol=1e-4, atol=1e-4)
    assert not torch.equal(
        after.model.layers[0].self_attn.v_proj.weight, before.model.layers[0].self_attn.v_proj.weight
    )
    assert CliRunner().invoke(app, [*arguments, str(tmp_path / "new")]).exit_code == 2
    assert CliRunner().invoke(app, [*arguments, str(tmp_path / "x"), "--v", "full"]).exit_code == 1


# --- the formats themselves -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [(c, b, r) for c in (False, True) for b in (False, True) for r in (False, True)])
def test_mean_balance_and_rotation_are_exact_where_nothing_is_quantised(flags: tuple[bool, bool, bool]) -> None:
    """Each alone and together. With codes left unrounded, what is stored comes back to rounding of fp32."""
    center, with_balance, rotate = flags
    fmt = Format("int8", "token", symmetric=False, center=center, balance=with_balance, rotate=rotate)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(50, 2, 32, generator=generator) * torch.logspace(-1, 1, 32) + 3
    params = identity_params(fmt, 2, 32)
    if center:
        params[MEAN] = x.mean(0)
    if with_balance:
        params[BALANCE] = x.std(0)
    y = (x - params[MEAN]) / params[BALANCE]
    y = hadamard(y) if rotate else y
    scale, zero = (y.amax(-1, keepdim=True) - y.amin(-1, keepdim=True)) / 255, torch.zeros(50, 2, 1)
    exact = dequantize(y.double() / scale.double(), fmt, params, scale, zero)
    torch.testing.assert_close(exact, x.double(), rtol=1e-5, atol=1e-5)
    codes, scale, zero = quantize(x, fmt, params)
    error = (dequantize(codes, fmt, params, scale, zero) - x).abs().amax()
    assert 0 < float(error) < 2.0
