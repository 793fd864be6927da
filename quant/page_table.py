"""Which page holds which token: the page list, length and sharing of every row. Host memory only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .errors import ArgumentError, PoolExhaustedError, describe


@dataclass(frozen=True)
class Reservation:
    """What `PageTable.commit` will do, worked out but not done.

    counts: row -> new tokens. pages: row -> its whole page list, for rows whose list changes.
    copies: (from, to) pages that must be copied first, because a shared page is about to be written.
    """

    counts: Mapping[int, int]
    pages: Mapping[int, list[int]]
    copies: Sequence[tuple[int, int]]
    num_taken: int


class PageTable:
    """Page lists, lengths and reference counts of `max_batch` rows over a pool of `num_pages` pages.

    A row is inactive or active; an active row of `n` tokens holds exactly ceil(n / page_size) pages. Rows share pages
    (`fork`, `select`) until one of them writes: then it gets a copy of its own.
    """

    def __init__(self, max_batch: int, max_seq_len: int, num_pages: int, page_size: int) -> None:
        self.max_seq_len = max_seq_len
        self.page_size = page_size
        self.num_pages = num_pages
        self.pages: list[list[int]] = [[] for _ in range(max_batch)]
        self.lengths = [0] * max_batch
        self.active = [False] * max_batch
        self.refcounts = [0] * num_pages
        self.free_pages = list(reversed(range(num_pages)))

    @property
    def max_batch(self) -> int:
        return len(self.pages)

    @property
    def rows(self) -> list[int]:
        """The active rows, ascending."""
        return [row for row, active in enumerate(self.active) if active]

    def num_pages_for(self, num_tokens: int) -> int:
        """Pages that `num_tokens` tokens of one row take."""
        return -(-num_tokens // self.page_size)

    def check_active(self, row: int) -> None:
        """ArgumentError unless `row` is active."""
        if not (0 <= row < self.max_batch and self.active[row]):
            raise ArgumentError(describe("row", f"one of the active rows {self.rows}", str(row)))

    def allocate(self) -> int:
        """Activate the lowest inactive row, with no tokens. PoolExhaustedError when all are active."""
        for row, active in enumerate(self.active):
            if not active:
                self.active[row] = True
                return row
        fix = "free a row or make the cache with a larger max_batch"
        raise PoolExhaustedError(describe("rows", "an inactive one", f"{self.max_batch} active ones", fix))

    def prepare(self, counts: Mapping[int, int]) -> Reservation:
        """Find pages for `counts[row]` more tokens of each row; changes nothing.

        Errors: PoolExhaustedError naming the pages needed and free, or the row that would pass `max_seq_len`.
        """
        taken = 0
        released: Counter[int] = Counter()
        copies: list[tuple[int, int]] = []
        changed: dict[int, list[int]] = {}
        num_free = len(self.free_pages)

        def take() -> int:
            nonlocal taken
            taken += 1
            return self.free_pages[-taken] if taken <= num_free else -1

        for row, count in counts.items():
            self.check_active(row)
            if count < 0:
                raise ArgumentError(describe("tokens to reserve", "0 or more", f"{count} for row {row}"))
            length = self.lengths[row]
            if length + count > self.max_seq_len:
                got = f"{length} + {count} in row {row}"
                fix = "make the cache with a larger max_seq_len, or generate fewer tokens"
                raise PoolExhaustedError(describe("tokens of a sequence", f"at most {self.max_seq_len}", got, fix))
            if not count:
                continue
            pages = self.pages[row]
            if length % self.page_size and self.refcounts[pages[-1]] - released[pages[-1]] > 1:
                shared = pages[-1]
                released[shared] += 1
                copies.append((shared, take()))
                pages = [*pages[:-1], copies[-1][1]]
            missing = self.num_pages_for(length + count) - len(pages)
            if missing or pages is not self.pages[row]:
                changed[row] = [*pages, *(take() for _ in range(missing))]
        if taken > num_free:
            fix = "free rows, or make the cache with more pages (num_pages)"
            raise PoolExhaustedError(
                describe("free pages", str(taken), f"{num_free} of {self.num_pages} (page_size {self.page_size})", fix)
            )
        return Reservation(dict(counts), changed, copies, taken)

    def commit(self, reservation: Reservation) -> None:
        """Do what `prepare` found; nothing may have changed in between."""
        for source, _ in reservation.copies:
            self.refcounts[source] -= 1
        for _ in range(reservation.num_taken):
            self.refcounts[self.free_pages.pop()] = 1
        for row, pages in reservation.pages.items():
            self.pages[row] = pages
        for row, count in reservation.counts.items():
            self.lengths[row] += count

    def extend(self, rows: Sequence[int]) -> Reservation:
        """`prepare` and `commit` of one token for each of `rows`; a row inside a page of its own costs an addition.

        Errors: as `prepare`; nothing has changed then.
        """
        size, pages, lengths = self.page_size, self.pages, self.lengths
        moving = [
            row
            for row in rows
            if not lengths[row] % size or self.refcounts[pages[row][-1]] > 1 or lengths[row] >= self.max_seq_len
        ]
        reservation = self.prepare(dict.fromkeys(moving, 1))
        self.commit(reservation)
        for row in set(rows).difference(moving):
            lengths[row] += 1
        return reservation

    def move(self, row: int, target: int) -> None:
        """Let the inactive row `target` be what the active `row` is, which becomes inactive."""
        self.check_active(row)
        if self.active[target]:
            raise ArgumentError(describe("row to move to", "an inactive one", str(target)))
        self.pages[target], self.lengths[target], self.active[target] = self.pages[row], self.lengths[row], True
        self.pages[row], self.lengths[row], self.active[row] = [], 0, False

    def truncate(self, row: int, length: int) -> None:
        """Keep the first `length` tokens of `row` and give back pages that hold none of them."""
        self.check_active(row)
        if not 0 <= length <= self.lengths[row]:
            raise ArgumentError(describe("length to keep", f"0 .. {self.lengths[row]}", f"{length} for row {row}"))
        keep = self.num_pages_for(length)
        released = self.pages[row][keep:]
        self.pages[row], self.lengths[row] = self.pages[row][:keep], length
        for page in released:
            self.refcounts[page] -= 1
            if not self.refcounts[page]:
                self.free_pages.append(page)

    def free(self, row: int) -> None:
        """Deactivate `row` and give back its pages."""
        self.truncate(row, 0)
        self.active[row] = False

    def fork(self, row: int) -> int:
        """A new row that shares every page of `row`."""
        self.check_active(row)
        copy = self.allocate()
        self.pages[copy], self.lengths[copy] = list(self.pages[row]), self.lengths[row]
        for page in self.pages[copy]:
            self.refcounts[page] += 1
        return copy

    def select(self, sources: Sequence[int]) -> None:
        """Replace all rows: row `i` becomes what row `sources[i]` was, pages shared; the other rows become inactive."""
        for row in sources:
            self.check_active(row)
        if len(sources) > self.max_batch:
            fix = "make the cache with a larger max_batch"
            raise PoolExhaustedError(describe("rows", f"at most {self.max_batch}", str(len(sources)), fix))
        spare = self.max_batch - len(sources)
        self.pages, self.lengths, self.active = (
            [list(self.pages[row]) for row in sources] + [[] for _ in range(spare)],
            [self.lengths[row] for row in sources] + [0] * spare,
            [True] * len(sources) + [False] * spare,
        )
        self.recount()

    def restore(self, lengths: Mapping[int, int]) -> None:
        """After an interruption at any point: exactly the rows of `lengths` are active, cut to those lengths."""
        for row in range(self.max_batch):
            length = lengths.get(row, 0)
            self.active[row], self.lengths[row] = row in lengths, length
            self.pages[row] = self.pages[row][: self.num_pages_for(length)]
        self.recount()

    def recount(self) -> None:
        """Derive reference counts and the free list from the page lists."""
        counts = Counter(page for pages in self.pages for page in pages)
        self.refcounts = [counts[page] for page in range(self.num_pages)]
        self.free_pages = [page for page in reversed(range(self.num_pages)) if not counts[page]]
