"""The formats that a plan may choose from, for K and for V of each layer, and the maps it must beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quant.spec import KVSpec, LayerSpecs, resolve_mode

STATIC = "c4s"
FULL = "c4r"
DYNAMIC = (FULL, "c4d")
"""Dynamic 4-bit modes: mean, balance and rotation together, and the same unrotated; `transforms` has the others."""
WIDE = ("c8", "c8d", "c16")
EXACT = "c16"
UNIFORM = ("c4s", "c4", "c4r", "k8v4", "c8", "c8d")
"""Whole modes measured beside the plan."""


@dataclass(frozen=True)
class Choice:
    """One tensor ("k" or "v") of one layer stored as in `mode`."""

    layer: int
    tensor: str
    mode: str

    @property
    def name(self) -> str:
        return f"{self.layer}.{self.tensor}.{self.mode}"

    def bits(self, head_dim: int) -> float:
        """Stored bits per element, dynamic scale data included."""
        spec = resolve_mode(self.mode)
        return (spec.k if self.tensor == "k" else spec.v).bits_per_element(head_dim)

    def alone(self, float_codec: str) -> LayerSpecs:
        """This tensor as chosen, everything else exact."""
        pair = (self.mode, EXACT) if self.tensor == "k" else (EXACT, self.mode)
        exact = resolve_mode(EXACT, float_codec)
        return LayerSpecs(exact, {self.layer: resolve_mode("/".join(pair), float_codec)})


@dataclass(frozen=True)
class TensorSize:
    """One K or V tensor of a model: elements of one token, channels of a head."""

    layer: int
    tensor: str
    elements: int
    head_dim: int


def sizes(shapes: Mapping[int, tuple[int, int]]) -> list[TensorSize]:
    """K and V of every layer. shapes: layer -> (kv heads, head_dim)."""
    return [
        TensorSize(layer, tensor, h_kv * head_dim, head_dim)
        for layer, (h_kv, head_dim) in sorted(shapes.items())
        for tensor in ("k", "v")
    ]


def choices(size: TensorSize, dynamic: Sequence[str] = DYNAMIC) -> list[Choice]:
    """What may be chosen for one tensor, by the mode whose K, or V, is meant. dynamic: the 4-bit modes with a scale a token."""
    return [Choice(size.layer, size.tensor, mode) for mode in (STATIC, *dynamic, *WIDE)]


def mode_text(modes: Mapping[int, str]) -> str:
    """The map as `parse_modes` reads it: the most frequent mode, then the layers that differ. modes: layer -> "K/V"."""
    short = {layer: k if k == v else mode for layer, mode in modes.items() for k, v in [mode.split("/")]}
    names = list(short.values())
    default = max(sorted(set(names)), key=names.count)
    return ",".join([default, *(f"{layer}:{mode}" for layer, mode in sorted(short.items()) if mode != default)])


def exempt_maps(layers: Sequence[int]) -> dict[str, str]:
    """The rule of thumb that leaves the first and the last layer at 8 bits."""
    ends = sorted({layers[0], layers[-1]})
    return {f"{mode}, ends c8": ",".join([mode, *(f"{layer}:c8" for layer in ends)]) for mode in ("c4", "c4r")}


def bits_of(specs: LayerSpecs, shapes: Mapping[int, tuple[int, int]]) -> float:
    """Mean stored bits per element of a map over a model's layers."""
    total = sum(h_kv * d for h_kv, d in shapes.values())
    return sum(_spec(specs, idx).bits_per_element(d) * h_kv * d for idx, (h_kv, d) in shapes.items()) / total


def _spec(specs: LayerSpecs, layer: int) -> KVSpec:
    return specs[layer]
