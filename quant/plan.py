"""Fixed-size launches: what is known before any batch (`Capacity`) and the work list of one step (`Plan`).

The planner cuts every sequence's queries into tiles and its keys into chunks of `chunk_size` tokens. Chunk borders depend
on the sequence's own length alone. On a GPU the chunks of a sequence with few new tokens (`Capacity.grouped_q`) come in
groups of `GROUP_CHUNKS`, counted from token 0; elsewhere all chunks of a tile are one group. A row's result is the fold of
its groups, left to right, each the fold of its chunks. A run of chunks from a group's first one is folded in registers and
gives one partial; any other run writes one partial per chunk; the merge reads them in chunk order. All cuts give the same
bits, so the planner is free to choose them. Where there are groups, tiles without, of prompts, are cut only if
they are more than a worker's share and the workspace has room for all.

A tile costs its tokens, in units of 64, and `ITEM_COST` for what comes beside them. All tiles lie in a row of cost; its
first chunk lies where the tile begins, the others `ITEM_COST` later. Shares of the row are equal, but for a 24th, and no more
than `ITEM_COST`, that may be added so that cuts fall between tiles of the smallest cost, or at multiples where there is one
tile (`make_share`). Worker w has the items that begin in the w-th share.

The plan buffer is int32: a header of 16 (number of items, of merges, of partials used, index of the first merge, status,
cost of all tiles, chunk size, tile_q, index of the first item, num_workers, a worker's share rounded up, the most queries of
a tile among the merges, kv heads, zeros), the first item of each worker and the number of items, a zero for each merge and kv
head (where a GPU's blocks count how many of the tile's items are done, and which they leave zero), then items of 16 (seq,
q_begin, q_count, chunk_begin, chunk_end, first_partial or -1, folds, row of the first query in q, its position, start, seq_len,
chunks of a group or 0, index of the merge or -1, zeros), then merges of 16 (seq, q_begin, q_count, first_partial, parts, row of
the first query, items, zeros).
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import InitVar, dataclass, field
from fractions import Fraction
from math import ceil, floor
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import ArgumentError, describe
from .spec import check_head_dim, check_page_size

HEADER, ENTRY = 16, 16
MAX_WORKERS = 1 << 20
_STATUS = 4  # of the header; csrc/core/schedule.h has the values
CHUNK_SIZE = 256
GROUP_CHUNKS = 8
# Query rows up to which a GPU keeps a sequence's chunks in groups: those of one tile.
GROUPED_ROWS = 64
# Partials for which drafts and short prompts have room, at the most; a tile whose partials find none is not cut.
SHORT_PARTIALS = 1 << 14
# What 128 threads keep of a fold over groups, of one sequence and kv head; kGroupFloats in csrc/core/schedule.h.
GROUP_FLOATS = 128 * (64 + 4)
# What a planner counts: tokens in units of COST_TOKENS, and what a tile costs beside them.
COST_TOKENS, ITEM_COST = 64, 4
# Query rows of a tile: what the CPU keeps in registers; what a block on a GPU makes one pass over the keys with.
TILE_ROWS = {"cpu": 16, "cuda": 64}
# Blocks of 128 threads that each multiprocessor of a GPU holds at a time.
BLOCKS_PER_SM = 4


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


class PlanLimits(NamedTuple):
    """The numbers a planner works with, all of them functions of a `Capacity`."""

    chunk_size: int
    tile_q: int
    num_workers: int
    max_items: int
    max_tiles: int
    max_partials: int
    max_batch: int
    grouped_q: int
    kv_heads: int


@dataclass(frozen=True)
class Capacity:
    """The largest batch that a plan, a workspace and a captured graph serve. All sizes follow from it.

    max_batch: sequences a step; max_q_tokens: their new tokens together; max_seq_len: tokens of one sequence;
    total_tokens: cached tokens of all readers together, by default those of the pool; num_workers: how many runs the
    planner aims for (threads or blocks for each kv head), which changes who computes, never the result; tile_rows: query
    rows (tokens times heads of a group) that share one pass over the keys. `for_device` chooses the last two.
    chunk_groups: a GPU's, see above; it changes how sums are grouped. static_grid: on a GPU, a block for each chunk that the
    largest batch could have, most of which find nothing to do: the seed of this design, for comparison. It gives the same bits.
    """

    max_batch: int
    max_q_tokens: int
    max_seq_len: int
    total_tokens: int
    h_q: int
    h_kv: int
    head_dim: int
    page_size: int
    num_workers: int = 8
    chunk_size: int = CHUNK_SIZE
    tile_rows: int = TILE_ROWS["cpu"]
    static_grid: bool = False
    chunk_groups: bool = False

    @classmethod
    def for_device(cls, device: torch.device | str, *, static_grid: bool = False, **sizes: int) -> Capacity:
        """A capacity of these sizes with the workers and tiles that suit `device`: functions of the device alone."""
        device = torch.device(device)
        h_kv = sizes["h_kv"]
        if static_grid:
            workers = sizes["max_batch"] * (
                _ceil_div(sizes["max_seq_len"], CHUNK_SIZE) + ITEM_COST * COST_TOKENS // CHUNK_SIZE
            )
        elif device.type == "cuda":
            lanes = BLOCKS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count
            workers = max(1, lanes // h_kv)
        else:
            workers = _ceil_div(4 * torch.get_num_threads(), h_kv)
        rows = TILE_ROWS.get(device.type, TILE_ROWS["cpu"])
        groups = device.type == "cuda"
        return cls(**{"num_workers": workers, "tile_rows": rows, **sizes}, static_grid=static_grid, chunk_groups=groups)

    def __post_init__(self) -> None:
        check_head_dim(self.head_dim)
        check_page_size(self.page_size)
        names = ("max_batch", "max_q_tokens", "max_seq_len", "total_tokens", "h_q", "h_kv", "num_workers", "tile_rows")
        for name in names:
            if getattr(self, name) < 1:
                raise ArgumentError(describe(f"Capacity.{name}", "at least 1", str(getattr(self, name))))
        if self.h_q % self.h_kv:
            raise ArgumentError(describe("query heads", f"a multiple of the {self.h_kv} kv heads", str(self.h_q)))
        if self.num_workers > MAX_WORKERS:
            raise ArgumentError(describe("Capacity.num_workers", f"at most {MAX_WORKERS}", str(self.num_workers)))
        # A block finds its worker by a multiplication, `Divisor` in csrc/core/params.h.
        if self.static_grid and self.num_workers * self.h_kv**2 >= 1 << 32:
            most = ((1 << 32) - 1) // self.h_kv**2
            raise ArgumentError(describe("workers of a static grid", f"at most {most}", str(self.num_workers)))
        if self.chunk_size != CHUNK_SIZE:
            raise ArgumentError(describe("Capacity.chunk_size", str(CHUNK_SIZE), str(self.chunk_size)))

    @property
    def tile_q(self) -> int:
        """Query tokens of a tile."""
        return max(1, self.tile_rows * self.h_kv // self.h_q)

    @property
    def max_tiles(self) -> int:
        return self.max_q_tokens // self.tile_q + self.max_batch

    @property
    def max_items(self) -> int:
        return self.max_tiles + self.num_workers

    @property
    def max_partials(self) -> int:
        """Partials of one query token each that the workspace holds: an even number, so that outputs are 16-byte aligned."""
        chunks = _ceil_div(self.total_tokens, self.chunk_size)
        wanted = chunks + min(self.max_q_tokens, self.max_batch * self.tile_q)
        if self.chunk_groups:
            # Sequences of even length: a partial a group, and about four for each cut, which leaves the rest of a group alone.
            q_len = _ceil_div(self.max_q_tokens, self.max_batch)
            cut = _ceil_div(chunks, GROUP_CHUNKS) + GROUP_CHUNKS // 2 * self.num_workers
            parts = min(chunks, cut) if q_len <= self.grouped_q else chunks
            wanted = max(wanted, min(q_len * (parts + self.max_batch), SHORT_PARTIALS))
        return wanted + wanted % 2

    @property
    def grouped_q(self) -> int:
        """New tokens of a sequence up to which its chunks come in groups."""
        return min(self.tile_q, GROUPED_ROWS * self.h_kv // self.h_q) if self.chunk_groups else 0

    @property
    def limits(self) -> PlanLimits:
        return PlanLimits(
            self.chunk_size, self.tile_q, self.num_workers, self.max_items, self.max_tiles, self.max_partials,
            self.max_batch, self.grouped_q, self.h_kv,
        )  # fmt: skip

    @property
    def plan_ints(self) -> int:
        """int32 numbers of the plan buffer."""
        return item_at(self.limits) + ENTRY * (self.max_items + self.max_tiles)

    @property
    def workspace_floats(self) -> int:
        """fp32 numbers of the workspace: per partial and query head the running maximum, the sum, and `d` outputs; then, per
        sequence and kv head, the fold over groups that a GPU's block is at."""
        groups = self.max_batch * self.h_kv * GROUP_FLOATS
        return self.max_partials * self.h_q * (self.head_dim + 2) + groups


