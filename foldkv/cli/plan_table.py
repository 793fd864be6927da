"""What `calibrate` and `inspect` print of a plan per layer and of drift."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from .common import output


def show_plan(plan: Mapping[str, Any]) -> None:
    """The map with what each layer costs, the maps it was compared with, and why it was chosen, on stdout."""
    output.print(_layer_table(plan["layers"]))
    if screened := " ".join(_screen_lines(plan["layers"])):
        output.print(screened, highlight=False, markup=False, soft_wrap=True)
    output.print(_map_table(plan["table"], plan["mode"]))
    output.print(f"{plan['mode']}: {plan['why']}", highlight=False, markup=False, soft_wrap=True)


def _layer_table(rows: list[Mapping[str, Any]]) -> Table:
    """One line a tensor: its format, and the KLD of every choice measured alone."""
    modes = list(dict.fromkeys(mode for row in rows for mode in row["cost"]))
    table = Table(box=None, header_style="bold", pad_edge=False, title="KLD of each choice alone", title_justify="left")
    for title in ("layer", "tensor", "plan", *modes):
        table.add_column(title, justify="left" if title == "plan" else "right")
    for row in rows:
        costs = [f"{row['cost'][mode]:.1e}" if mode in row["cost"] else "" for mode in modes]
        table.add_row(str(row["layer"]), row["tensor"].upper(), row["format"], *costs)
    return table


def _screen_lines(rows: list[Mapping[str, Any]]) -> Iterator[str]:
    """Where mean, balance and rotation together leave the least error of dynamic 4-bit formats, and the best other."""
    screened = [(f"{row['layer']}.{row['tensor'].upper()}", row["screened"]) for row in rows if row.get("screened")]
    if screened:
        full = next(iter(screened[0][1]))
        others = [(found[name], place, name) for place, found in screened for name in found if name != full]
        ratio, place, name = min(others)
        least = sum(min(found, key=lambda word: found[word]) == full for _, found in screened)
        yield f"4 bits with {full} leave the least error in {least} of {len(screened)} tensors; of others the best is {name}"
        yield f"of {place}, {ratio:.2f} times that error"


def _map_table(rows: list[Mapping[str, Any]], chosen: str) -> Table:
    """One line a map, on the held-out text; the chosen one is marked."""
    table = Table(box=None, header_style="bold", pad_edge=False, title="maps on held-out text", title_justify="left")
    for title in ("", "map", "bits", "KLD", "+-", "99 %", "same top-1", "PPL"):
        table.add_column(title, justify="left" if title in ("", "map") else "right")
    for row in rows:
        figures = ("-",) * 5
        if row["kld"] is not None:
            error = "-" if row["kld_se"] is None else f"{row['kld_se']:.0e}"
            change = "-" if row["ppl"] is None else f"{row['ppl']:+.2%}"
            figures = (f"{row['kld']:.2e}", error, f"{row['kld_p99']:.1e}", f"{row['top1']:.2%}", change)
        table.add_row("*" if row["mode"] == chosen else "", row["name"], f"{row['bits']:.3f}", *figures)
    return table


def drift_lines(drift: Mapping[str, Any]) -> Iterator[str]:
    """A line each for K and V: the first samples against all of them, this corpus against the other."""
    heads = {
        "samples": lambda entry: f"drift from {entry['first']} samples to all",
        "corpora": lambda entry: f"drift from this corpus to {entry['source']}",
    }
    for name, head in heads.items():
        for tensor in ("k", "v"):
            if name in drift:
                from calib.drift import Drift

                yield f"{head(drift[name])}: {Drift(**drift[name][tensor])}"
