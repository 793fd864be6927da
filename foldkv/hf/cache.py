"""A transformers `Cache` whose layers keep K and V in the pages of one `PagedKVCache`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from quant import ops
from quant.cache import PagedKVCache
from quant.errors import ArgumentError, UnsupportedModelError, describe
from quant.pages import LayerPages, identity_params

from .state import CacheState, LayerParams

# The attribute that carries a `FoldLayer` from `Cache.update` to the attention function, on the tensors themselves.
TAG = "_foldkv_layer"


class FoldLayer(CacheLayerMixin):
    """One layer: appends to its pages and attends to them. Keeps every token; a window is the kernel's affair."""

    is_sliding = False
    is_croppable = True
    is_compileable = False
    supports_early_init = False

    def __init__(self, state: CacheState, layer_idx: int) -> None:
        super().__init__()
        self.state = state
        self.layer_idx = layer_idx
        self._index = -1

    @property
    def pages(self) -> LayerPages:
        """The pools of this layer, once it is initialised."""
        return self.state.paged.layers[self._index]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the pools for the heads and head size of `[b, h_kv, s, d]` tensors, and set the layer's scales."""
        if key_states.shape != value_states.shape:
            got = f"{list(key_states.shape)} and {list(value_states.shape)}"
            raise UnsupportedModelError(describe(f"K and V of layer {self.layer_idx}", "equal shapes", got))
        if key_states.device != self.state.paged.block_table.device:
            got = f"{key_states.device} in layer {self.layer_idx}"
            wanted = f"every layer on {self.state.paged.block_table.device}"
            raise UnsupportedModelError(describe("device", wanted, got, "load the model on one device"))
        paged = self.state.paged
        index = paged.add_layer(self.state.specs[self.layer_idx], key_states.shape[1], key_states.shape[3])
        params = self.state.params[self.layer_idx]
        if params is not None:
            paged.set_params(index, *params)
        self._index, self.is_initialized = index, True

    def set_params(self, params: LayerParams) -> None:
        """Put scale parameters in place, those that change nothing for None."""
        pages = self.pages
        if params is None:
            shape = (pages.h_kv, pages.head_dim, pages.k.params.device)
            params = (identity_params(pages.k.fmt, *shape), identity_params(pages.v.fmt, *shape), None, None)
        self.state.paged.set_params(self._index, *params)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append K and V `[b, h_kv, s, d]` (after RoPE); returns them tagged, for the attention function."""
        step = self.state.step_for(key_states.shape[0], key_states.shape[2])
        if self.layer_idx in step.appended:
            raise UnsupportedModelError(describe(f"layer {self.layer_idx}", "one append a forward pass", "two"))
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        pages = self.pages
        rows = (-1, pages.h_kv, pages.head_dim)
        k, v = (states.detach().transpose(1, 2).reshape(rows) for states in (key_states, value_states))
        ops.append_kv(pages, k, v, step.slots, nonfinite=self.state.nonfinite)
        step.appended.add(self.layer_idx)
        # Fresh objects, so that the tag cannot outlive this pass.
        key_states, value_states = key_states.view_as(key_states), value_states.view_as(value_states)
        for states in (key_states, value_states):
            setattr(states, TAG, self)
        return key_states, value_states

    def attend(
        self,
        query: Tensor,
        *,
        starts: Tensor | None,
        softmax_scale: float | None,
        window_left: int,
        softcap: float,
        sinks: Tensor | None,
    ) -> Tensor:
        """Attention of `query` `[b, h_q, q_len, d]`, the last q_len positions; starts: int32, `[b]` elements, or None.

        Returns `[b, q_len, h_q, d]`, contiguous, in the query's dtype.
        """
        state = self.state
        step = state.step
        if step is None:
            raise ArgumentError(describe("attention", "a running forward pass", "none"))
        batch, h_q, q_len, head_dim = query.shape
        pages = self.pages
        if starts is not None and not step.attended and not state.mask_checked:
            step.seq_starts = starts.reshape(-1).expand(batch).contiguous()
        plan = state.plan(step, pages, h_q, q_len, window_left)
        out = ops.append_attention(
            pages,
            query.transpose(1, 2).reshape(-1, h_q, head_dim),
            step.block_table,
            step.seq_lens,
            state.cu_seqlens(batch, q_len),
            plan,
            seq_starts=step.seq_starts,
            softmax_scale=softmax_scale,
            window_size=(window_left, -1),
            softcap=softcap,
            sinks=sinks,
        )
        step.attended.add(self.layer_idx)
        return out.view(batch, q_len, h_q, head_dim)  # type: ignore[union-attr]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that the coming `query_length` tokens may see, and the position of the first one."""
        return self.state.length + query_length, 0

    def get_seq_length(self) -> int:
        """Committed tokens of each row, padding included."""
        return self.state.length

    def get_max_length(self) -> int:
        """Tokens that a row can hold, -1 where the cache grows."""
        return -1 if self.state.grows else self.state.paged.max_seq_len

    def get_max_cache_shape(self) -> int:
        """`get_max_length` under its name before transformers 5.13."""
        return self.get_max_length()

    def _whole(self, *args: Any, **kwargs: Any) -> None:
        """Layers share their page ids, so rows and lengths change for all of them at once."""
        raise ArgumentError(describe("FoldLayer", "a call on the whole FoldCache", "one on a single layer"))

    crop = reset = reorder_cache = batch_repeat_interleave = batch_select_indices = _whole
    offload = prefetch = _whole


