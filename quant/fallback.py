"""The ops in plain PyTorch, for devices without compiled kernels: the reference in fp32. Right, and slow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import reference
from .codecs import codecs
from .pages import LayerPages, PagedTensor
from .plan import PlanLimits, arrivals_at, reference_plan
from .spec import Format


def _format(code: int) -> Format:
    name = next(codec.name for codec in codecs().values() if codec.id == code & 0xFF)
    if not code & 1 << 8:
        return Format(name, "channel" if codecs()[name].is_integer else "none")
    return Format(name, "token", symmetric=not code & 1 << 9, rotate=bool(code & 1 << 10))


def _pages(
    k_cache: Tensor, v_cache: Tensor, k_meta: Tensor, v_meta: Tensor, k_params: Tensor, v_params: Tensor,
    k_format: int, v_format: int, page_size: int,
) -> LayerPages:  # fmt: skip
    k = PagedTensor(_format(k_format), k_cache, k_meta, k_params)
    v = PagedTensor(_format(v_format), v_cache, v_meta, v_params)
    return LayerPages(k, v, page_size, k_params.shape[-1])


def _append_kv(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, k_meta: Tensor, v_meta: Tensor, k_params: Tensor,
    v_params: Tensor, k_shaping: Tensor | None, v_shaping: Tensor | None, slot_mapping: Tensor, cos: Tensor | None,
    sin: Tensor | None, positions: Tensor | None, interleaved: bool, nonfinite: Tensor | None, k_format: int,
    v_format: int, page_size: int,
) -> None:  # fmt: skip
    pages = _pages(k_cache, v_cache, k_meta, v_meta, k_params, v_params, k_format, v_format, page_size)
    pages.k.shaping, pages.v.shaping = k_shaping, v_shaping
    if cos is not None and sin is not None and positions is not None:
        k = reference.apply_rope(k, cos, sin, positions, interleaved)
    if nonfinite is not None:
        kept = (slot_mapping >= 0)[:, None, None]
        nonfinite += ((~torch.isfinite(k) & kept).sum() + (~torch.isfinite(v) & kept).sum()).to(nonfinite.dtype)
    reference.append_kv(pages, k, v, slot_mapping)


def _plan(
    seq_lens: Tensor, cu_seqlens_q: Tensor, seq_starts: Tensor | None, plan: Tensor, window_left: int, *limits: int
) -> None:  # fmt: skip
    starts = None if seq_starts is None else seq_starts.tolist()
    of = PlanLimits(*limits)
    items, merges, header = reference_plan(seq_lens.tolist(), cu_seqlens_q.tolist(), starts, of, window_left)
    arrivals = [0] * (len(merges) * of.kv_heads)
    for start, rows in ((0, [header]), (arrivals_at(of), [arrivals]), (header[8], items), (header[3], merges)):
        numbers = torch.tensor(rows, dtype=torch.int32).flatten()
        plan[start : start + len(numbers)] = numbers.to(plan.device)


def _append_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k_meta: Tensor, v_meta: Tensor, k_params: Tensor, v_params: Tensor,
    block_table: Tensor, seq_lens: Tensor, cu_seqlens_q: Tensor, seq_starts: Tensor | None, plan: Tensor,
    workspace: Tensor, out: Tensor, lse: Tensor | None, sinks: Tensor | None, softmax_scale: float, window_left: int,
    softcap: float, k_format: int, v_format: int, page_size: int,
) -> None:  # fmt: skip
    # The work list in `plan` decides who computes what; here one loop does it all.
    del plan, workspace
    pages = _pages(k_cache, v_cache, k_meta, v_meta, k_params, v_params, k_format, v_format, page_size)
    values, logs = reference.append_attention(
        pages, q, block_table, seq_lens, cu_seqlens_q, seq_starts=seq_starts, dtype=torch.float32,
        softmax_scale=softmax_scale, window_left=window_left, softcap=softcap, sinks=sinks,
    )  # fmt: skip
    out.copy_(values)
    if lse is not None:
        lse.copy_(logs)


def _append_attention_static_grid(*arguments: Any) -> None:
    _append_attention(*arguments[:-1])


def _merge(o: Tensor, lse: Tensor, out: Tensor, out_lse: Tensor) -> None:
    values, logs = reference.merge(o, lse)
    out.copy_(values)
    out_lse.copy_(logs)


def _copy_pages(pool: Tensor, src: Tensor, dst: Tensor) -> None:
    pool[dst] = pool[src]


OPS = {
    "append_kv": _append_kv,
    "plan": _plan,
    "append_attention": _append_attention,
    "append_attention_static_grid": _append_attention_static_grid,
    "merge": _merge,
    "copy_pages": _copy_pages,
}
