"""The laws of fixed-size launches (docs/design.md, 5) on a GPU, bit for bit; replays are in test_replay.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from ops_helpers import SPECS, WILD_PAGE, Batch, int32, make_batch, make_ragged, pools, same_bytes, twin
from torch import Tensor

from quant import backend, ops
from quant.pages import LayerPages
from quant.plan import Plan

from .helpers import (
    DEVICE,
    ON_GPU,
    capture,
    check_precision,
    cuda_only,
    device_workers,
    is_split,
    make_source,
    same_bits,
)

pytestmark = pytest.mark.gpu

LAW_MODES = ["c16", "c8", "c8d", "k8v4", "c4", "c4r"]


@pytest.mark.parametrize("op", ["append_kv", "plan", "append_attention", "merge"])
def test_the_kernels_are_compiled(op: str) -> None:
    assert backend.has_kernels(DEVICE.type, op), backend.EXTENSION_ERROR


# --- no wait, no allocation -------------------------------------------------------------------------------------------


def whole_step(mode: str) -> Callable[[], None]:
    """All four ops on tensors that exist."""
    batch = make_ragged(make_source(mode, 2, 4, 128, 64), [(2000, 1), (40, 5), (300, 100)])
    plan, one, slots = batch.plan(), batch.sequences[1], batch.slots(1)
    out, lse = torch.empty(batch.q.shape, dtype=batch.q.dtype, device=DEVICE), torch.empty(106, 8, device=DEVICE)
    nonfinite, part_o, part_lse = torch.zeros(1, dtype=torch.int64, device=DEVICE), out.expand(1, -1, -1, -1), lse[None]
    merged, merged_lse = torch.empty_like(out), torch.empty_like(lse)

    def step() -> None:
        ops.append_kv(batch.pages, one.k, one.v, slots, nonfinite=nonfinite)
        plan.update(batch.seq_lens, batch.cu_seqlens_q)
        tensors = (batch.block_table, batch.seq_lens, batch.cu_seqlens_q)
        ops.append_attention(batch.pages, batch.q, *tensors, plan, out=out, lse=lse)
        torch.ops.foldkv.merge(part_o, part_lse, merged, merged_lse)

    return step


@cuda_only
@pytest.mark.parametrize("mode", LAW_MODES)
def test_ops_do_not_wait_for_the_device(mode: str) -> None:
    step = whole_step(mode)
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.cuda._sleep(1_000_000_000)
        done = torch.cuda.Event()
        step()
        done.record()
        assert not done.query(), "the ops returned only after the device was idle"
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


@cuda_only
@pytest.mark.parametrize("mode", LAW_MODES)
def test_ops_allocate_nothing(mode: str) -> None:
    step = whole_step(mode)
    step()
    torch.cuda.synchronize()
    counters = ("allocation.all.allocated", "segment.all.allocated", "num_device_alloc")
    before, free = torch.cuda.memory_stats(), torch.cuda.mem_get_info()[0]
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    after = torch.cuda.memory_stats()
    assert [after.get(name) for name in counters] == [before.get(name) for name in counters]
    assert torch.cuda.mem_get_info()[0] == free


# --- batch invariance -------------------------------------------------------------------------------------------------


def result(batch: Batch, b: int, plan: Plan | None = None, **options: object) -> tuple[Tensor, Tensor]:
    out, lse = batch.attend(plan, **options)
    return out[batch.rows(b)], lse[batch.rows(b)]


@pytest.mark.parametrize("mode", [*SPECS][1:])
@pytest.mark.parametrize("q_len", [1, 7, 150], ids=["decode", "draft", "prefill"])
@pytest.mark.parametrize("window", [-1, 300])
def test_batch_invariance(mode: str, q_len: int, window: int) -> None:
    """The bits of a sequence's output depend on that sequence alone."""
    source = make_source(mode, 2, 4, 128, 32)
    one = source.sequence(3000, q_len, start=40)
    short, long, empty = source.sequence(60, 3), source.sequence(2500, 2), source.sequence(0, 1)
    prompt = source.sequence(400, 333)
    options = {"window_size": (window, 0), "softcap": 30.0, "sinks": torch.randn(8).to(DEVICE)}
    roomy = {"max_q_tokens": 1024, "total_tokens": 400_000}
    alone = make_batch(source, [one])
    whole = alone.plan(window, num_workers=1, **roomy)
    assert not is_split(whole)
    want = result(alone, 0, whole, **options)
    assert torch.isfinite(want[0]).all()
    mixes = [([], 0), ([short], 0), ([short], 1), ([long, empty, prompt], 2), ([prompt, long], 0), ([short] * 6, 6)]
    split = 0
    for mates, at in mixes:
        batch = make_batch(source, [*mates[:at], one, *mates[at:]], spare_pages=5)
        for changes in ({"num_workers": 3}, {"num_workers": device_workers(2)}, {"num_workers": 40, "total_tokens": 1}):
            plan = batch.plan(window, **roomy | changes)
            split += is_split(plan)
            assert same_bits(result(batch, at, plan, **options), want)
    assert split >= len(mixes)
    # A larger capacity.
    large = {"max_batch": 300, "max_q_tokens": 4096, "max_seq_len": 10**6, "total_tokens": 10**6, "num_workers": 132}
    assert same_bits(result(alone, 0, alone.plan(window, **large), **options), want)


