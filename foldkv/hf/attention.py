"""What a swapped model calls for attention and for its mask, registered in transformers by name.

With a `FoldCache` in the forward pass, attention runs on its pages and the mask is the first valid column of each row.
Without one (training, `use_cache=False`, another cache) both are those that the model had before the swap.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quant.errors import ArgumentError, UnsupportedModelError, describe

from .cache import TAG, FoldCache, FoldLayer

NAME = "foldkv_paged"
# The cache of the forward pass that is running, if it is ours.
active_cache: ContextVar[FoldCache | None] = ContextVar("active_cache", default=None)


def register(original: str | None) -> str:
    """Register the functions that fall back to the attention named `original`; returns the name to switch a model to."""
    fallback = "eager" if original == "eager" else "sdpa"
    name = NAME if fallback == "sdpa" else f"{NAME}_{fallback}"
    AttentionInterface.register(name, partial(attend, fallback=fallback))
    AttentionMaskInterface.register(name, partial(first_valid_column, fallback=fallback))
    return name


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *args: Any,
    fallback: str,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of `query` `[b, h_q, s, d]` over the cache that `key` is tagged with; returns `[b, s, h_q, d]` and None.

    Errors: UnsupportedModelError where the model asks for what the kernels do not do.
    """
    layer: FoldLayer | None = getattr(key, TAG, None)
    value_layer: FoldLayer | None = getattr(value, TAG, None)
    if layer is not None and layer is value_layer:
        return _attend_paged(layer, module, query, attention_mask, *args, **kwargs), None
    if layer is not None or active_cache.get() is not None:
        got = f"others in {type(module).__name__}"
        raise UnsupportedModelError(describe("keys and values", "those that the cache returned", got))
    return _fallback_attention(fallback, module)(module, query, key, value, attention_mask, *args, **kwargs)


def _attend_paged(
    layer: FoldLayer,
    module: nn.Module,
    query: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    trains = module.training and query.requires_grad
    if trains or dropout or position_bias is not None or not causal:
        got = f"training={trains}, {dropout=}, position_bias={position_bias is not None}, is_causal={causal}"
        raise UnsupportedModelError(
            describe(f"attention of {type(module).__name__}", "plain causal inference", got, "call model.eval()")
        )
    if attention_mask is not None and (attention_mask.dtype != torch.int32 or attention_mask.shape[1:] != (1, 1, 1)):
        got = f"{attention_mask.dtype} {list(attention_mask.shape)}"
        fix = "pass a 2-D mask with left padding, or restore() the model"
        raise UnsupportedModelError(describe("attention mask", "none or left padding", got, fix))
    return layer.attend(
        query.detach(),
        starts=attention_mask,
        softmax_scale=scaling,
        window_left=sliding_window - 1 if sliding_window else -1,
        softcap=softcap or 0.0,
        sinks=None if s_aux is None else s_aux.detach().float(),
    )


def first_valid_column(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *args: Any,
    fallback: str,
    mask_function: Callable[..., Tensor | bool] = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of a swapped model: None, or int32 `[b, 1, 1, 1]`, the first column of each row that is not padding.

    attention_mask: bool `[b, kv_length]`, False where padded. Errors: ArgumentError for a mask with padding between
    tokens, UnsupportedModelError for a pattern that is neither causal nor a sliding window.
    """
    cache = active_cache.get()
    if cache is None:
        kwargs |= {"mask_function": mask_function, "attention_mask": attention_mask, "use_vmap": use_vmap}
        return ALL_MASK_ATTENTION_FUNCTIONS[fallback](batch_size, q_length, kv_length, *args, **kwargs)
    if cache.state.mask_checked:
        return None
    if use_vmap or _looks_ahead(mask_function, batch_size, q_length, kv_length, kwargs.get("device")):
        raise UnsupportedModelError(describe("attention pattern", "causal or a sliding window", "another one"))
    if attention_mask is None:
        return None
    if attention_mask.shape[-1] < kv_length:
        got = f"{list(attention_mask.shape)}"
        fix = "let the mask cover the tokens in the cache too"
        raise ArgumentError(describe("attention_mask", f"[{batch_size}, {kv_length}]", got, fix))
    mask = attention_mask[:, :kv_length].to(torch.int32)
    tokens = mask.sum(-1)
    first = torch.where(tokens > 0, mask.argmax(-1), kv_length)
    last = kv_length - mask.flip(-1).argmax(-1)
    if bool(((tokens > 0) & (last - first != tokens)).any()):
        fix = "set tokenizer.padding_side = 'left'"
        raise ArgumentError(describe("attention_mask", "padding on the left only", "padding between tokens", fix))
    return first.to(torch.int32)[:, None, None, None]


def _looks_ahead(
    mask_function: Callable[..., Tensor | bool],
    batch_size: int,
    q_length: int,
    kv_length: int,
    device: torch.device | str | None,
) -> bool:
    """Whether any of the new tokens sees the one after it, as the tokens of an image may."""
    if q_length == 1:
        return False
    query = torch.arange(kv_length - q_length, kv_length - 1, device=device)
    rows = torch.arange(batch_size, device=device)[:, None]
    return bool(torch.as_tensor(mask_function(rows, 0, query, query + 1)).any())


def _fallback_attention(name: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function a model would call under `name`; eager ones stand in its own modelling file."""
    if name == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]
