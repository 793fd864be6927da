"""The ops: `foldkv::append_kv`, `plan`, `append_attention`, `merge`, `copy_pages`, in `torch.library`; and the reference
launch `append_attention_static_grid`, which a plan with `Capacity.static_grid` asks for.

Schemas stand here; the extension `quant._C` brings the kernels, and where it has none `quant.fallback` does, in PyTorch.
The functions of this module take the tensors grouped as `LayerPages` and `Plan`, and fill in defaults.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import backend
from .errors import ArgumentError, describe
from .pages import LayerPages
from .plan import Plan

_PAGES = (
    "Tensor{k} k_cache, Tensor{v} v_cache, Tensor{km} k_meta, Tensor{vm} v_meta, Tensor k_params, Tensor v_params, "
)
_ATTENTION = (
    "Tensor q, "
    + _PAGES.format(k="", v="", km="", vm="")
    + "Tensor block_table, Tensor seq_lens, Tensor cu_seqlens_q, Tensor? seq_starts, Tensor plan, Tensor(a!) workspace, "
    "Tensor(b!) out, Tensor(c!)? lse, Tensor? sinks, float softmax_scale, int window_left, float softcap, "
    "int k_format, int v_format, int page_size"
)
SCHEMAS = {
    "append_kv": "(Tensor k, Tensor v, "
    + _PAGES.format(k="(a!)", v="(b!)", km="(c!)", vm="(d!)")
    + "Tensor? k_shaping, Tensor? v_shaping, Tensor slot_mapping, Tensor? cos, Tensor? sin, Tensor? positions, "
    "bool interleaved, Tensor(e!)? nonfinite, "
    "int k_format, int v_format, int page_size) -> ()",
    "plan": "(Tensor seq_lens, Tensor cu_seqlens_q, Tensor? seq_starts, Tensor(a!) plan, int window_left, "
    "int chunk_size, int tile_q, int num_workers, int max_items, int max_tiles, int max_partials, "
    "int max_batch, int grouped_q, int kv_heads) -> ()",
    "append_attention": f"({_ATTENTION}) -> ()",
    "append_attention_static_grid": f"({_ATTENTION}, int grid_workers) -> ()",
    "merge": "(Tensor o, Tensor lse, Tensor(a!) out, Tensor(b!) out_lse) -> ()",
    "copy_pages": "(Tensor(a!) pool, Tensor src, Tensor dst) -> ()",
}

_library = torch.library.Library("foldkv", "DEF")
for _name, _schema in SCHEMAS.items():
    _library.define(_name + _schema)
    torch.library.register_fake(f"foldkv::{_name}", lambda *args: None, lib=_library)
backend.register(_library)


def append_kv(
    pages: LayerPages,
    k: Tensor,
    v: Tensor,
    slot_mapping: Tensor,
    *,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    positions: Tensor | None = None,
    interleaved: bool = False,
    nonfinite: Tensor | None = None,
) -> None:
    """Quantise new K and V rows and write them into their pages. Writing a row twice leaves the same bytes.

    k, v: `[tokens, h_kv, d]` fp32, fp16 or bf16, last dimension contiguous. slot_mapping: int64 `[tokens]`,
    page * page_size + offset; a negative slot skips its row. cos, sin: fp32 `[max_pos, rot / 2]` with positions int64
    `[tokens]`: turn K first (neox pairs, or interleaved). nonfinite: int64 `[1]`, raised by the number of NaN and
    infinite elements met (they are stored as 0 and as the nearest finite value). Errors: RuntimeError naming what was
    expected; nothing is written then.
    """
    torch.ops.foldkv.append_kv(
        k, v, *_tensors(pages), pages.k.shaping, pages.v.shaping, slot_mapping, cos, sin, positions, interleaved, nonfinite,
        pages.k.fmt.code, pages.v.fmt.code, pages.page_size,
    )  # fmt: skip


def append_attention(
    pages: LayerPages,
    q: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    cu_seqlens_q: Tensor,
    plan: Plan,
    *,
    seq_starts: Tensor | None = None,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of each sequence's newest tokens over all its cached tokens, theirs included.

    q: `[tokens, h_q, d]`, the batch's queries one sequence after another; sequence b owns rows
    cu_seqlens_q[b] .. cu_seqlens_q[b + 1] (int32 `[b + 1]`) and they are its last positions. block_table: int32
    `[b, max_pages]`. seq_lens: int32 `[b]`, cached tokens, the new ones included. seq_starts: int32 `[b]`, first
    position that is not padding. plan: updated for these lengths and this window. window_size: (left, right) as in
    FlashAttention; right is -1 or 0, as attention is causal. sinks: fp32 `[h_q]`. softmax_scale: 1 / sqrt(d) by default.
    Returns out `[tokens, h_q, d]` in q's dtype, and with return_lse the natural-log LSE fp32 `[tokens, h_q]`, sink included.
    Rows of no sequence are 0 with LSE -inf. Errors: RuntimeError naming what was expected.
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    if return_lse and lse is None:
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    if window_size[1] > 0:
        raise ValueError(f"window_size: expected (left, -1 or 0), as attention is causal, got {window_size}")
    if plan.capacity.h_kv != pages.h_kv:
        want = f"one for the pages' {pages.h_kv} kv heads"
        raise ArgumentError(describe("plan", want, f"a Capacity of h_kv {plan.capacity.h_kv}", "plan with that h_kv"))
    scale = 1.0 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    arguments = (
        q, *_tensors(pages), block_table, seq_lens, cu_seqlens_q, seq_starts, plan.buffer, plan.workspace,
        out, lse, sinks, scale, window_size[0], softcap, pages.k.fmt.code, pages.v.fmt.code, pages.page_size,
    )  # fmt: skip
    if plan.capacity.static_grid:
        torch.ops.foldkv.append_attention_static_grid(*arguments, plan.capacity.num_workers)
    else:
        torch.ops.foldkv.append_attention(*arguments)
    return (out, lse) if return_lse else out  # type: ignore[return-value]


def merge(o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Combine n partial results in order: o `[n, tokens, h, d]`, lse fp32 `[n, tokens, h]` (natural log).

    Returns o `[tokens, h, d]` in o's dtype and lse fp32 `[tokens, h]`. An empty part has lse -inf.
    """
    out = torch.empty(o.shape[1:], dtype=o.dtype, device=o.device)
    out_lse = torch.empty(lse.shape[1:], dtype=torch.float32, device=o.device)
    torch.ops.foldkv.merge(o, lse, out, out_lse)
    return out, out_lse


def merge_states(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Combine two partial results over different keys: o `[tokens, h, d]`, lse fp32 `[tokens, h]` each; as `merge`."""
    return merge(torch.stack((o_a, o_b)), torch.stack((lse_a, lse_b)))


def copy_pages(pages: LayerPages, src: Tensor, dst: Tensor) -> None:
    """Copy whole pages inside every pool of a layer: int64 page ids `src` to `dst` `[n]`, which must not overlap."""
    for part in (pages.k, pages.v):
        for pool in (part.codes, part.meta):
            if pool.numel():
                torch.ops.foldkv.copy_pages(pool, src, dst)


def _tensors(pages: LayerPages) -> tuple[Tensor, ...]:
    k, v = pages.k, pages.v
    return k.codes, v.codes, k.meta, v.meta, k.params, v.params
