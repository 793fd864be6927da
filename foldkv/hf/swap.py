"""Swap the KV cache of an unmodified transformers model, and swap it back."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from types import MethodType, TracebackType
from typing import Any

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
) -> KVSwap:
    """Let `model.generate()` keep its KV cache in foldkv pages, and attend to them with foldkv's kernels.

    model:  a transformers decoder; its code and weights are not touched.
    mode:   see `quant.spec.parse_modes`: "c8", "k8v4", "c4,0:c8", a `KVSpec`, a mapping of layers; "auto" is the
            plan of `scales`.
    scales: of `calibrate` or `KVScales.load`; needed by modes with static scales, used where given by the others.
    page_size: tokens of a page: 16, 32, 64 or 128.

    Returns the swap; `restore()` it, or use it as a context manager, to have the model back exactly as it was. Only
    `generate` takes the cache by itself; for a forward pass give it one: `model(ids, past_key_values=swap.new_cache(...))`.
    A swapped model cannot be swapped again: restore it first (`current_swap` finds the swap).
    Errors, all before anything is changed: UnsupportedModelError with the reason; ArgumentError for an unknown mode,
    missing scales, or a model already swapped; ScaleFileError for scales of another model.
    """
    return KVSwap(model, mode, scales, page_size=page_size)


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

    model: the model. specs: the format of every layer. scales: those it was swapped with.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        mode: str | KVSpec | LayerSpecs | Mapping[int | str, str | KVSpec],
        scales: KVScales | None = None,
        *,
        page_size: int = 64,
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
        self._text_config = model.config.get_text_config(decoder=True)
        float_codec = "bf16" if model.dtype == torch.bfloat16 else "fp16"
        self.specs = parse_modes(mode, self.num_layers, float_codec, scales.plan if scales else None)
        self._params = self._layer_params()
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
        return FoldCache(CacheState(paged, self.specs, self._params, grows), self.num_layers)

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

    def _change(self, owner: Any, name: str, value: Any) -> None:
        self._changes.append(_Change(owner, name, owner.__dict__.get(name, _ABSENT)))
        owner.__dict__[name] = value

    def restore(self) -> None:
        """Give the model its own cache and attention back, exactly as they were. A second call does nothing."""
        while self._changes:
            self._changes.pop().undo()

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

    def _layer_params(self) -> list[LayerParams]:
        """Scale parameters of each layer, or None where there are none to set."""
        if self.scales is None:
            if self.specs.needs_scales:
                fix = "run foldkv.calibrate(model), or take a mode without them (c8d, c4r)"
                raise ArgumentError(describe(f"scales of mode {self.mode!r}", "KVScales", "none", fix))
            return [None] * self.num_layers
        from calib.derive import layer_params

        self._check_scales(self.scales)
        return [
            None if layer is None else layer_params(self.scales, idx, self.specs[idx])
            for idx, layer in enumerate(self.scales.layers)
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
        run = own if own is not None else MethodType(stock, self)
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
