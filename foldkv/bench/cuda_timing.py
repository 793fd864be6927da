"""Times on a GPU: many calls in one CUDA graph, its replays back to back, the median between CUDA events."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

Call = Callable[[int], object]
Timer = Callable[[Call, int, float], "Timing"]

MIN_RUNS, MAX_RUNS, MAX_CALLS = 12, 200, 64
GRAPH_SECONDS = 2e-3  # a graph of calls lasts about this long, so that what a replay adds is lost in it
CEILING_BYTES = 4 << 30


@dataclass(frozen=True)
class Timing:
    """Median microseconds of one call over `runs` replays of a graph of `calls` calls."""

    us: float
    runs: int
    calls: int


def graph_time(call: Call, copies: int, seconds: float) -> Timing:
    """Time `call(i)` on the current device, i running through whole rounds of 0 .. copies - 1.

    Replays are queued back to back with an event between any two, so the host's part is not measured. `seconds` bounds
    the replays, but for the first dozen.
    """
    for i in range(min(copies, 3)):  # what is set up at a first call must not be captured
        call(i)
    eager = _intervals(lambda: call(0), 3)
    wanted = min(MAX_CALLS, max(1, int(GRAPH_SECONDS / max(min(eager), 1e-6))))
    calls = copies * -(-wanted // copies)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            call(i % copies)
    warm = _intervals(graph.replay, 2)
    runs = min(MAX_RUNS, max(MIN_RUNS, int(seconds / max(min(warm), 1e-6))))
    return Timing(statistics.median(_intervals(graph.replay, runs)) / calls * 1e6, runs, calls)


def _intervals(run: Callable[[], object], count: int) -> list[float]:
    """Seconds of `count` runs queued one behind another, after one that is not counted."""
    run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in zip(events[:-1], events[1:], strict=True)]


def device_rates(device: torch.device, timer: Timer, seconds: float) -> tuple[float, float]:
    """GB/s at which the device reads (the best of three reductions over 4 GiB) and copies (bytes read and written).

    On a card with less than 32 GiB the buffer is an eighth of its memory.
    """
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 32 << 20
    size = min(CEILING_BYTES, total // 8) // (1 << 20) * (1 << 20)
    data = torch.ones(size // 4, dtype=torch.float32, device=device)
    rows = data.view(-1, 1 << 18)
    reductions: tuple[Call, ...] = (lambda _: data.amax(), lambda _: data.sum(), lambda _: rows.amax(1))
    read = max(data.nbytes / timer(call, 1, seconds).us for call in reductions) / 1e3
    half, other = data.chunk(2)
    copied = data.nbytes / timer(lambda _: half.copy_(other), 1, seconds).us / 1e3
    return read, copied
