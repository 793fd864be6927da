"""Whatever is done to a `PagedKVCache`, it holds what plain lists of tokens hold, and loses no page."""

from __future__ import annotations

from collections import Counter
from itertools import count

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from quant import ops, reference
from quant.cache import PagedKVCache
from quant.errors import PoolExhaustedError
from quant.spec import resolve_mode

PAGE, MAX_BATCH, MAX_SEQ_LEN, NUM_PAGES = 16, 4, 70, 9
H_KV, D = 1, 16


class CacheMachine(RuleBasedStateMachine):
    """A small pool that runs full often, beside a dict of row -> token numbers that shares nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = PagedKVCache(MAX_BATCH, MAX_SEQ_LEN, num_pages=NUM_PAGES, page_size=PAGE)
        for mode in ("c32", "c16"):
            self.cache.add_layer(resolve_mode(mode, "fp16"), H_KV, D)
        self.model: dict[int, list[int]] = {}
        self.numbers = count(1)

    def rows(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.model)))

    @initialize(count=st.integers(1, 20))
    def start(self, count: int) -> None:
        for _ in range(2):
            self.allocate()
        self.decode(count)

    @rule()
    def allocate(self) -> None:
        if len(self.model) == MAX_BATCH:
            with pytest.raises(PoolExhaustedError):
                self.cache.allocate()
        else:
            self.model[self.cache.allocate()] = []

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def append(self, data: st.DataObject) -> None:
        rows = data.draw(st.lists(st.sampled_from(sorted(self.model)), unique=True, min_size=1))
        self.write({row: data.draw(st.integers(0, 20)) for row in rows})

    @precondition(lambda self: self.model)
    @rule(count=st.integers(1, 20))
    def decode(self, count: int) -> None:
        self.write(dict.fromkeys(self.model, count))

    @precondition(lambda self: self.model)
    @rule(data=st.data(), count=st.integers(1, 3))
    def beam_step(self, data: st.DataObject, count: int) -> None:
        self.select(data)
        self.decode(count)

    @precondition(lambda self: 0 < len(self.model) < MAX_BATCH)
    @rule(data=st.data(), count=st.integers(1, 20))
    def fork_and_write(self, data: st.DataObject, count: int) -> None:
        self.write({self.fork_of(self.rows(data)): count})

    def fork_of(self, row: int) -> int:
        copy = self.cache.fork(row)
        self.model[copy] = list(self.model[row])
        return copy

    def write(self, counts: dict[int, int]) -> None:
        new = {row: [next(self.numbers) % 2048 for _ in range(n)] for row, n in counts.items()}
        if self.is_too_much(counts):
            with pytest.raises(PoolExhaustedError):
                self.cache.reserve(counts)
            return
        slots = self.cache.reserve(counts)
        flat = torch.tensor([float(x) for row in sorted(new) for x in new[row]])
        rows_of = flat[:, None, None].expand(-1, H_KV, D).contiguous()
        for layer in self.cache.layers if len(flat) else []:
            ops.append_kv(layer, rows_of, -rows_of, slots)
        for row, tokens in new.items():
            self.model[row] = self.model[row] + tokens

    def is_too_much(self, counts: dict[int, int]) -> bool:
        """Whether `counts` cannot fit: a row too long, or too few pages for new ones and copies of shared ones."""
        table, needed, holders = self.cache.table, 0, Counter(p for pages in self.cache.table.pages for p in pages)
        for row, n in counts.items():
            length = len(self.model[row])
            if length + n > MAX_SEQ_LEN:
                return True
            needed += -(-(length + n) // PAGE) - -(-length // PAGE)
            if n and length % PAGE and holders[table.pages[row][-1]] > 1:
                holders[table.pages[row][-1]] -= 1
                needed += 1
        return needed > NUM_PAGES - len({page for pages in table.pages for page in pages})

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def rollback(self, data: st.DataObject) -> None:
        row = self.rows(data)
        n = data.draw(st.integers(0, len(self.model[row])))
        self.cache.rollback({row: n})
        self.model[row] = self.model[row][: len(self.model[row]) - n]

    @precondition(lambda self: 0 < len(self.model) < MAX_BATCH)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        self.fork_of(self.rows(data))

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def select(self, data: st.DataObject) -> None:
        sources = data.draw(st.lists(st.sampled_from(sorted(self.model)), min_size=1, max_size=MAX_BATCH))
        self.cache.select(torch.tensor(sources))
        self.model = {row: list(self.model[source]) for row, source in enumerate(sources)}

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        row = self.rows(data)
        self.cache.free(row)
        del self.model[row]

    @rule()
    def reset(self) -> None:
        self.cache.reset()
        self.model.clear()

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def interrupt(self, data: st.DataObject) -> None:
        """A reservation that is taken back as after Ctrl-C."""
        lengths = {row: len(tokens) for row, tokens in self.model.items()}
        try:
            self.cache.reserve(data.draw(st.integers(0, 40)))
        except PoolExhaustedError:
            return
        self.cache.restore(lengths)

    @invariant()
    def holds_what_the_lists_hold(self) -> None:
        assert self.cache.rows == sorted(self.model)
        assert self.cache.seq_lens.tolist() == [len(self.model.get(row, ())) for row in range(MAX_BATCH)]
        for row, tokens in self.model.items():
            for layer in self.cache.layers:
                k, v = (reference.read(x, PAGE, self.cache.block_table[row], len(tokens)) for x in (layer.k, layer.v))
                want = torch.tensor(tokens, dtype=torch.float64)[:, None, None].expand(-1, H_KV, D)
                assert torch.equal(k, want) and torch.equal(v, -want)

    @invariant()
    def no_page_is_lost_or_counted_wrong(self) -> None:
        table = self.cache.table
        holders = Counter(page for pages in table.pages for page in pages)
        assert table.refcounts == [holders[page] for page in range(NUM_PAGES)]
        assert sorted(table.free_pages) == [page for page in range(NUM_PAGES) if not holders[page]]
        assert [len(pages) for pages in table.pages] == [-(-n // PAGE) for n in table.lengths]
        for row, pages in enumerate(table.pages):
            assert len(set(pages)) == len(pages)
            assert self.cache.block_table[row, : len(pages)].tolist() == pages


CacheMachine.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),  # shrinking takes minutes
    suppress_health_check=list(HealthCheck),
)
TestCache = CacheMachine.TestCase
