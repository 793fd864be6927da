"""The paged KV cache: one page table for all layers, a pool of pages for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from . import ops
from .errors import ArgumentError, describe
from .page_table import PageTable
from .pages import LayerPages
from .spec import KVSpec, check_page_size


class PagedKVCache:
    """Pages of every layer and the table that says which row owns them.

    Page ids are the same in every layer; formats, head counts and head sizes may differ from layer to layer. Rows are
    0 .. max_batch - 1. Rows that share pages (`fork`, `select`) get a copy of a shared page when one is written.

    max_batch: rows. max_seq_len: tokens of one row. num_pages: pages of the pool, by default enough for every row at its
    longest. page_size: tokens of a page, 16, 32, 64 or 128.

    block_table: int32 `[max_batch, max_pages_per_seq]`, page ids of each row. seq_lens: int32 `[max_batch]`, tokens of
    each row, 0 for inactive ones. Both are updated in place; their addresses change only in `resize`.
    """

    block_table: Tensor
    seq_lens: Tensor

    def __init__(
        self,
        max_batch: int,
        max_seq_len: int,
        *,
        num_pages: int | None = None,
        page_size: int = 64,
        device: torch.device | str = "cpu",
    ) -> None:
        check_page_size(page_size)
        self.device = torch.device(device)
        self.layers: list[LayerPages] = []
        self._build(max_batch, max_seq_len, num_pages, page_size)

    def _build(self, max_batch: int, max_seq_len: int, num_pages: int | None, page_size: int) -> None:
        pages_per_seq = -(-max_seq_len // page_size)
        num_pages = max_batch * pages_per_seq if num_pages is None else num_pages
        for name, value in (("max_batch", max_batch), ("max_seq_len", max_seq_len), ("num_pages", num_pages)):
            if value < 1:
                raise ArgumentError(describe(f"PagedKVCache.{name}", "at least 1", str(value)))
        self.table = PageTable(max_batch, max_seq_len, num_pages, page_size)
        with torch.inference_mode(False):
            self._host_table = torch.zeros(max_batch, pages_per_seq, dtype=torch.int32)
            self.block_table = self._host_table.to(self.device)
            self.seq_lens = torch.zeros(max_batch, dtype=torch.int32, device=self.device)

    # --- layers -------------------------------------------------------------------------------------------------------

    def add_layer(self, spec: KVSpec, h_kv: int, head_dim: int) -> int:
        """Make the pools of one more layer, `h_kv` heads of `head_dim` channels; returns its index in `layers`."""
        with torch.inference_mode(False):
            layer = LayerPages.empty(spec, self.num_pages, self.page_size, h_kv, head_dim, self.device)
        self.layers.append(layer)
        return len(self.layers) - 1

    def set_params(
        self, layer: int, k_params: Tensor, v_params: Tensor, k_shaping: Tensor | None = None,
        v_shaping: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Copy a layer's parameters into place: addresses stay, so captured graphs see them.

        k_params, v_params: fp32 `[5, h_kv, d]`. k_shaping, v_shaping: int8 `[h_kv, d, d]` (see `quant.shaping`); None where
        rows shall round plainly. Errors: ArgumentError for a wrong shape or values that none may have; then nothing changes.
        """
        pages = self.layers[layer]
        parts = (pages.k, k_params, k_shaping), (pages.v, v_params, v_shaping)
        before = [(tensor, tensor.clone()) for part, _, _ in parts for tensor in part.constants]
        try:
            for part, params, shaping in parts:
                part.set_params(params)
                part.set_shaping(shaping)
        except ArgumentError:
            for tensor, value in before:
                tensor.copy_(value)
            raise

    # --- sizes --------------------------------------------------------------------------------------------------------

    @property
    def page_size(self) -> int:
        return self.table.page_size

    @property
    def max_batch(self) -> int:
        return self.table.max_batch

    @property
    def max_seq_len(self) -> int:
        return self.table.max_seq_len

    @property
    def num_pages(self) -> int:
        return self.table.num_pages

    @property
    def num_free_pages(self) -> int:
        return len(self.table.free_pages)

    @property
    def num_used_pages(self) -> int:
        return self.num_pages - self.num_free_pages

    @property
    def nbytes(self) -> int:
        """Bytes held: pools, scale data, parameters and tables."""
        tables = self.block_table.nbytes + self.seq_lens.nbytes
        return tables + sum(layer.nbytes for layer in self.layers)

    @property
    def elements_per_token(self) -> int:
        """K and V elements of one token, over all layers."""
        return sum(2 * layer.h_kv * layer.head_dim for layer in self.layers)

    @property
    def bits_per_element(self) -> float:
        """Mean stored bits of a K or V element over the layers, dynamic scale data included; 0 without layers."""
        bits = sum(
            layer.h_kv * layer.head_dim * part.fmt.bits_per_element(layer.head_dim)
            for layer in self.layers
            for part in (layer.k, layer.v)
        )
        return bits / self.elements_per_token if self.layers else 0.0

    # --- rows ---------------------------------------------------------------------------------------------------------

    @property
    def rows(self) -> list[int]:
        """The active rows, ascending."""
        return self.table.rows

    def length(self, row: int) -> int:
        """Tokens of `row`."""
        return self.table.lengths[row]

    def allocate(self) -> int:
        """Activate a row with no tokens and return it. PoolExhaustedError when all `max_batch` are active."""
        return self.table.allocate()

    def reserve(self, counts: int | Mapping[int, int]) -> Tensor:
        """Make room for new tokens: `counts` for each active row, or row -> count. All rows get it, or none.

        Returns the slot mapping, int64 `[tokens]` on the cache's device: rows ascending, a row's tokens in order. The
        new tokens count in `seq_lens` at once: append them to every layer, or `rollback`.
        Errors: PoolExhaustedError naming pages needed and free and what to do; nothing has changed then.
        """
        if isinstance(counts, int):
            counts = dict.fromkeys(self.rows, counts)
        counts = dict(sorted(counts.items()))
        starts = [self.table.lengths[row] for row in counts]
        reservation = self.table.prepare(counts)
        if reservation.copies:
            source, target = (torch.tensor(ids, device=self.device) for ids in zip(*reservation.copies, strict=True))
            for layer in self.layers:
                ops.copy_pages(layer, source, target)
        self.table.commit(reservation)
        self._write_tables(reservation.pages)
        return self._slots(counts, starts)

    def rollback(self, counts: int | Mapping[int, int]) -> None:
        """Forget the newest tokens: `counts` of each active row, or row -> count; pages without tokens return."""
        if isinstance(counts, int):
            counts = dict.fromkeys(self.rows, counts)
        for row, count in counts.items():
            self.table.check_active(row)
            if not 0 <= count <= self.table.lengths[row]:
                wanted = f"0 .. {self.table.lengths[row]} for row {row}"
                raise ArgumentError(describe("tokens to roll back", wanted, str(count)))
        for row, count in counts.items():
            self.table.truncate(row, self.table.lengths[row] - count)
        self._write_tables()

    def fork(self, row: int) -> int:
        """A new row with the tokens of `row`, pages shared."""
        copy = self.table.fork(row)
        self._write_tables([copy])
        return copy

    def select(self, sources: Sequence[int] | Tensor) -> None:
        """Row `i` becomes what row `sources[i]` was, pages shared; rows past them become inactive. Rows may repeat.

        One operation for beam reordering, repeating and picking. Errors: ArgumentError for an inactive source,
        PoolExhaustedError for more than `max_batch` of them; nothing has changed then.
        """
        self.table.select(sources.tolist() if isinstance(sources, Tensor) else list(sources))
        self._write_tables(self.rows)

    def reorder(self, beam_idx: Sequence[int] | Tensor) -> None:
        """Beam search: `select` that keeps the number of rows."""
        if len(beam_idx) != len(self.rows):
            raise ArgumentError(describe("beam_idx", f"{len(self.rows)} entries", str(len(beam_idx))))
        self.select(beam_idx)

    def free(self, row: int) -> None:
        """Deactivate `row`; pages that no other row shares return to the pool."""
        self.table.free(row)
        self._write_tables()

    def reset(self) -> None:
        """Deactivate every row. Pools, parameters and addresses stay."""
        self.restore({})

    def restore(self, lengths: Mapping[int, int]) -> None:
        """After an interruption: exactly the rows of `lengths` (row -> tokens, of those they had) stay, cut to size."""
        self.table.restore(lengths)
        self._write_tables(self.rows)

    def resize(self, *, max_batch: int, max_seq_len: int, num_pages: int | None = None) -> None:
        """Move to larger pools and tables, contents kept. Every address changes: capture graphs again.

        Errors: ArgumentError when a size would shrink.
        """
        old = self.table
        pages_per_seq = -(-max_seq_len // old.page_size)
        num_pages = max_batch * pages_per_seq if num_pages is None else num_pages
        sizes = {"max_batch": max_batch, "max_seq_len": max_seq_len, "num_pages": num_pages}
        for name, size in sizes.items():
            if size < getattr(old, name):
                raise ArgumentError(describe(f"resize {name}", f"at least {getattr(old, name)}", str(size)))
        layers = [self._enlarged(layer, num_pages) for layer in self.layers]
        self._build(max_batch, max_seq_len, num_pages, old.page_size)
        for name in ("pages", "lengths", "active"):
            getattr(self.table, name)[: old.max_batch] = getattr(old, name)
        self.table.recount()
        self.layers = layers
        self._write_tables(self.rows)

    def _enlarged(self, layer: LayerPages, num_pages: int) -> LayerPages:
        spec = KVSpec(layer.k.fmt, layer.v.fmt)
        with torch.inference_mode(False):
            larger = LayerPages.empty(spec, num_pages, layer.page_size, layer.h_kv, layer.head_dim, self.device)
        for old, new in ((layer.k, larger.k), (layer.v, larger.v)):
            new.codes[: layer.num_pages].copy_(old.codes)
            new.meta[: layer.num_pages].copy_(old.meta)
            for a, b in zip(new.constants, old.constants, strict=True):
                a.copy_(b)
        return larger

    # --- device tables ------------------------------------------------------------------------------------------------

    def _write_tables(self, changed_rows: Sequence[int] | Mapping[int, list[int]] = ()) -> None:
        """Bring `seq_lens`, and `block_table` where page lists changed, up to date in place."""
        for row in changed_rows:
            pages = self.table.pages[row]
            self._host_table[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        if changed_rows and self.block_table is not self._host_table:
            self.block_table.copy_(self._host_table)
        self.seq_lens.copy_(torch.tensor(self.table.lengths, dtype=torch.int32))

    def _slots(self, counts: Mapping[int, int], starts: Sequence[int]) -> Tensor:
        """Slots of the `counts[row]` tokens from position `starts` on: int64 `[tokens]`."""
        size, table = self.page_size, self.table
        if sum(counts.values()) <= 4 * len(counts):  # Decode: lists beat tensors.
            slots = [
                table.pages[row][position // size] * size + position % size
                for (row, count), start in zip(counts.items(), starts, strict=True)
                for position in range(start, start + count)
            ]
            return torch.tensor(slots, dtype=torch.int64, device=self.device)
        parts = []
        for (row, count), start in zip(counts.items(), starts, strict=True):
            position = torch.arange(start, start + count)
            parts.append(self._host_table[row, position // size].long() * size + position % size)
        return torch.cat(parts).to(self.device)
