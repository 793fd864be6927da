"""KV scales as other engines write them, and what foldkv makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quant.codecs import codec
from quant.errors import ScaleFileError, describe
from quant.scales import PERCENTILES, KVScales, LayerStats, StaticScale, TensorStats
from quant.spec import Format

from ..derive import grid

FP8_MAX = 448.0
"""Largest value of fp8 e4m3."""
_RANGES = {"fp8": (-FP8_MAX, FP8_MAX), "int8": (-127.5, 127.5), "int4": (-7.5, 7.5)}
"""What a symmetric scale is multiplied by to give the range: compressed-tensors' half-range of the codes."""


@dataclass(frozen=True)
class ExternalTensor:
    """Scales of K or V of one layer: a value is (code - zero) * scale.

    scale: fp32 `[1]`, `[h_kv]` or `[h_kv, d]`. kind: "fp8", "int8", "int4". zero: of unsigned integer codes, shaped as
    `scale`, or None for symmetric ones.
    """

    scale: Tensor
    kind: str = "fp8"
    zero: Tensor | None = None


@dataclass
class ExternalScales:
    """One pair (K, V) a layer, None for layers without a cache. facts: what the file says beside them."""

    layers: list[tuple[ExternalTensor, ExternalTensor] | None]
    facts: dict[str, Any] = field(default_factory=dict)

    def check(self, where: str) -> None:
        """ScaleFileError naming layer and tensor for scales that are missing, unusable, or were never calibrated."""
        present = [(idx, pair) for idx, pair in enumerate(self.layers) if pair is not None]
        if not present:
            raise ScaleFileError(describe(where, "KV scales", "none"))
        for idx, pair in present:
            for name, tensor in zip(("k_scale", "v_scale"), pair, strict=True):
                if not torch.isfinite(tensor.scale).all() or not (tensor.scale > 0).all():
                    got = "zero, negative, NaN or inf"
                    raise ScaleFileError(describe(f"{where}: layer {idx} {name}", "finite scales > 0", got))
        for name, side in (("k_scale", 0), ("v_scale", 1)):
            if all(bool((pair[side].scale == 1).all()) for _, pair in present):
                fix = "1.0 is what engines put where nothing was calibrated: calibrate the model"
                raise ScaleFileError(describe(f"{where}: {name}", "calibrated scales", "1.0 everywhere", fix))


def to_scales(external: ExternalScales, shapes: Sequence[tuple[int, int]], config: dict[str, Any]) -> KVScales:
    """`KVScales` that know the ranges of `external` and nothing more: no mean, no balance.

    shapes: (kv heads, channels) of each layer. Errors: ScaleFileError for a wrong number of layers or heads.
    """
    if len(external.layers) != len(shapes):
        raise ScaleFileError(describe("layers with scales", str(len(shapes)), str(len(external.layers))))
    layers: list[LayerStats | None] = []
    for idx, (pair, shape) in enumerate(zip(external.layers, shapes, strict=True)):
        named = None if pair is None else [
            _to_stats(tensor, shape, f"layer {idx} {name}") for tensor, name in zip(pair, ("K", "V"), strict=True)
        ]  # fmt: skip
        layers.append(None if named is None else LayerStats(*named))
    return KVScales(layers, {**config, "imported": external.facts})


def _to_stats(tensor: ExternalTensor, shape: tuple[int, int], where: str) -> TensorStats:
    scale = tensor.scale.double()
    fitting = {(1,): (1, 1), (shape[0],): (shape[0], 1), shape: shape}
    if tuple(scale.shape) not in fitting:
        wanted = " or ".join(str(size) for size in fitting)
        raise ScaleFileError(describe(f"{where} scale", f"shape {wanted}", str(tuple(scale.shape))))
    scale = scale.view(fitting[tuple(scale.shape)]).expand(shape)
    if tensor.zero is None:
        low, high = (bound * scale for bound in _RANGES[tensor.kind])
    else:
        zero = tensor.zero.double().view(fitting[tuple(tensor.scale.shape)]).expand(shape)
        low, high = -zero * scale, (codec(tensor.kind).max_code - zero) * scale
    low, high = low.float(), high.float()
    steps = torch.tensor(PERCENTILES).view(-1, 1, 1) / 100
    stats = TensorStats(
        min=low, max=high, mean=torch.zeros(shape), var=torch.ones(shape), percentiles=low + (high - low) * steps,
        weight=torch.ones(shape), tokens=1,
    )  # fmt: skip
    if tensor.zero is not None:
        fmt = f"{tensor.kind}.channel.asym"
        stats.static = StaticScale(fmt, scale.float()[:, None].clone(), zero.float()[:, None].clone())
    return stats


def absmax(stats: TensorStats, per: str) -> Tensor:
    """Largest magnitudes fp64 `[1]` ("tensor"), `[h_kv]` ("head") or `[h_kv, d]` ("channel")."""
    found = stats.absmax.double()
    return {"tensor": found.amax().view(1), "head": found.amax(-1), "channel": found}[per]


def fp8_scale(stats: TensorStats, per: str) -> Tensor:
    """absmax / 448, fp32."""
    return (absmax(stats, per) / FP8_MAX).float()


def int4_steps(stats: TensorStats) -> tuple[Tensor, Tensor]:
    """Step and zero point fp32 `[h_kv, d]` of int4 codes per channel: those stored with the statistics, or min .. max."""
    fmt = Format("int4", "channel", symmetric=False)
    stored = stats.static
    if stored is None or not stored.fmt.startswith(str(fmt)):
        stored = grid(stats.min, stats.max, fmt)
    return stored.scale[:, 0], stored.zero_point[:, 0]
