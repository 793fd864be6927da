"""The plan per layer: an exact knapsack, costs that are measured, a map never worse than a uniform mode."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import save_checkpoint, tiny_model, tokens
from typer.testing import CliRunner

from calib import calibrate
from foldkv.accuracy import accuracy_report
from foldkv.auto import Budget, calibrate_auto, choose_plan
from foldkv.auto.candidates import UNIFORM, Choice, TensorSize, bits_of, choices, mode_text, sizes
from foldkv.auto.search import CLEARLY, frontier, within, without_chance
from foldkv.auto.sensitivity import measure, sensitivities
from foldkv.cli.main import app
from foldkv.hf import load_model, swap_kv_cache
from quant.errors import ArgumentError
from quant.scales import KVScales
from quant.spec import LayerSpecs, parse_modes

SHAPES = {0: (2, 16), 1: (2, 16)}


# --- the search -------------------------------------------------------------------------------------------------------


def options(seed: int, count: int = 4) -> list[tuple[TensorSize, dict[Choice, float]]]:
    """Tensors of two sizes with random costs, falling with bits as a rule but not always."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        size = TensorSize(number // 2, "kv"[number % 2], 32 << number // 2, 64)
        costs = torch.rand(6, generator=generator) * torch.tensor([4.0, 2.0, 2.0, 0.1, 0.1, 0.0])
        found.append((size, dict(zip(choices(size), costs.tolist(), strict=True))))
    return found


@pytest.mark.parametrize("seed", range(4))
def test_the_knapsack_is_exact(seed: int) -> None:
    """Against all 1296 maps, at every budget of bits and of KLD."""
    given = options(seed)
    total = sum(size.elements for size, _ in given)
    every = []
    for chosen in itertools.product(*(list(costs.items()) for _, costs in given)):
        bits = sum(c.bits(64) * size.elements for (c, _), (size, _) in zip(chosen, given, strict=True)) / total
        every.append((bits, sum(cost for _, cost in chosen)))
    solutions = frontier(given)
    for bits in (4.1, 4.5, 5.0, 6.0, 8.0, 12.0, 16.0):
        best = within(solutions, Budget(bits=bits))
        assert best.bits <= bits
        assert best.cost == pytest.approx(min(cost for used, cost in every if used <= bits + 1e-9))
    for kld in (1e-9, 0.05, 0.5, 2.0):
        best = within(solutions, Budget(kld=kld))
        assert best.cost <= kld
        assert best.bits == pytest.approx(min(used for used, cost in every if cost <= kld + 1e-12))
    with pytest.raises(ArgumentError, match="budget: expected at least 4 bits per element, got 3.9"):
        within(solutions, Budget(bits=3.9))


def test_a_lucky_unrotated_format_is_not_offered() -> None:
    """Only one that is clearly better than the rotated format of the same bits stays."""
    size = TensorSize(0, "k", 32, 64)
    costs = {choice: {"c4r": 1.0, "c4d": 0.9}.get(choice.mode, 0.0) for choice in choices(size)}
    clear = {choice: (CLEARLY - 0.01) if choice.mode == "c4d" else cost for choice, cost in costs.items()}
    (_, chance), (_, better) = without_chance([(size, costs), (size, clear)])
    assert {choice.mode for choice in costs} - {choice.mode for choice in chance} == {"c4d"}
    assert better == clear


def test_budgets() -> None:
    assert Budget.of_memory("1MiB", 1024, 512).bits == 16
    assert Budget.of_memory("2 kB", 10, 400).bits == 4
    assert str(Budget(kld=0.01)) == "KLD 0.01"
    for text in ("many", "3 XB", ""):
        with pytest.raises(ArgumentError, match="memory: expected bytes"):
            Budget.of_memory(text, 10, 400)
    for wrong in ({}, {"bits": 4.0, "kld": 1.0}, {"bits": 0.0}, {"kld": float("inf")}):
        with pytest.raises(ArgumentError, match="budget"):
            Budget(**wrong)


