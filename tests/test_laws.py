"""The laws of fixed-size launches (docs/design.md, 5), as far as a CPU can show them: all of them bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from ops_helpers import (
    SPECS,
    WILD_PAGE,
    Batch,
    Sequence,
    Source,
    check_attention,
    int32,
    make_batch,
    make_ragged,
    poisoned,
    same_bytes,
)
from torch import Tensor

from quant import backend, ops
from quant.pages import LayerPages
from quant.plan import Plan

LAW_MODES = ["c32", "c16", "c8", "c8d", "k8v4", "c4", "c4r"]
compiled = pytest.mark.skipif(not backend.has_kernels("cpu"), reason="the extension is not built")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# --- batch invariance -------------------------------------------------------------------------------------------------


def result(batch: Batch, b: int, plan: Plan | None = None, **options: object) -> tuple[Tensor, Tensor]:
    out, lse = batch.attend(plan, **options)
    return out[batch.rows(b)], lse[batch.rows(b)]


def assert_same(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@compiled
@pytest.mark.parametrize("mode", SPECS)
@pytest.mark.parametrize("window", [-1, 300])
def test_batch_invariance(mode: str, window: int, threads: Callable[[int], None]) -> None:
    """The bits of a sequence's output depend on that sequence alone."""
    source = Source(SPECS[mode], 2, 3, 48, 16)
    one = source.sequence(1500, 7, start=40)
    short, long, empty = source.sequence(60, 3), source.sequence(2500, 2), source.sequence(0, 1)
    options = {"window_size": (window, 0), "softcap": 30.0, "sinks": torch.randn(6)}
    alone = make_batch(source, [one])
    want = result(alone, 0, alone.plan(window, num_workers=1), **options)
    assert torch.isfinite(want[0]).all()

    # Other mates, another slot, other pages.
    for mates, at in (([short], 0), ([short], 1), ([long, empty, short], 2), ([long, long], 0), ([short] * 6, 6)):
        batch = make_batch(source, [*mates[:at], one, *mates[at:]], spare_pages=5)
        assert_same(result(batch, at, **options), want)
        # Another split: other numbers of workers, and too small a workspace to split all.
        for changes in ({"num_workers": 3}, {"num_workers": 40}, {"num_workers": 40, "total_tokens": 1}):
            assert_same(result(batch, at, batch.plan(window, **changes), **options), want)
    assert alone.plan(window, num_workers=40).buffer[1] > 0  # that did cut the sequence
    assert alone.plan(window, num_workers=1).buffer[1] == 0

    # Other threads, another capacity, other page ids.
    for count in (2, 3):
        threads(count)
        assert_same(result(alone, 0, alone.plan(window, num_workers=16), **options), want)
    threads(1)
    large = alone.plan(window, max_batch=64, max_q_tokens=999, max_seq_len=10**6, total_tokens=10**5)
    assert_same(result(alone, 0, large, **options), want)
    moved = move_pages(alone)
    assert not torch.equal(moved.block_table, alone.block_table)
    assert_same(result(moved, 0, **options), want)


def move_pages(batch: Batch) -> Batch:
    """The same sequences with every page elsewhere in the pool."""
    order = torch.randperm(batch.pages.num_pages)
    pages = batch.source.pages(batch.pages.num_pages)
    for mine, theirs in ((pages.k, batch.pages.k), (pages.v, batch.pages.v)):
        mine.codes[order], mine.meta[order] = theirs.codes, theirs.meta
    table = batch.block_table.clone()
    named = table < batch.pages.num_pages
    table[named] = order[table[named].long()].int()
    return replace(batch, pages=pages, block_table=table)


@compiled
@pytest.mark.parametrize("mode", LAW_MODES)
@pytest.mark.parametrize("window", [-1, 70])
def test_prefill_in_chunks_and_decode_give_the_bits_of_one_prefill(mode: str, window: int) -> None:
    total = 290
    source = Source(SPECS[mode], 1, 4, 32, 32)
    one = source.sequence(total, total)
    batch = make_batch(source, [one])
    plan = Plan(source.capacity(max_q_tokens=512), window)
    written, k, v = batch.pages, one.k, one.v

    def step(pages: LayerPages, q: Tensor, length: int) -> Tensor:
        lengths, bounds = int32(length), int32(0, len(q))
        plan.update(lengths, bounds)
        return ops.append_attention(pages, q, batch.block_table, lengths, bounds, plan, window_size=(window, 0))

    whole = step(written, batch.q, total)
    for sizes in ([100, 1, 7, 182], [1] * total, [16] * 18 + [2]):
        pages = source.pages(batch.pages.num_pages)
        rows, at = [], 0
        for size in sizes:
            span = slice(at, at + size)
            ops.append_kv(pages, k[span], v[span], batch.slots(0)[span])
            at += size
            rows.append(step(pages, batch.q[span], at))
        assert torch.equal(torch.cat(rows), whole)
        assert same_bytes(pages, written)


# --- capacity alone decides sizes -------------------------------------------------------------------------------------


