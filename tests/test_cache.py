"""`PagedKVCache` and its page table: reservations, sharing, exhaustion, addresses, sizes."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from quant import ops, reference
from quant.cache import PagedKVCache
from quant.errors import ArgumentError, PoolExhaustedError
from quant.page_table import PageTable
from quant.pages import identity_params
from quant.spec import resolve_mode

PAGE = 16
H_KV, D = 2, 16


def make_cache(
    max_batch: int = 4, max_seq_len: int = 64, mode: str = "c32", num_layers: int = 1, **options: int
) -> PagedKVCache:
    cache = PagedKVCache(max_batch, max_seq_len, page_size=PAGE, **options)
    for _ in range(num_layers):
        cache.add_layer(resolve_mode(mode), H_KV, D)
    return cache


def rows_of(numbers: list[int], layer: int = 0) -> torch.Tensor:
    """K rows `[tokens, h_kv, d]` that tell which token of which layer they are."""
    values = torch.tensor(numbers, dtype=torch.float32)[:, None, None] + 1000 * layer
    return values.expand(-1, H_KV, D).contiguous()


def append(cache: PagedKVCache, numbers: dict[int, list[int]]) -> None:
    """Reserve and write `numbers[row]` new tokens of each row in every layer; V is minus K."""
    slots = cache.reserve({row: len(values) for row, values in numbers.items()})
    flat = [number for row in sorted(numbers) for number in numbers[row]]
    for idx, layer in enumerate(cache.layers):
        ops.append_kv(layer, rows_of(flat, idx), -rows_of(flat, idx), slots)


def contents(cache: PagedKVCache, row: int, layer: int = 0) -> list[int]:
    """The numbers of the tokens that `row` holds, read through the device tables."""
    length = int(cache.seq_lens[row])
    pages = cache.layers[layer]
    k, v = (reference.read(part, PAGE, cache.block_table[row], length) for part in (pages.k, pages.v))
    assert torch.equal(k, -v) and torch.equal(k, k[:, :1, :1].expand_as(k))
    return [int(x) - 1000 * layer for x in k[:, 0, 0]]


def test_reserve_gives_the_slots_of_each_row_in_order() -> None:
    cache = make_cache()
    first, second = cache.allocate(), cache.allocate()
    slots = cache.reserve({second: 2, first: 18})
    assert (first, second) == (0, 1)
    assert slots.dtype == torch.int64
    table = cache.block_table
    want = [int(table[0, p // PAGE]) * PAGE + p % PAGE for p in range(18)] + [
        int(table[1, 0]) * PAGE + p for p in range(2)
    ]
    assert slots.tolist() == want
    assert cache.seq_lens.tolist() == [18, 2, 0, 0]
    assert (cache.num_used_pages, cache.num_free_pages) == (3, 13)


def test_decode_and_prefill_paths_give_the_same_slots() -> None:
    whole, steps = make_cache(), make_cache()
    for cache in (whole, steps):
        cache.allocate()
        cache.allocate()
    at_once = whole.reserve(40)
    one_by_one = torch.stack([steps.reserve(1) for _ in range(40)])
    by_position = {(row, p): s for row in (0, 1) for p, s in enumerate(one_by_one[:, row].tolist())}
    read = [int(steps.block_table[row, p // PAGE]) * PAGE + p % PAGE for row in (0, 1) for p in range(40)]
    assert [by_position[row, p] for row in (0, 1) for p in range(40)] == read
    assert at_once.tolist() == [
        int(whole.block_table[r, p // PAGE]) * PAGE + p % PAGE for r in (0, 1) for p in range(40)
    ]


def test_exhausted_pool_names_needed_and_free_pages_and_changes_nothing() -> None:
    cache = make_cache(num_pages=3)
    for _ in range(2):
        cache.allocate()
    append(cache, {0: [1, 2, 3], 1: list(range(4, 20))})
    before = (cache.block_table.clone(), cache.seq_lens.clone(), list(cache.table.free_pages))
    with pytest.raises(PoolExhaustedError, match=r"free pages: expected 2, got 1 of 3 .*num_pages"):
        cache.reserve({0: 15, 1: 1})
    assert torch.equal(cache.block_table, before[0]) and torch.equal(cache.seq_lens, before[1])
    assert cache.table.free_pages == before[2]
    append(cache, {0: [20], 1: [21]})
    assert contents(cache, 0) == [1, 2, 3, 20]
    assert contents(cache, 1) == [*range(4, 20), 21]


def test_copy_on_write_needs_a_page_and_says_so() -> None:
    cache = make_cache(num_pages=1)
    cache.allocate()
    append(cache, {0: [1, 2]})
    cache.fork(0)
    with pytest.raises(PoolExhaustedError, match="free pages: expected 1, got 0 of 1"):
        cache.reserve({1: 1})
    assert [contents(cache, row) for row in (0, 1)] == [[1, 2], [1, 2]]


def test_sequence_longer_than_max_seq_len_is_an_error() -> None:
    cache = make_cache(max_seq_len=20)
    cache.allocate()
    cache.reserve(20)
    with pytest.raises(PoolExhaustedError, match=r"at most 20, got 20 \+ 1 in row 0; .*max_seq_len"):
        cache.reserve(1)
    assert cache.length(0) == 20


def test_too_many_rows_is_an_error() -> None:
    cache = make_cache(max_batch=2)
    cache.allocate()
    cache.allocate()
    with pytest.raises(PoolExhaustedError, match="max_batch"):
        cache.allocate()
    with pytest.raises(PoolExhaustedError, match="max_batch"):
        cache.fork(0)
    with pytest.raises(PoolExhaustedError, match="rows: expected at most 2, got 3"):
        cache.select([0, 1, 1])
    assert cache.rows == [0, 1]


def test_rejected_drafts_are_rewritten_to_the_same_bytes() -> None:
    drafted, plain = make_cache(mode="c4r"), make_cache(mode="c4r")
    k, v = torch.randn(2, 9, H_KV, D)
    for cache in (drafted, plain):
        cache.allocate()
        ops.append_kv(cache.layers[0], k[:5], v[:5], cache.reserve(5))
    for _ in range(2):
        ops.append_kv(drafted.layers[0], torch.randn(4, H_KV, D), torch.randn(4, H_KV, D), drafted.reserve(4))
        drafted.rollback(4)
    for cache in (drafted, plain):
        ops.append_kv(cache.layers[0], k[5:], v[5:], cache.reserve(4))
    for part in ("k", "v"):
        a, b = (getattr(cache.layers[0], part) for cache in (drafted, plain))
        assert torch.equal(a.codes, b.codes) and torch.equal(a.meta, b.meta)


def test_rollback_returns_whole_pages_and_checks_its_counts() -> None:
    cache = make_cache()
    cache.allocate()
    cache.reserve(33)
    assert cache.num_used_pages == 3
    cache.rollback(1)
    assert (cache.num_used_pages, cache.length(0)) == (2, 32)
    with pytest.raises(ArgumentError, match="tokens to roll back"):
        cache.rollback({0: 33})
    assert cache.length(0) == 32
    cache.rollback(32)
    assert (cache.num_used_pages, cache.rows) == (0, [0])


def test_beams_share_pages_until_they_write() -> None:
    cache = make_cache(num_layers=2)
    cache.allocate()
    append(cache, {0: list(range(20))})
    cache.select([0, 0, 0])
    assert cache.num_used_pages == 2
    append(cache, {0: [100], 1: [101], 2: [102]})
    assert cache.num_used_pages == 4  # The full page stays shared; one beam keeps the second page, two copy it.
    cache.reorder(torch.tensor([2, 2, 0]))
    append(cache, {0: [200], 1: [201], 2: [202]})
    for layer in range(2):
        assert contents(cache, 0, layer) == [*range(20), 102, 200]
        assert contents(cache, 1, layer) == [*range(20), 102, 201]
        assert contents(cache, 2, layer) == [*range(20), 100, 202]
    with pytest.raises(ArgumentError, match="beam_idx: expected 3 entries, got 2"):
        cache.reorder([0, 1])


def test_addresses_stay_except_when_resized() -> None:
    cache = make_cache()
    cache.allocate()
    append(cache, {0: [1, 2, 3]})
    layer = cache.layers[0]
    tensors = (cache.block_table, cache.seq_lens, layer.k.codes, layer.k.params)
    before = [tensor.data_ptr() for tensor in tensors]
    cache.fork(0)
    append(cache, {0: [4], 1: [5]})
    cache.set_params(0, 2 * identity_params(layer.k.fmt, H_KV, D), identity_params(layer.v.fmt, H_KV, D))
    cache.reset()
    assert [
        tensor.data_ptr() for tensor in (cache.block_table, cache.seq_lens, layer.k.codes, layer.k.params)
    ] == before
    assert cache.num_free_pages == cache.num_pages and cache.seq_lens.tolist() == [0] * 4
    assert float(layer.k.params[0, 0, 0]) == 2.0


def test_shaping_is_set_in_place_and_moves_with_the_pools() -> None:
    cache = PagedKVCache(1, 16, page_size=PAGE)
    cache.add_layer(resolve_mode("c4r"), H_KV, D)
    layer = cache.layers[0]
    params = [identity_params(part.fmt, H_KV, D) for part in (layer.k, layer.v)]
    assert layer.k.shaping is not None and layer.v.shaping is not None
    addresses = layer.k.shaping.data_ptr(), layer.v.shaping.data_ptr()
    shaping = (3 * torch.eye(D)).to(torch.int8).repeat(H_KV, 1, 1)
    cache.set_params(0, *params, shaping, 2 * shaping)
    with pytest.raises(ArgumentError, match="shaping"):
        cache.set_params(0, params[0], params[1] * 2, 2 * shaping, -shaping)
    assert torch.equal(layer.v.params, params[1]) and torch.equal(layer.k.shaping, shaping)
    assert (layer.k.shaping.data_ptr(), layer.v.shaping.data_ptr()) == addresses
    cache.resize(max_batch=2, max_seq_len=16)
    layer = cache.layers[0]
    assert layer.k.shaping is not None and torch.equal(layer.k.shaping, shaping)
    cache.set_params(0, *params)
    assert not layer.k.shaping.any()


def test_bad_params_leave_both_as_they_were() -> None:
    cache = make_cache()
    layer = cache.layers[0]
    good, bad = 3 * identity_params(layer.k.fmt, H_KV, D), torch.zeros(5, H_KV, D)
    with pytest.raises(ArgumentError, match="params"):
        cache.set_params(0, good, bad)
    with pytest.raises(ArgumentError, match="params"):
        cache.set_params(0, good[:, :1], good)
    assert torch.equal(layer.k.params, identity_params(layer.k.fmt, H_KV, D))


def test_resize_keeps_contents_and_refuses_to_shrink() -> None:
    cache = make_cache(max_batch=2, max_seq_len=32, num_layers=2)
    cache.allocate()
    append(cache, {0: list(range(30))})
    cache.fork(0)
    with pytest.raises(ArgumentError, match="resize max_seq_len"):
        cache.resize(max_batch=2, max_seq_len=16)
    cache.resize(max_batch=3, max_seq_len=64)
    assert (cache.max_batch, cache.max_seq_len, cache.num_pages) == (3, 64, 12)
    append(cache, {0: list(range(30, 50)), 1: [99]})
    for layer in range(2):
        assert contents(cache, 0, layer) == list(range(50))
        assert contents(cache, 1, layer) == [*range(30), 99]


def test_restore_after_an_interruption_in_the_middle_of_a_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache()
    cache.allocate()
    append(cache, {0: list(range(10))})
    cache.fork(0)
    commit = cache.table.commit

    def interrupted(reservation: object) -> None:
        cache.table.refcounts[0] -= 1
        cache.table.free_pages.pop()
        raise KeyboardInterrupt

    monkeypatch.setattr(cache.table, "commit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.reserve(20)
    monkeypatch.setattr(cache.table, "commit", commit)
    cache.restore({0: 10, 1: 10})
    append(cache, {0: [50], 1: [60]})
    assert contents(cache, 0) == [*range(10), 50]
    assert contents(cache, 1) == [*range(10), 60]
    assert cache.num_used_pages == 2


def test_sizes_count_formats_heads_and_scale_data() -> None:
    cache = PagedKVCache(1, 32, page_size=PAGE)
    assert cache.bits_per_element == 0.0
    cache.add_layer(resolve_mode("c8d"), 2, 32)  # 8 bits + a bf16 scale for 32 channels
    cache.add_layer(resolve_mode("c16"), 1, 64)
    assert cache.bits_per_element == pytest.approx((8.5 + 16) / 2)
    pools = 2 * PAGE * 2 * (2 * (32 + 2)) + 2 * PAGE * 2 * (64 * 2)
    params = 2 * 5 * 4 * (2 * 32 + 64)
    shaping = 2 * 2 * 32 * 32
    assert cache.nbytes == pools + params + shaping + 2 * 4 + 4


@pytest.mark.parametrize("bad", [{"max_batch": 0}, {"max_seq_len": 0}, {"num_pages": 0}])
def test_empty_sizes_are_errors(bad: dict[str, int]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(bad))):
        PagedKVCache(**{"max_batch": 1, "max_seq_len": 1, **bad})


def test_bad_arguments() -> None:
    with pytest.raises(ArgumentError, match="page_size"):
        PagedKVCache(1, 16, page_size=17)
    cache = make_cache()
    with pytest.raises(ArgumentError, match="head_dim"):
        cache.add_layer(resolve_mode("c8"), 1, 24)
    cache.allocate()
    for call in (
        lambda: cache.reserve({1: 1}),
        lambda: cache.fork(7),
        lambda: cache.free(-1),
        lambda: cache.select([1]),
    ):
        with pytest.raises(ArgumentError, match="active rows"):
            call()
    with pytest.raises(ArgumentError, match="tokens to reserve"):
        cache.reserve({0: -1})
    assert cache.reserve(0).numel() == 0


@pytest.mark.parametrize("seed", range(6))
def test_extend_is_prepare_and_commit_of_one_token(seed: int) -> None:
    """Over rows that share pages and rows at a page's end, and with nothing changed where it cannot be."""
    rng = random.Random(seed)
    table = PageTable(6, 5 * PAGE, 14, PAGE)
    for _ in range(3):
        table.commit(table.prepare({table.allocate(): rng.choice((1, PAGE, PAGE + 5, 2 * PAGE))}))
    for _ in range(2):
        table.fork(rng.choice(table.rows))
    for _ in range(2 * PAGE):
        rows = rng.sample(table.rows, rng.randint(0, len(table.rows)))
        other = copy.deepcopy(table)
        try:
            want = other.prepare(dict.fromkeys(rows, 1))
        except PoolExhaustedError as error:
            with pytest.raises(PoolExhaustedError) as found:
                table.extend(rows)
            assert str(found.value) == str(error) and vars(table) == vars(other)
            return
        other.commit(want)
        got = table.extend(rows)
        # The order of the rows decides who keeps a shared page; the sizes and the counts agree.
        assert vars(table) == vars(other) and got.pages == want.pages and got.copies == want.copies


def test_extend_stops_at_the_longest_length() -> None:
    table = PageTable(1, PAGE + 3, 4, PAGE)
    table.commit(table.prepare({table.allocate(): PAGE + 2}))
    table.extend([0])
    with pytest.raises(PoolExhaustedError, match="at most 19"):
        table.extend([0])
    assert table.lengths == [PAGE + 3]


def test_a_row_moves_with_its_pages() -> None:
    cache = make_cache()
    for row in range(2):
        cache.allocate()
        append(cache, {row: [10 * row + 1, 10 * row + 2]})
    cache.free(0)
    pages = list(cache.table.pages[1])
    cache.table.move(1, 0)
    cache.restore(dict(enumerate(cache.table.lengths[:1])))
    assert cache.rows == [0] and cache.table.pages[0] == pages and contents(cache, 0) == [11, 12]
    with pytest.raises(ArgumentError, match="active rows"):
        cache.table.move(3, 1)
    cache.allocate()
    with pytest.raises(ArgumentError, match="inactive"):
        cache.table.move(1, 0)
