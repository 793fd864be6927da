"""What a cache ought to give, without foldkv's kernels: K and V through the reference, attention by PyTorch in fp32.

`EmulatedSource` is a transformers cache whose K and V have been quantised and dequantised on their way in. It serves three
ends: the truth that a swapped model is held against, the other people's formats of `baselines`, and ablations finer than a
layer. `tap` shows the queries, keys and values of every attention call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from calib.derive import layer_params, layer_shaping
from quant import reference
from quant.pages import identity_params
from quant.spec import Format, LayerSpecs

from .sources import CacheSource, NewCache, exact_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from quant.scales import KVScales

NAME = "foldkv_emulated"

Codec = Callable[[Tensor], Tensor]
"""K or V `[b, h_kv, s, d]` to what a cache gives back for it, fp32 of the same shape."""

Codecs = Callable[[int], tuple[Codec, Codec]]
"""The codecs of K and of V of a layer."""

Tap = Callable[[int, Tensor, Tensor, Tensor, dict[str, Any]], None]
"""Called with layer, q `[b, h_q, s, d]`, k and v `[b, h_kv, s_kv, d]`, and the options of the attention."""

_active_tap: ContextVar[Tap | None] = ContextVar("_active_tap", default=None)


# --- codecs -----------------------------------------------------------------------------------------------------------


def rows_of(x: Tensor) -> Tensor:
    """fp32 rows `[b * s, h, d]` of `[b, h, s, d]`."""
    return x.float().transpose(1, 2).reshape(-1, x.shape[1], x.shape[3])


def like(rows: Tensor, x: Tensor) -> Tensor:
    """Rows `[b * s, h, d]` in the order of `x` `[b, h, s, d]`; inverse of `rows_of`."""
    b, h, s, d = x.shape
    return rows.view(b, s, h, d).transpose(1, 2)


def format_codec(fmt: Format, params: Tensor | None, shaping: Tensor | None = None) -> Codec:
    """The reference's codec of `fmt`, exact to the stored bits.

    params: fp32 `[5, h_kv, d]`, or None for the identity. shaping: int8 `[h_kv, d, d]` (`quant.shaping`), or None for rows that
    round plainly.
    """

    def codec(x: Tensor) -> Tensor:
        used = identity_params(fmt, x.shape[1], x.shape[3]) if params is None else params
        used = used.to(x.device)
        shapes = None if shaping is None else shaping.to(x.device)
        codes, meta = reference.encode(rows_of(x), fmt, used, shapes)
        return like(reference.decode(codes, meta, fmt, used, torch.float32), x)

    return codec


def spec_codecs(specs: LayerSpecs, scales: KVScales | None) -> Codecs:
    """The codecs of a mode, with the parameters that a swap would give its layers."""

    def of_layer(layer_idx: int) -> tuple[Codec, Codec]:
        spec = specs[layer_idx]
        if scales is None:
            return format_codec(spec.k, None), format_codec(spec.v, None)
        params, shaping = layer_params(scales, layer_idx, spec), layer_shaping(scales, layer_idx, spec)
        return format_codec(spec.k, params[0], shaping[0]), format_codec(spec.v, params[1], shaping[1])

    return of_layer


def pick_heads(chosen: Codec, other: Codec, heads: Sequence[int]) -> Codec:
    """`chosen` for these kv heads, `other` for the rest."""

    def codec(x: Tensor) -> Tensor:
        mask = torch.zeros(x.shape[1], dtype=torch.bool, device=x.device)
        mask[list(heads)] = True
        return torch.where(mask[:, None, None], chosen(x), other(x))

    return codec


# --- cache and attention ----------------------------------------------------------------------------------------------


class EmulatedCache(DynamicCache):
    """A growing cache of fp32 K and V that went through codecs: when appended, or, `on_read`, all of them at each read."""

    def __init__(self, config: Any, codecs: Codecs, on_read: bool) -> None:
        super().__init__(config=config)
        self._codecs_of = codecs
        self._on_read = on_read
        self._known: dict[int, tuple[Codec, Codec]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append K and V `[b, h_kv, s, d]` (after RoPE); returns all that attention may see, fp32."""
        if layer_idx not in self._known:
            self._known[layer_idx] = self._codecs_of(layer_idx)
        k_codec, v_codec = self._known[layer_idx]
        if self._on_read:
            k, v = super().update(key_states.float(), value_states.float(), layer_idx, *args, **kwargs)
            return k_codec(k), v_codec(v)
        return super().update(k_codec(key_states), v_codec(value_states), layer_idx, *args, **kwargs)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, inner: str, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention in the dtype of the keys, which the emulated cache gives in fp32; output in the query's."""
    tap = _active_tap.get()
    if tap is not None:
        tap(module.layer_idx, query, key, value, kwargs)
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.to(key.dtype)
    attention: Any = ALL_ATTENTION_FUNCTIONS[inner] if inner != "eager" else _eager_of(module)
    out, weights = attention(module, query.to(key.dtype), key, value, attention_mask, **kwargs)
    return out.to(query.dtype), weights


def _eager_of(module: Any) -> Any:
    import sys

    return sys.modules[type(module).__module__].eager_attention_forward


@contextmanager
def emulated_attention(model: PreTrainedModel, tap: Tap | None = None) -> Iterator[None]:
    """Let `model` attend in fp32 where its cache gives fp32; restored on leaving. tap: called at every attention call."""
    before = model.config._attn_implementation
    inner = exact_attention(model)
    name = f"{NAME}_{inner}"
    AttentionInterface.register(name, partial(_attend, inner=inner))
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[inner])
    token = _active_tap.set(tap)
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        _active_tap.reset(token)


class EmulatedSource(CacheSource):
    """A cache of given codecs in plain PyTorch.

    bits: stored bits of a K or V element, scale data included. on_read: the codecs see the whole history at each read, as
    formats with groups of tokens need. note: for the report, where the format comes from.
    """

    def __init__(
        self, name: str, codecs: Codecs, bits: float, *, on_read: bool = False, note: str = "", quantised: bool = True
    ) -> None:
        super().__init__(name)
        self.codecs = codecs
        self.bits = bits
        self.on_read = on_read
        self.note = note
        self.quantised = quantised

    @contextmanager
    def open(self, model: PreTrainedModel) -> Iterator[NewCache]:
        with emulated_attention(model):
            yield lambda batch, max_seq_len: EmulatedCache(model.config, self.codecs, self.on_read)

    def describe(self) -> dict[str, Any]:
        return {"bits_per_element": self.bits, "note": self.note}


__all__ = [
    "Codec", "Codecs", "EmulatedCache", "EmulatedSource", "Tap", "emulated_attention", "format_codec", "like", "pick_heads",
    "rows_of", "spec_codecs",
]  # fmt: skip