def test_maps_are_written_as_they_are_read() -> None:
    modes = {0: "c8/c4r", 1: "c4r/c4r", 2: "c4r/c4r", 3: "c4/c8"}
    text = mode_text(modes)
    assert text == "c4r,0:c8/c4r,3:c4/c8"
    specs = parse_modes(text, 4)
    for layer, pair in modes.items():
        k, v = (parse_modes(mode, 4).default for mode in pair.split("/"))
        assert (specs[layer].k, specs[layer].v) == (k.k, v.v)
    assert bits_of(parse_modes("c4s,1:c16", 2), SHAPES) == 10
    assert parse_modes("auto", 4, plan=text).name == specs.name
    with pytest.raises(ArgumentError, match="mode 'auto': expected scales with a plan"):
        parse_modes("auto", 4)


# --- on a model -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hard() -> tuple[Any, KVScales]:
    """A tiny model whose layer 0 has K channels scaled apart: it is the one to spend bits on."""
    model = tiny_model("llama", num_hidden_layers=3)
    layer = model.model.layers[0].self_attn
    layer.q_proj.weight.data *= 6
    return model, calibrate(model, tokens(8, 64), num_samples=8, max_seq_len=64)


def test_costs_are_those_of_each_tensor_alone(hard: tuple[Any, KVScales]) -> None:
    model, scales = hard
    text = tokens(2, 48, seed=5)
    found = sensitivities(model, sizes(dict.fromkeys(range(3), (2, 16))), scales, text)
    costs = {choice.name: cost for _, of in found for choice, cost in of.items()}
    assert len(costs) == 36 and all(costs[name] == 0 for name in costs if name.endswith("c16"))
    again = measure(
        model, {"x": LayerSpecs(parse_modes("c16", 3).default, {1: parse_modes("c16/c4r", 3).default})}, scales, text
    )
    assert costs["1.v.c4r"] == pytest.approx(again["x"]["kld_mean"], rel=1e-6)
    assert costs["0.k.c4s"] > costs["0.k.c8"] > 0


def test_the_plan_is_the_best_map_within_the_budget(hard: tuple[Any, KVScales]) -> None:
    model, scales = hard
    plan = choose_plan(model, scales, tokens(2, 48, seed=5), tokens(3, 48, seed=6), Budget(bits=6.5))
    rows = {row["name"]: row for row in plan.table}
    assert {*UNIFORM, "auto", "c4, ends c8", "c4r, ends c8"} <= rows.keys()
    fitting = [row for row in plan.table if row["bits"] <= 6.5]
    assert plan.kld == min(row["kld"] for row in fitting) and plan.bits <= 6.5
    # Measured again on the same text, it is what it says.
    specs = parse_modes(plan.mode, 3)
    again = measure(model, {"x": specs}, scales, tokens(3, 48, seed=6))["x"]
    assert again["kld_mean"] == pytest.approx(plan.kld, rel=1e-6)
    assert plan.bits == pytest.approx(bits_of(specs, dict.fromkeys(range(3), (2, 16))))
    assert "within 6.5 bits" in plan.why and len(plan.layers) == 6
    for row in plan.layers:
        spec = specs[row["layer"]]
        assert row["format"] == str(spec.k if row["tensor"] == "k" else spec.v)


