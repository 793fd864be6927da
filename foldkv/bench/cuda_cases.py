"""Caches for the CUDA benchmark: random pages made on the device, read in turn so that L2 never holds what comes next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from quant import ops
from quant.errors import ArgumentError, describe
from quant.pages import BALANCE, MEAN, QUERY, SCALE, ZERO, LayerPages, PagedTensor
from quant.plan import Capacity, Plan
from quant.spec import KVSpec
from quant.steering import MAX_DIRECTION

ROTATION_BYTES = 512 << 20
# Pools of a server: a plan serves max_batch sequences of max_seq_len, but no more tokens than this together.
POOL_TOKENS = 4 << 20
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Workload:
    """A batch: each sequence has `lengths[b]` cached tokens, the last `q_len` of them new.

    max_seq_len: what the plan and the block table are made for, by default the longest sequence. static_grid: the seed of
    the design, see `Capacity`.
    """

    name: str
    lengths: tuple[int, ...]
    q_len: int = 1
    h_q: int = 32
    h_kv: int = 8
    head_dim: int = 128
    page_size: int = 64
    max_seq_len: int | None = None
    static_grid: bool = False

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < self.q_len:
            raise ArgumentError(describe("cached tokens", f"at least the {self.q_len} new ones", str(self.lengths[:4])))
        if self.max_seq_len is not None and self.max_seq_len < max(self.lengths):
            raise ArgumentError(describe("max_seq_len", f"at least {max(self.lengths)}", str(self.max_seq_len)))

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def q_tokens(self) -> int:
        return self.batch * self.q_len

    @property
    def is_uniform(self) -> bool:
        return len(set(self.lengths)) == 1

    @property
    def page_counts(self) -> list[int]:
        return [-(-length // self.page_size) for length in self.lengths]

    def kv_bytes(self, bits: float) -> float:
        """Bytes of K and V that one step reads at `bits` an element, scale data included in them."""
        return 2 * sum(self.lengths) * self.h_kv * self.head_dim * bits / 8

    def append_bytes(self, bits: float, input_bytes: int = 2) -> float:
        """Bytes that appending the new tokens reads (K and V in the model's dtype) and writes."""
        return 2 * self.q_tokens * self.h_kv * self.head_dim * (input_bytes + bits / 8)

    @property
    def flops(self) -> float:
        """Floating-point operations of the pairs of query and key that the causal mask leaves."""
        pairs = sum(self.q_len * (length - self.q_len) + self.q_len * (self.q_len + 1) / 2 for length in self.lengths)
        return 4.0 * self.h_q * self.head_dim * pairs


def copies_for(step_bytes: float, device: torch.device) -> int:
    """How many caches of `step_bytes` rotate: more than 512 MB together, as far as memory goes."""
    copies = max(1, -(-ROTATION_BYTES // int(step_bytes)))
    if device.type != "cuda":
        return copies
    torch.cuda.empty_cache()
    free = int(torch.cuda.mem_get_info(device)[0] * 0.85)
    if step_bytes > free:
        raise ArgumentError(describe("free GPU memory", f"{step_bytes / 1e9:.1f} GB", f"{free / 1e9:.1f} GB"))
    return min(copies, int(free // step_bytes))


def fill_random(paged: PagedTensor, *, is_k: bool) -> None:
    """Random codes, scale data and parameters of sensible size, made where the pool is; they steer and shape as calibrated."""
    fmt, element = paged.fmt, paged.fmt.element
    if element.is_integer:
        paged.codes.random_(0, 256)
    else:
        paged.codes.view(DTYPES[element.name]).normal_()
    if fmt.is_dynamic:
        words = fmt.meta_bytes // 2
        paged.meta.view(torch.bfloat16)[..., ::words].uniform_(0.02, 0.05)
        if words == 2:
            paged.meta.view(torch.float16)[..., 1::2].normal_(element.max_code / 2, 0.5)
    params = paged.params.clone()
    if fmt.is_static:
        params[SCALE].uniform_(3.0 / element.max_code, 5.0 / element.max_code)
        if not fmt.symmetric:
            params[ZERO].normal_(element.max_code / 2, element.max_code / 32)
    if is_k and fmt.steers_rounding and fmt.scaling == "channel":
        params[QUERY].uniform_(-MAX_DIRECTION, MAX_DIRECTION).round_()
    if fmt.center:
        params[MEAN].normal_(0, 0.1)
    if fmt.balance:
        params[BALANCE].uniform_(0.9, 1.1)
    paged.set_params(params)
    if paged.shaping is not None:
        parts = torch.randn(paged.shaping.shape, device=params.device)
        cost = parts.mT @ parts / params.shape[-1]
        cost = (cost + cost.mT) / cost.amax((1, 2), keepdim=True) * 63
        paged.set_shaping(cost.round().to(torch.int8))


class PagedCase:
    """A mode at a workload: `attend`, `plan_step`, `append` and `step` each do one call on cache i of `copies`."""

    def __init__(
        self, spec: KVSpec, work: Workload, device: torch.device, *, dtype: torch.dtype, copies: int | None = None
    ) -> None:
        self.spec, self.work, self.dtype, self.device = spec, work, dtype, device
        counts = torch.tensor(work.page_counts)
        pages_step = int(counts.sum())
        step_bytes = work.kv_bytes(spec.bits_per_element(work.head_dim))
        self.copies = copies or copies_for(step_bytes, device)
        num_pages = pages_step * self.copies
        self.pages = LayerPages.empty(spec, num_pages, work.page_size, work.h_kv, work.head_dim, device)
        fill_random(self.pages.k, is_k=True)
        fill_random(self.pages.v, is_k=False)
        max_seq_len = work.max_seq_len or max(work.lengths)
        column = torch.arange(-(-max_seq_len // work.page_size))
        local = (counts.cumsum(0) - counts)[:, None] + column
        local = local.masked_fill(column >= counts[:, None], 0).to(device)  # what lies past a sequence is never read
        shuffled = torch.randperm(num_pages, device=device).int()
        self.tables = [shuffled[copy * pages_step : (copy + 1) * pages_step][local] for copy in range(self.copies)]
        self.seq_lens = torch.tensor(work.lengths, dtype=torch.int32, device=device)
        self.cu_seqlens_q = torch.arange(work.batch + 1, dtype=torch.int32, device=device) * work.q_len
        tokens = max(sum(work.lengths), min(work.batch * max_seq_len, POOL_TOKENS))
        capacity = Capacity.for_device(
            device, max_batch=work.batch, max_q_tokens=work.q_tokens, max_seq_len=max_seq_len, total_tokens=tokens,
            h_q=work.h_q, h_kv=work.h_kv, head_dim=work.head_dim, page_size=work.page_size,
            static_grid=work.static_grid,
        )  # fmt: skip
        self.plan = Plan(capacity, device=device)
        self.plan.update(self.seq_lens, self.cu_seqlens_q)
        self.q = torch.randn(work.q_tokens, work.h_q, work.head_dim, device=device).to(dtype)
        self.out = torch.empty_like(self.q)

    @cached_property
    def _positions(self) -> Tensor:
        ends = self.seq_lens.long()[:, None] - self.work.q_len
        return (ends + torch.arange(self.work.q_len, device=self.device)).flatten()

    @cached_property
    def _new_rows(self) -> tuple[Tensor, Tensor]:
        """K and V of the new tokens for each copy, `[copies, tokens, h_kv, d]`."""
        shape = (self.copies, self.work.q_tokens, self.work.h_kv, self.work.head_dim)
        return tuple(torch.empty(shape, dtype=self.dtype, device=self.device).normal_() for _ in "kv")  # type: ignore[return-value]

    @cached_property
    def _slots(self) -> list[Tensor]:
        size = self.work.page_size
        sequence = torch.arange(self.work.batch, device=self.device).repeat_interleave(self.work.q_len)
        page, offset = self._positions // size, self._positions % size
        return [table[sequence, page].long() * size + offset for table in self.tables]

    @cached_property
    def _rope(self) -> tuple[Tensor, Tensor]:
        half = self.work.head_dim // 2
        rates = 10000.0 ** (-torch.arange(half, device=self.device) / half)
        angles = torch.arange(max(self.work.lengths), device=self.device)[:, None] * rates
        return angles.cos(), angles.sin()

    def attend(self, i: int) -> None:
        ops.append_attention(
            self.pages, self.q, self.tables[i], self.seq_lens, self.cu_seqlens_q, self.plan, out=self.out
        )

    def plan_step(self, i: int) -> None:
        self.plan.update(self.seq_lens, self.cu_seqlens_q)

    def append(self, i: int) -> None:
        (k, v), (cos, sin) = self._new_rows, self._rope
        ops.append_kv(self.pages, k[i], v[i], self._slots[i], cos=cos, sin=sin, positions=self._positions)

    def step(self, i: int) -> None:
        self.plan_step(i)
        self.append(i)
        self.attend(i)

    def call(self, op: str) -> Callable[[int], None]:
        """The call of an op: attend, plan, append, or step, which is all three."""
        return {"attend": self.attend, "plan": self.plan_step, "append": self.append, "step": self.step}[op]
