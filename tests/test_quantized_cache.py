"""transformers' own QuantizedCache with quanto and HQQ, where they are installed, as benchmark row and baseline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hf_helpers import one_thread
from report_helpers import tiny_model, tiny_scales, token_windows
from transformers import MistralConfig, MistralForCausalLM
from typer.testing import CliRunner

from foldkv.accuracy import accuracy_report
from foldkv.accuracy.baselines import make_baselines
from foldkv.cli.main import app
from foldkv.hf.quantized_cache import QUANTIZED_CACHES, RESIDUAL

pytestmark = pytest.mark.usefixtures(one_thread.__name__)


def installed(name: str) -> None:
    """Skip the test where the cache of this name cannot be had."""
    why = QUANTIZED_CACHES[name].refuses(tiny_model(head_dim=64))
    if why is not None:
        pytest.skip(f"{name}: {why}")


@pytest.mark.parametrize("name", QUANTIZED_CACHES)
def test_row_of_the_benchmark(name: str, tmp_path: Path) -> None:
    installed(name)
    out = tmp_path / "x.json"
    options = ("--model", "tiny-shape", "--dtype", "fp32", "--device", "cpu", "--steps", "20", "--no-ttft")
    result = CliRunner().invoke(
        app, ["bench", *options, "--kv", "c16", "--cases", "2x64", "--peers", name, "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    row = json.loads(out.read_text())["rows"][1]
    assert row["name"] == name and row["bits"] == QUANTIZED_CACHES[name].bits
    assert row["tokens_per_s"] > 0 and row["x_c16"] > 0


def test_baselines_of_the_report() -> None:
    for name in QUANTIZED_CACHES:
        installed(name)
    model, names = tiny_model(head_dim=64), [f"hf-{name}" for name in QUANTIZED_CACHES]
    sizes = {"num_windows": 0, "decode_windows": 2, "decode_len": RESIDUAL + 40}
    report = accuracy_report(
        model, ["c8d"], token_windows(2, RESIDUAL + 40, seed=2), scales=tiny_scales(model), level="quick",
        baselines=names, **sizes,
    ).data  # fmt: skip
    assert list(report["baselines"]) == names and "prefill" not in report["baselines"]["hf-hqq4"]
    kld = {name: entry["decode"]["kld_mean"] for name, entry in report["baselines"].items()}
    assert 0 < kld["hf-hqq8"] < kld["hf-hqq4"] / 10 and kld["hf-quanto4"] > 0
    bits = report["baselines"]["hf-hqq4"]["bits_per_element"]
    assert 4.5 < bits < 16 and "in 16 bits, counted over 168 tokens" in report["baselines"]["hf-hqq4"]["note"]


def test_bits_count_what_stays_in_16() -> None:
    """Against the cache's own tensors where HQQ is installed, and its law: all but the first of 128 tokens in 16 bits."""
    kind = QUANTIZED_CACHES["hqq4"]
    assert kind.mean_bits(1) == 4.5
    assert kind.mean_bits(2) == pytest.approx(4.5 + 11.5 * (0 + 1 / 2) / 2)
    assert kind.mean_bits(100_000) == pytest.approx(4.5, abs=0.1)
    installed("hqq4")
    cache, shares = kind.make(tiny_model(head_dim=64).config), []
    for tokens in range(1, 2 * RESIDUAL + 10):
        cache.update(*(torch.randn(1, 2, 1, 64) for _ in range(2)), 0)
        keys = cache.layers[0].keys
        shares.append((keys.shape[2] if keys.dim() == 4 else 0) / tokens)
    assert kind.mean_bits(len(shares)) == pytest.approx(4.5 + 11.5 * sum(shares) / len(shares))


def test_left_out_with_the_reason() -> None:
    names = [f"hf-{name}" for name in QUANTIZED_CACHES]
    model = tiny_model()
    _, left_out = make_baselines(None, model, None, decode_len=0)
    assert [text for text in left_out if "nothing is decoded" in text] == [
        f"{name}: it is fed token by token, and nothing is decoded" for name in names
    ]
    config = MistralConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=32, sliding_window=8, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    sources, left_out = make_baselines(["all"], MistralForCausalLM(config).eval(), None, decode_len=8)
    assert len(sources) == 10 and [text.split(":")[0] for text in left_out] == names
    assert all("not installed" in text or "full attention" in text for text in left_out)


def test_a_cache_that_fails_on_the_model_is_left_out() -> None:
    """HQQ packs two groups in one, and one token of 2 x 32 channels is a single group."""
    installed("hqq4")
    why = QUANTIZED_CACHES["hqq4"].refuses(tiny_model(head_dim=32))
    assert why is not None and why.startswith("it fails on this model: ")


def test_a_backend_that_breaks_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that is missing shows at the first use only."""

    def broken(kind: object, config: object) -> None:
        raise RuntimeError("Error building extension 'quanto_cuda'\nand a page of log")

    monkeypatch.setattr("foldkv.hf.quantized_cache._installed", lambda package: True)
    monkeypatch.setattr("foldkv.hf.quantized_cache.QuantizedCacheKind.make", broken)
    _, left_out = make_baselines(None, tiny_model(), None, decode_len=8)
    assert left_out[-1] == "hf-hqq4: it fails on this model: Error building extension 'quanto_cuda'"