def arrivals_at(limits: PlanLimits) -> int:
    """Index of the first arrival count in a plan buffer."""
    return HEADER + 4 * _ceil_div(limits.num_workers + 1, 4)


def item_at(limits: PlanLimits) -> int:
    """Index of the first item in a plan buffer. Every tile that is cut has a worker's border inside."""
    return arrivals_at(limits) + 4 * _ceil_div(min(limits.max_tiles, limits.num_workers) * limits.kv_heads, 4)


def tile_keys(seq_len: int, q_len: int, q_begin: int, q_count: int, start: int, window_left: int) -> tuple[int, int]:
    """First and one-past-last key that the tile's queries can see; mirror of `csrc/core/schedule.h`."""
    first_query = seq_len - q_len + q_begin
    end = min(first_query + q_count, seq_len)
    begin = max(0, start if window_left < 0 else max(start, first_query - window_left))
    return (begin, end) if begin < end else (0, 0)


def make_share(total: int, smallest: int, num_workers: int) -> Fraction:
    """A worker's share of all cost: equal shares, and a little more where cuts then fall on borders of the smallest tile, or
    divide it evenly; or, where it is alone, all fall on multiples of the same number of chunks."""
    chunk = CHUNK_SIZE // COST_TOKENS
    least = max(_ceil_div(total, num_workers), chunk)
    if smallest <= 0:
        return Fraction(least)
    pieces = min(smallest * num_workers // total, smallest // chunk)  # workers for each of the smallest tiles
    cost = smallest if pieces else _ceil_div(least, smallest) * smallest
    if pieces > 1:  # as many as there are with the most chunks that one of them has
        chunks = _ceil_div(smallest - ITEM_COST, chunk)
        most = _ceil_div(chunks, pieces)
        pieces = _ceil_div(chunks, most) if most else 1
        if total == smallest and pieces > 1:
            cost = ITEM_COST + pieces * most * chunk
    even = Fraction(cost, max(1, pieces))
    more = even - least
    return even if more * 24 <= least and more <= ITEM_COST else Fraction(least)


class _Tile(NamedTuple):
    """A tile of queries; keys and chunks that it sees; its cost, and where in all cost it begins."""

    seq: int
    q_begin: int
    q_count: int
    keys: tuple[int, int]
    where: list[int]
    at: int

    @property
    def chunks(self) -> tuple[int, int]:
        return self.keys[0] // CHUNK_SIZE, _ceil_div(self.keys[1], CHUNK_SIZE)

    @property
    def cost(self) -> int:
        return ITEM_COST + _ceil_div(self.keys[1], COST_TOKENS) - self.keys[0] // COST_TOKENS

    def place(self, chunk: int) -> int:
        """Where in all cost a chunk of the tile begins."""
        inside = ITEM_COST + chunk * (CHUNK_SIZE // COST_TOKENS) - self.keys[0] // COST_TOKENS
        return self.at + (inside if chunk > self.chunks[0] else 0)

    def cuts(self, share: Fraction) -> list[int]:
        """Chunks that fall to another worker than the chunk before them."""
        workers = {chunk: floor(self.place(chunk) / share) for chunk in range(*self.chunks)}
        return [chunk for chunk in range(self.chunks[0] + 1, self.chunks[1]) if workers[chunk] != workers[chunk - 1]]

    def parts(self, group: int, cuts: list[int], begin: int, end: int) -> int:
        """Partials of each query that chunks begin .. end - 1 write: one for each run from a group's first chunk, one for
        each other chunk."""
        count, folding = 0, False
        for chunk in range(begin, end):
            first = chunk == self.chunks[0] or (group > 0 and chunk % group == 0)
            folding = first or (folding and chunk not in cuts)
            count += first or not folding
        return count


def reference_plan(
    seq_lens: list[int],
    cu_seqlens_q: list[int],
    starts: list[int] | None,
    limits: PlanLimits,
    window_left: int = -1,
) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """Items, merges, and the header with the workers' first items, by the definition; what every planner must give."""
    tiles: list[_Tile] = []
    total = 0
    for b, seq_len in enumerate(seq_lens):
        row, q_len = cu_seqlens_q[b], cu_seqlens_q[b + 1] - cu_seqlens_q[b]
        for q_begin in range(0, q_len, limits.tile_q):
            q_count = min(limits.tile_q, q_len - q_begin)
            start = max(0, starts[b]) if starts else 0
            keys = tile_keys(seq_len, q_len, q_begin, q_count, start, window_left)
            group = GROUP_CHUNKS if q_len <= limits.grouped_q else 0
            where = [row + q_begin, seq_len - q_len + q_begin, start, seq_len, group]
            tiles.append(_Tile(b, q_begin, q_count, keys, where, total))
            total += tiles[-1].cost
    share = make_share(total, min((tile.cost for tile in tiles), default=0), limits.num_workers)
    alone = sum((tile.chunks[1] - tile.chunks[0]) * tile.q_count for tile in tiles if tile.where[-1] == 0)
    room = alone <= limits.max_partials
    items: list[list[int]] = []
    merges: list[list[int]] = []
    begins: list[int] = []  # where in all cost each item begins
    wanted, used = 0, 0
    for tile in tiles:
        b, q_begin, q_count, _, where, _ = tile
        first, last = tile.chunks
        group = where[-1]
        whole = limits.grouped_q > 0 and group == 0 and (tile.cost <= share or not room)
        cuts = [] if whole else tile.cuts(share)
        if cuts:
            parts = tile.parts(group, cuts, first, last)
            fits = wanted + parts * q_count <= limits.max_partials
            partial, wanted = wanted, wanted + parts * q_count
            cuts = cuts if fits else []
        if not cuts:
            items.append([b, q_begin, q_count, first, last, -1, 1, *where, -1, 0, 0, 0])
            begins.append(tile.at)
            continue
        used = wanted
        merges.append([b, q_begin, q_count, partial, parts, where[0], len(cuts) + 1, *[0] * 9])
        for begin, end in zip([first, *cuts], [*cuts, last], strict=True):
            slot = partial + tile.parts(group, cuts, first, begin) * q_count
            folds = begin == first or (group > 0 and begin % group == 0)
            items.append([b, q_begin, q_count, begin, end, slot, int(folds), *where, len(merges) - 1, 0, 0, 0])
            begins.append(tile.place(begin))
    first_item = item_at(limits)
    merge_at = first_item + ENTRY * limits.max_items
    header = [len(items), len(merges), used, merge_at, 0, total, limits.chunk_size, limits.tile_q]
    header += [first_item, limits.num_workers, ceil(share)]
    header += [max((merge[2] for merge in merges), default=0), limits.kv_heads, 0, 0, 0]
    header += [bisect_left(begins, ceil(worker * share)) for worker in range(limits.num_workers + 1)]
    return items, merges, header


@dataclass
class Plan:
    """The work list and workspace of a step, at fixed addresses; one serves every layer with the same window.

    Call `update` once a step, then pass the plan to `quant.ops.append_attention`; on a GPU one call at a time, as its blocks
    meet at counts in the plan. shared: fp32, at least `capacity.workspace_floats`, the workspace of plans whose attention never
    runs at the same time; by default its own.
    """

    capacity: Capacity
    window_left: int = -1
    device: torch.device | str = "cpu"
    shared: InitVar[Tensor | None] = None
    buffer: Tensor = field(init=False, repr=False)
    workspace: Tensor = field(init=False, repr=False)

    def __post_init__(self, shared: Tensor | None) -> None:
        self.buffer = torch.zeros(self.capacity.plan_ints, dtype=torch.int32, device=self.device)
        size = self.capacity.workspace_floats
        if shared is not None and shared.numel() < size:
            raise ArgumentError(describe("workspace", f"at least {size} numbers", str(shared.numel())))
        self.workspace = torch.zeros(size, dtype=torch.float32, device=self.device) if shared is None else shared

    def update(self, seq_lens: Tensor, cu_seqlens_q: Tensor, seq_starts: Tensor | None = None) -> None:
        """Plan for these lengths: int32 `seq_lens` `[b]`, `cu_seqlens_q` `[b + 1]`, `seq_starts` `[b]` (left padding)."""
        limits = self.capacity.limits
        torch.ops.foldkv.plan(seq_lens, cu_seqlens_q, seq_starts, self.buffer, self.window_left, *limits)

    def check(self) -> None:
        """Raise ArgumentError where the last update could not be planned. A GPU cannot say so at once: outputs are NaN there.

        Waits for the device; not for use while a graph is captured.
        """
        status = int(self.buffer[_STATUS])
        if status:
            sizes = f"{self.capacity.max_tiles} query tiles of {self.capacity.tile_q} tokens"
            wanted, fix = {
                1: (f"at most {sizes} (Capacity.max_batch and max_q_tokens)", "plan with a larger Capacity"),
                2: ("lengths >= 0 and cu_seqlens_q from 0 on without falling", "look at seq_lens and cu_seqlens_q"),
            }.get(status, ("a work list", "call Plan.update first"))
            raise ArgumentError(describe("plan", wanted, f"a batch that is not (status {status})", fix))
