"""What the device knows of each row: its token to come, length, and how it is sampled and ends. Fixed addresses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .sampling import MAX_STOP_IDS, sample

Index = slice | Tensor


def upload(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`values` on the device, without waiting for it: by way of pinned memory, which PyTorch keeps until it was read."""
    host = torch.as_tensor(values, dtype=dtype)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.clone()


class Rows:
    """Tensors of one number a row, `[max_batch]`, and the block table `[max_batch, pages]`.

    tokens int64: the token to feed next. seq_lens int32: tokens in the cache. active int32: 1 while the row decodes;
    a row that is not reads and writes nothing. remaining int32: tokens it may still get. temperature, top_p fp32, top_k
    int32, seeds int64, stop_ids int64 `[max_batch, MAX_STOP_IDS]` (-1: none). out int64: the newest token of a row that
    was active in the last step, else -1.
    """

    def __init__(self, block_table: Tensor, page_size: int) -> None:
        self.block_table, self.page_size, self.device = block_table, page_size, block_table.device
        count = block_table.shape[0]

        def full(value: float, dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.full((count, *shape), value, dtype=dtype, device=self.device)

        with torch.inference_mode(False):
            self.tokens, self.out = full(0, torch.int64), full(-1, torch.int64)
            self.seq_lens, self.active, self.remaining = (full(0, torch.int32) for _ in range(3))
            self.temperature, self.top_p = full(0, torch.float32), full(1, torch.float32)
            self.top_k, self.seeds = full(0, torch.int32), full(0, torch.int64)
            self.stop_ids = full(-1, torch.int64, MAX_STOP_IDS)
            self.cu_seqlens = torch.arange(count + 1, dtype=torch.int32, device=self.device)

    @property
    def _state(self) -> tuple[Tensor, ...]:
        return (
            self.tokens, self.seq_lens, self.active, self.remaining, self.temperature, self.top_p, self.top_k,
            self.seeds, self.stop_ids, self.block_table,
        )  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Bytes of all of them, the block table apart."""
        return sum(t.nbytes for t in self._state) + self.out.nbytes + self.cu_seqlens.nbytes - self.block_table.nbytes

    # --- set by the host, in stream order -----------------------------------------------------------------------------

    def set(self, rows: Sequence[int], **columns: Sequence[Any]) -> None:
        """Write columns of some rows: `set([3, 5], seq_lens=[7, 9])`."""
        index = upload(rows, torch.int64, self.device)
        for name, values in columns.items():
            column: Tensor = getattr(self, name)
            column.index_copy_(0, index, upload(values, column.dtype, self.device))

    def set_pages(self, entries: Sequence[tuple[int, int, int]]) -> None:
        """Write (row, index in its page list, page id) entries of the block table."""
        if not entries:
            return
        table = upload(entries, torch.int64, self.device)
        self.block_table.view(-1).index_copy_(
            0, table[:, 0] * self.block_table.shape[1] + table[:, 1], table[:, 2].to(torch.int32)
        )

    def move(self, row: int, target: int) -> None:
        """Row `target` becomes what `row` is, which becomes inactive."""
        for column in self._state:
            column[target].copy_(column[row])
        self.active[row].zero_()

    # --- what a step does, capture-safe -------------------------------------------------------------------------------

    def begin(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Make room for one token of each active row among the first `batch`.

        Returns positions int64 `[batch]`, slots int64 `[batch]` (-1 where inactive), lengths int32 `[batch]` with the new
        token (0 where inactive).
        """
        active = self.active[:batch]
        position = (self.seq_lens[:batch] * active).long()
        page = self.block_table[:batch].gather(1, (position // self.page_size)[:, None])[:, 0]
        slots = page.long() * self.page_size + position % self.page_size
        slots = torch.where(active > 0, slots, -1)
        self.seq_lens[:batch] += active
        return position, slots, self.seq_lens[:batch] * active

    def finish(self, index: Index, logits: Tensor, kind: str) -> None:
        """Sample the next token of the rows `index` from logits `[rows, vocab]`, and end those that are done."""

        def take(column: Tensor) -> Tensor:
            return column[index]

        def put(column: Tensor, values: Tensor) -> None:
            column[index] = values

        active = take(self.active)
        # The new token's place in its sequence decides its draw, however it came to be sampled.
        position = take(self.seq_lens).long()
        sampling = (take(self.temperature), take(self.top_k), take(self.top_p), take(self.seeds))
        token = sample(logits, kind, *sampling, position)
        remaining = take(self.remaining) - active
        done = (remaining <= 0) | (token[:, None] == take(self.stop_ids)).any(-1)
        put(self.out, torch.where(active > 0, token, -1))
        put(self.tokens, torch.where(active > 0, token, take(self.tokens)))
        put(self.remaining, remaining)
        put(self.active, active * ~done)
