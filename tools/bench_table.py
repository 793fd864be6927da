"""Markdown tables of a result that `foldkv bench --device cuda --out FILE` wrote.

Usage: python tools/bench_table.py FILE.json [SUITE ...]        default: every suite in the file
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from foldkv.bench import targets

Row = dict[str, Any]


def header(result: dict[str, Any]) -> str:
    """What was measured where, in one line."""
    rates, versions = result["rates_gb_per_s"], result["versions"]
    return (
        f"{result['device']}, torch {versions['torch']}, commit {result['commit']}, {result['date'][:10]}; "
        f"read ceiling {rates['read']:.0f} GB/s, copy rate {rates['copy']:.0f} GB/s. `{result['command']}`"
    )


def tables(result: dict[str, Any], suites: list[str] | None = None) -> str:
    """Header and one table for each suite and op, shapes down, kernels across; the fastest peers first."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in result["rows"]:
        if not suites or row["suite"] in suites:
            groups.setdefault((row["suite"], row["op"]), []).append(row)
    parts = [header(result)]
    for (suite, op), rows in groups.items():
        parts.append(f"### {suite}: {op}\n\n{_table(rows, suite)}")
    return "\n\n".join(parts) + "\n"


def _table(rows: list[Row], suite: str) -> str:
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    names = list(dict.fromkeys(row["name"] for row in rows))
    cells = {(row["shape"], row["name"]): _cell(row) for row in rows}
    extra = _target_columns if suite == "decode" else None
    heads = ["batch x kv length" if suite == "decode" else "shape", *names]
    if extra:
        heads += ["best peers 16 / 8 / 4, H200", "goals 16 / 8 / 4, H200"]
    lines = [heads, ["---"] * len(heads)]
    for shape in shapes:
        lines.append([shape, *(cells.get((shape, name), "") for name in names), *(extra(shape) if extra else ())])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(row: Row) -> str:
    """Microseconds with the share of the ceiling, or with TFLOP/s."""
    us = f"{row['us']:.1f}" if row["us"] < 100 else f"{row['us']:.0f}"
    if row["tflops"] is not None:
        return f"{us} ({row['tflops']:.0f} T)"
    return us if row["share"] is None else f"{us} ({row['share']:.2f})"


def _target_columns(shape: str) -> tuple[str, str]:
    found = next((row for row in (*targets.DECODE, *targets.MIXES) if row.name == shape), None)
    if found is None:
        return "", ""
    peers, goals = (
        " / ".join(f"{us[width]:g}" for width in targets.CLASSES if width in us)
        for us in (found.peer_us, found.goal_us)
    )
    return peers, goals


def main() -> int:
    parser = argparse.ArgumentParser(description="Markdown tables of a result of `foldkv bench --device cuda`.")
    parser.add_argument("file", type=Path)
    parser.add_argument("suite", nargs="*")
    options = parser.parse_args()
    result = json.loads(options.file.read_text(encoding="utf-8"))
    if result.get("kind") != "cuda":
        print(f"{options.file}: expected a result of `foldkv bench --device cuda`, got another", file=sys.stderr)
        return 2
    sys.stdout.write(tables(result, options.suite))
    return 0


if __name__ == "__main__":
    sys.exit(main())
