"""Timing: medians over rotating caches, beside the read ceiling measured in the same run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from foldkv.doctor import cpu_name
from quant.errors import ArgumentError, describe
from quant.spec import MODES, resolve_mode

from .cases import CacheCase, SdpaCase, Shape
from .result import stamp

# Caches together are at least this large: several times any last-level cache that a benchmark of one sequence meets.
ROTATION_BYTES = 192 << 20
PEERS = {
    "torch SDPA fp32": (torch.float32, False),
    "torch SDPA bf16": (torch.bfloat16, False),
    "torch SDPA fp32, folded": (torch.float32, True),
    "torch SDPA bf16, folded": (torch.bfloat16, True),
}


@dataclass(frozen=True)
class Row:
    """One line of the table. GB/s counts the bytes of K and V that a step must read; share is of the read ceiling."""

    name: str
    shape: str
    threads: int
    us: float
    gb_per_s: float
    share: float
    x_c16: float | None
    x_peer: float | None
    runs: int


def _median_us(run: Callable[[int], None], seconds: float, warm_up: int = 3) -> tuple[float, int]:
    for i in range(warm_up):
        run(i)
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < stop:
        begun = time.perf_counter()
        run(len(times) + warm_up)
        times.append(time.perf_counter() - begun)
    return statistics.median(times) * 1e6, len(times)


def read_ceiling(seconds: float = 1.0) -> float:
    """GB/s at which this machine's current threads read memory: the best of two reductions over 512 MiB."""
    data = torch.ones(128 << 20, dtype=torch.int32)
    best = 0.0
    for tensor, reduce in ((data, torch.amax), (data.view(torch.float32), torch.sum)):
        us, _ = _median_us(lambda _, t=tensor, f=reduce: f(t), seconds / 2)  # type: ignore[misc]
        best = max(best, tensor.nbytes / us / 1e3)
    return best


def _copies(step_bytes: float) -> int:
    return max(2, -(-ROTATION_BYTES // int(step_bytes)))


def bench_cpu(
    modes: Iterable[str], shape: Shape, threads: Iterable[int], seconds: float = 1.5
) -> Iterator[Row | float]:
    """Time every mode and peer for each thread count; first of each count comes the read ceiling, a plain float, GB/s."""
    names = list(modes)
    for name in names:
        if name not in MODES:
            raise ArgumentError(describe("mode", f"one of {', '.join(MODES)}", repr(name)))
    before = torch.get_num_threads()
    try:
        for count in threads:
            torch.set_num_threads(count)
            yield from _bench_threads(names, shape, count, seconds)
    finally:
        torch.set_num_threads(before)


def _bench_threads(names: list[str], shape: Shape, count: int, seconds: float) -> Iterator[Row | float]:
    ceiling = read_ceiling()
    yield ceiling
    peers: dict[str, float] = {}

    def row(name: str, case: CacheCase | SdpaCase, bits: float, c16: float | None, peer: float | None) -> Row:
        us, runs = _median_us(case.run, seconds)
        rate = shape.kv_bytes(bits) / us / 1e3
        return Row(name, str(shape), count, us, rate, rate / ceiling, c16 and c16 / us, peer and peer / us, runs)

    if shape.q_len == 1:
        for name, (dtype, folded) in PEERS.items():
            bits = 8.0 * dtype.itemsize
            result = row(name, SdpaCase(dtype, shape, _copies(shape.kv_bytes(bits)), folded), bits, None, None)
            peers[name] = result.us
            yield result
    best_peer = min(peers.values()) if peers else None
    c16 = None
    for name in names:
        spec = resolve_mode(name)
        bits = spec.bits_per_element(shape.head_dim)
        case = CacheCase(spec, shape, _copies(shape.kv_bytes(bits)), num_workers=-(-4 * count // shape.h_kv))
        result = row(name, case, bits, c16, best_peer)
        c16 = result.us if name == "c16" else c16
        yield result


def record(rows: list[Row], ceilings: dict[int, float], shape: Shape, command: str) -> dict[str, Any]:
    """A result as it is kept: rows, read ceilings by thread count, and what produced them."""
    return stamp(cpu_name(), command) | {
        "shape": asdict(shape),
        "read_ceiling_gb_per_s": {str(threads): rate for threads, rate in ceilings.items()},
        "rows": [asdict(row) for row in rows],
    }
