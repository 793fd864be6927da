"""What the layers of a paged cache share, and the steps in which it grows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quant.cache import PagedKVCache
from quant.errors import ArgumentError, PoolExhaustedError, UnsupportedModelError, describe
from quant.pages import LayerPages
from quant.plan import Capacity, Plan
from quant.spec import LayerSpecs

LayerParams = tuple[Tensor, Tensor, Tensor | None, Tensor | None] | None
"""Params of K and of V, and what their rows are shaped by, as `PagedKVCache.set_params` takes them."""


@dataclass
class Step:
    """One forward pass: `batch` rows of `q_len` new tokens each, for which pages are reserved."""

    batch: int
    q_len: int
    slots: Tensor
    block_table: Tensor
    seq_lens: Tensor
    seq_starts: Tensor | None = None
    appended: set[int] = field(default_factory=set)
    attended: set[int] = field(default_factory=set)


@dataclass
class _PlanSlot:
    """A plan and the step and query length it was made for."""

    plan: Plan
    step: Step | None = None
    q_len: int = 0


class CacheState:
    """What the layers of a `FoldCache` share: the pages, the committed length, the step that is running.

    Rows 0 .. batch - 1 hold `length` tokens each, left padding included. A forward pass reserves its tokens at the first
    layer it reaches and commits them when it ends; whatever ends it early takes them back.
    """

    # Whether the model's attention patterns are known to be causal, so that masks need not be looked at.
    mask_checked = False

    def __init__(
        self, paged: PagedKVCache, specs: LayerSpecs, params: Sequence[LayerParams], grows: bool = False
    ) -> None:
        self.paged = paged
        self.specs = specs
        self.params = params
        self.grows = grows
        self.batch = 0
        self.length = 0
        self.step: Step | None = None
        self.in_forward = False
        self.is_stale = False  # its pages were written under other scales or formats than the swap now has
        with torch.inference_mode(False):
            self.nonfinite = torch.zeros(1, dtype=torch.int64, device=paged.device)
        self._plans: dict[tuple[int, ...], _PlanSlot] = {}
        self._cu_seqlens: dict[tuple[int, int], Tensor] = {}

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around a forward pass: commit what it appended, or on any exception, Ctrl-C included, take it back."""
        if self.is_stale:
            got = "one whose pages were written under others"
            raise ArgumentError(describe("cache", "one of the swap's present mode and scales", got, "make a new one"))
        self.in_forward, self.step = True, None
        try:
            yield
            self._check_reached()
            self.length += self.step.q_len if self.step else 0
        except BaseException:
            self.batch = self.batch if self.length else 0
            self.paged.restore(dict.fromkeys(range(self.batch), self.length))
            raise
        finally:
            self.in_forward, self.step = False, None

    def _check_reached(self) -> None:
        """UnsupportedModelError unless every layer that appended has attended through our kernels too."""
        appended, attended = (self.step.appended, self.step.attended) if self.step else (set(), set())
        if not appended or appended - attended:
            got = f"{len(appended)} layers that wrote the cache, {len(attended)} that read it"
            fix = "this model does not take its attention from transformers' AttentionInterface; it cannot be swapped"
            raise UnsupportedModelError(
                describe("forward pass", "attention of every layer through the paged cache", got, fix)
            )

    def step_for(self, batch: int, q_len: int) -> Step:
        """The running step; its first layer opens it, which reserves the tokens of all layers."""
        step = self.step
        if step is None:
            step = self.step = self._open(batch, q_len)
        elif (step.batch, step.q_len) != (batch, q_len):
            got = f"[{batch}, {q_len}]"
            raise UnsupportedModelError(describe("new tokens of a layer", f"[{step.batch}, {step.q_len}]", got))
        return step

    def _open(self, batch: int, q_len: int) -> Step:
        if not self.in_forward:
            fix = "use a cache only with the model whose swap made it, while that swap is on"
            raise ArgumentError(describe("FoldCache", "a forward pass of a swapped model", "another call", fix))
        if batch < 1 or q_len < 1:
            raise ArgumentError(describe("new tokens", "at least one row and one token", f"[{batch}, {q_len}]"))
        if self.batch and batch != self.batch:
            fix = "reset() the cache or make a new one"
            raise ArgumentError(describe("rows", f"the {self.batch} that the cache holds", str(batch), fix))
        if self.grows:
            self._grow(batch, self.length + q_len)
        elif batch > self.paged.max_batch:
            fix = "make the cache with a larger max_batch"
            raise PoolExhaustedError(describe("rows", f"at most {self.paged.max_batch}", str(batch), fix))
        while len(self.paged.rows) < batch:
            self.paged.allocate()
        slots = self.paged.reserve(q_len)
        self.batch = batch
        return Step(batch, q_len, slots, self.paged.block_table[:batch], self.paged.seq_lens[:batch])

    def _grow(self, batch: int, seq_len: int) -> None:
        """Double what is too small. Only caches that `generate` made by itself grow."""
        paged = self.paged
        max_batch = max(paged.max_batch, batch)
        max_seq_len = paged.max_seq_len if seq_len <= paged.max_seq_len else max(seq_len, 2 * paged.max_seq_len)
        if (max_batch, max_seq_len) != (paged.max_batch, paged.max_seq_len):
            paged.resize(max_batch=max_batch, max_seq_len=max_seq_len)
            self._plans.clear()

    def select(self, sources: Sequence[int]) -> None:
        """Row `i` becomes what row `sources[i]` was; an empty cache stays empty."""
        if self.batch:
            if self.grows:
                self._grow(len(sources), self.length)
            self.paged.select(sources)
            self.batch = len(sources)

    def rollback(self, num_tokens: int) -> None:
        """Forget the newest `num_tokens` of every row."""
        self.paged.rollback(num_tokens)
        self.length -= num_tokens

    def reset(self) -> None:
        """Forget every row; pools and scales stay."""
        self.paged.reset()
        self.batch = self.length = 0

    def cu_seqlens(self, batch: int, q_len: int) -> Tensor:
        """int32 `[batch + 1]` row starts of equal rows."""
        found = self._cu_seqlens.get((batch, q_len))
        if found is None:
            if len(self._cu_seqlens) > 8:
                self._cu_seqlens.clear()
            found = torch.arange(batch + 1, dtype=torch.int32, device=self.paged.device) * q_len
            self._cu_seqlens[batch, q_len] = found
        return found

    def plan(self, step: Step, pages: LayerPages, h_q: int, q_len: int, window_left: int) -> Plan:
        """The plan of this step for a window and a head layout: made once, updated at the first layer that asks."""
        key = (window_left, h_q, pages.h_kv, pages.head_dim)
        slot = self._plans.get(key)
        if slot is None or slot.plan.capacity.max_q_tokens < step.batch * q_len:
            slot = self._plans[key] = _PlanSlot(self._new_plan(key, step.batch * q_len))
        if slot.step is not step or slot.q_len != q_len:
            slot.plan.update(step.seq_lens, self.cu_seqlens(step.batch, q_len), step.seq_starts)
            slot.step, slot.q_len = step, q_len
        return slot.plan

    def _new_plan(self, key: tuple[int, ...], q_tokens: int) -> Plan:
        window_left, h_q, h_kv, head_dim = key
        paged = self.paged
        capacity = Capacity.for_device(
            paged.device,
            max_batch=paged.max_batch,
            max_q_tokens=max(q_tokens, paged.max_batch),
            max_seq_len=paged.max_seq_len,
            total_tokens=paged.block_table.numel() * paged.page_size,
            h_q=h_q,
            h_kv=h_kv,
            head_dim=head_dim,
            page_size=paged.page_size,
        )
        with torch.inference_mode(False):
            return Plan(capacity, window_left, paged.device)
