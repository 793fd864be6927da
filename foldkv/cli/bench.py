"""`foldkv bench`: speed of attention over the cache, beside PyTorch and the memory's read rate."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from .common import UsageError, cli_errors, console, emit_json, output


@cli_errors()
def bench(
    kv: Annotated[str, typer.Option(help="Modes, with commas.")] = "c16,c8,c8d,k8v4,c4s,c4,c4r",
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    seq: Annotated[int, typer.Option(min=1, help="Cached tokens of each.")] = 4096,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(min=1, help="KV heads.")] = 8,
    head_dim: Annotated[int, typer.Option(min=16, help="Channels of a head.")] = 128,
    page_size: Annotated[int, typer.Option(help="Tokens of a page.")] = 64,
    q_len: Annotated[int, typer.Option(min=1, help="New tokens of each sequence.")] = 1,
    threads: Annotated[str, typer.Option(help="Thread counts, with commas; default 1 and all cores.")] = "",
    seconds: Annotated[float, typer.Option(min=0.0, help="Time spent on each row.")] = 1.5,
    device: Annotated[str, typer.Option(help="cpu.")] = "cpu",
    out: Annotated[Path | None, typer.Option(help="Write the result here, as JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Result as JSON on stdout.")] = False,
) -> None:
    """Time decode attention for each mode: microseconds, GB/s, share of the read ceiling, x C16, x the best peer."""
    if device != "cpu":
        raise UsageError(f"--device: expected cpu (CUDA kernels are not in this version), got {device}")
    counts = [int(n) for n in threads.split(",")] if threads else sorted({1, len(os.sched_getaffinity(0))})
    from foldkv.bench.cases import Shape
    from foldkv.bench.run import Row, bench_cpu, record

    shape = Shape(batch, seq, heads, kv_heads, head_dim, page_size, q_len)
    rows: list[Row] = []
    ceilings: dict[int, float] = {}
    pending = iter(counts)
    for result in bench_cpu([name.strip() for name in kv.split(",")], shape, counts, seconds):
        if isinstance(result, Row):
            rows.append(result)
            if not as_json:
                output.print(_line(result), markup=False, highlight=False)
        else:
            count = next(pending)
            ceilings[count] = result
            if not as_json:
                output.print(f"{shape}; {count} threads, read ceiling {result:.1f} GB/s", highlight=False)
                output.print(f"{'mode':26}{'us':>10}{'GB/s':>8}{'share':>7}{'x c16':>7}{'x peer':>8}", highlight=False)
    command = (
        f"foldkv bench --kv {kv} --batch {batch} --seq {seq} --heads {heads} --kv-heads {kv_heads} "
        f"--head-dim {head_dim} --page-size {page_size} --q-len {q_len} --threads {','.join(map(str, counts))}"
    )
    kept = record(rows, ceilings, shape, command)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        console.print(f"wrote {out}", highlight=False)
    if as_json:
        emit_json(kept)


def _line(row: object) -> str:
    ratio = {key: "" if getattr(row, key) is None else f"{getattr(row, key):.2f}" for key in ("x_c16", "x_peer")}
    return (
        f"{row.name:26}{row.us:10.0f}{row.gb_per_s:8.2f}{row.share:7.2f}"  # type: ignore[attr-defined]
        f"{ratio['x_c16']:>7}{ratio['x_peer']:>8}"
    )
