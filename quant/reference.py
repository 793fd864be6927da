"""What is right: quantise, pack, append, attend and merge in plain PyTorch.

Quantisation is fp32 arithmetic, one rounding per written operation, so that any device can give the same bytes.
Attention and merge are fp64. Nothing here is fast.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .dynamic import quantize_rows
from .pages import BALANCE, MEAN, QUERY, SCALE, ZERO, LayerPages, PagedTensor
from .spec import Format
from .steering import steered_codes

_FLOAT = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Dynamic formats cut what they quantise to this magnitude, so that no sum of a rotation overflows.
_MAX_DYNAMIC = 2.0**100


# --- rotation ---------------------------------------------------------------------------------------------------------


def hadamard_block(head_dim: int) -> int:
    """Size of the rotation's diagonal blocks: the largest power of two that divides `head_dim`."""
    return head_dim & -head_dim


def hadamard(x: Tensor) -> Tensor:
    """Orthonormal block-diagonal Hadamard transform of the last dimension, its own inverse; same dtype as `x`.

    Butterflies of distance 1, 2, 4, ..., then one multiplication by 1 / sqrt(block).
    """
    block = hadamard_block(x.shape[-1])
    y = x
    step = 1
    while step < block:
        pairs = y.reshape(*x.shape[:-1], x.shape[-1] // (2 * step), 2, step)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack((a + b, a - b), dim=-2).reshape(x.shape)
        step *= 2
    return y * torch.tensor(1.0 / math.sqrt(block), dtype=x.dtype, device=x.device)


# --- quantise ---------------------------------------------------------------------------------------------------------


def _finite(x: Tensor, bound: Tensor | float) -> Tensor:
    """NaN becomes 0, +-inf becomes +-bound."""
    x = torch.where(torch.isnan(x), torch.zeros_like(x), x)
    return torch.where(
        torch.isinf(x), torch.copysign(torch.as_tensor(bound, dtype=x.dtype, device=x.device).expand_as(x), x), x
    )


def quantize(x: Tensor, fmt: Format, params: Tensor, shaping: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero of rows `x`.

    x: `[tokens, h_kv, d]`, any float dtype; an integer format; params: fp32 `[5, h_kv, d]`; shaping: int8
    `[h_kv, d, d]`, see `quant.shaping`, looked at by formats that shape their rounding.
    Returns codes int32 `[tokens, h_kv, d]`, scale and zero fp32, `[tokens, h_kv, 1]` for dynamic formats and
    `[h_kv, d]` for static ones. A NaN counts as 0; an infinity takes the end code (static) or the row's largest
    finite magnitude (dynamic).
    """
    x = x.float()
    if fmt.is_dynamic:
        finite = torch.where(torch.isfinite(x), x.abs(), torch.zeros_like(x))
        x = _finite(x, finite.amax(-1, keepdim=True))
    else:
        x = torch.where(torch.isnan(x), torch.zeros_like(x), x)
    y = (x - params[MEAN]) / params[BALANCE]
    if fmt.is_dynamic:
        y = y.clamp(-_MAX_DYNAMIC, _MAX_DYNAMIC)
    if fmt.rotate:
        y = hadamard(y)
    if fmt.is_dynamic:
        codes, scale, zero = quantize_rows(y, fmt, shaping)
        return codes.to(torch.int32), scale, zero
    scale, zero = params[SCALE], params[ZERO]
    place = y / scale + zero
    if fmt.steers_rounding:
        codes = steered_codes(place, params[QUERY])
    else:
        codes = torch.round(place).clamp(0, fmt.element.max_code)
    return codes.to(torch.int32), scale, zero


def dequantize(
    codes: Tensor, fmt: Format, params: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype = torch.float64
) -> Tensor:
    """The values `[tokens, h_kv, d]` that codes stand for, computed in `dtype`."""
    y = (codes.to(dtype) - zero.to(dtype)) * scale.to(dtype)
    if fmt.rotate:
        y = hadamard(y)
    return y * params[BALANCE].to(dtype) + params[MEAN].to(dtype)


# --- bytes ------------------------------------------------------------------------------------------------------------


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """uint8 rows `[..., d * bits / 8]` of integer codes `[..., d]`: the lowest channel in the lowest bits."""
    per_byte = 8 // bits
    groups = codes.reshape(*codes.shape[:-1], codes.shape[-1] // per_byte, per_byte)
    shifts = torch.arange(per_byte, device=codes.device, dtype=torch.int32) * bits
    return (groups << shifts).sum(-1).to(torch.uint8)


def unpack_codes(rows: Tensor, bits: int) -> Tensor:
    """int32 codes `[..., d]` of uint8 rows; inverse of `pack_codes`."""
    shifts = torch.arange(8 // bits, device=rows.device, dtype=torch.int32) * bits
    codes = (rows.to(torch.int32).unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return codes.flatten(-2)


def pack_meta(scale: Tensor, zero: Tensor, fmt: Format) -> Tensor:
    """uint8 `[..., meta_bytes]` of dynamic scale and zero `[..., 1]`."""
    parts = [scale.bfloat16().view(torch.uint8)]
    if not fmt.symmetric:
        parts.append(zero.half().view(torch.uint8))
    return torch.cat(parts, dim=-1)


def unpack_meta(meta: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """fp32 scale and zero `[..., 1]` of uint8 `[..., meta_bytes]`."""
    scale = meta[..., :2].contiguous().view(torch.bfloat16).float()
    if fmt.symmetric:
        return scale, torch.full_like(scale, fmt.element.mid_code)
    return scale, meta[..., 2:4].contiguous().view(torch.float16).float()


def encode(x: Tensor, fmt: Format, params: Tensor, shaping: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The bytes of rows `x` `[tokens, h_kv, d]`: codes uint8 `[tokens, h_kv, row_bytes]`, meta `[.., meta_bytes]`.

    params, shaping: as `quantize` has them.
    """
    if not fmt.element.is_integer:
        dtype = _FLOAT[fmt.codec]
        limit = torch.finfo(dtype).max
        rows = _finite(x.float(), limit).clamp(-limit, limit).to(dtype)
        return rows.contiguous().view(torch.uint8), x.new_empty(*x.shape[:-1], 0, dtype=torch.uint8)
    codes, scale, zero = quantize(x, fmt, params, shaping)
    rows = pack_codes(codes, fmt.element.bits)
    if not fmt.is_dynamic:
        return rows, rows.new_empty(*x.shape[:-1], 0)
    return rows, pack_meta(scale, zero, fmt)


def decode(rows: Tensor, meta: Tensor, fmt: Format, params: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """The values `[tokens, h_kv, d]` of stored bytes; inverse of `encode` up to quantisation."""
    if not fmt.element.is_integer:
        return rows.contiguous().view(_FLOAT[fmt.codec]).to(dtype)
    codes = unpack_codes(rows, fmt.element.bits)
    scale, zero = unpack_meta(meta, fmt) if fmt.is_dynamic else (params[SCALE], params[ZERO])
    return dequantize(codes, fmt, params, scale, zero, dtype)


# --- cache ------------------------------------------------------------------------------------------------------------


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, interleaved: bool = False) -> Tensor:
    """Rotary embedding of `x` `[tokens, heads, d]` in fp32: `cos`, `sin` fp32 `[max_pos, rot / 2]`, `positions` `[tokens]`.

    The first `rot` channels turn, as pairs (i, i + rot / 2) (neox) or (2 i, 2 i + 1) (interleaved).
    """
    half = cos.shape[-1]
    c, s = cos[positions, None].float(), sin[positions, None].float()
    turned = x[..., : 2 * half].float()
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.split(half, dim=-1)
    a, b = a * c - b * s, b * c + a * s
    turned = torch.stack((a, b), dim=-1).flatten(-2) if interleaved else torch.cat((a, b), dim=-1)
    return torch.cat((turned, x[..., 2 * half :].float()), dim=-1)


def _write(paged: PagedTensor, x: Tensor, slots: Tensor, page_size: int) -> None:
    rows, meta = encode(x, paged.fmt, paged.params, paged.shaping)
    pages, offsets = slots // page_size, slots % page_size
    for pool, part in ((paged.codes, rows), (paged.meta, meta)):
        pool.view(*pool.shape[:2], page_size, -1)[pages, :, offsets] = part


def append_kv(pages: LayerPages, k: Tensor, v: Tensor, slots: Tensor) -> None:
    """Quantise rows `k`, `v` `[tokens, h_kv, d]` into `slots` int64 `[tokens]` (page * page_size + offset; < 0 skips)."""
    keep = slots >= 0
    _write(pages.k, k[keep], slots[keep], pages.page_size)
    _write(pages.v, v[keep], slots[keep], pages.page_size)


def read(
    paged: PagedTensor, page_size: int, block_table: Tensor, seq_len: int, dtype: torch.dtype = torch.float64
) -> Tensor:
    """The values `[seq_len, h_kv, d]` of one sequence, its pages listed by `block_table` `[max_pages]`."""
    position = torch.arange(seq_len, device=paged.codes.device)
    page_ids, offsets = block_table.long()[position // page_size], position % page_size
    rows, meta = (
        pool.view(*pool.shape[:2], page_size, pool.shape[2] // page_size)[page_ids, :, offsets]
        for pool in (paged.codes, paged.meta)
    )
    return decode(rows, meta, paged.fmt, paged.params, dtype)


# --- attend -----------------------------------------------------------------------------------------------------------


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    window_left: int = -1,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    start: int = 0,
) -> tuple[Tensor, Tensor]:
    """Causal attention of one sequence's newest tokens, in the dtype of `k` (fp64 for the truth).

    q: `[q_len, h_q, d]`, the last q_len positions; k, v: `[seq_len, h_kv, d]`; keys before `start` are padding.
    window_left: a query at position p sees keys p - window_left .. p (-1: all). softcap: cap * tanh(logit / cap).
    sinks: `[h_q]` logits that take probability and no value. Returns out `[q_len, h_q, d]` and the natural-log LSE
    `[q_len, h_q]`, sink included; a query that sees nothing gives 0 and -inf.
    """
    q_len, h_q, d = q.shape
    seq_len, h_kv, _ = k.shape
    scale = 1.0 / math.sqrt(d) if softmax_scale is None else softmax_scale
    grouped = q.to(k.dtype).view(q_len, h_kv, h_q // h_kv, d)
    logits = torch.einsum("qhgd,khd->hgqk", grouped, k) * scale
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    key_pos = torch.arange(seq_len, device=q.device)
    query_pos = torch.arange(seq_len - q_len, seq_len, device=q.device)[:, None]
    visible = (key_pos <= query_pos) & (key_pos >= start)
    if window_left >= 0:
        visible &= query_pos - key_pos <= window_left
    logits = logits.masked_fill(~visible, -math.inf)
    if sinks is not None:
        column = sinks.to(k.dtype).view(h_kv, h_q // h_kv, 1, 1).expand(-1, -1, q_len, 1)
        logits = torch.cat((logits, column), dim=-1)
    lse = torch.logsumexp(logits, dim=-1)
    weights = torch.where(torch.isneginf(lse)[..., None], torch.zeros_like(logits), (logits - lse[..., None]).exp())
    out = torch.einsum("hgqk,khd->qhgd", weights[..., :seq_len], v)
    return out.reshape(q_len, h_q, d), lse.permute(2, 0, 1).reshape(q_len, h_q)


def append_attention(
    pages: LayerPages,
    q: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    *,
    seq_starts: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    **options: float | Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`attention` over the cache, ragged over the batch: see `quant.ops.append_attention`. Returns out and LSE in `dtype`."""
    out = torch.zeros(q.shape, dtype=dtype, device=q.device)
    lse = torch.full(q.shape[:2], -math.inf, dtype=dtype, device=q.device)
    bounds, lengths = cu_seqlens_q.tolist(), seq_lens.tolist()
    starts = [0] * len(lengths) if seq_starts is None else seq_starts.tolist()
    for b, seq_len in enumerate(lengths):
        rows = slice(bounds[b], bounds[b + 1])
        if rows.start == rows.stop:
            continue
        k, v = (read(part, pages.page_size, block_table[b], seq_len, dtype) for part in (pages.k, pages.v))
        out[rows], lse[rows] = attention(q[rows].to(dtype), k, v, start=starts[b], **options)  # type: ignore[arg-type]
    return out, lse


def merge(o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Combine partial results over the first dimension: o `[n, tokens, h, d]`, lse `[n, tokens, h]` natural log, in fp64.

    An empty part has lse -inf; its o is ignored, whatever it holds.
    """
    lse = lse.double()
    total = torch.logsumexp(lse, dim=0)
    weight = torch.where(torch.isneginf(lse), torch.zeros_like(lse), (lse - total).exp())
    parts = torch.where((weight > 0)[..., None], o.double(), torch.zeros_like(o, dtype=torch.float64))
    return (parts * weight[..., None]).sum(0), total