@compiled
@pytest.mark.parametrize("mode", LAW_MODES)
def test_a_static_grid_gives_the_same_bits(mode: str) -> None:
    """A worker for each chunk that the largest batch could have; most have nothing to do. More in tests/gpu/test_laws.py."""
    batch = make_ragged(Source(SPECS[mode], 2, 2, 32, 16), [(1500, 1), (40, 5), (300, 2)])
    plan = batch.plan(num_workers=8 * 17, static_grid=True)
    assert int(plan.buffer[10]) == 4 and int(plan.buffer[1]) > 0  # a chunk's cost
    for got, want in zip(batch.attend(plan), batch.attend(batch.plan(num_workers=1)), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("mode", LAW_MODES)
def test_the_same_buffers_serve_any_batch(mode: str) -> None:
    """Plan and workspace stay where they are and as large as they are, and what an earlier batch left does not matter."""
    source = Source(SPECS[mode], 2, 2, 64)
    plan = Plan(source.capacity(num_workers=12))
    addresses = plan.buffer.data_ptr(), plan.workspace.data_ptr()
    sizes = plan.buffer.shape, plan.workspace.shape
    plan.workspace.fill_(float("nan"))
    for lengths in ([(1, 1)], [(0, 0)] * 8, [(3000, 1), (200, 40)], [], [(900, 2)] * 5, [(2, 2)] * 3, [(3000, 9)]):
        batch = make_ragged(source, lengths)
        want = batch.attend(batch.plan(num_workers=12))
        plan.update(batch.seq_lens, batch.cu_seqlens_q)
        assert_same(batch.attend(plan), want)
        assert addresses == (plan.buffer.data_ptr(), plan.workspace.data_ptr())
        assert sizes == (plan.buffer.shape, plan.workspace.shape)


@compiled
@pytest.mark.parametrize("mode", LAW_MODES)
def test_a_cache_that_grows_and_shrinks_is_as_good_as_new(mode: str) -> None:
    """Rolling back and growing again over old bytes gives the bits of a fresh, poisoned pool."""
    source = Source(SPECS[mode], 2, 2, 64)
    batch = make_batch(source, [source.sequence(50, 1)])
    draft, final = source.sequence(50, 2), source.sequence(45, 3)
    slots = batch.slots(0)
    ops.append_kv(batch.pages, draft.k, draft.v, slots)
    ops.append_kv(batch.pages, final.k, final.v, slots[:45])
    shrunk = replace(batch, sequences=[final], seq_lens=int32(45), cu_seqlens_q=int32(0, 3), q=final.q)
    fresh = make_batch(source, [final])
    assert_same(shrunk.attend(), fresh.attend())
    check_attention(shrunk)


# --- nothing past the end, nothing outside the window -----------------------------------------------------------------


@compiled
@pytest.mark.parametrize("mode", SPECS)
@pytest.mark.parametrize("page_size", [16, 128])
def test_bytes_past_the_end_never_matter(mode: str, page_size: int) -> None:
    source = Source(SPECS[mode], 2, 2, 48, page_size)
    sequences = [source.sequence(length, 2) for length in (1, 15, 16, 17, 257, 301)]
    batch = make_batch(source, sequences)
    want = batch.attend()
    assert torch.isfinite(want[0]).all()
    clean = make_batch(source, sequences)
    for part in (clean.pages.k, clean.pages.v):
        part.codes.zero_()
        part.meta.zero_()
    for b, one in enumerate(sequences):
        ops.append_kv(clean.pages, one.k, one.v, clean.slots(b))
    assert_same(clean.attend(), want)


@compiled
@pytest.mark.parametrize("mode", LAW_MODES)
@pytest.mark.parametrize("window", [0, 20, 300])
def test_pages_outside_the_window_are_never_read(mode: str, window: int) -> None:
    """They may be given back to the pool: their ids may be wild, and their bytes another's."""
    source = Source(SPECS[mode], 1, 3, 64)
    batch = make_ragged(source, [(1000, 3), (700, 1), (40, 2)])
    options = {"window_size": (window, 0)}
    want = batch.attend(**options)
    tables = batch.block_table.clone()
    gone: list[int] = []
    for b in range(3):
        first = max(0, int(batch.seq_lens[b]) - int(batch.cu_seqlens_q[b + 1] - batch.cu_seqlens_q[b]) - window)
        gone += tables[b, : first // 16].tolist()
        tables[b, : first // 16] = WILD_PAGE if b else -WILD_PAGE
    assert len(gone) > 60 // (1 + window // 100)
    for part in (batch.pages.k, batch.pages.v):
        part.codes[gone], part.meta[gone] = 0xFF, 0xFF
    assert_same(replace(batch, block_table=tables).attend(**options), want)


@compiled
@pytest.mark.parametrize("mode", LAW_MODES)
def test_pages_of_padding_are_never_read(mode: str) -> None:
    source = Source(SPECS[mode], 1, 3, 64)
    batch = make_ragged(source, [(600, 4, 333), (90, 1, 50)])
    want = batch.attend()
    tables = batch.block_table.clone()
    tables[0, : 333 // 16], tables[1, : 50 // 16] = WILD_PAGE, -1
    assert_same(replace(batch, block_table=tables).attend(), want)


def test_sequences_may_share_pages() -> None:
    source = Source(SPECS["c4"], 2, 2, 64)
    prompt = source.sequence(64, 0)
    tails = [source.sequence(5, 1) for _ in range(2)]
    whole = [Sequence(torch.cat((prompt.k, tail.k)), torch.cat((prompt.v, tail.v)), tail.q) for tail in tails]
    apart = make_batch(source, whole)
    table = apart.block_table.clone()
    table[1, :4] = table[0, :4]
    assert_same(replace(apart, block_table=table).attend(), apart.attend())


def test_poison_is_poison() -> None:
    """What the tests above rely on: read as a value, a poisoned pool gives no usable result in the float codecs."""
    pages = poisoned(Source(SPECS["c16"]).pages(1))
    assert torch.isnan(pages.k.codes.view(torch.float16)).all()
