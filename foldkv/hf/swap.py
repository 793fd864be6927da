"""Swap the KV cache of an unmodified transformers model, and swap it back."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from types import MethodType, TracebackType
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.generation import GenerationMode

from quant.cache import PagedKVCache
from quant.errors import ArgumentError, ScaleFileError, describe
from quant.scales import KVScales
from quant.spec import KVSpec, LayerSpecs, check_page_size, parse_modes

from .attention import active_cache, register
from .cache import FoldCache
from .models import check_model, kv_shapes
from .state import CacheState, LayerParams

# The attribute of a swapped model that holds its `KVSwap`.
_MARK = "_foldkv_swap"


def swap_kv_cache(
    model: PreTrainedModel,
    mode: str | KVSpec | LayerSpecs | Mapping[int | str, str | KVSpec] = "c8",
    scales: KVScales | None = None,
    *,
    page_size: int = 64,
    engine: bool | None = None,
) -> KVSwap:
    """Let `model.generate()` keep its KV cache in foldkv pages, and attend to them with foldkv's kernels.

    model:  a transformers decoder; its code and weights are not touched.
    mode:   see `quant.spec.parse_modes`: "c8", "k8v4", "c4,0:c8", a `KVSpec`, a mapping of layers; "auto" is the
            plan of `scales`.
    scales: of `calibrate` or `KVScales.load`; needed by modes with static scales, used where given by the others.
    page_size: tokens of a page: 16, 32, 64 or 128.
    engine: whether `generate` runs on `foldkv.Engine` where that can serve the call (`foldkv.explain` says): None on a GPU.

    Returns the swap; `restore()` it, or use it as a context manager, to have the model back exactly as it was. Only
    `generate` takes the cache by itself; for a forward pass give it one: `model(ids, past_key_values=swap.new_cache(...))`.
    A swapped model cannot be swapped again: restore it first (`current_swap` finds the swap).
    Errors, all before anything is changed: UnsupportedModelError with the reason; ArgumentError for an unknown mode,
    missing scales, or a model already swapped; ScaleFileError for scales of another model.
    """
    return KVSwap(model, mode, scales, page_size=page_size, engine=engine)


def current_swap(model: nn.Module) -> KVSwap | None:
    """The swap that is on for `model`, or None."""
    return model.__dict__.get(_MARK)


class _Absent(Enum):
    """Stands for an attribute that was not there; an enum, as deep copies of a swapped model keep its identity."""

    ABSENT = 0


_ABSENT = _Absent.ABSENT


@dataclass(frozen=True)
class _Change:
    """An instance attribute that a swap set, and what was there before."""

    owner: Any
    name: str
    before: Any

    def undo(self) -> None:
        if self.before is _ABSENT:
            self.owner.__dict__.pop(self.name, None)
        else:
            self.owner.__dict__[self.name] = self.before


class KVSwap:
    """A swapped KV cache; see `swap_kv_cache`.

    model: the model. specs: the format of every layer. scales: those it was swapped with. use_engine: as given.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        mode: str | KVSpec | LayerSpecs | Mapping[int | str, str | KVSpec],
        scales: KVScales | None = None,
        *,
        page_size: int = 64,
        engine: bool | None = None,
    ) -> None:
        check_page_size(page_size)
        check_model(model)
        swap = current_swap(model)
        if swap is not None:
            fix = "restore() that swap first, or leave its with block"
            raise ArgumentError(describe("model", "one with its own cache", f"one swapped to {swap.mode!r}", fix))
        self.model = model
        self.scales = scales
        self.page_size = page_size
        self.use_engine = engine
        self.engine: Any = None  # the one that `generate` made
        self._states: WeakSet[CacheState] = WeakSet()
        self._engines: WeakSet[Any] = WeakSet()
        self._text_config = model.config.get_text_config(decoder=True)
        self.specs = self._parse(mode, scales)
        self._params = self._layer_params(self.specs, scales)
        self._warned_length = False
        self._changes: list[_Change] = []
        try:
            self._install()
        except BaseException:
            self.restore()
            raise

    # --- what it is ---------------------------------------------------------------------------------------------------

    @property
    def mode(self) -> str:
        """The name of the mode, exceptions included."""
        return self.specs.name

    @property
    def params(self) -> list[LayerParams]:
        """What `PagedKVCache.set_params` takes for each layer, or None for a layer without scales."""
        return self._params

    @property
    def num_layers(self) -> int:
        return self._text_config.num_hidden_layers

    @property
    def bits_per_element(self) -> float:
        """Mean stored bits of a K or V element over the layers, dynamic scale data included."""
        shapes = kv_shapes(self._text_config)
        bits = sum(self.specs[idx].bits_per_element(d) * h_kv * d for idx, (h_kv, d) in enumerate(shapes))
        return bits / sum(h_kv * d for h_kv, d in shapes)

    @property
    def is_on(self) -> bool:
        """False once restored."""
        return bool(self._changes)

    def new_cache(self, max_batch: int, max_seq_len: int, *, num_pages: int | None = None) -> FoldCache:
        """A cache for `past_key_values=`, of fixed size: rows (beams included), tokens of each, pages of the pool.

        num_pages: by default enough for every row at its longest; fewer bound the memory, and passing them raises
        PoolExhaustedError.
        """
        return self._new_cache(max_batch, max_seq_len, num_pages=num_pages, grows=False)

    def _new_cache(self, max_batch: int, max_seq_len: int, *, num_pages: int | None = None, grows: bool) -> FoldCache:
        if not self.is_on:
            raise ArgumentError(describe("swap", "one that is on", "a restored one", "swap the model again"))
        paged = PagedKVCache(
            max_batch, max_seq_len, num_pages=num_pages, page_size=self.page_size, device=self.model.device
        )
        state = CacheState(paged, self.specs, self._params, grows)
        self._states.add(state)
        return FoldCache(state, self.num_layers)

    # --- on and off ---------------------------------------------------------------------------------------------------

    def _install(self) -> None:
        model, decoder = self.model, self.model.get_decoder()
        self._change(model, _MARK, self)
        configs = {
            id(module.config): module.config for module in decoder.modules() if isinstance(module, PreTrainedModel)
        }
        for config in configs.values():
            self._change(config, "_attn_implementation_internal", config._attn_implementation)
        decoder.set_attn_implementation(register(decoder.config._attn_implementation))
        for module in {id(module): module for module in (model, decoder)}.values():
            self._change(module, "forward", MethodType(_forward_of(module), module))
        self._change(model, "_prepare_cache_for_generation", MethodType(_prepare_cache_for_generation, model))
        self._change(model, "generate", MethodType(_generate_of(model), model))

    def _change(self, owner: Any, name: str, value: Any) -> None:
        self._changes.append(_Change(owner, name, owner.__dict__.get(name, _ABSENT)))
        owner.__dict__[name] = value

    def restore(self) -> None:
        """Give the model its own cache and attention back, exactly as they were. A second call does nothing."""
        self.release_engine()
        while self._changes:
            self._changes.pop().undo()

    def release_engine(self) -> None:
        """Free the pool and the graphs that `generate` keeps from call to call."""
        if self.engine is not None:
            self.engine.close()
            self.engine = None

    def __enter__(self) -> KVSwap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.restore()

    def __repr__(self) -> str:
        state = "on" if self.is_on else "restored"
        return f"KVSwap({type(self.model).__name__}, {self.mode!r}, {self.bits_per_element:.3g} bits, {state})"

    # --- scales -------------------------------------------------------------------------------------------------------

    def load(
        self,
        mode: str | KVSpec | LayerSpecs | Mapping[int | str, str | KVSpec] | None = None,
        scales: KVScales | None = None,
        *,
        recompute: bool = False,
    ) -> None:
        """Change mode, scales or both while the swap is on; what is left out stays as it is.

        Pages written before mean nothing under other scales, so caches of `new_cache` raise from now on. Engines take the
        change over: new scales of the same formats go to the same addresses and captured graphs stay; another format makes
        their pools anew. Their sequences are computed again from their tokens with `recompute`, and a warning says so.
        Loading A, then B, then A again leaves the bits of A.
        Errors, before anything is changed: as `swap_kv_cache`; ArgumentError while an engine has sequences, without
        `recompute`, and for a swap that is off.
        """
        if not self.is_on:
            raise ArgumentError(describe("swap", "one that is on", "a restored one", "swap the model again"))
        scales = self.scales if scales is None else scales
        specs = self.specs if mode is None else self._parse(mode, scales)
        params = self._layer_params(specs, scales)
        engines = list(self._engines)
        for engine in engines:
            engine.prepare_reload(recompute)
        self.specs, self.scales, self._params, self._warned_length = specs, scales, params, False
        for state in self._states:
            state.is_stale = True
        for engine in engines:
            engine.reload()

    def register_engine(self, engine: Any) -> None:
        """Have `load` tell an engine of changes, as long as it lives."""
        self._engines.add(engine)

    def forget_engine(self, engine: Any) -> None:
        """Undo `register_engine`."""
        self._engines.discard(engine)

    def _parse(
        self, mode: str | KVSpec | LayerSpecs | Mapping[int | str, str | KVSpec], scales: KVScales | None
    ) -> LayerSpecs:
        float_codec = "bf16" if self.model.dtype == torch.bfloat16 else "fp16"
        return parse_modes(mode, self.num_layers, float_codec, scales.plan if scales else None)

    def _layer_params(self, specs: LayerSpecs, scales: KVScales | None) -> list[LayerParams]:
        """Scale parameters of each layer, or None where there are none to set."""
        if scales is None:
            if specs.needs_scales:
                fix = "run foldkv.calibrate(model), or take a mode without them (c8d, c4r)"
                raise ArgumentError(describe(f"scales of mode {specs.name!r}", "KVScales", "none", fix))
            return [None] * self.num_layers
        from calib.derive import layer_params, layer_shaping

        self._check_scales(scales)
        return [
            None if layer is None else (*layer_params(scales, idx, specs[idx]), *layer_shaping(scales, idx, specs[idx]))
            for idx, layer in enumerate(scales.layers)
        ]

    def _check_scales(self, scales: KVScales) -> None:
        """ScaleFileError unless the scales have this model's layers, heads and head size."""
        scales.check_model(self.model.config)
        fix = "the scales are of another model; calibrate this one"
        for idx, shape in enumerate(kv_shapes(self._text_config)):
            layer = scales.layers[idx]
            got = None if layer is None else tuple(layer.k.min.shape)
            if got != shape:
                raise ScaleFileError(describe(f"scales of layer {idx}", f"[heads, d] {shape}", str(got), fix))

    def after_forward(self, cache: FoldCache) -> None:
        """Warn, once a swap, when a sequence passes the length that static scales were calibrated on."""
        known = self.scales.calibrated_len if self.scales and self.specs.needs_scales else None
        if known and not self._warned_length and cache.get_seq_length() > known:
            self._warned_length = True
            warnings.warn(
                f"foldkv: sequences are now longer than the {known} positions that the scales of mode {self.mode!r} were "
                "calibrated for, so K may leave its range; calibrate again with a larger --max-position",
                stacklevel=2,
            )


