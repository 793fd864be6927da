"""What a swapped model really does with its cache: op calls counted, bytes read off the tensors the ops were given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quant import ops

from .evaluate import feed
from .sources import CacheSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ARGUMENTS = {
    name: [argument.name for argument in getattr(torch.ops.foldkv, name).default._schema.arguments]
    for name in ("append_kv", "append_attention")
}
assert set(_ARGUMENTS) <= set(ops.SCHEMAS)


@dataclass(frozen=True)
class LayerStore:
    """How a layer's cache is laid out: format numbers of the kernels, kv heads, channels, bytes of one token."""

    k_format: int
    v_format: int
    h_kv: int
    head_dim: int
    bytes_per_token: float


@dataclass
class Probe:
    """Calls of the ops in a number of forward passes. Layers are told apart by the address of their K pool."""

    forwards: int = 0
    append_calls: int = 0
    attention_calls: int = 0
    layers: dict[int, LayerStore] = field(default_factory=dict)
    attended: set[int] = field(default_factory=set)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of one cached token over all layers, dynamic scale data included."""
        return sum(layer.bytes_per_token for layer in self.layers.values())

    @property
    def bits_per_element(self) -> float:
        """Mean stored bits of a K or V element, dynamic scale data included."""
        elements = sum(2 * layer.h_kv * layer.head_dim for layer in self.layers.values())
        return 8 * self.bytes_per_token / elements if elements else 0.0

    @property
    def sound(self) -> bool:
        """Each forward pass appended to every layer's pages once, and attention read those same pages."""
        per_pass = self.forwards * len(self.layers)
        return (
            0 < per_pass == self.append_calls and self.attention_calls >= per_pass and self.attended == set(self.layers)
        )


class _Recorder(TorchDispatchMode):
    def __init__(self, probe: Probe) -> None:
        super().__init__()
        self.probe = probe

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.removeprefix("foldkv::")
        if name in _ARGUMENTS:
            self._record(name, dict(zip(_ARGUMENTS[name], args, strict=False)) | dict(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _record(self, name: str, given: dict[str, Any]) -> None:
        pool: Tensor = given["k_cache"]
        if name == "append_attention":
            self.probe.attention_calls += 1
            self.probe.attended.add(pool.data_ptr())
            return
        self.probe.append_calls += 1
        pools = [given[key] for key in ("k_cache", "v_cache", "k_meta", "v_meta")]
        tokens = pool.shape[0] * given["page_size"]
        _, h_kv, head_dim = given["k"].shape
        self.probe.layers[pool.data_ptr()] = LayerStore(
            given["k_format"], given["v_format"], h_kv, head_dim, sum(p.nbytes for p in pools) / tokens
        )


@torch.inference_mode()
def probe(model: PreTrainedModel, source: CacheSource, ids: Tensor, chunk: int) -> Probe:
    """Feed ids `[windows, length]` through a cache of `source`, `chunk` tokens at once, and record the ops called."""
    result = Probe()
    with source.open(model) as new_cache, _Recorder(result):
        for _ in feed(model, new_cache, ids.to(model.device), chunk):
            result.forwards += 1
    return result