class FoldCache(Cache):
    """A paged, quantised KV cache for `past_key_values=` of a swapped model. Make it with `KVSwap.new_cache`.

    Every row holds the same number of tokens, left padding included. `max_batch` and `max_seq_len` are fixed; passing
    them raises PoolExhaustedError and leaves the cache as it was.
    """

    def __init__(self, state: CacheState, num_layers: int) -> None:
        super().__init__(layers=[FoldLayer(state, layer_idx) for layer_idx in range(num_layers)])
        self.state = state

    def forward(self) -> Any:
        """Context of one forward pass: commits what the pass appended, or takes it back if the pass fails."""
        return self.state.forward()

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Append to one layer; see `FoldLayer.update`."""
        if layer_idx >= len(self.layers):
            got = f"layer {layer_idx}"
            raise UnsupportedModelError(describe("layer of the cache", f"0 .. {len(self.layers) - 1}", got))
        return self.layers[layer_idx].update(key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Committed tokens of each row, padding included."""
        return self.state.length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Keys that the coming `query_length` tokens may see, and the position of the first one."""
        return self.state.length + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Tokens that a row can hold, -1 where the cache grows."""
        return -1 if self.state.grows else self.state.paged.max_seq_len

    def get_max_cache_shape(self, layer_idx: int | None = None) -> int:
        """`get_max_length` under its name before transformers 5.13."""
        return self.get_max_length()

    def crop(self, tokens_to_remove: int = 0, *, max_length: int | None = None) -> None:
        """Forget tokens: a negative number of them, or a positive length to keep (transformers before 5.15)."""
        count = int(tokens_to_remove if max_length is None else max_length)
        remove = -count if count < 0 else self.state.length - count if count > 0 else 0
        self.state.rollback(min(max(remove, 0), self.state.length))

    def reset(self) -> None:
        """Forget every row; pools and scales stay where they are."""
        self.state.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: row `i` goes on from row `beam_idx[i]`; pages are shared until written."""
        self.state.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times, in place of the row."""
        self.state.select([row for row in range(self.state.batch) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` (int64 or a bool mask `[b]`), in that order."""
        if self.state.batch:
            self.state.select(torch.arange(self.state.batch)[indices.cpu()].tolist())

    @property
    def batch_size(self) -> int:
        """Rows held, -1 while there are none."""
        return self.state.batch or -1

    @property
    def is_initialized(self) -> bool:
        """Whether any layer has its pools."""
        return bool(self.state.paged.layers)

    @property
    def paged(self) -> PagedKVCache:
        """The pages themselves."""
        return self.state.paged

    @property
    def nbytes(self) -> int:
        """Bytes held by pools, scale data and tables; pools come with the first forward pass."""
        return self.state.paged.nbytes

    @property
    def bits_per_element(self) -> float:
        """Mean stored bits of a K or V element, scale data included; 0 before the first forward pass."""
        return self.state.paged.bits_per_element

    @property
    def num_nonfinite(self) -> int:
        """NaN and infinite elements met in K and V so far, stored as 0 and as the nearest finite value."""
        return int(self.state.nonfinite)
