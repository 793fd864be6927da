"""A mode of foldkv as a source of the report: through the swap, and beside it through the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from quant.errors import ArgumentError, UnsupportedModelError, describe
from quant.spec import KVSpec, LayerSpecs, parse_modes

from .emulate import EmulatedSource, spec_codecs
from .sources import CacheSource, NewCache

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from quant.scales import KVScales

Mode = str | KVSpec | LayerSpecs | CacheSource

PIECE = 7
"""Tokens by which a prompt is longer than what an engine that takes it in pieces appends at once."""


class ModeSource(CacheSource):
    """A mode of foldkv, through `swap_kv_cache`."""

    kernels = True

    def __init__(self, name: str, specs: LayerSpecs, scales: KVScales | None) -> None:
        super().__init__(name)
        self.specs = specs
        self.scales = scales
        used = (specs.default, *specs.layers.values())
        self.quantised = any(_is_quantised(spec) for spec in used)
        self.searches = any(spec.k.searches_range or spec.k.steers_rounding or spec.v.searches_range for spec in used)
        known = scales is not None and any(gram is not None for grams in scales.grams for gram in grams)
        self.shapes = known and any(spec.k.shapes_rounding or spec.v.shapes_rounding for spec in used)

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

    def generate(
        self, model: PreTrainedModel, prompts: Tensor, num_tokens: int, *, pieces: bool = False,
        advance: Callable[[int], object] = lambda tokens: None,
    ) -> tuple[Tensor, bool]:  # fmt: skip
        """Greedy tokens int64 `[n, num_tokens]` after prompts `[n, length]` by `foldkv.Engine`, all in one batch.

        pieces: prompts appended in pieces, and half of them in a batch. advance: called with the tokens generated.
        The source must be open. Gives also whether every step was the replay of a CUDA graph.
        """
        from foldkv.engine import Engine, SamplingParams

        count, length = prompts.shape
        batch = -(-count // 2) if pieces else count
        prefill = max(1, length - PIECE) if pieces else count * length
        texts: list[list[int]] = [[] for _ in range(count)]
        with Engine(
            model, max_batch=batch, max_seq_len=length + num_tokens, buckets=(batch,), prefill_tokens=prefill
        ) as engine:
            for row, token in engine.stream(list(prompts), SamplingParams(num_tokens, stop_token_ids=())):
                texts[row].append(token)
                advance(1)
            return torch.tensor(texts), not engine.no_graph_reason

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
        return EmulatedSource(f"{self.name}.reference", spec_codecs(self.specs, self.scales), 0.0)

    def describe(self) -> dict[str, Any]:
        spec = self.specs.default
        layers = {str(i): f"{layer.k} / {layer.v}" for i, layer in sorted(self.specs.layers.items())}
        return {"k_format": str(spec.k), "v_format": str(spec.v)} | ({"layer_formats": layers} if layers else {})


def make_source(mode: Mode, model: PreTrainedModel, scales: KVScales | None) -> CacheSource:
    """The source of a mode, on this model; a `CacheSource` is given back as it is. ArgumentError for a bad mode."""
    if isinstance(mode, CacheSource):
        return mode
    float_codec = "bf16" if model.dtype == torch.bfloat16 else "fp16"
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    specs = parse_modes(mode, num_layers, float_codec, scales.plan if scales else None)
    if scales is None and specs.needs_scales:
        fix = "calibrate the model first: foldkv calibrate MODEL"
        raise ArgumentError(describe(f"mode {specs.name}", "the scales of a calibration", "none", fix))
    return ModeSource(mode if isinstance(mode, str) else specs.name, specs, scales)


def _is_quantised(spec: KVSpec) -> bool:
    return spec.k.element.is_integer or spec.v.element.is_integer