@pytest.mark.parametrize("mode", LAW_MODES)
@pytest.mark.parametrize("window", [-1, 5000])
@pytest.mark.parametrize("q_len", [1, 3, 8, 16], ids=lambda q_len: f"{4 * q_len} rows")
def test_groups_of_chunks_give_the_same_bits_however_they_are_cut(mode: str, window: int, q_len: int) -> None:
    """Several groups by one worker, one each, cut inside, a workspace too small for any cut: the same bits, the same LSE."""
    source = make_source(mode, 2, 4, 128, 64)
    options = {"window_size": (window, 0), "sinks": torch.randn(8).to(DEVICE)}
    room = {"max_seq_len": 16384, "total_tokens": 32768 * q_len}
    batch = make_batch(
        source,
        [source.sequence(n, q, start=s) for n, q, s in ((9000, q_len, 0), (4096, 2, 70), (6000, q_len, 3000))],
    )
    whole = batch.plan(window, num_workers=1, **room)
    assert not is_split(whole)
    want = check_precision(batch, whole, **options)
    parts = set()
    for workers in (2, 3, 5, 9, 20, 33, 80):
        plan = batch.plan(window, num_workers=workers, **room)
        assert is_split(plan)
        parts.add(int(plan.buffer[2]))
        assert same_bits(batch.attend(plan, **options), want), workers
    assert not ON_GPU or 2 * min(parts) < max(parts)  # about one a group, and one a chunk
    tight = batch.plan(
        window, num_workers=20, **room | {"total_tokens": 1, "max_q_tokens": 2 * q_len + 2, "max_batch": 3}
    )
    assert same_bits(batch.attend(tight, **options), want)


@pytest.mark.parametrize("mode", LAW_MODES)
@pytest.mark.parametrize("q_len", [1, 2, 6, 20])
def test_whoever_merges_gives_the_same_bits_and_leaves_the_plan_as_it_was(mode: str, q_len: int) -> None:
    """Attention's own blocks where shapes speak of few query rows a sequence, a kernel of its own where of many."""
    source = make_source(mode, 2, 4, 128, 64)
    one, sinks = source.sequence(9000, q_len), torch.randn(8).to(DEVICE)
    room = {"max_batch": 16, "max_seq_len": 16384, "max_q_tokens": 1024, "total_tokens": 200_000}
    alone = make_batch(source, [one])
    want = result(alone, 0, alone.plan(num_workers=1, **room), sinks=sinks)
    few, many = [source.sequence(40, 0)] * 15, [source.sequence(400, 333)]
    for mates in (few, many, []):
        batch = make_batch(source, [one, *mates])
        for workers in (3, 30, 60):
            plan = batch.plan(num_workers=workers, **room)
            before = plan.buffer.clone()
            assert is_split(plan) or workers == 3
            for _ in range(3):
                assert same_bits(result(batch, 0, plan, sinks=sinks), want)
            assert torch.equal(plan.buffer, before)


