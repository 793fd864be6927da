"""Where the caches of a run come from: a mode of ours, or the stock cache of transformers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from quant.errors import UnsupportedModelError
from quant.spec import KVSpec, LayerSpecs

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from quant.scales import KVScales

NewCache = Callable[[int, int], Any]
"""`new_cache(batch, max_seq_len)`: an empty transformers Cache to pass as `past_key_values`."""


class CacheSource(ABC):
    """Something that gives a model empty caches; one run of the report is one source fed one way.

    name: the key in the report. quantised: its logits must differ from the base's. kernels: it runs on foldkv's ops,
    which are then counted. fed: the way by which it is fed where one is enough.
    """

    quantised = True
    kernels = False
    fed = "prefill"

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def open(self, model: PreTrainedModel) -> AbstractContextManager[NewCache]:
        """Prepare the model; leaving the context restores it."""

    def decode(self, model: PreTrainedModel, ids: Tensor, prefill: int = 1) -> Iterator[tuple[int, Tensor]]:
        """Teacher-forced decode of ids `[windows, length]` through one captured graph, the source being open.

        Yields (position, logits `[windows, 1, vocab]`) from position prefill - 1 on; a step may overwrite the one before.
        """
        raise NotImplementedError(f"{self.name} has no graph")

    def refuses_decode(self, model: PreTrainedModel, length: int) -> str | None:
        """Why `decode` cannot be had for texts of `length` tokens; None where it can."""
        return "it has no graph"

    def reference(self) -> CacheSource | None:
        """What this source should give, by other means, for its logits to be held against; None where there is none."""
        return None

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

    def decode(self, model: PreTrainedModel, ids: Tensor, prefill: int = 1) -> Iterator[tuple[int, Tensor]]:
        """Through `foldkv.Engine`: on a GPU each step is one replay, on a CPU the same code without graphs."""
        from foldkv.engine import Engine

        with Engine(model, max_batch=ids.shape[0], max_seq_len=ids.shape[1], buckets=(ids.shape[0],)) as engine:
            for position, logits in enumerate(engine.score(ids, prefill), prefill - 1):
                yield position, logits[:, None]

    def refuses_decode(self, model: PreTrainedModel, length: int) -> str | None:
        """What the engine says to the model; an engine for one sequence is made to find out."""
        from foldkv.engine import Engine

        try:
            with self.open(model), Engine(model, max_batch=1, max_seq_len=length):
                return None
        except UnsupportedModelError as error:
            return str(error)

    def reference(self) -> CacheSource:
        """The same formats and scales through `quant.reference`, with neither the swap nor a kernel."""
        from .emulate import EmulatedSource, spec_codecs

        return EmulatedSource(f"{self.name}.reference", spec_codecs(self.specs, self.scales), 0.0)

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
        model.set_attn_implementation(exact_attention(model))
        try:
            yield lambda batch, max_seq_len: DynamicCache(config=model.config)
        finally:
            model.set_attn_implementation(before)


def exact_attention(model: PreTrainedModel) -> str:
    """The attention of transformers that computes what the model means: torch's, or eager with a soft cap or sinks."""
    config = model.config.get_text_config(decoder=True)
    softcap = getattr(config, "attn_logit_softcapping", None)
    return "eager" if softcap or "sinks" in dict(_attention_parameters(model)) else "sdpa"


def _attention_parameters(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """The last names of the parameters of the modules that cache."""
    for name, parameter in model.named_parameters():
        if "attn" in name or "attention" in name:
            yield name.rpartition(".")[2], parameter


def _is_quantised(spec: KVSpec) -> bool:
    return spec.k.element.is_integer or spec.v.element.is_integer
