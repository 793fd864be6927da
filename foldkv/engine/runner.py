"""The device's part of an engine: the steps of prefill, decoding and scoring, and their graphs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from foldkv.hf.cache import FoldCache, FoldLayer
from foldkv.hf.state import LayerParams
from foldkv.hf.swap import KVSwap
from quant.cache import PagedKVCache
from quant.errors import UnsupportedModelError, describe

from .experts import capturable_experts, has_experts
from .graphs import GraphRunner
from .rows import Rows, upload
from .state import PackedState, PackedStep

SCORE = "score"


class Piece:
    """A run of one sequence's tokens in a prefill step: `tokens` go in at positions `start` and on, in its `pages`."""

    __slots__ = ("pages", "row", "start", "tokens")

    def __init__(self, row: int, start: int, tokens: Sequence[int] | np.ndarray, pages: Sequence[int]) -> None:
        self.row, self.start, self.tokens, self.pages = row, start, tokens, pages


class Runner:
    """Runs the model over a pool. Every tensor a decoding step touches has a fixed address and size.

    buckets: batch sizes of decoding steps, ascending; a step is captured for the smallest that holds its rows. compile:
    whether decoding goes through `torch.compile`, or options for it; once for each bucket, without graph breaks.
    """

    def __init__(
        self, swap: KVSwap, paged: PagedKVCache, buckets: Sequence[int], max_tokens: int, graphs: GraphRunner,
        compile: bool | Mapping[str, Any] = False,
    ) -> None:  # fmt: skip
        self.model: PreTrainedModel = swap.model
        self.paged, self.buckets, self.max_tokens, self.graphs = paged, tuple(buckets), max_tokens, graphs
        self.state = PackedState(paged, swap.specs, swap.params, max_tokens)
        self.cache = FoldCache(self.state, swap.num_layers)
        self.rows = Rows(paged.block_table, paged.page_size)
        self.device = paged.device
        options = dict(compile) if isinstance(compile, Mapping) else {}
        self._compiled = torch.compile(_forward_alone(), fullgraph=True, dynamic=False, **options) if compile else None
        # Already 4-D, a mask goes by transformers' mask functions, which ask Python for the cache that is active.
        self._no_padding = torch.zeros(1, 1, 1, 1, dtype=torch.int32, device=self.device)
        self._experts = has_experts(self.model) and self.device.type == "cuda"
        self._keeps = check_signature(self.model)

    # --- forward passes -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _forward(self, step: PackedStep, tokens: Tensor, positions: Tensor, keep: Tensor | None = None) -> Tensor:
        """Logits `[kept tokens, vocab]` of a step."""
        options = {"logits_to_keep": keep} if keep is not None and self._keeps else {}
        arguments = {"input_ids": tokens[None], "position_ids": positions[None], "use_cache": True, **options}
        with self.state.running(step):
            if self._compiled is not None and step.one_each:
                limit = torch._dynamo.config.patch(recompile_limit=len(self.buckets) + 1)
                with self.cache.forward(), limit:
                    result = self._compiled(
                        self.model, **arguments, past_key_values=self.cache, attention_mask=self._no_padding
                    )
            else:
                result = self.model(**arguments, past_key_values=self.cache)
        logits: Tensor = result.logits[0]
        return logits if keep is None or options else logits[keep]

    @torch.no_grad()
    def dry_run(self, num_tokens: int) -> None:
        """A prefill of `num_tokens` tokens that writes nothing: makes pools, loads kernels, shows what memory it takes."""
        device, size = self.device, self.paged.page_size
        whole = torch.full(
            (1,), min(num_tokens, self.paged.block_table.shape[1] * size), dtype=torch.int32, device=device
        )
        step = PackedStep(
            1, num_tokens, torch.full((num_tokens,), -1, device=device), torch.zeros_like(self.paged.block_table[:1]), whole,
            cu_seqlens=torch.tensor([0, num_tokens], dtype=torch.int32, device=device), one_each=False,
        )  # fmt: skip
        tokens = torch.zeros(num_tokens, dtype=torch.int64, device=device)
        self._forward(step, tokens, torch.arange(num_tokens, device=device), tokens[:1])
        self.state.mask_checked = True

    @torch.no_grad()
    def prefill(self, pieces: Sequence[Piece], wanted: Sequence[int] | None = None) -> Tensor:
        """Append every piece and attend; returns logits `[n, vocab]` of the tokens `wanted`, by default the last of each."""
        size = self.paged.page_size
        counts = np.array([len(piece.tokens) for piece in pieces])
        ends = counts.cumsum()
        ids, positions, slots = np.empty((3, int(ends[-1])), dtype=np.int64)
        for piece, end, count in zip(pieces, ends, counts, strict=True):
            own = slice(end - count, end)
            where = np.arange(piece.start, piece.start + count)
            ids[own], positions[own] = piece.tokens, where
            slots[own] = np.asarray(piece.pages)[where // size] * size + where % size
        packed = upload(np.stack((ids, positions, slots)), torch.int64, self.device)
        lengths = upload(np.array([piece.start for piece in pieces]) + counts, torch.int32, self.device)
        table = self.rows.block_table.index_select(0, upload([piece.row for piece in pieces], torch.int64, self.device))
        step = PackedStep(
            1, int(ends[-1]), packed[2], table, lengths,
            cu_seqlens=upload([0, *ends], torch.int32, self.device), one_each=False,
        )  # fmt: skip
        keep = upload(ends - 1 if wanted is None else wanted, torch.int64, self.device)
        return self._forward(step, packed[0], packed[1], keep)

    @torch.no_grad()
    def _step(self, batch: int, kind: str) -> Tensor:
        rows = self.rows
        positions, slots, lengths = rows.begin(batch)
        step = PackedStep(
            1, batch, slots, rows.block_table[:batch], lengths, cu_seqlens=rows.cu_seqlens[: batch + 1], one_each=True
        )
        logits = self._forward(step, rows.tokens[:batch], positions)
        if kind != SCORE:
            rows.finish(slice(0, batch), logits, kind)
        return logits

    @torch.no_grad()
    def decode(self, batch: int, kind: str) -> Tensor:
        """One token more for every active row among the first `batch`; returns logits `[bucket, vocab]`, until the next."""
        bucket = self.bucket(batch)

        def step() -> Tensor:
            with capturable_experts(self.model) if self._experts else nullcontext():
                return self._step(bucket, kind)

        def warm_up() -> None:
            active = self.rows.active.clone()
            self.rows.active.zero_()
            step()
            self.rows.active.copy_(active)

        return self.graphs.run((bucket, kind), step, warm_up)

    def bucket(self, batch: int) -> int:
        """The smallest bucket that holds `batch` rows."""
        return next(size for size in self.buckets if size >= batch)

    def set_params(self, params: Sequence[LayerParams]) -> None:
        """Put other scale parameters of the same formats in place; graphs stay as they are."""
        self.state.params = params
        for layer, pair in zip(self.cache.layers, params, strict=True):
            if isinstance(layer, FoldLayer) and layer.is_initialized:
                layer.set_params(pair)

    @torch.no_grad()
    def first_token(self, rows: Sequence[int], logits: Tensor, kind: str) -> None:
        """Sample the token after the prompt of each of `rows` from logits `[rows, vocab]`."""
        self.rows.finish(upload(rows, torch.int64, self.device), logits, kind)


def _forward_alone() -> Callable[..., Any]:
    """What calls a model, with a code object of its own: dynamo keeps compiled code there, for this runner alone."""

    def forward(model: PreTrainedModel, **arguments: Any) -> Any:
        return model(**arguments)

    return FunctionType(forward.__code__.replace(), forward.__globals__)


def check_signature(model: PreTrainedModel) -> bool:
    """Whether the model can give the logits of some tokens alone. UnsupportedModelError if it takes no positions."""
    names = inspect.signature(type(model).forward).parameters
    if "position_ids" not in names:
        fix = "use model.generate(), which runs the model as it is"
        raise UnsupportedModelError(describe("engine", "a model that takes position_ids", type(model).__name__, fix))
    return "logits_to_keep" in names
