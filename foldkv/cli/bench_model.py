"""`foldkv bench --model`: a whole model on the engine, mode beside mode."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from quant.errors import FoldkvError

from .common import UsageError, console, emit_json, output

if TYPE_CHECKING:
    from foldkv.bench.model_run import ModelRow

HEAD = (
    f"{'cache':10}{'case':>13}{'bits':>7}{'tokens/s':>10}{'x c16':>7}{'ITL ms':>9}{'p99':>8}{'TTFT ms':>10}"
    f"{'pool GB':>9}{'planned':>9}{'peak':>8}{'card holds':>12}"
)


def bench_model(
    name: str, modes: list[str], cases: str, peers: str, dtype: str, device: str, *, steps: int, compiled: bool,
    ttft: bool, out: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Run the end-to-end benchmark, print a line a row as it comes, and write JSON after every row."""
    import torch

    from foldkv.bench.cuda_run import Note, Recorder
    from foldkv.bench.model_cases import DTYPES, parse_cases
    from foldkv.bench.model_peers import PEERS
    from foldkv.bench.model_run import ModelBench

    wanted = parse_cases(cases)
    others = [] if peers == "none" else [peer.strip() for peer in peers.split(",")]
    unknown = [peer for peer in others if peer not in PEERS]
    if unknown:
        raise UsageError(f"--peers: expected none, or some of {', '.join(PEERS)}, got {', '.join(unknown)}")
    if dtype not in DTYPES:
        raise UsageError(f"--dtype: expected {', '.join(DTYPES)}, got {dtype}")
    command = (
        f"foldkv bench --model {name} --kv {','.join(modes)} --cases {cases} --peers {peers} --dtype {dtype} "
        f"--steps {steps}{' --compile' if compiled else ''}{'' if ttft else ' --no-ttft'} --device {device}"
    )
    place = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    recorder = Recorder(command, place, out, kind="model")
    bench = ModelBench(name, modes, dtype, device, steps=steps, ttft=ttft, peers=others, compiled=compiled)
    if not as_json:
        _print(f"{name}, {dtype}, {place}")
        _print(HEAD)
    for result in bench.results(wanted):
        recorder.add(result)
        if isinstance(result, Note):
            console.print(f"note: {result.text}", highlight=False, markup=False, soft_wrap=True)
        elif not as_json:
            _print(_line(result))
    if out is not None:
        console.print(f"wrote {out}", highlight=False)
    if as_json:
        emit_json(recorder.data)
    if not any(row["tokens_per_s"] for row in recorder.data["rows"]):
        raise FoldkvError("bench: expected at least one batch that runs, got none; the rows and notes say why")


def _line(row: ModelRow) -> str:
    def number(value: float | None, width: int, digits: int = 2) -> str:
        return " " * width if value is None else f"{value:{width}.{digits}f}"

    head = f"{row.name:10}{row.case:>13}{row.bits:7.3g}"
    if row.note:
        return f"{head}  {row.note}"
    return (
        f"{head}{number(row.tokens_per_s, 10, 1)}{number(row.x_c16, 7)}{number(row.itl_ms, 9)}"
        f"{number(row.itl_p99_ms, 8)}{number(row.ttft_ms, 10, 1)}{number(row.pool_gb, 9)}{number(row.planned_gb, 9)}"
        f"{number(row.peak_gb, 8)}{number(row.capacity_tokens, 12, 0)}"
        f"{'' if row.graph in ('', 'CUDA graph') else '  ' + row.graph}"
    ).rstrip()


def _print(line: str) -> None:
    output.print(line, markup=False, highlight=False, soft_wrap=True)
