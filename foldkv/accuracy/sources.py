"""Where the caches of a run come from: a mode of ours, or the stock cache of transformers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from quant.spec import KVSpec, LayerSpecs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from quant.scales import KVScales

NewCache = Callable[[int, int], Any]
"""`new_cache(batch, max_seq_len)`: an empty transformers Cache to pass as `past_key_values`."""


class CacheSource(ABC):
    """Something that gives a model empty caches; one run of the report is one source fed one way.

    name: the key in the report. quantised: its logits must differ from the base's. kernels: it runs on foldkv's ops,
    which are then counted.
    """

    quantised = True
    kernels = False

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def open(self, model: PreTrainedModel) -> AbstractContextManager[NewCache]:
        """Prepare the model; leaving the context restores it."""

    def describe(self) -> dict[str, Any]:
        """Facts for the report about how K and V are stored.

        A source without kernels must give `bits_per_element`, scale data included, and should give `bytes_per_token`.
        """
        return {}


class ModeSource(CacheSource):
    """A mode of foldkv, through `swap_kv_cache`."""

    kernels = True

    def __init__(self, name: str, specs: LayerSpecs, scales: KVScales | None) -> None:
        super().__init__(name)
        self.specs = specs
        self.scales = scales
        self.quantised = any(_is_quantised(spec) for spec in (specs.default, *specs.layers.values()))

    @contextmanager
    def open(self, model: PreTrainedModel) -> Iterator[NewCache]:
        from foldkv.hf.swap import swap_kv_cache

        with swap_kv_cache(model, self.specs, scales=self.scales) as swap:
            yield swap.new_cache

    def describe(self) -> dict[str, Any]:
        spec = self.specs.default
        layers = {str(i): f"{layer.k} / {layer.v}" for i, layer in sorted(self.specs.layers.items())}
        return {"k_format": str(spec.k), "v_format": str(spec.v)} | ({"layer_formats": layers} if layers else {})


class StockSource(CacheSource):
    """The model as transformers ships it: its own cache and torch's scaled dot-product attention."""

    quantised = False

    def __init__(self) -> None:
        super().__init__("stock")

    @contextmanager
    def open(self, model: PreTrainedModel) -> Iterator[NewCache]:
        from transformers import DynamicCache

        before = model.config._attn_implementation
        model.set_attn_implementation("sdpa")
        try:
            yield lambda batch, max_seq_len: DynamicCache(config=model.config)
        finally:
            model.set_attn_implementation(before)


def _is_quantised(spec: KVSpec) -> bool:
    return spec.k.element.is_integer or spec.v.element.is_integer
