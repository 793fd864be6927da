"""Captured K and V, and hand-made statistics for the calibration tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from quant.scales import PERCENTILES, KVScales, LayerStats, StaticScale, TensorStats

LAYERS, H_KV, HEAD_DIM = 2, 2, 16


def capture(model: PreTrainedModel, ids: Tensor, **inputs: Tensor) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Post-RoPE q `[batch, h_q, seq, d]`, k and v `[batch, h_kv, seq, d]` of every layer, taken by plain means."""
    seen: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def look(module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen[module.layer_idx] = (q.clone(), k.clone(), v.clone())
        kwargs.pop("softcap", None)
        return sdpa_attention_forward(module, q, k, v, *args, **kwargs)

    AttentionInterface.register("test_capture", look)
    AttentionMaskInterface.register("test_capture", sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("test_capture")
    with torch.no_grad():
        model(ids, use_cache=False, **inputs)
    model.config._attn_implementation_internal = before
    return seen


def stats_of(rows: Tensor, weight: Tensor | None = None) -> TensorStats:
    """Statistics of fp32 rows `[tokens, h_kv, d]`, all of which are the sample too. weight: default 1."""
    percentiles = torch.quantile(rows, torch.tensor(PERCENTILES) / 100, dim=0)
    low, high = rows.amin(0), rows.amax(0)
    weight = torch.ones_like(low) if weight is None else weight
    return TensorStats(low, high, rows.mean(0), rows.var(0, correction=0), percentiles, weight, len(rows), sample=rows)


def random_stats(h_kv: int = H_KV, d: int = HEAD_DIM, seed: int = 0, static: bool = True) -> TensorStats:
    """Sound statistics of random numbers."""
    rows = torch.randn(200, h_kv, d, generator=torch.Generator().manual_seed(seed))
    return TensorStats(
        min=rows.amin(0),
        max=rows.amax(0),
        mean=rows.mean(0),
        var=rows.var(0, correction=0),
        percentiles=torch.quantile(rows, torch.tensor(PERCENTILES) / 100, dim=0),
        weight=rows.square().mean(0),
        tokens=len(rows),
        static=StaticScale("int8.channel.asym", torch.full((h_kv, 1, d), 0.1), torch.full((h_kv, 1, d), 128.0))
        if static
        else None,
    )


def random_scales(layers: int = LAYERS, h_kv: int = H_KV, d: int = HEAD_DIM, **config: Any) -> KVScales:
    """Scales of `layers` layers of random numbers."""
    found: list[LayerStats | None] = [
        LayerStats(random_stats(h_kv, d, 2 * idx), random_stats(h_kv, d, 2 * idx + 1)) for idx in range(layers)
    ]
    return KVScales(found, config)


def rows_of(x: Tensor) -> Tensor:
    """`[batch, heads, seq, d]` as `[batch * seq, heads, d]`."""
    return x.transpose(1, 2).flatten(0, 1)
