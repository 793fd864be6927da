"""foldkv::plan: the work list is the definition's, covers every chunk once, and stays within its bounds."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_helpers import fails, int32
from plan_helpers import Step, bounds, planned
from plan_strategies import steps

from quant import backend
from quant.errors import ArgumentError
from quant.plan import (
    CHUNK_SIZE,
    COST_TOKENS,
    GROUP_CHUNKS,
    HEADER,
    ITEM_COST,
    Capacity,
    Plan,
    make_share,
    reference_plan,
)

compiled = pytest.mark.skipif(not backend.has_kernels("cpu"), reason="the extension is not built")


def seen_chunks(length: int, q_len: int, query: int, start: int, window: int) -> range:
    """Chunks with a key that the query sees, from the definition of visibility."""
    position = length - q_len + query
    first = max(0, start, position - window if window >= 0 else 0)
    return range(first // CHUNK_SIZE, position // CHUNK_SIZE + 1) if first <= position else range(0)


def written(item: list[int]) -> int:
    """Partials of each query that an item's worker writes: one for each run from a group's first chunk, else one a chunk."""
    count, folding = 0, bool(item[6])
    for chunk in range(item[3], item[4]):
        first = (chunk == item[3] and folding) or (item[11] > 0 and chunk % item[11] == 0)
        folding = folding or first
        count += first or not folding
    return count


def cost(item: list[int], length: int) -> int:
    """Tokens of an item in units of 64, from its first chunk's border on."""
    return -(-min(item[4] * CHUNK_SIZE, length) // COST_TOKENS) - item[3] * CHUNK_SIZE // COST_TOKENS


@given(steps())
@settings(max_examples=200, deadline=None)
def test_the_op_gives_the_definition(step: Step) -> None:
    capacity, lengths, q_lens, starts, window = step
    header, items, merges = planned(step)
    want_items, want_merges, want_header = reference_plan(lengths, bounds(q_lens), starts, capacity.limits, window)
    assert header == want_header
    assert items == want_items
    assert merges == want_merges


@given(steps())
@settings(max_examples=200, deadline=None)
def test_every_visible_chunk_once_and_within_bounds(step: Step) -> None:
    capacity, lengths, q_lens, starts, window = step
    header, items, merges = planned(step)
    covered = Counter(
        (item[0], item[1] + i, chunk) for item in items for i in range(item[2]) for chunk in range(*item[3:5])
    )
    assert set(covered.values()) <= {1}
    first = {tuple(item[:3]): item[3] for item in reversed(items)}
    begun = [item for item in items if item[3] == first[tuple(item[:3])]]
    assert all(item[6] for item in begun)
    queries = Counter((item[0], item[1] + i) for item in begun for i in range(item[2]))
    assert queries == Counter((b, i) for b, q_len in enumerate(q_lens) for i in range(q_len))  # each is begun once
    for b, q_len in enumerate(q_lens):
        for i in range(q_len):
            chunks = seen_chunks(lengths[b], q_len, i, starts[b] if starts else 0, window)
            assert all((b, i, chunk) in covered for chunk in chunks)
    # Bounds of items and partials.
    assert len(items) <= capacity.max_items and len(merges) <= capacity.max_tiles
    assert header[2] <= capacity.max_partials
    split = {tuple(merge[:3]): merge for merge in merges}
    slots: list[int] = []
    for item in items:
        merge = split.get(tuple(item[:3]))
        assert (item[5] >= 0) == (merge is not None)
        assert item[12] == (-1 if merge is None else merges.index(merge))
        if merge is None:
            assert item[6] == 1
            continue
        parts = written(item)
        slots += range(item[5], item[5] + parts * item[2])
        assert merge[3] <= item[5] and item[5] + parts * item[2] <= merge[3] + merge[4] * merge[2]
    pieces = Counter(tuple(item[:3]) for item in items)
    assert all(merge[6] == pieces[tile] > 1 for tile, merge in split.items())
    assert len(merges) <= capacity.num_workers  # room for their arrivals
    assert len(slots) == len(set(slots)) == sum(merge[2] * merge[4] for merge in merges)
    assert all(0 <= slot < header[2] for slot in slots)


@given(steps())
@settings(max_examples=50, deadline=None)
def test_a_capacity_that_holds_the_batch_never_refuses_to_split(step: Step) -> None:
    """The stated bound of the workspace is enough when queries are few: one tile a sequence."""
    capacity, lengths, q_lens, starts, window = step
    q_lens = [min(q_len, capacity.tile_q, 1) for q_len in q_lens]
    total = max(1, sum(lengths))
    roomy = Capacity(
        max(1, len(lengths)), max(1, sum(q_lens)), 20 * CHUNK_SIZE, total, capacity.h_q, capacity.h_kv, 64, 16, 132,
        chunk_groups=capacity.chunk_groups,
    )  # fmt: skip
    header, items, _ = planned(Step(roomy, lengths, q_lens, starts, window))
    # Nobody is left with more than a share, and the chunk in which it ends.
    most = header[10] + CHUNK_SIZE // COST_TOKENS
    assert all(cost(item, lengths[item[0]]) <= most for item in items)


@given(steps())
@settings(max_examples=100, deadline=None)
def test_workers_have_equal_shares(step: Step) -> None:
    """Every item has one worker, in order; one that was cut is no longer than a share and the chunk in which that ends."""
    capacity = step[0]
    header, items, _ = planned(step)
    first, share = header[HEADER:], header[10]
    assert first[0] == 0 and first[-1] == len(items) and first == sorted(first)
    for begin, end in pairwise(first):
        sizes = [cost(item, step.lengths[item[0]]) for item in items[begin:end]]
        cut = [size for size, item in zip(sizes, items[begin:end], strict=True) if item[5] >= 0]
        assert all(size <= share + CHUNK_SIZE // COST_TOKENS for size in cut)
    assert capacity.num_workers * share >= header[5]


@given(st.integers(1, 10**6), st.integers(0, 3000), st.integers(1, 600))
@settings(max_examples=200, deadline=None)
def test_shares_are_equal_but_for_a_24th(total: int, smallest: int, workers: int) -> None:
    smallest = min(smallest, total)
    share, least = make_share(total, smallest, workers), max(-(-total // workers), CHUNK_SIZE // COST_TOKENS)
    assert share * workers >= total and CHUNK_SIZE // COST_TOKENS <= share <= least + min(least / 24, ITEM_COST)
    if share != least:  # for a reason: shares hold whole smallest tiles, or the other way round, or cut one evenly
        alone = total == smallest and (ITEM_COST / (share % 4)).denominator == 1
        assert (share / smallest).denominator == 1 or (smallest / share).denominator == 1 or alone


@pytest.mark.parametrize(("batch", "length"), [(64, 4096), (256, 1024), (128, 2048), (16, 32768), (8, 8192)])
def test_equal_sequences_are_cut_evenly_or_not_at_all(batch: int, length: int) -> None:
    """66 workers, as many as one of 8 kv heads has on 132 multiprocessors."""
    room = Capacity(batch, batch, length, batch * length, 32, 8, 128, 64, 66, chunk_groups=True)
    header, items, merges = planned(Step(room, [length] * batch, [1] * batch))
    sizes = {item[4] - item[3] for item in items}
    assert len(sizes) == 1
    assert (merges == []) == (batch > 33)
    if batch == 16:  # quarters, each whole groups: one partial for each group
        assert sizes == {32} and header[2] == batch * length // CHUNK_SIZE // GROUP_CHUNKS


def test_long_sequences_are_not_rounded_where_that_costs_more_than_a_cut() -> None:
    """Halves of 32 x 32768 would leave two of 66 workers idle, and the others 7 more than an equal share of 251."""
    room = Capacity(32, 32, 32768, 1 << 20, 32, 8, 128, 64, 66, chunk_groups=True)
    header, items, _ = planned(Step(room, [32768] * 32, [1] * 32))
    assert header[10] == 251 and header[HEADER + 65] < len(items)


def test_chunk_borders_do_not_depend_on_the_batch() -> None:
    """Cuts fall on multiples of the chunk, wherever the sequence stands and whoever stands beside it."""
    capacity = Capacity(8, 64, 8192, 65536, 8, 2, 64, 16, 8)
    alone = planned(Step(capacity, [5000], [1]))[1]  # cost 83, shares of 11: chunk c lies at 4 + 4 c
    assert [item[3:5] for item in alone] == [[0, 2], [2, 5], [5, 8], [8, 10], [10, 13], [13, 16], [16, 19], [19, 20]]
    for mates in ([1], [5000, 5000, 30], [8000]):
        items = planned(Step(capacity, [*mates, 5000], [1] * len(mates) + [1]))[1]
        mine = [item for item in items if item[0] == len(mates)]
        assert [item[3] for item in mine] == [0] + [item[4] for item in mine[:-1]]
        assert mine[-1][4] == 20


def test_short_batches_write_no_partials_and_one_long_sequence_fills_the_workers() -> None:
    capacity = Capacity(256, 256, 65536, 65536, 8, 2, 64, 16, 16)
    header, items, merges = planned(Step(capacity, [200] * 256, [1] * 256))
    assert (header[2], merges, len(items)) == (0, [], 256)
    header, items, merges = planned(Step(capacity, [65536], [1]))
    assert len(items) == 16 and len(merges) == 1
    assert {item[4] - item[3] for item in items} <= {15, 16, 17}


@pytest.mark.parametrize(
    ("h_q", "h_kv", "tile"), [(8, 8, 16), (8, 4, 8), (14, 2, 2), (16, 1, 1), (20, 1, 1), (7, 1, 2)]
)
def test_sizes_are_functions_of_the_capacity(h_q: int, h_kv: int, tile: int) -> None:
    capacity = Capacity(32, 96, 131072, 40000, h_q, h_kv, 128, 64, num_workers=10)
    assert capacity.tile_q == tile
    assert capacity.max_tiles == 96 // tile + 32
    arrivals = -(-min(capacity.max_tiles, 10) * h_kv // 4) * 4
    assert capacity.plan_ints == 16 + 12 + arrivals + 16 * (2 * capacity.max_tiles + 10)
    assert (
        capacity.max_partials in (157 + min(96, 32 * tile), 158 + min(96, 32 * tile)) and capacity.max_partials % 2 == 0
    )
    assert capacity.workspace_floats == capacity.max_partials * h_q * 130 + 32 * h_kv * 128 * 68
    plan = Plan(capacity)
    assert plan.buffer.shape == (capacity.plan_ints,) and plan.workspace.shape == (capacity.workspace_floats,)
    longer = Capacity(32, 96, 1048576, 40000, h_q, h_kv, 128, 64, num_workers=10)
    assert longer.workspace_floats == capacity.workspace_floats  # the pool bounds it, not the longest sequence


@compiled
def test_too_many_tiles_leave_the_buffer_alone() -> None:
    plan = Plan(Capacity(2, 4, 1024, 1024, 2, 2, 64, 16))
    plan.buffer.fill_(-77)
    with pytest.raises(RuntimeError, match=r"at most 2 query tiles of 16 tokens .* got 40 query tokens in 2 sequences"):
        plan.update(int32(50, 5), int32(0, 39, 40))
    with pytest.raises(RuntimeError, match=r"at most 2 sequences \(Capacity.max_batch\), got 3"):
        plan.update(int32(5, 5, 5), int32(0, 1, 2, 3))
    assert set(plan.buffer.tolist()) == {-77}
    assert torch.count_nonzero(plan.workspace) == 0


def test_a_plan_that_could_not_be_made_says_so() -> None:
    """As a GPU leaves it: the CPU raises at once."""
    plan = Plan(Capacity(2, 4, 1024, 1024, 2, 2, 64, 16))
    plan.update(int32(5, 5), int32(0, 1, 2))
    plan.check()
    plan.buffer[4] = 1
    with fails("plan: expected at most 2 query tiles of 16 tokens", ArgumentError):
        plan.check()
    plan.buffer[4] = 2
    with fails("plan: expected lengths >= 0", ArgumentError):
        plan.check()


@pytest.mark.parametrize(("length", "chunks"), [(4096, 1), (32768, 2), (100_000, 6), (127_000, 8), (131_072, 8)])
def test_one_sequence_is_cut_at_multiples(length: int, chunks: int) -> None:
    """66 workers: as few chunks as the busiest must have, and no cut inside a group of chunks where it is 8."""
    room = Capacity(1, 1, length, length, 32, 8, 128, 64, 66, chunk_groups=True)
    header, items, _ = planned(Step(room, [length], [1]))
    total = -(-length // CHUNK_SIZE)
    assert chunks == -(-total // 66)
    assert [item[3] for item in items] == list(range(0, total, chunks))
    assert chunks != GROUP_CHUNKS or header[2] == len(items)


def test_a_static_grid_past_what_a_block_can_divide_is_an_error() -> None:
    sizes = {"max_batch": 1, "max_q_tokens": 1, "max_seq_len": 1, "total_tokens": 1, "h_q": 128, "h_kv": 128}
    room = {"head_dim": 128, "page_size": 64, "num_workers": 1 << 18}
    assert Capacity(**sizes, **room).num_workers == 1 << 18
    assert Capacity(**sizes, **room | {"num_workers": (1 << 18) - 1}, static_grid=True).static_grid
    with pytest.raises(ArgumentError, match="workers of a static grid: expected at most 262143, got 262144"):
        Capacity(**sizes, **room, static_grid=True)


@pytest.mark.parametrize(("batch", "length", "q_len"), [(1, 32768, 4), (1, 4096, 4), (8, 8192, 8), (4, 32768, 16)])
def test_drafts_on_few_sequences_are_shared_by_all_workers(batch: int, length: int, q_len: int) -> None:
    room = Capacity(batch, batch * q_len, length, batch * length, 32, 8, 128, 64, 66, tile_rows=64, chunk_groups=True)
    header, items, merges = planned(Step(room, [length] * batch, [q_len] * batch))
    assert len(merges) == batch and len(items) == min(64, batch * length // CHUNK_SIZE)
    assert max(item[4] - item[3] for item in items) <= -(-header[10] // (CHUNK_SIZE // COST_TOKENS)) + 1


def test_tiles_of_prompts_are_cut_where_they_are_more_than_a_share() -> None:
    """Their chunks have a partial each; a few tiles over a long past are worth it, many tiles are not."""
    few = Capacity(1, 64, 32768, 32768, 32, 8, 128, 64, 66, tile_rows=64, chunk_groups=True)
    _, items, merges = planned(Step(few, [32768], [64]))
    assert len(merges) == 4 and len(items) >= 60
    _, items, merges = planned(Step(replace(few, total_tokens=1), [32768], [64]))
    assert not merges and len(items) == 4  # without room for all of them none is cut
    many = Capacity(16, 8192, 4096, 65536, 32, 8, 128, 64, 66, tile_rows=64, chunk_groups=True)
    _, items, merges = planned(Step(many, [4096] * 16, [512] * 16))
    assert not merges and len(items) == 512
