"""The same model on transformers' own caches: StaticCache with torch.compile, QuantizedCache with its backends."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import StaticCache

from foldkv.hf.models import kv_shapes
from foldkv.hf.quantized_cache import QUANTIZED_CACHES, QuantizedCacheKind

Step = Callable[[], object]


def static_cache(model: PreTrainedModel, batch: int, seq_len: int, steps: int) -> Step:
    """A decoding step on a StaticCache that holds `seq_len` random tokens, compiled as transformers' guide has it."""
    config = model.config.get_text_config(decoder=True)
    (h_kv, head_dim), *_ = kv_shapes(config)
    cache = StaticCache(config=config, max_cache_len=seq_len + steps)
    cache.early_initialization(batch, h_kv, head_dim, model.dtype, model.device)
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(seq_len)
    mode = "reduce-overhead" if model.device.type == "cuda" else "default"
    compiled = torch.compile(model.forward, mode=mode, fullgraph=True)
    return _loop(compiled, model, cache, batch, seq_len)


def quantized_cache(kind: QuantizedCacheKind, model: PreTrainedModel, batch: int, seq_len: int, steps: int) -> Step:
    """A decoding step on a QuantizedCache of random K and V; it cannot be compiled. ImportError without its backend.

    What transformers spends on quantising all anew, once in 128 steps, is in the row only where there are so many.
    """
    config = model.config.get_text_config(decoder=True)
    cache = kind.make(config)
    for idx, (h_kv, head_dim) in enumerate(kv_shapes(config)):
        shape = (batch, h_kv, seq_len, head_dim)
        k, v = (torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2))
        cache.update(k, v, idx)
    return _loop(model, model, cache, batch, seq_len)


def _loop(call: Callable[..., Any], model: PreTrainedModel, cache: Any, batch: int, seq_len: int) -> Step:
    """Greedy decoding, one token a call; the token stays on the device."""
    tokens = torch.ones(batch, 1, dtype=torch.int64, device=model.device)
    positions = torch.full((batch, 1), seq_len, dtype=torch.int64, device=model.device)

    @torch.no_grad()
    def step() -> Tensor:
        logits = call(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True).logits
        tokens.copy_(logits[:, -1].argmax(-1, keepdim=True))
        positions.add_(1)
        return tokens

    return step


# name -> bits an element of its cache, and what makes a step
PEERS: dict[str, tuple[float, Callable[[PreTrainedModel, int, int, int], Step]]] = {
    "static": (16, static_cache),
    **{name: (kind.bits, partial(quantized_cache, kind)) for name, kind in QUANTIZED_CACHES.items()},
}
