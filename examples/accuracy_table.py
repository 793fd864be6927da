"""The table of docs/accuracy.md: modes, plans at several budgets, and controls that must fail on hard models.

    python examples/accuracy_table.py MODEL --scales KV --data TEXT [--c4-scales KV4] [--windows 8] [--device cuda] [--json F]
    python examples/accuracy_table.py --join FILE... [--device cuda] [--json RECORD]

Scales: of `foldkv calibrate MODEL --mode auto`, whose measured costs serve the other budgets; c4-scales: of `--mode c4`, for
the row `c4`, whose static ranges are then chosen for it. Prints one Markdown row a mode: bits, mean KLD to the 16-bit cache
with its standard error over windows, 99th percentile, top-1 agreement, perplexity change. `--join` makes one table of the
files of several checkpoints, or of a record, which `--json` then writes, with what produced it. `accuracy_table.sh` does all
of it for one trained checkpoint and three made hard.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from foldkv.accuracy import accuracy_report
from foldkv.accuracy.stamp import machine, software
from foldkv.auto.candidates import Choice, TensorSize, mode_text
from foldkv.auto.search import Budget, frontier, within, without_chance
from foldkv.hf import load_model
from quant.scales import KVScales, LayerStats
from quant.spec import MODES, Format, KVSpec, LayerSpecs, parse_modes

MODE_NAMES = ("c8d", "c8", "k8v4", "c4r", "c4", "c4s", "c8h")
CONTROL = "c4x"


def controls() -> dict[str, KVSpec]:
    """What must fail on hard checkpoints: each lacks one of the things that make a format hold, and rounds plainly."""
    rotated, exact = MODES["c4r"].k, Format("fp16")
    int8, int4 = Format("int8", "token"), Format("int4", "token", symmetric=False)
    return {
        "int8 per head, static (c8h)": MODES["c8h"],
        "int8 per token, no mean": KVSpec(int8, int8),
        "int4 per token, no mean": KVSpec(int4, int4),
        "K int4 rotated, no mean": KVSpec(replace(rotated, center=False), exact),
        "K int4 rotated, no balance": KVSpec(replace(rotated, balance=False), exact),
    }


def plainly_rounded(scales: KVScales) -> KVScales:
    """The same scales without what codes are chosen together by, which makes up for some of what controls lack."""
    layers = [
        None if layer is None else LayerStats(*(replace(one, gram=None) for one in (layer.k, layer.v)))
        for layer in scales.layers
    ]
    return KVScales(layers, scales.config)


def plan_text(scales: KVScales, bits: float) -> str:
    """The knapsack's map at another budget, from the costs that the calibration measured."""
    rows = scales.config["plan"]["layers"]
    options = []
    for row in rows:
        stats = getattr(scales[row["layer"]], row["tensor"])
        size = TensorSize(row["layer"], row["tensor"], stats.h_kv * stats.head_dim, stats.head_dim)
        options.append((size, {Choice(size.layer, size.tensor, mode): cost for mode, cost in row["cost"].items()}))
    return mode_text(within(frontier(without_chance(options)), Budget(bits=bits)).modes)


def measured(
    model: Any, tokenizer: Any, named: Mapping[str, LayerSpecs], scales: KVScales, **options: Any
) -> dict[str, Any]:
    """What the table says of each mode, and of the control: `entry_of`."""
    different = list({specs.name: specs for specs in named.values()}.values())  # a plan may be a uniform mode
    report = accuracy_report(
        model, different, tokenizer=tokenizer, scales=scales, level="quick", decode_windows=0, new_tokens=0, **options
    )
    names = {name: specs.name for name, specs in named.items()} | {CONTROL: CONTROL}
    return {name: entry_of(report.data["modes"][mode], mode) for name, mode in names.items()}


