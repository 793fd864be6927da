"""Mean, balance and rotation apart: exact where nothing is lost, screened by their error, chosen where they help."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from calib_helpers import stats_of
from hf_helpers import save_checkpoint, tiny_model, tokens
from torch import Tensor
from typer.testing import CliRunner

from calib import calibrate
from calib.derive import tensor_params, tensor_shaping
from foldkv.auto import Budget, api, calibrate_auto, choose_plan
from foldkv.auto.candidates import DYNAMIC, FULL, TensorSize, sizes
from foldkv.auto.sensitivity import sensitivities
from foldkv.auto.transforms import PROMISING, combinations, error, mode_of, offer, parse_transforms, screen, words
from foldkv.cli.main import app
from foldkv.hf import swap_kv_cache
from quant.errors import ArgumentError
from quant.pages import BALANCE, MEAN, identity_params
from quant.reference import dequantize, hadamard, quantize
from quant.scales import KVScales, LayerStats
from quant.spec import MODES, parse_modes, resolve_mode

SHAPES = dict.fromkeys(range(3), (2, 16))
OTHER = "int4.token.asym.center.rotate"


@pytest.mark.parametrize("name", combinations())
def test_each_combination_is_exact_where_nothing_is_lost(name: str) -> None:
    """Rows that lie on the grid of 16 codes once transformed come back to the bit; of any other combination they do not."""
    fmt = combinations()[name]
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 16, (40, 2, 64), generator=generator).float() - 4
    y[..., 0], y[..., 1] = -4, 11
    params = identity_params(fmt, 2, 64)
    params[MEAN] = torch.randint(-8, 9, (2, 64), generator=generator) / 4
    params[BALANCE] = 2.0 ** torch.randint(-2, 3, (2, 64), generator=generator)

    def through(on: Any, x: Tensor) -> Tensor:
        own = identity_params(on, 2, 64)
        own[MEAN] = params[MEAN] if on.center else own[MEAN]
        own[BALANCE] = params[BALANCE] if on.balance else own[BALANCE]
        codes, scale, zero = quantize(x, on, own)
        return dequantize(codes, on, own, scale, zero, dtype=torch.float32)

    x = (hadamard(y) if fmt.rotate else y) * (params[BALANCE] if fmt.balance else 1) + (
        params[MEAN] if fmt.center else 0
    )
    assert torch.equal(through(fmt, x), x)
    for other, on in combinations().items():
        assert other == name or (through(on, x) - x).abs().max() > 1e-3, other


def test_words_and_modes() -> None:
    found = combinations()
    assert len(found) == 8 and next(iter(found)) == "mean+balance+rotate" and "none" in found
    assert all(words(fmt) == name and resolve_mode(mode_of(fmt)).k == fmt for name, fmt in found.items())
    assert mode_of(found["mean+balance+rotate"]) == FULL and mode_of(found["mean+balance"]) == "c4d"
    assert parse_transforms("auto") is None
    assert parse_transforms("rotate+mean, none,mean+rotate") == [OTHER, "int4.token.asym"]
    for wrong in ("spin", "mean+", "", "auto,none", "mean balance"):
        with pytest.raises(ArgumentError, match="transforms: expected auto, none, or some of mean, balance, rotate"):
            parse_transforms(wrong)


def scales_of(k: Tensor, v: Tensor, weight: Tensor | None = None) -> KVScales:
    """One layer of these rows, which are its sampled tokens too."""
    return KVScales([LayerStats(stats_of(k, weight), stats_of(v))])


def test_screening_finds_what_helps_and_offers_no_more() -> None:
    """Rows of two levels lie on the grid as they are and not once rotated; Gaussian rows gain nothing by leaving one out."""
    generator = torch.Generator().manual_seed(1)
    levels = 15.0 * torch.randint(0, 2, (300, 1, 64), generator=generator)
    scales = scales_of(torch.randn(300, 1, 64, generator=generator) * 2 + 5, levels)
    k, v = sizes({0: (1, 64)})
    found = screen(scales, [k, v])
    assert found[v]["none"] == 0 and found[k][words(MODES[FULL].k)] == 1
    assert all(ratio > PROMISING for ratio in found[k].values())
    chosen = offer(found, [k, v])
    assert chosen[k] == (FULL,) and chosen[v][0] == FULL and len(chosen[v]) == 2
    assert not resolve_mode(chosen[v][1]).v.rotate and error(scales[0].v, resolve_mode(chosen[v][1]).v, "v") == 0
    scales[0].v.sample = None
    assert screen(scales, [k, v]) == {} and offer({}, [k, v]) == {k: DYNAMIC, v: DYNAMIC}


def test_the_error_is_what_softmax_and_o_proj_see() -> None:
    """A shift of K that all tokens share costs nothing; channels count by their weight."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(1, 1, 64, generator=generator).expand(50, 1, 64) + 0.0
    scales = scales_of(rows, rows)
    plain = combinations()["none"]
    assert error(scales[0].k, plain, "k") < 1e-10 < 1e-4 < error(scales[0].v, plain, "v")
    x = torch.randn(200, 1, 64, generator=generator)
    once, twice = (scales_of(x, x, torch.full((1, 64), weight))[0].k for weight in (1.0, 2.0))
    assert error(twice, plain, "k") == pytest.approx(2 * error(once, plain, "k"))
    codes, scale, zero = quantize(x, plain, tensor_params(once, plain))
    left = dequantize(codes, plain, tensor_params(once, plain), scale, zero).float() - x
    assert error(once, plain, "v") == pytest.approx(float(left.square().mean(0).sum()), rel=1e-5)
    # With a Gram matrix: under it, of the shaped rows, as much in all as the weights.
    once.gram = twice.gram = torch.ones(1, 64, 64) + torch.eye(64)
    shaping = tensor_shaping(once, plain)
    codes, scale, zero = quantize(x, plain, tensor_params(once, plain), shaping)
    left = dequantize(codes, plain, tensor_params(once, plain), scale, zero).float() - x
    want = (left.square().sum(-1) + left.sum(-1).square()).mean() / 2
    assert error(once, plain, "v") == pytest.approx(float(want), rel=1e-4)
    assert error(twice, plain, "v") == pytest.approx(2 * float(want), rel=1e-4)


