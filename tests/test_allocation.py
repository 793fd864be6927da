"""The ops take memory from no one: all of it is given to them, sized by the capacity."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable

import pytest
import torch
from ops_helpers import SPECS, Batch, Source, make_ragged
from torch.profiler import ProfilerActivity, profile

from quant import backend, ops

compiled = pytest.mark.skipif(not backend.has_kernels("cpu"), reason="the extension is not built")


def decode_step(source: Source, batch: Batch) -> Callable[[], None]:
    """One decode step with everything allocated beforehand."""
    plan, out = batch.plan(), torch.empty(batch.q.shape, dtype=batch.q.dtype)
    lse = torch.empty(batch.q.shape[:2])
    one = batch.sequences[0]
    slots, nonfinite = batch.slots(0), torch.zeros(1, dtype=torch.int64)

    def step() -> None:
        ops.append_kv(batch.pages, one.k, one.v, slots, nonfinite=nonfinite)
        plan.update(batch.seq_lens, batch.cu_seqlens_q)
        ops.append_attention(
            batch.pages, batch.q, batch.block_table, batch.seq_lens, batch.cu_seqlens_q, plan, out=out, lse=lse
        )

    return step


def allocations(run: Callable[[], object]) -> int:
    """How many times PyTorch's allocator handed out memory during `run`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = recorded.profiler.kineto_results.events()
    return sum(event.name() == "[memory]" and event.nbytes() > 0 for event in events)


@compiled
@pytest.mark.parametrize("mode", ["c32", "c16", "c8", "c8d", "k8v4", "c4", "c4r"])
def test_ops_allocate_nothing(mode: str) -> None:
    source = Source(SPECS[mode], 2, 2, 64)
    step = decode_step(source, make_ragged(source, [(700, 3), (40, 1)]))
    step()
    assert allocations(lambda: torch.empty(100)) == 1  # the counter counts
    assert allocations(step) == 0


class MallInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def heap_in_use() -> int:
    """Bytes that malloc has handed out and not got back."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        pytest.skip("mallinfo2 is glibc's, from 2.33 on")
    mallinfo.restype = MallInfo
    numbers = mallinfo()
    return numbers.uordblks + numbers.hblkhd


@compiled
def test_memory_does_not_grow() -> None:
    source = Source(SPECS["c4"], 2, 2, 64)
    step = decode_step(source, make_ragged(source, [(300, 1), (40, 1)]))
    for _ in range(50):
        step()
    gc.collect()
    before = heap_in_use()
    for _ in range(1000):
        step()
    gc.collect()
    assert heap_in_use() - before < 64_000  # a leak of 64 bytes a step would show
