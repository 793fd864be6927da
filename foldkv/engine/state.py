"""The cache of an engine's step: tokens of many sequences in one row, each with a length of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from foldkv.hf.state import CacheState, LayerParams, Step
from quant.cache import PagedKVCache
from quant.errors import ArgumentError, UnsupportedModelError, describe
from quant.pages import LayerPages
from quant.plan import Capacity, Plan
from quant.spec import LayerSpecs


class Geometry(NamedTuple):
    """What a plan serves: layers with one window and one layout of heads."""

    window_left: int
    h_q: int
    h_kv: int
    head_dim: int


@dataclass
class PackedStep(Step):
    """A step of `q_len` tokens in one row (`batch` is 1), those of one sequence after those of another.

    cu_seqlens: int32 `[n + 1]`, where the tokens of each sequence begin; seq_lens int32 `[n]`, block_table int32
    `[n, pages]`. one_each: one token a sequence, as in decoding.
    """

    cu_seqlens: Tensor = field(kw_only=True)
    one_each: bool = field(kw_only=True)
    planned: set[Geometry] = field(default_factory=set)


class PackedState(CacheState):
    """What the layers of a `FoldCache` share in an engine: pages, plans and workspace. Lengths are the engine's affair.

    max_tokens: of a prefill step, all sequences together. Plans are made when a step first asks for them; `prepare`
    makes those of a real run at once, so that captured graphs may rely on their addresses.
    """

    def __init__(self, paged: PagedKVCache, specs: LayerSpecs, params: Sequence[LayerParams], max_tokens: int) -> None:
        super().__init__(paged, specs, params)
        self.max_tokens = max_tokens
        self.geometries: list[Geometry] = []
        self.workspace: Tensor | None = None
        self._packed_plans: dict[tuple[bool, Geometry], Plan] = {}
        self._next: PackedStep | None = None

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Around the forward pass of the step that was set by `running`."""
        if self._next is None:
            fix = "its rows belong to the engine; make one with swap.new_cache"
            raise ArgumentError(describe("cache of an engine", "the engine's own forward pass", "another", fix))
        self.in_forward, self.step = True, self._next
        try:
            yield
            self._check_reached()
        finally:
            self.in_forward, self.step = False, None

    @contextmanager
    def running(self, step: PackedStep) -> Iterator[None]:
        """The step that the forward pass within takes."""
        self._next = step
        try:
            yield
        finally:
            self._next = None

    def cu_seqlens(self, batch: int, q_len: int) -> Tensor:
        assert isinstance(self.step, PackedStep)
        return self.step.cu_seqlens

    def plan(self, step: Step, pages: LayerPages, h_q: int, q_len: int, window_left: int) -> Plan:
        """The plan of a window and a head layout, updated by the step's first layer that asks."""
        assert isinstance(step, PackedStep)
        geometry = Geometry(window_left, h_q, pages.h_kv, pages.head_dim)
        plan = self._packed_plans.get((step.one_each, geometry))
        if plan is None:
            if self.workspace is not None:
                got = f"a window or head layout that came later: {geometry}"
                raise UnsupportedModelError(describe("layers", "the same in every forward pass", got))
            if geometry not in self.geometries:
                self.geometries.append(geometry)
            plan = self._new_packed_plan(step.one_each, geometry, None)
        if geometry not in step.planned:
            plan.update(step.seq_lens, step.cu_seqlens)
            step.planned.add(geometry)
        return plan

    def prepare(self, geometries: Sequence[Geometry]) -> None:
        """Make every plan, for decoding and for prefill, over one workspace: no two kernels use it at a time."""
        self.geometries = list(geometries)
        capacities = [self.capacity(one_each, geometry) for one_each in (True, False) for geometry in geometries]
        size = max((capacity.workspace_floats for capacity in capacities), default=0)
        with torch.inference_mode(False):
            self.workspace = torch.zeros(size, dtype=torch.float32, device=self.paged.device)
        for one_each in (True, False):
            for geometry in geometries:
                self._new_packed_plan(one_each, geometry, self.workspace)

    def _new_packed_plan(self, one_each: bool, geometry: Geometry, workspace: Tensor | None) -> Plan:
        with torch.inference_mode(False):
            plan = Plan(self.capacity(one_each, geometry), geometry.window_left, self.paged.device, workspace)
        self._packed_plans[one_each, geometry] = plan
        return plan

    def capacity(self, one_each: bool, geometry: Geometry) -> Capacity:
        """The largest step of decoding, or of prefill, over this pool."""
        paged = self.paged
        return packed_capacity(
            paged.device, one_each, geometry, max_batch=paged.max_batch, max_seq_len=paged.max_seq_len,
            num_pages=paged.num_pages, page_size=paged.page_size, max_tokens=self.max_tokens,
        )  # fmt: skip

    @property
    def plan_bytes(self) -> int:
        """Bytes of plans and workspace."""
        shared = self.workspace.nbytes if self.workspace is not None else 0
        return shared + sum(plan.buffer.nbytes for plan in self._packed_plans.values())


def packed_capacity(
    device: torch.device, one_each: bool, geometry: Geometry, *, max_batch: int, max_seq_len: int, num_pages: int,
    page_size: int, max_tokens: int,
) -> Capacity:  # fmt: skip
    """The `Capacity` of an engine's steps: `max_batch` tokens of as many sequences, or `max_tokens` of them."""
    return Capacity.for_device(
        device, max_batch=max_batch, max_q_tokens=max_batch if one_each else max_tokens, max_seq_len=max_seq_len,
        total_tokens=num_pages * page_size, h_q=geometry.h_q, h_kv=geometry.h_kv, head_dim=geometry.head_dim,
        page_size=page_size,
    )  # fmt: skip