# --- in a plan --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, KVScales]:
    model = tiny_model("llama", num_hidden_layers=3)
    return model, calibrate(model, tokens(8, 64), num_samples=8, max_seq_len=64)


def test_a_combination_that_helps_is_chosen_for_its_tensor_alone(
    tiny: tuple[Any, KVScales], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """K of layer 1 does better without balance, screened and measured: the map says so, and is saved, read and run."""
    model, _ = tiny
    real_screen = screen

    def screened(scales: KVScales, tensors: list[TensorSize]) -> Any:
        found = real_screen(scales, tensors)
        for size, ratios in found.items():
            ratios.update(dict.fromkeys(ratios, 2.0) | {"mean+balance+rotate": 1.0})
            if (size.layer, size.tensor) == (1, "k"):
                ratios["mean+rotate"] = 0.5
        return found

    def cheap(*args: Any, **kwargs: Any) -> Any:
        dear = {"c4s": 9.0, FULL: 1.0, OTHER: 0.01}
        return [
            (size, {choice: dear.get(choice.mode, 0.001) for choice in costs})
            for size, costs in sensitivities(*args, **kwargs)
        ]

    monkeypatch.setattr(api, "screen", screened)
    monkeypatch.setattr(api, "sensitivities", cheap)
    monkeypatch.setattr(api, "_pick", lambda rows, budget: next(row for row in rows if row["name"] == "auto"))
    scales = calibrate_auto(
        model,
        tokens(14, 64),
        budget=Budget(bits=6),
        num_samples=8,
        max_seq_len=64,
        windows=2,
        held_out=3,
        window_len=64,
    )
    plan = scales.config["plan"]
    costs = {(row["layer"], row["tensor"]): row["cost"] for row in plan["layers"]}
    assert [place for place, cost in costs.items() if OTHER in cost] == [(1, "k")]
    assert all(FULL in cost and "c4d" not in cost for cost in costs.values())
    chosen = {(row["layer"], row["tensor"]): row["format"] for row in plan["layers"]}
    assert [place for place, fmt in chosen.items() if fmt == OTHER] == [(1, "k")]
    assert plan["layers"][2]["screened"]["mean+rotate"] == 0.5
    scales.save(tmp_path)
    back = KVScales.load(tmp_path, model.config)
    assert parse_modes(back.plan, 3)[1].k == combinations()["mean+rotate"]
    with swap_kv_cache(model, "auto", back) as swap:
        assert str(swap.specs[1].k) == OTHER
        model.generate(tokens(1, 9), max_new_tokens=4, do_sample=False)


def test_a_list_is_offered_to_every_tensor_as_it_is(tiny: tuple[Any, KVScales]) -> None:
    model, scales = tiny
    plan = choose_plan(
        model, scales, tokens(1, 48, seed=5), tokens(2, 48, seed=6), Budget(bits=6.5), transforms="mean+rotate,none"
    )
    offered = {frozenset(row["cost"]) for row in plan.layers}
    assert offered == {frozenset(("c4s", OTHER, "int4.token.asym", "c8", "c8d", "c16"))}
    assert not any("screened" in row for row in plan.layers)


def test_the_command_line(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tiny_model("llama"), tmp_path / "model")
    text = tmp_path / "text.jsonl"
    words_of = torch.randint(30, 90, (40, 60), generator=torch.Generator().manual_seed(0)).tolist()
    text.write_text("\n".join(json.dumps({"text": " ".join(f"w{idx}" for idx in row)}) for row in words_of))

    def run(*options: object) -> Any:
        basic = ("calibrate", checkpoint, "--data", text, "--num-samples", 8, "--max-seq-len", 64, "--overwrite")
        return CliRunner().invoke(app, [str(word) for word in (*basic, *options)])

    done = run("--mode", "auto", "--budget-bits", 7)
    assert done.exit_code == 0 and "4 bits with mean+balance+rotate leave the least error in" in done.stdout, (
        done.output
    )
    done = run("--mode", "auto", "--budget-bits", 7, "--transforms", "mean+rotate")
    assert done.exit_code == 0 and OTHER in done.stdout and "leave the least error" not in done.stdout, done.output
    for options, said in (
        (("--mode", "c8", "--transforms", "none"), "--mode auto with it"),
        (("--mode", "auto", "--transforms", "spin"), "--transforms: expected auto, none"),
    ):
        done = run(*options)
        assert done.exit_code == 2 and said in done.stderr, done.output