def test_a_plan_that_is_worse_gives_way_to_a_uniform_mode(
    hard: tuple[Any, KVScales], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Costs that lie: the knapsack then finds a bad map, and the held-out text shows it."""
    from foldkv.auto import api

    def lie(*args: Any, **kwargs: Any) -> Any:
        found = sensitivities(*args, **kwargs)
        return [
            (size, {choice: -choice.bits(16) * (choice.mode == "c4s") for choice in costs}) for size, costs in found
        ]

    monkeypatch.setattr(api, "sensitivities", lie)
    model, scales = hard
    plan = choose_plan(model, scales, tokens(2, 48, seed=5), tokens(3, 48, seed=6), Budget(bits=8.5))
    rows = {row["name"]: row for row in plan.table}
    assert rows["auto"]["kld"] > rows["c8"]["kld"] >= plan.kld
    assert "no map per layer was better" in plan.why


def test_a_kld_budget_is_kept_on_held_out_text(hard: tuple[Any, KVScales]) -> None:
    model, scales = hard
    held_out = tokens(3, 48, seed=6)
    loose = choose_plan(model, scales, tokens(2, 48, seed=5), held_out, Budget(kld=1e-2))
    tight = choose_plan(model, scales, tokens(2, 48, seed=5), held_out, Budget(kld=1e-4))
    assert loose.kld <= 1e-2 and tight.kld <= 1e-4 and loose.bits < tight.bits
    exact = choose_plan(model, scales, tokens(1, 48, seed=5), held_out, Budget(kld=1e-12))
    assert (exact.mode, exact.bits, exact.kld) == ("c16", 16, 0)


def test_the_plan_travels_with_the_scales(tmp_path: Path, hard: tuple[Any, KVScales]) -> None:
    model, _ = hard
    scales = calibrate_auto(
        model,
        tokens(14, 64),
        budget=Budget(bits=6.5),
        num_samples=8,
        max_seq_len=64,
        windows=2,
        held_out=3,
        window_len=64,
    )
    scales.save(tmp_path)
    back = KVScales.load(tmp_path, model.config)
    assert back.plan == scales.plan == back.config["mode"] and back.config["data"]["num_samples"] == 8
    with swap_kv_cache(model, "auto", back) as swap:
        assert swap.mode == parse_modes(back.plan, 3).name and swap.bits_per_element <= 6.5
        model.generate(tokens(1, 9), max_new_tokens=4, do_sample=False)
    report = accuracy_report(
        model, ["auto"], tokens(2, 48, seed=9), scales=back, num_windows=2, window_len=48, decode_windows=0
    )
    assert report.data["modes"]["auto"]["bits_per_element"] == pytest.approx(back.config["plan"]["bits"])
    with pytest.raises(ArgumentError, match="estimator of a plan: expected one that reads text, got 'bias'"):
        calibrate_auto(model, tokens(14, 64), estimator="bias")
    static = back[0].v.static
    assert static is not None and static.fmt == "int4.channel.asym"
    assert back.config["estimator"] == "percentile/attention_output"
    plain = calibrate(model, tokens(8, 64), num_samples=8, max_seq_len=64)
    with pytest.raises(ArgumentError, match="mode 'auto': expected scales with a plan"):
        swap_kv_cache(model, "auto", plain)


# --- on the command line ----------------------------------------------------------------------------------------------


def test_calibrate_mode_auto(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tiny_model("llama"), tmp_path / "model")
    words = torch.randint(30, 90, (40, 60), generator=torch.Generator().manual_seed(0)).tolist()
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": " ".join(f"w{idx}" for idx in row)}) for row in words))

    def run(*arguments: object) -> Any:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    basic = ("calibrate", checkpoint, "--data", text, "--num-samples", 20, "--max-seq-len", 64, "--mode", "auto")
    done = run(*basic, "--budget-bits", 7)
    assert done.exit_code == 0, done.output
    for word in ("KLD of each choice alone", "maps on held-out text", "within 7 bits", "c4r, ends c8", "int4"):
        assert word in done.stdout, word
    assert "drift from 16 samples to all: K ranges" in done.stderr
    shown = run("inspect", checkpoint)
    assert shown.exit_code == 0 and "maps on held-out text" in shown.stdout
    model, _ = load_model(checkpoint)
    scales = KVScales.load(checkpoint / "kv_cache", model.config)
    assert scales.config["plan"]["bits"] <= 7
    generated = run("generate", checkpoint, "--prompt", "w5 w6", "--kv", "auto", "--max-new-tokens", 3)
    assert generated.exit_code == 0, generated.output
    reported = run(
        "report", checkpoint, "--kv", "auto", "--data", text, "--windows", 1, "--window-len", 32, "--decode-windows", 0,
        "--out", tmp_path / "report",
    )  # fmt: skip
    assert "auto" in reported.stdout, reported.output

    done = run(*basic, "--memory", "6kB", "--tokens", 64, "--out", tmp_path / "kv", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["plan"]["bits"] <= 8 * 6000 / 64 / 128
    for options, message in (
        (("--budget-bits", 5, "--budget-kld", 0.1), "one of --budget-bits, --budget-kld and --memory"),
        (("--mode", "c8", "--budget-bits", 5), "--mode auto with it"),
        (("--stream",), "text and a mode"),
        (("--data", "nowhere.txt"), "a file, or hub:NAME"),
    ):
        done = run(*basic, "--out", tmp_path / "other", *options)
        assert done.exit_code == 2 and message in done.stderr, (options, done.output)
