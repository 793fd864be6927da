"""Rows of docs/accuracy.md for one checkpoint: modes, plans at several budgets, and controls that must fail on hard models.

    python examples/accuracy_table.py MODEL --scales KV --data TEXT [--windows 8] [--window-len 1024] [--budgets 4.5,5]

Scales: of `foldkv calibrate MODEL --mode auto`, whose measured costs serve the other budgets. Prints one Markdown row a
mode: bits, mean KLD to the 16-bit cache with its standard error, 99th percentile, top-1 agreement, perplexity change.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from foldkv.accuracy import accuracy_report
from foldkv.auto.candidates import Choice, TensorSize, mode_text
from foldkv.auto.search import Budget, frontier, within, without_chance
from foldkv.hf import load_model
from quant.scales import KVScales
from quant.spec import MODES, Format, KVSpec, parse_modes

MODE_NAMES = ("c8", "c8d", "k8v4", "c4r", "c4", "c4s")


def controls() -> dict[str, KVSpec]:
    """What must fail on hard checkpoints: each lacks one of the things that make a format hold."""
    rotated, exact = MODES["c4r"].k, Format("fp16")
    int8, int4 = Format("int8", "token"), Format("int4", "token", symmetric=False)
    return {
        "int8 per head, static (c8h)": MODES["c8h"],
        "int8 per token, no mean": KVSpec(int8, int8),
        "int4 per token, no mean": KVSpec(int4, int4),
        "K int4 rotated, no mean": KVSpec(replace(rotated, center=False), exact),
        "K int4 rotated, no balance": KVSpec(replace(rotated, balance=False), exact),
    }


def plan_text(scales: KVScales, bits: float) -> str:
    """The knapsack's map at another budget, from the costs that the calibration measured."""
    rows = scales.config["plan"]["layers"]
    options = []
    for row in rows:
        stats = getattr(scales[row["layer"]], row["tensor"])
        size = TensorSize(row["layer"], row["tensor"], stats.h_kv * stats.head_dim, stats.head_dim)
        options.append((size, {Choice(size.layer, size.tensor, mode): cost for mode, cost in row["cost"].items()}))
    return mode_text(within(frontier(without_chance(options)), Budget(bits=bits)).modes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--scales", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window-len", type=int, default=1024)
    parser.add_argument("--budgets", default="4.5,5")
    parser.add_argument("--only", choices=("modes", "plans", "controls"), help="one part of the table")
    arguments = parser.parse_args()
    model, tokenizer = load_model(arguments.model, "float32")
    scales = KVScales.load(arguments.scales, model.config)
    count = len(scales.layers)
    wanted = [arguments.only] if arguments.only else ["modes", "plans", "controls"]
    modes: dict[str, str | KVSpec] = {}
    if "modes" in wanted:
        modes |= {name: name for name in MODE_NAMES}
    if "plans" in wanted:
        modes |= {f"plan, {bits} bits": plan_text(scales, float(bits)) for bits in arguments.budgets.split(",")}
    if "controls" in wanted:
        modes |= {name: replace(spec, name=name) for name, spec in controls().items()}
    named = {name: parse_modes(mode, count) for name, mode in modes.items()}
    different = list({specs.name: specs for specs in named.values()}.values())  # a plan may be a uniform mode
    report = accuracy_report(
        model, different, arguments.data, tokenizer=tokenizer, scales=scales,
        num_windows=arguments.windows, window_len=arguments.window_len, decode_windows=0,
    )  # fmt: skip
    print("| | bits | mean KLD | 99 % | top-1 | perplexity | map |\n|---|---|---|---|---|---|---|")
    for name, specs in {**named, "control (c4x)": parse_modes("c4x", count)}.items():
        entry = report.data["modes"][specs.name]
        way = entry["prefill"]
        error = way["kld_se"] or float("nan")  # one window has none
        shown = f"`{specs.name}`" if name.startswith("plan") else ""
        print(
            f"| {name} | {entry['bits_per_element']:.3f} | {way['kld_mean']:.2e} +- {error:.0e} | {way['kld_p99']:.1e} "
            f"| {way['top1_agreement']:.2%} | {way['ppl_change']:+.2%} | {shown} |"
        )


if __name__ == "__main__":
    main()
