"""One benchmark case: a batch of sequences in caches that rotate, so that no processor cache is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from calib.derive import tensor_params, tensor_shaping
from quant import ops
from quant.errors import ArgumentError, describe
from quant.gram import normalised
from quant.pages import LayerPages, PagedTensor
from quant.plan import Capacity, Plan
from quant.scales import PERCENTILES, TensorStats
from quant.spec import KVSpec


@dataclass(frozen=True)
class Shape:
    """A decode step: `batch` sequences of `seq_len` cached tokens, `q_len` new ones each."""

    batch: int = 1
    seq_len: int = 4096
    h_q: int = 32
    h_kv: int = 8
    head_dim: int = 128
    page_size: int = 64
    q_len: int = 1

    def __str__(self) -> str:
        heads = f"{self.h_q}/{self.h_kv}x{self.head_dim}"
        return f"{self.batch} x {self.seq_len}, {heads}" + (f", q {self.q_len}" if self.q_len > 1 else "")

    def kv_bytes(self, bits_per_element: float) -> float:
        """Bytes of K and V that one step must read, scale data included."""
        return 2 * self.batch * self.seq_len * self.h_kv * self.head_dim * bits_per_element / 8


def keys_and_values(shape: Shape, seed: int = 0) -> tuple[Tensor, Tensor]:
    """K and V of one sequence, fp32 `[seq_len, h_kv, d]`: Gaussian, K with an offset for each channel."""
    generator = torch.Generator().manual_seed(seed)
    size = (shape.seq_len, shape.h_kv, shape.head_dim)
    offset = torch.randn(size[1:], generator=generator)
    return torch.randn(size, generator=generator) + offset, torch.randn(size, generator=generator)


def _calibrate(paged: PagedTensor, x: Tensor) -> None:
    low, high = x.amin(0), x.amax(0)
    ones = torch.ones_like(low)
    stats = TensorStats(
        min=low, max=high, mean=x.mean(0), var=x.var(0), weight=ones, tokens=len(x),
        percentiles=torch.quantile(x[:4096], torch.tensor(PERCENTILES) / 100, dim=0),
        gram=normalised(torch.einsum("thd,the->hde", x, x)),
    )  # fmt: skip
    paged.set_params(tensor_params(stats, paged.fmt))
    paged.set_shaping(tensor_shaping(stats, paged.fmt))


@dataclass
class CacheCase:
    """A mode at a shape, ready to run: `run(i)` does one step on cache i of `copies`."""

    spec: KVSpec
    shape: Shape
    copies: int
    num_workers: int = 8
    _step: Callable[[int], None] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        s = self.shape
        pages_each = -(-s.seq_len // s.page_size)
        pages_step = pages_each * s.batch
        pages = LayerPages.empty(self.spec, pages_step * self.copies, s.page_size, s.h_kv, s.head_dim)
        k, v = keys_and_values(s)
        for paged, x in ((pages.k, k), (pages.v, v)):
            _calibrate(paged, x)
        slots = torch.arange(s.seq_len)
        ops.append_kv(pages, k, v, slots)
        for pool in (pages.k.codes, pages.k.meta, pages.v.codes, pages.v.meta):
            if pool.numel():
                pool.view(-1, pages_each, *pool.shape[1:])[1:] = pool[:pages_each].clone()
        tables = torch.arange(pages_step * self.copies, dtype=torch.int32).view(self.copies, s.batch, pages_each)
        seq_lens = torch.full((s.batch,), s.seq_len, dtype=torch.int32)
        cu_seqlens_q = torch.arange(0, (s.batch + 1) * s.q_len, s.q_len, dtype=torch.int32)
        tokens = s.batch * s.seq_len
        capacity = Capacity(
            s.batch, s.batch * s.q_len, s.seq_len, tokens, s.h_q, s.h_kv, s.head_dim, s.page_size, self.num_workers
        )
        plan = Plan(capacity)
        plan.update(seq_lens, cu_seqlens_q)
        q = torch.randn(s.batch * s.q_len, s.h_q, s.head_dim, generator=torch.Generator().manual_seed(1))
        out = torch.empty_like(q)

        def step(i: int) -> None:
            ops.append_attention(pages, q, tables[i % self.copies], seq_lens, cu_seqlens_q, plan, out=out)

        self._step = step

    def run(self, i: int) -> None:
        self._step(i)


@dataclass
class SdpaCase:
    """PyTorch's scaled_dot_product_attention on a contiguous cache, as a peer.

    folded: the query group becomes rows of one head (the fast way by hand); otherwise `enable_gqa=True`, which is what
    transformers calls.
    """

    dtype: torch.dtype
    shape: Shape
    copies: int
    folded: bool

    def __post_init__(self) -> None:
        s = self.shape
        if s.q_len != 1:
            raise ArgumentError(describe("q_len of the PyTorch peer", "1", str(s.q_len)))
        k, v = (x.transpose(0, 1).to(self.dtype) for x in keys_and_values(s))
        self._k, self._v = (x.expand(self.copies, s.batch, -1, -1, -1).contiguous() for x in (k, v))
        group = s.h_q // s.h_kv
        rows = (s.batch, s.h_kv, group, s.head_dim) if self.folded else (s.batch, s.h_q, 1, s.head_dim)
        self._q = torch.randn(rows, generator=torch.Generator().manual_seed(1)).to(self.dtype)

    def run(self, i: int) -> None:
        k, v = self._k[i % self.copies], self._v[i % self.copies]
        torch.nn.functional.scaled_dot_product_attention(self._q, k, v, enable_gqa=not self.folded)
