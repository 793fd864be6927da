"""What the GPU tests share: the device, captured graphs, and the rule of precision.

FOLDKV_TEST_DEVICE=cpu runs them on the CPU, whose kernels then play the GPU's part: a graph is an eager call there, and
what only CUDA has is left out. That checks the tests, not the kernels.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops_helpers import SPECS, Batch, Source
from torch import Tensor

from quant import reference
from quant.plan import Capacity, Plan
from quant.spec import KVSpec, resolve_mode

DEVICE = torch.device(os.environ.get("FOLDKV_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
cuda_only = pytest.mark.skipif(not ON_GPU, reason="a matter of CUDA")

HALF = torch.float16
_CACHE_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def spec_of(mode: str) -> KVSpec:
    """A mode of `SPECS`, or two of them as "K/V"."""
    return SPECS[mode] if mode in SPECS else resolve_mode(mode)


def make_source(
    mode: str, h_kv: int = 2, group: int = 2, d: int = 64, page_size: int = 16, dtype: torch.dtype = HALF
) -> Source:
    return Source(spec_of(mode), h_kv, group, d, page_size, dtype, DEVICE)


def device_workers(h_kv: int) -> int:
    """The number of workers that `Capacity.for_device` chooses."""
    sizes = {"max_batch": 1, "max_q_tokens": 1, "max_seq_len": 1, "total_tokens": 1, "head_dim": 64, "page_size": 16}
    return Capacity.for_device(DEVICE, **sizes, h_q=h_kv, h_kv=h_kv).num_workers


def capture(step: Callable[[], object]) -> Callable[[], object]:
    """`step` as a captured graph, called once before; returns what replays it."""
    step()  # loads the kernels
    if not ON_GPU:
        return step
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    torch.cuda.synchronize()
    return graph.replay


def bits(x: Tensor) -> Tensor:
    """The bits of a float tensor as integers, so that NaN equals NaN and -0 is not 0."""
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def same_bits(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True))


def is_split(plan: Plan) -> bool:
    """True where some tile's chunks were cut among workers."""
    return int(plan.buffer[1]) > 0


# --- precision --------------------------------------------------------------------------------------------------------


def _plain(
    q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype, start: int, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Attention as PyTorch does it in `dtype`: matmul, softmax, matmul. Shapes and options of `reference.attention`."""
    q_len, h_q, d = q.shape
    seq_len, h_kv, _ = k.shape
    q, k, v = (x.to(dtype) for x in (q, k, v))
    scale = options.get("softmax_scale") or 1.0 / math.sqrt(d)
    logits = torch.einsum("qhgd,khd->hgqk", q.view(q_len, h_kv, h_q // h_kv, d), k) * scale
    if softcap := options.get("softcap", 0.0):
        logits = softcap * torch.tanh(logits / softcap)
    key = torch.arange(seq_len, device=q.device)
    query = torch.arange(seq_len - q_len, seq_len, device=q.device)[:, None]
    hidden = (key > query) | (key < start)
    if (window := options.get("window_size", (-1, -1))[0]) >= 0:
        hidden |= query - key > window
    logits = logits.masked_fill(hidden, -math.inf)
    if (sinks := options.get("sinks")) is not None:
        column = sinks.to(dtype).view(h_kv, h_q // h_kv, 1, 1).expand(-1, -1, q_len, 1)
        logits = torch.cat((logits, column), dim=-1)
    weights = torch.softmax(logits, dim=-1).nan_to_num()[..., :seq_len]
    out = torch.einsum("hgqk,khd->qhgd", weights, v).reshape(q_len, h_q, d)
    return out, torch.logsumexp(logits.float(), dim=-1).permute(2, 0, 1).reshape(q_len, h_q)


def _hold(name: str, got: Tensor, plain: Tensor, want: Tensor, floor: float, most: float, mean: float) -> None:
    """Assert at most `most` times the greatest and `mean` times the mean error of plain PyTorch, and a small floor."""
    error, allowed = ((x.double() - want).abs() for x in (got, plain))
    for kind, limit, figure in (("greatest", most, Tensor.max), ("mean", mean, Tensor.mean)):
        found, bound = float(figure(error)), limit * float(figure(allowed)) + floor
        assert found <= bound, f"{name}: {kind} error {found:.3g}, limit {bound:.3g}"


def check_precision(batch: Batch, plan: Plan | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """Hold the op to the error of plain PyTorch in the same precision; return what it gave.

    Errors are against fp64 over the stored bytes. Plain PyTorch has K and V dequantised exactly, in the cache's 16-bit
    dtype or else in that of q. Over the batch the greatest error is at most twice, the mean error 1.5 times its own; each
    sequence's alone 4 and 3 times, as short ones would hide long ones. The LSE: 3 and 2 times, and a floor of its own.
    """
    out, lse = batch.attend(plan, **options)
    want, want_lse = batch.truth(**options)
    seen = torch.isfinite(want_lse)
    assert torch.equal(torch.isfinite(lse), seen) and torch.equal(lse[~seen], want_lse[~seen].float())
    assert torch.isfinite(out).all() and not out[want.abs().amax(-1) == 0].any()
    dtype = _CACHE_DTYPES.get(batch.source.spec.k.codec, out.dtype)
    plain, plain_lse, largest = torch.zeros_like(out), torch.zeros_like(lse), 0.0
    for b, seq_len in enumerate(batch.seq_lens.tolist()):
        rows, start = batch.rows(b), 0 if batch.seq_starts is None else int(batch.seq_starts[b])
        if rows.start == rows.stop or seq_len == 0:
            continue
        parts = (batch.pages.k, batch.pages.v)
        k, v = (reference.read(part, batch.source.page_size, batch.block_table[b], seq_len) for part in parts)
        plain[rows], plain_lse[rows] = _plain(batch.q[rows], k, v, dtype, start, options)
        name, floor = f"sequence {b} of {seq_len} tokens, {rows.stop - rows.start} queries", 1e-5 * float(v.abs().max())
        _hold(name, out[rows], plain[rows], want[rows], floor, 4, 3)
        largest = max(largest, float(v.abs().max()))
    seen &= (want != 0).any(-1)  # an LSE that is the sink's alone is held to nothing but being finite
    if seen.any():
        _hold("output", out, plain, want, 1e-5 * largest, 2, 1.5)
        # A query folded with the scales is rounded once for all keys, so that its error does not average out in the LSE.
        floor = torch.finfo(dtype).eps / 16 * max(1.0, float(want_lse[seen].abs().max()))
        _hold("LSE", lse[seen], plain_lse[seen], want_lse[seen], floor, 3, 2)
    return out, lse
