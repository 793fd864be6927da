"""`foldkv bench`: speed of attention over the cache, beside other kernels and the memory's read rate."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quant.errors import FoldkvError

from .common import UsageError, cli_errors, console, emit_json, output

if TYPE_CHECKING:
    from foldkv.bench.cases import Shape
    from foldkv.bench.cuda_run import CudaRow
    from foldkv.bench.cuda_suites import Item
    from foldkv.bench.run import Row

SECONDS = {"cpu": 1.5, "cuda": 0.25}


@cli_errors()
def bench(
    kv: Annotated[str, typer.Option(help="Modes, with commas.")] = "c16,c8,c8d,k8v4,c4s,c4,c4r",
    suite: Annotated[
        str,
        typer.Option(help="On a GPU: all, or some of decode, capacity, groups, spec, prefill, append, pages, dims."),
    ] = "",
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    seq: Annotated[int, typer.Option(min=1, help="Cached tokens of each.")] = 4096,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 32,
    kv_heads: Annotated[int, typer.Option(min=1, help="KV heads.")] = 8,
    head_dim: Annotated[int, typer.Option(min=16, help="Channels of a head.")] = 128,
    page_size: Annotated[int, typer.Option(help="Tokens of a page.")] = 64,
    q_len: Annotated[int, typer.Option(min=1, help="New tokens of each sequence.")] = 1,
    threads: Annotated[str, typer.Option(help="On a CPU: thread counts, with commas; default 1 and all cores.")] = "",
    dtype: Annotated[str, typer.Option(help="On a GPU: queries and the c16 cache, fp16 or bf16.")] = "fp16",
    seconds: Annotated[
        float | None, typer.Option(min=0.0, help="Time spent on each row; default 1.5, on a GPU 0.25.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto (a GPU where there is one), cpu or cuda.")] = "auto",
    model: Annotated[
        str, typer.Option(help="Time a whole model: a checkpoint, a config.json, llama3-8b-shape, llama3-1b-shape.")
    ] = "",
    cases: Annotated[str, typer.Option(help="With --model: batches x cached tokens.")] = "1x32k,16x8k,64x8k,256x1k",
    peers: Annotated[str, typer.Option(help="With --model: also on static, quanto4, hqq8, hqq4; none.")] = "none",
    steps: Annotated[int, typer.Option(min=16, help="With --model: decoding steps of each row.")] = 64,
    compiled: Annotated[bool, typer.Option("--compile", help="With --model: decode through torch.compile.")] = False,
    ttft: Annotated[bool, typer.Option(help="With --model: time a prefill of each case too.")] = True,
    out: Annotated[Path | None, typer.Option(help="Write the result here, as JSON; on a GPU after every row.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Result as JSON on stdout.")] = False,
) -> None:
    """Time attention for each mode: microseconds, GB/s, share of the read ceiling, x C16, x the best peer.

    One shape (--batch, --seq, ...), or on a GPU the sets of shapes that --suite names. With --model a whole model on the
    engine: tokens/s, time to first token, time between tokens, memory.
    """
    place = _device(device)
    if suite and place == "cpu":
        raise UsageError("--suite: expected a GPU, got --device cpu; give a shape with --batch and --seq")
    modes = [name.strip() for name in kv.split(",")]
    if model:
        from .bench_model import bench_model

        bench_model(
            model,
            modes,
            cases,
            peers,
            dtype,
            place,
            steps=steps,
            compiled=compiled,
            ttft=ttft,
            out=out,
            as_json=as_json,
        )
        return
    from foldkv.bench.cases import Shape

    shape = Shape(batch, seq, heads, kv_heads, head_dim, page_size, q_len)
    budget = SECONDS[place] if seconds is None else seconds
    sizes = (
        f"--batch {batch} --seq {seq} --heads {heads} --kv-heads {kv_heads} "
        f"--head-dim {head_dim} --page-size {page_size} --q-len {q_len}"
    )
    if place == "cuda":
        command = f"foldkv bench --device cuda --kv {kv} {f'--suite {suite}' if suite else sizes} --dtype {dtype}"
        _bench_cuda(modes, _items(suite, shape), dtype, budget, f"{command} --seconds {budget:g}", out, as_json)
        return
    counts = [int(n) for n in threads.split(",")] if threads else sorted({1, len(os.sched_getaffinity(0))})
    command = f"foldkv bench --device cpu --kv {kv} {sizes} --threads {','.join(map(str, counts))}"
    _bench_cpu(modes, shape, counts, budget, command, out, as_json)


def _device(name: str) -> str:
    if name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device: expected auto, cpu or cuda, got {name}")
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        why = "finds no GPU or no driver" if torch.version.cuda else "is built without CUDA"
        raise UsageError(f"--device cuda: expected a GPU, got none: PyTorch {torch.__version__} {why}")
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _items(suite: str, shape: Shape) -> list[Item]:
    from foldkv.bench.cuda_cases import Workload
    from foldkv.bench.cuda_suites import SUITES, shape_items, suite_items

    if not suite:
        sizes = (shape.q_len, shape.h_q, shape.h_kv, shape.head_dim, shape.page_size)
        return shape_items(Workload(str(shape), (shape.seq_len,) * shape.batch, *sizes))
    names = [name.strip() for name in suite.split(",")]
    unknown = [name for name in names if name not in (*SUITES, "all")]
    if unknown:
        raise UsageError(f"--suite: expected all, or some of {', '.join(SUITES)}, got {', '.join(unknown)}")
    return suite_items(names)


def _bench_cuda(
    modes: list[str], items: list[Item], dtype: str, seconds: float, command: str, out: Path | None, as_json: bool
) -> None:
    import torch

    from foldkv.bench.cuda_run import CudaBench, CudaRow, Note, Rates, Recorder

    recorder = Recorder(command, torch.cuda.get_device_name(), out)
    last: tuple[str, str] = ("", "")
    for result in CudaBench(modes, dtype, seconds).results(items):
        recorder.add(result)
        if isinstance(result, Note):
            console.print(f"note: {result.text}", markup=False, highlight=False, soft_wrap=True)
        elif as_json:
            continue
        elif isinstance(result, Rates):
            line = f"{recorder.data['device']}: reads {result.read:.0f} GB/s, copies {result.copy:.0f} GB/s"
            _print(f"{line}; goals are those of an H200")
        elif isinstance(result, CudaRow):
            if (result.suite, result.op) != last:
                last = (result.suite, result.op)
                _print(_cuda_header(result))
            _print(_cuda_line(result))
    if out is not None:
        console.print(f"wrote {out}", highlight=False)
    if as_json:
        emit_json(recorder.data)
    if not recorder.data["rows"]:
        raise FoldkvError("bench: expected at least one row, got none; the notes say why")


def _cuda_header(row: CudaRow) -> str:
    rate = "TFLOP/s" if row.tflops is not None else "GB/s"
    head = f"{'mode':22}{'shape':28}{'us':>10}{rate:>9}{'share':>7}{'x c16':>7}{'x peer':>8}{'goal us':>9}{'share':>7}"
    return f"\n{row.suite}: {row.op}\n{head}"


def _cuda_line(row: CudaRow) -> str:
    rate = row.gb_per_s if row.tflops is None else row.tflops
    return (
        f"{row.name:22}{row.shape:28}{row.us:10.2f}{_number(rate, 9, 0)}{_number(row.share, 7)}{_number(row.x_c16, 7)}"
        f"{_number(row.x_peer, 8)}{_number(row.goal_us, 9, 1)}{_number(row.goal_share, 7)}"
    ).rstrip()


def _number(value: float | None, width: int, digits: int = 2) -> str:
    return " " * width if value is None else f"{value:{width}.{digits}f}"


def _print(line: str) -> None:
    output.print(line, markup=False, highlight=False, soft_wrap=True)


def _bench_cpu(
    modes: list[str], shape: Shape, counts: list[int], seconds: float, command: str, out: Path | None, as_json: bool
) -> None:
    from foldkv.bench.run import Row, bench_cpu, record

    rows: list[Row] = []
    ceilings: dict[int, float] = {}
    pending = iter(counts)
    for result in bench_cpu(modes, shape, counts, seconds):
        if isinstance(result, Row):
            rows.append(result)
            if not as_json:
                _print(_cpu_line(result))
        else:
            count = next(pending)
            ceilings[count] = result
            if not as_json:
                _print(f"{shape}; {count} threads, read ceiling {result:.1f} GB/s")
                _print(f"{'mode':26}{'us':>10}{'GB/s':>8}{'share':>7}{'x c16':>7}{'x peer':>8}")
    kept = record(rows, ceilings, shape, command)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        console.print(f"wrote {out}", highlight=False)
    if as_json:
        emit_json(kept)


def _cpu_line(row: Row) -> str:
    ratios = f"{_number(row.x_c16, 7)}{_number(row.x_peer, 8)}"
    return f"{row.name:26}{row.us:10.0f}{row.gb_per_s:8.2f}{row.share:7.2f}{ratios}"
