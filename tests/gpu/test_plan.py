"""foldkv::plan on a GPU: the work list is the definition's, whatever the batch, from fixed buffers and under a graph."""

from __future__ import annotations

import pytest
import torch
from ops_helpers import int32
from plan_helpers import Step, bounds, entries, planned

from quant.plan import TILE_ROWS, Capacity, Plan, reference_plan

from .helpers import DEVICE, capture, cuda_only, device_workers

pytestmark = pytest.mark.gpu

TOO_MANY_TILES, BAD_LENGTHS = 1, 2  # PlanStatus of csrc/core/schedule.h


def capacity(
    lengths: list[int], q_lens: list[int], h_q: int = 32, h_kv: int = 8, workers: int = 0, tokens: int = 0
) -> Capacity:
    """The least capacity of a batch. workers, tokens: 0 for those of the device, and of the batch."""
    sizes = max(1, len(lengths)), max(1, sum(q_lens)), max([1, *lengths]), tokens or max(1, sum(lengths))
    workers = workers or device_workers(h_kv)
    return Capacity(*sizes, h_q, h_kv, 128, 16, workers, tile_rows=TILE_ROWS[DEVICE.type], chunk_groups=True)


def check(step: Step) -> None:
    header, items, merges = planned(step, DEVICE)
    limits = step.capacity.limits
    want_items, want_merges, want_header = reference_plan(
        step.lengths, bounds(step.q_lens), step.starts, limits, step.window
    )
    assert header == want_header
    assert items == want_items
    assert merges == want_merges


_seeded = torch.Generator().manual_seed(0)


def random_lengths(count: int, most: int, least: int = 0) -> list[int]:
    return torch.randint(least, most + 1, (count,), generator=_seeded).tolist()


BATCHES = {
    "empty": ([], []),
    "all-empty": ([0] * 70, [0] * 70),
    "decode-256": (random_lengths(256, 8192, 1), [1] * 256),
    "decode-256-equal": ([2048] * 256, [1] * 256),
    "idle-slots": ([length * (i % 3 > 0) for i, length in enumerate(random_lengths(300, 4000))], [1] * 300),
    "sequences-1000": (random_lengths(1000, 3000), random_lengths(1000, 4)),
    "sequences-4097": ([300] * 4097, [1] * 4097),
    "prefill-8192": ([8192], [8192]),
    "prefill-in-chunks": ([9000, 512, 131072], [512, 512, 2048]),
    "long-131072": ([131072], [1]),
    "long-among-short": ([*random_lengths(64, 200, 1), 131072], [1] * 65),
    "speculative": (random_lengths(100, 5000, 16), random_lengths(100, 16, 1)),
}


@pytest.mark.parametrize("workers", [0, 1, 7, 4096])
@pytest.mark.parametrize("name", BATCHES)
def test_large_batches(name: str, workers: int) -> None:
    lengths, q_lens = BATCHES[name]
    check(Step(capacity(lengths, q_lens, workers=workers), lengths, q_lens))


@pytest.mark.parametrize("window", [0, 100, 4096])
@pytest.mark.parametrize("name", ["decode-256", "prefill-in-chunks", "sequences-1000"])
def test_windows_and_padding(name: str, window: int) -> None:
    lengths, q_lens = BATCHES[name]
    starts = [min(start, length) for start, length in zip(random_lengths(len(lengths), 600), lengths, strict=True)]
    for some in (None, starts, [-5] * len(lengths)):
        check(Step(capacity(lengths, q_lens), lengths, q_lens, some, window))


@pytest.mark.parametrize("tokens", [1, 5000, 100_000])
@pytest.mark.parametrize("name", ["decode-256", "long-among-short", "prefill-in-chunks", "speculative"])
def test_a_small_workspace_cuts_less(name: str, tokens: int) -> None:
    lengths, q_lens = BATCHES[name]
    check(Step(capacity(lengths, q_lens, tokens=tokens), lengths, q_lens))


@pytest.mark.parametrize(("h_q", "h_kv"), [(8, 8), (14, 2), (16, 1), (20, 1), (7, 1), (128, 1)])
def test_groups(h_q: int, h_kv: int) -> None:
    lengths, q_lens = random_lengths(40, 4000, 100), random_lengths(40, 100)
    check(Step(capacity(lengths, q_lens, h_q, h_kv), lengths, q_lens))


def test_a_captured_graph_plans_other_lengths() -> None:
    """Captured with nothing to do, replayed with anything; the buffer keeps its place."""
    sizes = 64, 256, 131072, 400_000, 32, 8, 128, 16, device_workers(8)
    room = Capacity(*sizes, tile_rows=TILE_ROWS[DEVICE.type], chunk_groups=True)
    plan = Plan(room, device=DEVICE)
    address = plan.buffer.data_ptr()
    buffers = [torch.zeros(n, dtype=torch.int32, device=DEVICE) for n in (64, 65, 64)]
    replay = capture(lambda: plan.update(*buffers))
    for trial in range(40):
        batch = int(torch.randint(0, 65, ()))
        lengths = [*random_lengths(batch, (1, 300, 4000)[trial % 3]), *[0] * (64 - batch)]
        if trial % 10 == 9:
            lengths[trial] = 131072
        q_lens = [min(length, 1 + trial % 4) for length in lengths]
        starts = [length // 3 * (trial % 2) for length in lengths]
        for buffer, row in zip(buffers, (lengths, bounds(q_lens), starts), strict=True):
            buffer.copy_(int32(*row))
        plan.buffer.fill_(-77)
        replay()
        header, items, merges = entries(plan)
        want_items, want_merges, want_header = reference_plan(lengths, bounds(q_lens), starts, room.limits)
        assert (header, items, merges) == (want_header, want_items, want_merges)
        assert plan.buffer.data_ptr() == address


@cuda_only
@pytest.mark.parametrize(
    ("lengths", "cu_seqlens_q", "status"),
    [
        ([500, 500], [0, 200, 400], TOO_MANY_TILES),
        ([5, 5], [0, 2, 1], BAD_LENGTHS),
        ([5, -1], [0, 1, 2], BAD_LENGTHS),
        ([5, 5], [1, 2, 3], BAD_LENGTHS),
    ],
)
def test_a_batch_that_cannot_be_planned_says_so(lengths: list[int], cu_seqlens_q: list[int], status: int) -> None:
    plan = Plan(Capacity(2, 4, 1024, 1024, 2, 2, 64, 16, tile_rows=TILE_ROWS["cuda"]), device=DEVICE)
    plan.buffer.fill_(-77)
    plan.update(int32(*lengths, device=DEVICE), int32(*cu_seqlens_q, device=DEVICE))
    assert plan.buffer[[0, 1, 4]].tolist() == [0, 0, status]  # no items, no merges
    # The next batch that fits is planned as if nothing had been.
    plan.update(int32(5, 5, device=DEVICE), int32(0, 1, 2, device=DEVICE))
    assert plan.buffer[[0, 1, 4]].tolist() == [2, 0, 0]
