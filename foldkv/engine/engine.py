"""`Engine`: a swapped model that generates for many sequences at a time, each decoding step one CUDA graph."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foldkv.hf.swap import KVSwap, current_swap, swap_kv_cache
from quant.errors import ArgumentError, describe
from quant.scales import KVScales

from .build import build_runner
from .memory import parse_bytes
from .runner import SCORE, Piece
from .sampling import MAX_STOP_IDS, SamplingParams
from .scheduler import Scheduler
from .sequence import Output, Sequence

LAG = 2  # steps in flight on a GPU: one computes, one is queued


def buckets_up_to(max_batch: int) -> tuple[int, ...]:
    """1, 2, 4, 8, ... and `max_batch`."""
    return (*(1 << i for i in range((max_batch - 1).bit_length())), max_batch)


class Engine:
    """Continuous batching on a paged, quantised KV cache.

    with foldkv.Engine(model, kv="c4", scales=scales, max_batch=64, max_seq_len=8192) as engine:
        texts = engine.generate(["Once upon a time"], tokenizer=tokenizer, max_new_tokens=100)

    model: a transformers decoder, swapped already, or swapped here to `kv` with `scales` (see `swap_kv_cache`) until
    `close`. max_batch: sequences that decode at a time. max_seq_len: tokens of one, prompt and output. memory: bytes of
    the cache, or a text like "40GB"; by default as many as `max_batch` sequences at their longest need, on a GPU at most
    what is free. num_pages: pages in its place. page_size: tokens of a page. prefill_tokens: prompt tokens of one step;
    longer prompts go in by pieces, between decoding steps. buckets: batch sizes that are captured; by default powers of
    two. graphs: see `GraphRunner`. compile: whether
    decoding goes through `torch.compile` before it is captured, which fuses small kernels, or options for it.

    A decoding step (forward pass, append, plan, attention, sampling, ends) is one graph for each bucket and kind of
    sampling, captured when first needed. Works on the current stream. Not thread-safe.
    Errors: as `swap_kv_cache`; PoolExhaustedError where the memory cannot hold the smallest pool.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        kv: Any = None,
        scales: KVScales | None = None,
        *,
        max_batch: int = 16,
        max_seq_len: int = 4096,
        memory: int | str | None = None,
        num_pages: int | None = None,
        page_size: int = 64,
        prefill_tokens: int = 2048,
        buckets: SequenceOf[int] | None = None,
        graphs: bool | None = None,
        tokenizer: Any = None,
        compile: bool | Mapping[str, Any] = False,
    ) -> None:
        sizes = {"max_batch": max_batch, "max_seq_len": max_seq_len, "prefill_tokens": prefill_tokens}
        for name, value in sizes.items():
            if value < 1:
                raise ArgumentError(describe(f"Engine.{name}", "at least 1", str(value)))
        if memory is not None and num_pages is not None:
            raise ArgumentError(describe("Engine", "memory or num_pages", "both"))
        buckets = tuple(sorted(set(buckets or buckets_up_to(max_batch))))
        if buckets[0] < 1 or buckets[-1] != max_batch:
            raise ArgumentError(describe("Engine.buckets", f"batch sizes up to max_batch {max_batch}", str(buckets)))
        self.tokenizer = tokenizer
        self.swap, self._owns_swap = _swap_of(model, kv, scales, page_size)
        try:
            bytes_given = None if memory is None else parse_bytes(memory)
            self._build = partial(
                build_runner, self.swap, max_batch, max_seq_len, num_pages, bytes_given, buckets, prefill_tokens, graphs,
                compile,
            )  # fmt: skip
            self.runner, self.memory = self._build()
        except BaseException:
            self._restore()
            raise
        self.scheduler = Scheduler(self.runner, LAG if self.runner.device.type == "cuda" else 0)
        self.swap.register_engine(self)

    # --- what it is ---------------------------------------------------------------------------------------------------

    @property
    def model(self) -> PreTrainedModel:
        return self.swap.model

    @property
    def max_batch(self) -> int:
        return self.runner.paged.max_batch

    @property
    def max_seq_len(self) -> int:
        return self.runner.paged.max_seq_len

    @property
    def num_free_pages(self) -> int:
        return self.runner.paged.num_free_pages

    @property
    def num_pages(self) -> int:
        return self.runner.paged.num_pages

    @property
    def no_graph_reason(self) -> str:
        """Why decoding steps are not CUDA graphs; "" where they are."""
        return self.runner.graphs.reason

    def __repr__(self) -> str:
        how = "CUDA graphs" if not self.no_graph_reason else "no graphs"
        return (
            f"Engine({type(self.model).__name__}, {self.swap.mode!r}, {self.max_batch} x {self.max_seq_len}, "
            f"{self.num_pages} pages of {self.runner.paged.page_size}, {how})"
        )

    # --- sequences ----------------------------------------------------------------------------------------------------

    def submit(self, prompt: str | SequenceOf[int] | Tensor, params: SamplingParams | None = None) -> Sequence:
        """Queue a prompt, token ids or a text for the engine's tokenizer; `step` then brings it on.

        Errors: ArgumentError for an empty prompt, and for one that `max_seq_len` or the pool can never hold.
        """
        params = params or SamplingParams()
        tokens = self._encode(prompt)
        vocab = self.model.get_input_embeddings().weight.shape[0]
        if not tokens or min(tokens) < 0 or max(tokens) >= vocab:
            got = "none" if not tokens else f"ids {min(tokens)} .. {max(tokens)}"
            raise ArgumentError(describe("prompt", f"at least one token, ids 0 .. {vocab - 1}", got))
        longest = len(tokens) + params.max_new_tokens
        paged = self.runner.paged
        limit = min(paged.max_seq_len, paged.num_pages * paged.page_size)
        if longest > limit:
            got = f"{len(tokens)} + {params.max_new_tokens}"
            fix = "make the engine with a larger max_seq_len or more memory, or ask for fewer tokens"
            raise ArgumentError(describe("prompt and new tokens", f"at most {limit} tokens", got, fix))
        seed = params.seed if params.seed is not None else int(torch.randint(1 << 62, ()))
        sequence = Sequence(tokens, params, self._stop_ids(params), seed)
        self.scheduler.waiting.append(sequence)
        return sequence

    def step(self) -> list[Output]:
        """One iteration: prompts in, a token for every running sequence. Returns tokens that have come in, oldest first."""
        return self.scheduler.step()

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence; its pages are free at once. Tokens on their way are dropped."""
        self.scheduler.cancel(sequence)

    def fork(self, sequence: Sequence, params: SamplingParams | None = None) -> Sequence:
        """A second sequence that goes on from where `sequence` is, pages shared until written.

        params: of the copy, by default the same ones with a seed of its own; max_new_tokens counts from the prompt.
        Errors: ArgumentError for one that is over, PoolExhaustedError where all rows are taken.
        """
        self.scheduler.drain()
        self._check_alive(sequence)
        params = params or sequence.params
        if params.max_new_tokens > sequence.params.max_new_tokens or params.max_new_tokens <= len(sequence.output):
            wanted = f"{len(sequence.output) + 1} .. {sequence.params.max_new_tokens}"
            raise ArgumentError(describe("max_new_tokens of a fork", wanted, str(params.max_new_tokens)))
        seed = params.seed if params.seed is not None else int(torch.randint(1 << 62, ()))
        copy = Sequence(list(sequence.prompt), params, self._stop_ids(params), seed, list(sequence.output))
        self.scheduler.fork(sequence, copy)
        return copy

    def rollback(self, sequence: Sequence, count: int) -> None:
        """Forget the newest `count` tokens of the output; they are generated anew. Tokens in flight are read first.

        Errors: ArgumentError for a sequence that is over, and for more tokens than its output has.
        """
        self.scheduler.drain()
        self._check_alive(sequence)
        self.scheduler.rollback(sequence, count)

    def run(self) -> Iterator[Output]:
        """Tokens of all sequences as they come, until none is left."""
        while not self.scheduler.is_idle:
            yield from self.step()

    # --- whole jobs ---------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Iterable[str | SequenceOf[int] | Tensor],
        params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        **options: Any,
    ) -> list[list[int]]:
        """New tokens of each prompt, a stop token included. params: for all or one each; else `options` make them.

        What is interrupted (Ctrl-C) is cancelled.
        """
        sequences = self._submit_all(prompts, params, options)
        try:
            while not all(sequence.is_finished for sequence in sequences):
                self.step()
        except BaseException:
            for sequence in sequences:
                self.cancel(sequence)
            raise
        self.scheduler.drain()  # steps launched before their end was known
        return [sequence.output for sequence in sequences]

    def stream(
        self,
        prompts: Iterable[str | SequenceOf[int] | Tensor],
        params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        **options: Any,
    ) -> Iterator[tuple[int, int]]:
        """(index of the prompt, token) as tokens come. Leaving the loop cancels what is unfinished."""
        sequences = self._submit_all(prompts, params, options)
        index = {id(sequence): i for i, sequence in enumerate(sequences)}
        try:
            while not all(sequence.is_finished for sequence in sequences):
                for output in self.step():
                    if id(output.sequence) in index:
                        yield index[id(output.sequence)], output.token
        finally:
            for sequence in sequences:
                self.cancel(sequence)
            self.scheduler.drain()

    def _submit_all(self, prompts: Iterable[Any], params: Any, options: dict[str, Any]) -> list[Sequence]:
        prompts = list(prompts)
        if params is not None and options:
            raise ArgumentError(describe("sampling", "params or options", "both"))
        shared = params if isinstance(params, SamplingParams) else None if params else SamplingParams(**options)
        each = [shared] * len(prompts) if shared is not None else list(params)
        if len(each) != len(prompts):
            raise ArgumentError(describe("params", f"one, or one for each of {len(prompts)} prompts", str(len(each))))
        sequences: list[Sequence] = []
        try:
            for prompt, own in zip(prompts, each, strict=True):
                sequences.append(self.submit(prompt, own))
        except BaseException:
            for sequence in sequences:
                self.cancel(sequence)
            raise
        return sequences

    def score(self, tokens: Tensor, prefill: int) -> Iterator[Tensor]:
        """Logits of given tokens, as serving computes them: prefill, then one decoding step after another.

        tokens: int64 `[n, t]`, n <= max_batch, t <= max_seq_len. The first `prefill` >= 1 tokens of each row go through
        the cache as prompts do; then row i's token p is fed at step p. Yields t - prefill tensors `[n, vocab]` on the
        device, for the positions prefill - 1 .. t - 2 in order: the logits at position p predict `tokens[:, p + 1]`.

        Errors: ArgumentError for a wrong shape or while sequences run; PoolExhaustedError where the pool is too small.
        """
        if tokens.dim() != 2 or not 1 <= tokens.shape[0] <= self.max_batch or not 1 <= prefill < tokens.shape[1]:
            wanted = f"[n <= {self.max_batch}, t > prefill >= 1]"
            raise ArgumentError(describe("tokens to score", wanted, f"{list(tokens.shape)}, prefill {prefill}"))
        self.scheduler.drain()
        if not self.scheduler.is_idle:
            raise ArgumentError(describe("engine", "no other sequences while it scores", "some", "run() it first"))
        return self._score(tokens, prefill)

    def _score(self, tokens: Tensor, prefill: int) -> Iterator[Tensor]:
        runner, table = self.runner, self.runner.paged.table
        count, length = tokens.shape
        rows = [table.allocate() for _ in range(count)]
        try:
            for row in rows:
                self.scheduler.take(row, length)
            zeros = [0] * count
            runner.rows.set(rows, seq_lens=[prefill] * count, active=[1] * count, tokens=zeros)
            yield self._score_prefill(rows, tokens[:, :prefill].cpu())
            columns = tokens.to(runner.device, torch.int64).t().contiguous()
            for position in range(prefill, length - 1):
                runner.rows.tokens[:count].copy_(columns[position])
                yield runner.decode(count, SCORE)[:count].clone()
        finally:
            runner.rows.set(rows, active=[0] * count)
            for row in rows:
                table.free(row)

    def _score_prefill(self, rows: list[int], prompts: Tensor) -> Tensor:
        """Append the prompts, a few at a time; logits of the last token of each."""
        runner, kept = self.runner, []
        table = runner.paged.table
        count, length = prompts.shape
        size = min(length, runner.max_tokens)
        together = max(1, runner.max_tokens // size)
        for first in range(0, count, together):
            group = rows[first : first + together]
            for start in range(0, length, size):
                part = prompts[first : first + together, start : start + size].numpy()
                pieces = [Piece(row, start, ids, table.pages[row]) for row, ids in zip(group, part, strict=True)]
                logits = runner.prefill(pieces)
            kept.append(logits)
        return torch.cat(kept)

    # --- other scales -------------------------------------------------------------------------------------------------

    def load(self, kv: Any = None, scales: KVScales | None = None, *, recompute: bool = False) -> None:
        """Change the mode, the scales or both of the swap, and of this engine with it; see `KVSwap.load`."""
        self.swap.load(kv, scales, recompute=recompute)

    def prepare_reload(self, recompute: bool) -> None:
        """Give every page back before scales change. ArgumentError where sequences have some, without `recompute`."""
        self.scheduler.drain()
        holding = len(self.scheduler.running) + len(self.scheduler.prefilling)
        if holding and not recompute:
            fix = "run() or cancel them first, or pass recompute=True to compute them again"
            raise ArgumentError(describe("engine", "no sequences in the cache", f"{holding} under other scales", fix))
        if holding:
            warnings.warn(
                f"foldkv: mode or scales changed: the pages of {holding} sequences mean nothing any more; their tokens are "
                "computed again",
                stacklevel=4,
            )
        self.scheduler.preempt_all()

    def reload(self) -> None:
        """Take over what the swap has now: other parameters in place, or pools, plans and graphs anew."""
        if self.runner.state.specs == self.swap.specs:
            self.runner.set_params(self.swap.params)
            return
        scheduler, lag = self.scheduler, self.scheduler.lag
        self.runner.graphs.clear()
        del self.runner, scheduler.runner, self.scheduler
        self.runner, self.memory = self._build()
        self.scheduler = Scheduler(self.runner, lag)
        self.scheduler.take_over(scheduler)

    # --- the rest -----------------------------------------------------------------------------------------------------

    def memory_report(self) -> dict[str, Any]:
        """Planned bytes by part and, on a GPU, the peak that PyTorch allocated since the engine was begun."""
        report: dict[str, Any] = {"planned": self.memory.as_dict(), "peak": None}
        if self.runner.device.type == "cuda":
            report["peak"] = torch.cuda.max_memory_allocated(self.runner.device)
        return report

    def close(self) -> None:
        """Cancel everything, drop graphs, and restore the model where the engine swapped it. A second call does nothing."""
        self.swap.forget_engine(self)
        self.scheduler.clear()
        self.runner.graphs.clear()
        self._restore()

    def _restore(self) -> None:
        if self._owns_swap:
            self.swap.restore()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _check_alive(self, sequence: Sequence) -> None:
        if sequence.is_finished:
            raise ArgumentError(
                describe("sequence", "one that is not over", f"one that ended: {sequence.finish_reason}")
            )

    def _encode(self, prompt: str | SequenceOf[int] | Tensor) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                fix = "make the engine with tokenizer=, or pass token ids"
                raise ArgumentError(describe("prompt", "token ids", "a text, and no tokenizer", fix))
            return list(self.tokenizer(prompt)["input_ids"])
        return [int(token) for token in (prompt.tolist() if isinstance(prompt, Tensor) else prompt)]

    def _stop_ids(self, params: SamplingParams) -> frozenset[int]:
        if params.stop_token_ids is not None:
            return frozenset(params.stop_token_ids)
        eos = self.model.generation_config.eos_token_id
        ids = frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos])
        if len(ids) > MAX_STOP_IDS:
            raise ArgumentError(describe("stop tokens", f"at most {MAX_STOP_IDS}", str(len(ids))))
        return ids


def _swap_of(model: PreTrainedModel, kv: Any, scales: KVScales | None, page_size: int) -> tuple[KVSwap, bool]:
    """The swap that is on, or one made now; and whether it is the engine's to undo."""
    swap = current_swap(model)
    if swap is None:
        return swap_kv_cache(model, "c8" if kv is None else kv, scales, page_size=page_size), True
    if kv is not None or scales is not None:
        fix = "leave kv and scales out, or restore() that swap first"
        raise ArgumentError(describe("model", "one with its own cache", f"one swapped to {swap.mode!r}", fix))
    return swap, False
