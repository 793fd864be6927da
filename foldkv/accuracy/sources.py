"""Where the caches of a run come from: a mode of ours, or the stock cache of transformers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel


NewCache = Callable[[int, int], Any]
"""`new_cache(batch, max_seq_len)`: an empty transformers Cache to pass as `past_key_values`."""


class CacheSource(ABC):
    """Something that gives a model empty caches; one run of the report is one source fed one way.

    name: the key in the report. quantised: its logits must differ from the base's. searches: its rows choose among grids, so
    that a rounding may tip a whole row; shapes: so may it where codes are chosen one after another
    (`verdict.reference_checks`). kernels: it runs on foldkv's ops, which are then
    counted. fed: the way by which it is fed where one is enough.
    """

    quantised = True
    searches = False
    shapes = False
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
