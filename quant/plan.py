"""Fixed-size launches: what is known before any batch (`Capacity`) and the work list of one step (`Plan`).

The planner cuts every sequence's queries into tiles and its keys into chunks of `chunk_size` tokens. Chunk borders depend
on the sequence's own length alone. A run of chunks from a tile's first one is folded in registers; any other run writes one
partial per chunk; the merge reads them in chunk order. All cuts give the same bits, so the planner is free to choose them.

The plan buffer is int32: a header of 8 (number of items, of merges, of partials used, index of the first merge, status,
chunk units, chunk size, tile_q), then items of 8 (seq, q_begin, q_count, chunk_begin, chunk_end, first_partial or -1,
folds, 0), then merges of 8 (seq, q_begin, q_count, first_partial, parts, 0, 0, 0).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import ArgumentError, describe
from .spec import check_head_dim, check_page_size

HEADER, ENTRY = 8, 8
CHUNK_SIZE = 256
_TILE_ROWS = 16


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


@dataclass(frozen=True)
class Capacity:
    """The largest batch that a plan, a workspace and a captured graph serve. All sizes follow from it.

    max_batch: sequences a step; max_q_tokens: their new tokens together; max_seq_len: tokens of one sequence;
    total_tokens: cached tokens of all readers together, by default those of the pool; num_workers: how many runs the
    planner aims for (threads or blocks for each kv head), which changes who computes, never the result.
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

    def __post_init__(self) -> None:
        check_head_dim(self.head_dim)
        check_page_size(self.page_size)
        names = ("max_batch", "max_q_tokens", "max_seq_len", "total_tokens", "h_q", "h_kv", "num_workers")
        for name in names:
            if getattr(self, name) < 1:
                raise ArgumentError(describe(f"Capacity.{name}", "at least 1", str(getattr(self, name))))
        if self.h_q % self.h_kv:
            raise ArgumentError(describe("query heads", f"a multiple of the {self.h_kv} kv heads", str(self.h_q)))
        if self.chunk_size != CHUNK_SIZE:
            raise ArgumentError(describe("Capacity.chunk_size", str(CHUNK_SIZE), str(self.chunk_size)))

    @property
    def tile_q(self) -> int:
        """Query tokens of a tile."""
        return max(1, _TILE_ROWS * self.h_kv // self.h_q)

    @property
    def max_tiles(self) -> int:
        return self.max_q_tokens // self.tile_q + self.max_batch

    @property
    def max_items(self) -> int:
        return self.max_tiles + self.num_workers

    @property
    def max_partials(self) -> int:
        """Partials of one query token each that the workspace holds."""
        return _ceil_div(self.total_tokens, self.chunk_size) + min(self.max_q_tokens, self.max_batch * self.tile_q)

    @property
    def limits(self) -> PlanLimits:
        return PlanLimits(
            self.chunk_size, self.tile_q, self.num_workers, self.max_items, self.max_tiles, self.max_partials
        )

    @property
    def plan_ints(self) -> int:
        """int32 numbers of the plan buffer."""
        return HEADER + ENTRY * (self.max_items + self.max_tiles)

    @property
    def workspace_floats(self) -> int:
        """fp32 numbers of the workspace: per partial and query head the running maximum, the sum, and `d` outputs."""
        return self.max_partials * self.h_q * (self.head_dim + 2)


def tile_chunks(
    seq_len: int, q_len: int, q_begin: int, q_count: int, start: int, window_left: int, chunk_size: int
) -> tuple[int, int]:
    """First and one-past-last chunk that the tile's queries can see; mirror of `csrc/core/schedule.h`."""
    first_query = seq_len - q_len + q_begin
    end = min(first_query + q_count, seq_len)
    begin = start if window_left < 0 else max(start, first_query - window_left)
    begin = max(begin, 0)
    return (0, 0) if begin >= end else (begin // chunk_size, _ceil_div(end, chunk_size))


def reference_plan(
    seq_lens: list[int],
    cu_seqlens_q: list[int],
    starts: list[int] | None,
    limits: PlanLimits,
    window_left: int = -1,
) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """Items, merges and header of a step, by the definition; what every backend's planner must give."""
    tiles = []
    for b, seq_len in enumerate(seq_lens):
        q_len = cu_seqlens_q[b + 1] - cu_seqlens_q[b]
        for q_begin in range(0, q_len, limits.tile_q):
            q_count = min(limits.tile_q, q_len - q_begin)
            start = starts[b] if starts else 0
            span = tile_chunks(seq_len, q_len, q_begin, q_count, start, window_left, limits.chunk_size)
            tiles.append((b, q_begin, q_count, *span))
    units = [max(1, tile[4] - tile[3]) for tile in tiles]
    per_worker = max(1, _ceil_div(sum(units), limits.num_workers))
    items: list[list[int]] = []
    merges: list[list[int]] = []
    begun, wanted, used = 0, 0, 0
    for (b, q_begin, q_count, first, last), size in zip(tiles, units, strict=True):
        # Cut where a worker's share of the concatenated units ends.
        cuts = [first + c - begun for c in range((begun // per_worker + 1) * per_worker, begun + size, per_worker)]
        begun += size
        if cuts:
            parts = 1 + last - cuts[0]
            fits = wanted + parts * q_count <= limits.max_partials
            partial, wanted = wanted, wanted + parts * q_count
            cuts = cuts if fits else []
        if not cuts:
            items.append([b, q_begin, q_count, first, last, -1, 1, 0])
            continue
        used = wanted
        merges.append([b, q_begin, q_count, partial, parts, 0, 0, 0])
        for begin, end in zip([first, *cuts], [*cuts, last], strict=True):
            slot = partial if begin == first else partial + (1 + begin - cuts[0]) * q_count
            items.append([b, q_begin, q_count, begin, end, slot, int(begin == first), 0])
    merge_at = HEADER + ENTRY * limits.max_items
    header = [len(items), len(merges), used, merge_at, 0, begun, limits.chunk_size, limits.tile_q]
    return items, merges, header


@dataclass
class Plan:
    """The work list and workspace of a step, at fixed addresses; one serves every layer with the same window.

    Call `update` once a step, then pass the plan to `quant.ops.append_attention`.
    """

    capacity: Capacity
    window_left: int = -1
    device: torch.device | str = "cpu"
    buffer: Tensor = field(init=False, repr=False)
    workspace: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.buffer = torch.zeros(self.capacity.plan_ints, dtype=torch.int32, device=self.device)
        self.workspace = torch.zeros(self.capacity.workspace_floats, dtype=torch.float32, device=self.device)

    def update(self, seq_lens: Tensor, cu_seqlens_q: Tensor, seq_starts: Tensor | None = None) -> None:
        """Plan for these lengths: int32 `seq_lens` `[b]`, `cu_seqlens_q` `[b + 1]`, `seq_starts` `[b]` (left padding)."""
        limits = self.capacity.limits
        torch.ops.foldkv.plan(seq_lens, cu_seqlens_q, seq_starts, self.buffer, self.window_left, *limits)
