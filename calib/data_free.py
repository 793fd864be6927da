"""Statistics without data: K offsets from the bias of k_proj through RoPE, widths from the weights."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quant.errors import UnsupportedModelError, describe
from quant.scales import PERCENTILES, LayerStats, TensorStats

from .collect import check_model

SIGMAS = 8.0
"""A channel is taken to reach so many of its deviations to either side of its offset: inputs are no Gaussians."""


@torch.no_grad()
def bias_stats(model: PreTrainedModel, max_position: int) -> list[LayerStats | None]:
    """Statistics of K and V over positions 0 .. max_position - 1, from the weights alone.

    A normalised input is taken to have independent channels of unit power, so that channel c of a projection W has
    deviation sqrt(sum_j (W_cj gamma_j)^2) and mean its bias; RoPE turns mean and deviation of K. The offset, exact where
    the bias is, is what matters (published figures on Qwen2.5 put such offsets within 0.03 perplexity of measured ones);
    the width is a guess: prefer any text.
    Errors: UnsupportedModelError where the layers do not have q_proj, k_proj, v_proj behind a plain norm, or norm q or k.
    """
    check_model(model)
    base: Any = model.get_decoder()
    return [_layer(model, base, layer, max_position) for layer in getattr(base, "layers", [None])]


def _layer(model: PreTrainedModel, base: Any, layer: Any, max_position: int) -> LayerStats:
    attention: Any = getattr(layer, "self_attn", None)
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    usable = attention is not None and all(hasattr(attention, name) for name in names)
    usable = usable and hasattr(layer, "input_layernorm") and not hasattr(attention, "k_norm")
    rotate = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if not usable or rotate is None or not hasattr(base, "rotary_emb"):
        fix = "calibrate with text"
        wanted = "q_proj, k_proj, v_proj and o_proj behind input_layernorm, with RoPE and no norm of k"
        raise UnsupportedModelError(describe("estimator bias", wanted, type(model).__name__, fix))
    d = attention.head_dim
    gamma = layer.input_layernorm.weight.double()
    (q_mean, q_var), (k_mean, k_var), (v_mean, v_var) = (
        _moments(getattr(attention, name), gamma, d) for name in names[:3]
    )
    h_kv, group = k_mean.shape[0], q_mean.shape[0] // k_mean.shape[0]

    # One position a row: cos and sin [1, positions, d]; a mean turns as a vector, variances as its squares.
    places = torch.arange(max_position, device=gamma.device)[None]
    cos, sin = base.rotary_emb(torch.zeros(1, 1, d, dtype=torch.float32, device=gamma.device), places)

    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """`[positions, heads, d]` of x `[heads, d]` at every position."""
        rows = x.float()[None, :, None].expand(1, -1, max_position, -1)
        return rotate(rows, rows, cos, sin)[0][0].transpose(0, 1).double()

    none = torch.zeros_like(cos)
    power = turned(k_var, cos.square(), none) + turned(k_var, none, sin.square()).abs()
    power, offsets = power.mean(0), turned(k_mean, cos, sin)
    weight = (q_var + q_mean.square()).view(h_kv, group, d).mean(1)
    columns = attention.o_proj.weight.double().square().sum(0).view(h_kv, group, d).sum(1)
    k = _stats(offsets.amin(0), offsets.amax(0), offsets.mean(0), power + offsets.var(0, correction=0), power, weight)
    k.query = turned(q_mean.view(h_kv, group, d).mean(1), cos, sin).mean(0).float().cpu()
    v = _stats(v_mean, v_mean, v_mean, v_var, v_var, columns)
    return LayerStats(k, v)


def _moments(projection: Any, gamma: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Mean and variance fp64 `[heads, d]` of a projection's output."""
    weight = projection.weight.double() * gamma
    bias = weight.new_zeros(len(weight)) if projection.bias is None else projection.bias.double()
    return bias.view(-1, head_dim), weight.square().sum(1).view(-1, head_dim)


def _stats(low: Tensor, high: Tensor, mean: Tensor, var: Tensor, noise: Tensor, weight: Tensor) -> TensorStats:
    reach = SIGMAS * noise.sqrt()
    low, high = low - reach, high + reach
    # Quantiles of a uniform range stand in for percentiles.
    steps = torch.tensor(PERCENTILES, dtype=torch.float64, device=low.device).view(-1, 1, 1) / 100
    values = (low, high, mean, var, low + (high - low) * steps, weight)
    low, high, mean, var, percentiles, weight = (value.float().cpu() for value in values)
    return TensorStats(low, high, mean, var, percentiles, weight, tokens=1)
