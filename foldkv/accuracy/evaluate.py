"""Feed windows of tokens through caches and compare the logits: caches outside, windows inside.

A way of exercising a cache is how many tokens are appended at once: the whole window, or 128 tokens after another (every
query then attends to K and V that have been through the cache already, as the append comes before the attention), or one
token after another, on a GPU through one captured graph.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .metrics import TokenScores, compare
from .sources import CacheSource, NewCache, StockSource
from .store import BaseStore

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_BYTES = 1 << 29
"""Most bytes of logits computed at once; decides how many windows make a batch."""

MAX_ROWS = 64
"""Most windows of a batch."""

GROUP = 32
"""Steps of a decode whose logits are compared at once."""

SPLIT = 100
"""Tokens appended at once in the noise floor's other split of a prefill: no multiple of a page or a chunk."""

CHUNK = 128
"""Tokens appended at once in chunked prefill."""

OnResult = Callable[[str, str, TokenScores], None]


@dataclass(frozen=True)
class Way:
    """A way of exercising the cache.

    windows, length: how much text, the first `length` tokens of the first `windows` windows. chunk: tokens appended at
    once. other_chunk: the same for the noise floor's run of the base with another split. graphs: foldkv's own modes run
    through a captured graph (only with chunk 1).
    """

    name: str
    windows: int
    length: int
    chunk: int
    other_chunk: int
    graphs: bool = False

    @property
    def tokens(self) -> int:
        return self.windows * self.length