def static_plan(batch: Batch, **changes: int) -> Plan:
    """A block for each chunk that the largest batch could have."""
    room = {"max_batch": 8, "max_seq_len": 4096, **changes}
    workers = room["max_batch"] * (1 - -room["max_seq_len"] // 256)
    return batch.plan(num_workers=workers, static_grid=True, **room)


@pytest.mark.parametrize("mode", LAW_MODES)
def test_a_static_grid_gives_the_same_bits(mode: str) -> None:
    """The seed of the design, a grid for the longest sequence: every chunk has a block of its own, and none two."""
    batch = make_ragged(make_source(mode, 2, 4, 128, 64), MIXED)
    want = batch.attend(batch.plan(num_workers=1))
    plan = static_plan(batch)
    assert int(plan.buffer[10]) == 4 and is_split(plan)  # a chunk's cost
    assert same_bits(batch.attend(plan), want)
    assert same_bits(batch.attend(static_plan(batch, max_seq_len=100_000)), want)
    buffers, results = (batch.seq_lens, batch.cu_seqlens_q), []
    real = [buffer.clone() for buffer in buffers]
    for buffer in buffers:
        buffer.zero_()
    plan.update(*buffers)
    replay = capture(lambda: results.append(batch.attend(plan)))
    for buffer, numbers in zip(buffers, real, strict=True):
        buffer.copy_(numbers)
    plan.update(*buffers)
    replay()
    assert same_bits(results[-1], want)


@pytest.mark.parametrize("mode", LAW_MODES)
@pytest.mark.parametrize("window", [-1, 70])
def test_prefill_in_chunks_gives_the_bits_of_one_prefill(mode: str, window: int) -> None:
    """On CUDA as long as every chunk has more than 8 query rows: sequences with fewer are summed in another order."""
    total = 290
    source = make_source(mode, 1, 4, 64, 32)
    one = source.sequence(total, total)
    batch = make_batch(source, [one])
    plan = Plan(source.capacity(max_q_tokens=512), window, DEVICE)

    def step(pages: LayerPages, q: Tensor, length: int) -> Tensor:
        lengths, bounds = int32(length, device=DEVICE), int32(0, len(q), device=DEVICE)
        plan.update(lengths, bounds)
        return ops.append_attention(pages, q, batch.block_table, lengths, bounds, plan, window_size=(window, 0))

    whole = step(batch.pages, batch.q, total)
    for sizes in ([100, 3, 7, 180], [5] * 58, [16] * 17 + [18], *([] if ON_GPU else [[1] * total])):
        pages, rows, at = source.pages(batch.pages.num_pages), [], 0
        for size in sizes:
            span = slice(at, at + size)
            ops.append_kv(pages, one.k[span], one.v[span], batch.slots(0)[span])
            at += size
            rows.append(step(pages, batch.q[span], at))
        assert same_bytes(pages, batch.pages)
        assert torch.equal(torch.cat(rows), whole)


# --- what must not matter ---------------------------------------------------------------------------------------------

MIXED = [(1, 1), (15, 2), (257, 1), (0, 1), (1500, 3), (301, 140)]


@pytest.mark.parametrize("mode", LAW_MODES)
def test_what_a_workspace_held_does_not_matter(mode: str) -> None:
    batch = make_ragged(make_source(mode, 2, 4, 128, 64), MIXED)
    want = batch.attend()
    for fill in (0.0, 1e30, -torch.inf):
        plan = batch.plan(num_workers=12)
        assert is_split(plan)
        plan.workspace.fill_(fill)
        assert same_bits(batch.attend(plan), want)
        assert same_bits(batch.attend(plan), want)  # nor what an earlier layer left there


@pytest.mark.parametrize("mode", LAW_MODES)
@pytest.mark.parametrize("page_size", [16, 128])
def test_bytes_of_no_token_do_not_matter(mode: str, page_size: int) -> None:
    """Bytes past the end of a sequence, and pages of no sequence: 0xFF in one pool, 0 in the other."""
    source = make_source(mode, 2, 4, 64, page_size)
    sequences = [source.sequence(*numbers) for numbers in MIXED]
    batch = make_batch(source, sequences)
    clean = replace(batch, pages=twin(batch.pages))
    for pool in pools(clean.pages):
        pool.zero_()
    for b, one in enumerate(sequences):
        ops.append_kv(clean.pages, one.k, one.v, clean.slots(b))
    want = batch.attend()
    assert torch.isfinite(want[0]).all() and same_bits(clean.attend(), want)


@pytest.mark.parametrize("mode", LAW_MODES)
@pytest.mark.parametrize("window", [0, 20, 300])
def test_pages_outside_the_window_are_never_read(mode: str, window: int) -> None:
    """They may be given back to the pool: their ids may be wild, and their bytes another's."""
    batch = make_ragged(make_source(mode, 1, 3, 64), [(2000, 3), (700, 1), (40, 2), (900, 100)])
    options = {"window_size": (window, 0)}
    want = batch.attend(**options)
    tables = batch.block_table.clone()
    for b, one in enumerate(batch.sequences):
        gone = max(0, len(one.k) - len(one.q) - window) // 16
        pages = tables[b, :gone].long()
        for pool in pools(batch.pages):
            pool[pages] = 0xFF
        tables[b, :gone] = WILD_PAGE if b % 2 else -WILD_PAGE
    assert int((tables != batch.block_table).sum()) > 100
    assert same_bits(replace(batch, block_table=tables).attend(**options), want)


@pytest.mark.parametrize("mode", LAW_MODES)
def test_pages_of_padding_are_never_read(mode: str) -> None:
    batch = make_ragged(make_source(mode, 1, 4, 64), [(600, 4, 333), (90, 1, 50)])
    want = batch.attend()
    tables = batch.block_table.clone()
    tables[0, : 333 // 16], tables[1, : 50 // 16] = WILD_PAGE, -1
    assert same_bits(replace(batch, block_table=tables).attend(), want)


# --- the workspace ----------------------------------------------------------------------------------------------------


def fenced(tensor: Tensor) -> tuple[Tensor, Callable[[], bool]]:
    """A copy of `tensor` between two fences, and whether these still stand."""
    room, fence = (
        torch.full((len(tensor) + 8192,), -1, dtype=torch.int32, device=DEVICE),
        slice(4096, 4096 + len(tensor)),
    )
    inside = room.view(tensor.dtype)[fence]
    inside.copy_(tensor)
    return inside, lambda: bool((room[:4096] == -1).all() and (room[fence.stop :] == -1).all())


@pytest.mark.parametrize("mode", LAW_MODES)
@pytest.mark.parametrize("total_tokens", [1, 700, 2100, 100_000])
def test_nothing_is_written_past_plan_and_workspace(mode: str, total_tokens: int) -> None:
    """However little room there is, results are the same."""
    batch = make_ragged(make_source(mode, 2, 4, 128, 64), [(2000, 1), (40, 5), (1700, 8)])
    want = batch.attend(batch.plan(num_workers=1))
    for workers in (7, device_workers(2)):
        plan = batch.plan(num_workers=workers, total_tokens=total_tokens, max_batch=3, max_q_tokens=14)
        (plan.buffer, plan_stands), (plan.workspace, workspace_stands) = fenced(plan.buffer), fenced(plan.workspace)
        plan.update(batch.seq_lens, batch.cu_seqlens_q)
        assert same_bits(batch.attend(plan), want)
        assert plan_stands() and workspace_stands()
    check_precision(batch, plan)


@cuda_only
@pytest.mark.parametrize("mode", LAW_MODES)
def test_a_batch_past_the_capacity_gives_nan(mode: str) -> None:
    """The host cannot refuse what it may not look at; the output says so."""
    batch = make_ragged(make_source(mode, 2, 2, 64), [(500, 200), (300, 1)])
    plan = batch.plan(max_batch=2, max_q_tokens=1)
    assert int(plan.buffer[4]) == 1
    out, lse = batch.attend(plan)
    assert torch.isnan(out).all() and torch.isnan(lse).all()


@cuda_only
@pytest.mark.parametrize("mode", LAW_MODES)
def test_a_plan_for_other_heads_gives_nan(mode: str) -> None:
    batch = make_ragged(make_source(mode, 2, 2, 64), [(500, 1), (3000, 1)])
    plan = batch.plan(num_workers=7)
    plan.buffer[12] += 1
    out, lse = batch.attend(plan)
    assert torch.isnan(out).all() and torch.isnan(lse).all()