def _forward_of(module: nn.Module) -> Callable[..., Any]:
    """`forward` of a module, as a function of `self`, that opens a step of the `FoldCache` it is given."""
    own: Callable[..., Any] | None = module.__dict__.get("forward")
    stock = type(module).forward

    @functools.wraps(stock)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            return stock(self, *args, **kwargs) if own is None else own(*args, **kwargs)

        if torch.compiler.is_compiling():  # whoever compiles opens the step outside
            return run(*args, **kwargs)
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, FoldCache):
            cache = next((value for value in args if isinstance(value, FoldCache)), None)
        if cache is active_cache.get():  # Inside the model that opened the step, or no cache of ours at all.
            return run(*args, **kwargs)
        token = active_cache.set(cache)
        try:
            if cache is None:
                return run(*args, **kwargs)
            _check_not_empty(*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
            with cache.forward():
                result = run(*args, **kwargs)
        finally:
            active_cache.reset(token)
        swap = current_swap(self)
        if swap is not None:
            swap.after_forward(cache)
        return result

    return forward


Generator = Callable[["KVSwap", tuple[Any, ...], dict[str, Any]], Any]
_generators: list[Generator] = []


def serve_generate(generator: Generator) -> None:
    """Have `generate` of swapped models ask `generator(swap, args, kwargs)` first; it gives None for what it cannot serve."""
    _generators.append(generator)


def _generate_of(model: PreTrainedModel) -> Callable[..., Any]:
    """`generate` of a swapped model: the engine's where that can serve the call, else transformers' own."""
    own: Callable[..., Any] | None = model.__dict__.get("generate")
    stock = type(model).generate

    @functools.wraps(stock)
    def generate(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        swap = current_swap(self)
        if swap is not None and own is None:
            for generator in _generators:
                found = generator(swap, args, kwargs)
                if found is not None:
                    return found
        return stock(self, *args, **kwargs) if own is None else own(*args, **kwargs)

    return generate


def _check_not_empty(*inputs: Any) -> None:
    """ArgumentError for a batch without rows or without tokens, where transformers stumbles over shapes."""
    for tokens in inputs:
        if isinstance(tokens, torch.Tensor) and not tokens.numel():
            raise ArgumentError(describe("input", "at least one row and one token", f"shape {list(tokens.shape)}"))


def _prepare_cache_for_generation(
    self: PreTrainedModel,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> Any:
    """What `generate` calls for its cache: a paged one that holds every row at its longest, and grows beyond."""
    swap = current_swap(self)
    if swap is None or model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False:
        stock: Callable[..., Any] = type(self)._prepare_cache_for_generation
        return stock(self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
    wanted = generation_config.cache_implementation
    # "dynamic..." is any cache that grows; assisted decoding asks for one by itself in some versions.
    if not (wanted or "dynamic").startswith("dynamic") and wanted != self.generation_config.cache_implementation:
        fix = "leave cache_implementation out, or restore() the model first"
        raise ArgumentError(describe("cache_implementation of a swapped model", "none", repr(wanted), fix))
    generation_config.cache_implementation = None
    rows = batch_size * max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
    assisted = generation_mode == GenerationMode.ASSISTED_GENERATION
    draft_sizes = (generation_config.num_assistant_tokens, generation_config.prompt_lookup_num_tokens)
    drafts = max(size or 0 for size in draft_sizes) if assisted else 0
    model_kwargs["past_key_values"] = swap._new_cache(rows, max_cache_length + drafts + 1, grows=True)
    return None