def make_ways(
    num_windows: int,
    window_len: int,
    decode_windows: int,
    decode_len: int,
    chunked_windows: int = 0,
    graphs: bool = False,
) -> list[Way]:
    """Prefill through the cache in one piece and in chunks, and teacher-forced decode; a way with no windows is left out.

    Windows no longer than a chunk leave the chunks out too.
    """
    ways = [
        Way("prefill", num_windows, window_len, window_len, min(SPLIT, -(-window_len // 2))),
        Way("chunked", chunked_windows if window_len > CHUNK else 0, window_len, CHUNK, SPLIT),
        Way("decode", decode_windows, decode_len, 1, decode_len, graphs),
    ]
    return [way for way in ways if way.windows > 0]


@dataclass(frozen=True)
class Run:
    """One cache fed one way: `chunk` tokens at once."""

    name: str
    source: CacheSource
    chunk: int
    graphs: bool = False


def make_runs(way: Way, base: CacheSource, sources: Sequence[CacheSource]) -> list[Run]:
    """The runs compared with the base: each source, then the two of the noise floor, named "noise.*"."""
    runs = [Run(source.name, source, way.chunk, way.graphs and source.kernels) for source in sources]
    return [*runs, Run("noise.split", base, way.other_chunk), Run("noise.stock", StockSource(), way.chunk)]


def total_tokens(ways: Sequence[Way], num_sources: int) -> int:
    """Tokens that `evaluate` feeds in all: what its `advance` adds up to."""
    return sum(way.tokens for way in ways) * (num_sources + 3)


def feed(model: PreTrainedModel, new_cache: NewCache, ids: Tensor, chunk: int) -> Iterator[tuple[int, Tensor]]:
    """Run ids `[windows, length]` through a fresh cache, `chunk` tokens at once.

    Yields (first position, logits `[windows, n, vocab]`) in the model's dtype.
    """
    cache: Any = new_cache(*ids.shape)
    for begin in range(0, ids.shape[1], chunk):
        part = ids[:, begin : begin + chunk]
        yield begin, model(part, past_key_values=cache, use_cache=True).logits


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel,
    ids: Tensor,
    way: Way,
    base: CacheSource,
    sources: Sequence[CacheSource],
    *,
    advance: Callable[[int], object] = lambda tokens: None,
    on_result: OnResult = lambda way, run, scores: None,
    known: Mapping[str, TokenScores] | None = None,
    clock: dict[str, float] | None = None,
    noise: bool = True,
) -> dict[str, TokenScores]:
    """The scores of every run of one way, by name: positions 0 .. length - 2, each predicting the token after it.

    ids: int64 `[windows, length]`. advance is called with the tokens fed since the last call, on_result as a run ends.
    known: scores of an earlier, interrupted evaluation, which are taken as they are. clock: gets the tokens a second of
    each run, the base's own as "base", and "store.floor", the KLD that keeping the base's logits costs. noise: False
    leaves the noise floor out.
    """
    known, clock = known or {}, {} if clock is None else clock
    ids = ids[: way.windows, : way.length]
    runs = [run for run in make_runs(way, base, sources) if noise or not run.name.startswith("noise.")]
    scores = {run.name: known[run.name] for run in runs if run.name in known}
    for name in scores:
        advance(way.tokens)
        on_result(way.name, name, scores[name])
    if len(scores) == len(runs):
        advance(way.tokens)
        return scores
    vocab = model.config.get_text_config(decoder=True).vocab_size
    store = BaseStore(ids.shape[0], way.length - 1, vocab, model.device)
    for row, begin, logits in _timed(model, ids, Run("base", base, way.chunk, way.graphs), clock, advance):
        store.write(row, begin, logits)
    clock["store.floor"] = store.floor
    for run in runs:
        if run.name in scores:
            continue
        rows: dict[int, list[TokenScores]] = {}
        for row, begin, logits in _timed(model, ids, run, clock, advance):
            end, windows = begin + logits.shape[1], logits.shape[0]
            want = store.read(row, windows, begin, end, logits.device)
            next_tokens = ids[row : row + windows, begin + 1 : end + 1]
            rows.setdefault(row, []).append(compare(want, logits, next_tokens))
        scores[run.name] = TokenScores.cat([TokenScores.cat(parts, dim=1) for parts in rows.values()], dim=0)
        on_result(way.name, run.name, scores[run.name])
    return {run.name: scores[run.name] for run in runs}


def _timed(
    model: PreTrainedModel, ids: Tensor, run: Run, clock: dict[str, float], advance: Callable[[int], object]
) -> Iterator[tuple[int, int, Tensor]]:
    """The logits of a run: (first window, first position, `[windows, n, vocab]`), the last position left out.

    Counts the seconds spent inside the model, the first batch's first piece aside, where there is more than that.
    """
    seconds = tokens = 0.0
    last = ids.shape[1] - 1
    with run.source.open(model) as new_cache:
        row = 0
        for batch in ids.split(_batch_rows(model, ids.shape, run)):
            steps = _steps(model, run, new_cache, batch.to(model.device))
            while True:
                start = time.perf_counter()
                part = next(steps, None)
                if part is None:
                    break
                begin, logits = part
                if model.device.type == "cuda":
                    torch.cuda.synchronize(model.device)
                first = row == begin == 0 and logits.shape[:2] != ids.shape
                seconds += 0.0 if first else time.perf_counter() - start
                tokens += 0 if first else logits.shape[0] * logits.shape[1]
                advance(logits.shape[0] * logits.shape[1])
                if begin < last:
                    yield row, begin, logits[:, : last - begin]
            row += batch.shape[0]
    if seconds:
        clock[run.name] = tokens / seconds


def _batch_rows(model: PreTrainedModel, shape: Sequence[int], run: Run) -> int:
    """Windows of a batch: as many as keep the logits of a step, or of a group of steps, within bounds."""
    vocab = model.config.get_text_config(decoder=True).vocab_size
    width = min(shape[1], max(run.chunk, GROUP))
    return max(1, min(MAX_ROWS, BATCH_BYTES // (4 * vocab * width)))


def _steps(model: PreTrainedModel, run: Run, new_cache: NewCache, batch: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first position, logits `[windows, n, vocab]`), short steps joined to groups."""
    if run.graphs:
        steps = run.source.decode(model, batch)
    else:
        steps = feed(model, new_cache, batch, run.chunk)
    if run.chunk >= GROUP:
        yield from steps
        return
    held: list[Tensor] = []
    first = count = 0
    for begin, logits in steps:
        first = begin if not held else first
        held.append(logits.clone() if run.graphs else logits)  # a graph writes the next step over this one
        count += logits.shape[1]
        if count >= GROUP:
            yield first, torch.cat(held, dim=1)
            held, count = [], 0
    if held:
        yield first, torch.cat(held, dim=1)