def entry_of(mode: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Bits, map and figures of one mode: top-1 and perplexity change in per cent."""
    way = mode["prefill"]
    return {
        "bits": mode["bits_per_element"], "map": name, "windows": way["windows"],
        "kld": way["kld_mean"], "kld_se": way["kld_se"], "p99": way["kld_p99"],
        "top1": 100 * way["top1_agreement"], "top1_se": 100 * (way["top1_se"] or 0.0),
        "ppl": 100 * way["ppl_change"],
        "ppl_se": 100 * (1 + way["ppl_change"]) * (way["ln_ppl_ratio_se"] or 0.0),
    }  # fmt: skip


def cell(entry: Mapping[str, Any]) -> str:
    """KLD, its 99 % percentile, top-1 and perplexity change, with standard errors over windows."""
    error = float("nan") if entry["kld_se"] is None else entry["kld_se"]  # one window has none
    return (
        f"{entry['kld']:.2e} +- {error:.0e} / {entry['p99']:.1e} / {entry['top1']:.2f} +- {entry['top1_se']:.2f} / "
        f"{entry['ppl']:+.2f} +- {entry['ppl_se']:.2f}"
    )


def read(files: list[Path]) -> dict[str, Any]:
    """Checkpoint -> figures by mode: of files of one checkpoint each, named for it, or of a record of all."""
    tables: dict[str, Any] = {}
    for file in files:
        data = json.loads(file.read_text(encoding="utf-8"))
        tables |= data.get("checkpoints", {file.stem: data})
    return tables


def joined(tables: Mapping[str, Any]) -> str:
    """One Markdown table of modes x checkpoints, and the maps of plans below."""
    names = list(dict.fromkeys(name for table in tables.values() for name in table))
    lines = [f"| mode | bits | {' | '.join(tables)} |", "|---|---|" + "---|" * len(tables)]
    for name in names:
        entries = [table.get(name) for table in tables.values()]
        bits = sorted({f"{entry['bits']:.3f}".rstrip("0").rstrip(".") for entry in entries if entry})
        cells = ("" if entry is None else cell(entry) for entry in entries)
        lines.append(f"| {name} | {', '.join(bits)} | {' | '.join(cells)} |")
    for name in names:
        if name.startswith("plan"):
            lines += [f"{name}, {one}: `{table[name]['map']}`" for one, table in tables.items() if name in table]
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--scales", type=Path)
    parser.add_argument("--c4-scales", type=Path, help="scales of a calibration for c4")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window-len", type=int, default=1024)
    parser.add_argument("--budgets", default="5,4.5")
    parser.add_argument(
        "--only", choices=("modes", "plans", "tables", "controls"), help="one part; tables: modes and plans"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the figures there, for --join; with --join, the record of all")
    parser.add_argument("--join", type=Path, nargs="+", help="print one table of these files")
    arguments = parser.parse_args()
    if not arguments.join and None in (arguments.model, arguments.scales, arguments.data):
        parser.error("expected MODEL, --scales and --data, or --join")
    return arguments


def _command() -> str:
    """What this run was asked for, without where its files lie."""
    return " ".join(["examples/accuracy_table.py", *(Path(word).name for word in sys.argv[1:])])


def main() -> None:
    arguments = parse()
    if arguments.join:
        tables = read(arguments.join)
        if arguments.json is not None:
            head = {**machine(torch.device(arguments.device)), **software(), "command": _command()}
            record = head | {"checkpoints": tables}
            arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(joined(tables))
        return
    model, tokenizer = load_model(arguments.model, "float32", arguments.device)
    scales = KVScales.load(arguments.scales, model.config)
    count = len(scales.layers)
    parts = {None: ["modes", "plans", "controls"], "tables": ["modes", "plans"]}
    wanted = parts.get(arguments.only, [arguments.only])
    modes: dict[str, str | KVSpec] = {}
    if "modes" in wanted:
        modes |= {name: name for name in MODE_NAMES}
    if "plans" in wanted:
        modes |= {f"plan, {bits} bits": plan_text(scales, float(bits)) for bits in arguments.budgets.split(",")}
    options = {"data": arguments.data, "num_windows": arguments.windows, "window_len": arguments.window_len}
    found: dict[str, Any] = {}
    if modes:
        named = {name: parse_modes(mode, count) for name, mode in modes.items()}
        found |= measured(model, tokenizer, named, scales, **options)
    if "controls" in wanted:
        named = {name: parse_modes(replace(spec, name=name), count) for name, spec in controls().items()}
        found |= measured(model, tokenizer, named, plainly_rounded(scales), **options)
    if arguments.c4_scales is not None:
        fitted = KVScales.load(arguments.c4_scales, model.config)
        c4 = measured(model, tokenizer, {"c4": parse_modes("c4", count)}, fitted, **options)["c4"]
        before = {"c4": {"c4": c4, "c4, ranges by minmax": found.get("c4")}}
        found = {key: one for name, entry in found.items() for key, one in before.get(name, {name: entry}).items()}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("| | bits | KLD / 99 % / top-1, % / perplexity, % | map |\n|---|---|---|---|")
    for name, entry in found.items():
        shown = f"`{entry['map']}`" if name.startswith("plan") else ""
        print(f"| {name} | {entry['bits']:.3f} | {cell(entry)} | {shown} |")


if __name__ == "__main__":
    main()
