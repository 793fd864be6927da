"""Balance and rotation written into the weights: K and V that are easier to quantise, the same function.

K: channel pairs of RoPE divided by a balance, the query rows multiplied by it. V: any invertible matrix T per head,
v_proj becomes T^-1 v_proj and o_proj becomes o_proj T. A mean cannot be written into K, whose bias RoPE turns.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quant.errors import ArgumentError, UnsupportedModelError, describe
from quant.reference import hadamard
from quant.scales import KVScales, TensorStats

from .derive import MAX_BALANCE, balance

V_KINDS = ("none", "balance", "rotate")
K_KINDS = ("none", "balance")
_TINY = 1e-12


@torch.no_grad()
def rewrite_model(model: PreTrainedModel, scales: KVScales, *, k: str = "balance", v: str = "rotate") -> None:
    """Rewrite q, k, v and output projections of every layer in place; the model's function stays, up to rounding.

    scales: of `calibrate` on this model.
    k: "balance": pairs that RoPE turns together share a factor. "none".
    v: "balance": the one of `derive.balance`; "rotate": a Hadamard rotation behind it; "none".
    What was calibrated before does not fit the rewritten model: calibrate it again.
    Errors: ArgumentError for an unknown kind, UnsupportedModelError where the projections do not stand alone; both before
    anything is changed.
    """
    for name, kind, kinds in (("k", k, K_KINDS), ("v", v, V_KINDS)):
        if kind not in kinds:
            raise ArgumentError(describe(f"rewrite of {name}", f"one of {', '.join(kinds)}", repr(kind)))
    layers = [module for module in model.modules() if hasattr(module, "layer_idx") and hasattr(module, "v_proj")]
    if not layers or len(layers) != sum(layer is not None for layer in scales.layers):
        fix = "its projections are fused or shared, so they cannot be rewritten"
        raise UnsupportedModelError(describe("model", "q_proj, k_proj, v_proj and o_proj", type(model).__name__, fix))
    partner = _rope_partner(model, layers[0]) if k != "none" else None
    for attention in layers:
        _check_layer(attention, scales[attention.layer_idx].k, k)
    transforms = [None if v == "none" else v_transform(scales[one.layer_idx].v, v) for one in layers]
    for attention, transform in zip(layers, transforms, strict=True):
        stats = scales[attention.layer_idx]
        if partner is not None:
            fold_k_balance(attention, pair_balance(stats.k, partner))
        if transform is not None:
            fold_v_transform(attention, transform)


def pair_balance(stats: TensorStats, partner: Tensor) -> Tensor:
    """K balance fp64 `[h_kv, d]` that is equal on both channels of a RoPE pair, geometric mean 1 per head.

    partner: int64 `[d]`, the other channel of each one's pair. As `derive.balance`, over the sums of each pair.
    """
    var, weight = (part.double() + part.double()[:, partner] for part in (stats.var, stats.weight))
    log = (var.clamp(min=_TINY).log() - weight.clamp(min=_TINY).log()) / 4
    log = (log - log.median(-1, keepdim=True).values).clamp(-_LIMIT, _LIMIT)
    return (log - log.mean(-1, keepdim=True)).exp()


_LIMIT = float(torch.tensor(MAX_BALANCE).log())


def v_transform(stats: TensorStats, kind: str) -> Tensor:
    """T fp64 `[h_kv, d, d]`: T^-1 v is what shall be cached. "balance": diagonal; "rotate": balance, then Hadamard."""
    d = stats.head_dim
    diagonal = torch.diag_embed(balance(stats).double())
    return diagonal if kind == "balance" else diagonal @ hadamard(torch.eye(d, dtype=torch.float64))


def fold_k_balance(attention: Any, factor: Tensor) -> None:
    """Divide K by `factor` `[h_kv, d]`, equal on RoPE pairs, and multiply the group's queries by it."""
    q, k = attention.q_proj, attention.k_proj
    group = q.weight.shape[0] // k.weight.shape[0]
    _scale_rows(k, 1 / factor.flatten())
    _scale_rows(q, factor.repeat_interleave(group, dim=0).flatten())


def fold_v_transform(attention: Any, transform: Tensor) -> None:
    """Cache T^-1 v in place of v, T fp64 `[h_kv, d, d]`, and give T to the columns of o_proj."""
    v, o = attention.v_proj, attention.o_proj
    h_kv, d, _ = transform.shape
    inverse = torch.linalg.inv(transform).to(v.weight.device)
    transform = transform.to(v.weight.device)
    v.weight.copy_((inverse @ v.weight.double().view(h_kv, d, -1)).flatten(0, 1))
    if v.bias is not None:
        v.bias.copy_((inverse @ v.bias.double().view(h_kv, d, 1)).flatten())
    columns = o.weight.double().view(o.weight.shape[0], h_kv, -1, d)
    o.weight.copy_(torch.einsum("ohgc,hcd->ohgd", columns, transform).flatten(1))


def _scale_rows(linear: Any, factor: Tensor) -> None:
    factor = factor.to(linear.weight.device)
    linear.weight.copy_(linear.weight.double() * factor[:, None])
    if linear.bias is not None:
        linear.bias.copy_(linear.bias.double() * factor)


def _check_layer(attention: Any, stats: TensorStats, k: str) -> None:
    """UnsupportedModelError unless the projections are plain ones of the calibrated shape."""
    where = f"layer {attention.layer_idx}"
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    plain = all(isinstance(getattr(attention, name, None), nn.Linear) for name in names)
    if not plain or attention.k_proj.out_features != stats.h_kv * stats.head_dim:
        raise UnsupportedModelError(describe(where, "linear q_proj, k_proj, v_proj and o_proj", "others"))
    if k != "none" and any(hasattr(attention, name) for name in ("k_norm", "q_norm", "qk_norm", "k_layernorm")):
        fix = "rewrite V alone"
        raise UnsupportedModelError(describe(where, "K without a norm behind its projection", "a norm", fix))
    if any(hasattr(attention, name) for name in ("v_norm", "gate_proj", "g_proj")):
        raise UnsupportedModelError(describe(where, "V and output that are linear", "a norm or a gate between them"))


def _rope_partner(model: PreTrainedModel, attention: Any) -> Tensor:
    """The other channel of each channel's RoPE pair, int64 `[d]`, found by turning unit vectors."""
    rotate = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    rotary = getattr(model.get_decoder(), "rotary_emb", None)
    if rotate is None or rotary is None:
        raise UnsupportedModelError(describe("model", "RoPE by apply_rotary_pos_emb", type(model).__name__))
    d = attention.head_dim
    units = torch.eye(d, device=attention.k_proj.weight.device)[None, None]
    cos, sin = rotary(units[0], torch.ones(1, d, dtype=torch.int64, device=units.device))
    if cos.shape[-1] != d:
        got = f"{cos.shape[-1]} of {d}"
        raise UnsupportedModelError(describe("model", "RoPE over whole heads", got, "rewrite V alone"))
    turned = rotate(units, units, cos, sin)[0][0, 0].abs()
    turned.fill_diagonal_(0)
    return turned.argmax(-1).cpu()
