"""The end-to-end benchmark: whole models on the engine, mode beside mode, and beside transformers' own caches."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from transformers import PreTrainedModel

from foldkv.engine import Engine, SamplingParams, pool_size
from foldkv.engine.sequence import Sequence as EngineSequence
from foldkv.engine.sequence import Status
from foldkv.hf.models import kv_shapes
from foldkv.hf.swap import swap_kv_cache
from quant.errors import FoldkvError, PoolExhaustedError
from quant.spec import parse_modes

from .cuda_cases import fill_random
from .cuda_run import Note
from .model_cases import Case, bench_model, random_scales
from .model_peers import PEERS

WARM_STEPS = 4
PROMPT_TOKENS = 2048  # of a prefill step
NOT_ENOUGH = "does not fit"


@dataclass(frozen=True)
class ModelRow:
    """One batch in one mode (or on another cache). Rates are of decoding, in the steady state.

    tokens_per_s: of the whole batch. itl_ms: between two tokens of a sequence, the median and the 99th percentile over
    steps but the last, which waits for what is in flight. ttft_ms: from the submission of one prompt of `ttft_tokens`
    tokens, alone, to its first token on the host. capacity_tokens: tokens that the card's free memory holds beside the
    weights in this mode. x_c16: tokens_per_s over that of c16. note: why there are no rates, where the batch does not fit.
    """

    name: str
    case: str
    batch: int
    seq_len: int
    bits: float
    tokens_per_s: float | None = None
    itl_ms: float | None = None
    itl_p99_ms: float | None = None
    ttft_ms: float | None = None
    ttft_tokens: int | None = None
    x_c16: float | None = None
    steps: int = 0
    capacity_tokens: int | None = None
    pool_gb: float | None = None
    planned_gb: float | None = None
    peak_gb: float | None = None
    graph: str = ""
    note: str = ""


class ModelBench:
    """Runs cases one mode after another; iterate over `results()`.

    The cache is not filled by the model but with random codes, which cost attention the same time; the time to the first
    token is of a real prefill. Weights are random where `model` is a shape.
    """

    def __init__(
        self, model: str, modes: Sequence[str], dtype: str, device: str, *, steps: int = 64, ttft: bool = True,
        peers: Sequence[str] = (), compiled: bool = False, page_size: int = 64,
    ) -> None:  # fmt: skip
        self.device = torch.device(device)
        self.model, self.is_random = bench_model(model, dtype, self.device)
        self.modes, self.steps, self.ttft, self.peers, self.page_size = modes, steps, ttft, peers, page_size
        self.compiled = compiled
        self.scales = random_scales(self.model.config)

    def results(self, cases: Sequence[Case]) -> Iterator[ModelRow | Note]:
        """A row for every case and mode, and a note for each that cannot be."""
        if self.is_random:
            yield Note("random weights, and scales of no worth: figures of speed and memory only")
        for case in cases:
            base: float | None = None
            for mode in self.modes:
                row = self._guarded(partial(self._mode_row, mode, case, base), f"{mode}, {case}")
                if isinstance(row, ModelRow) and mode == "c16":
                    base = row.tokens_per_s
                yield row
            for name in self.peers:
                yield self._guarded(partial(self._peer_row, name, case, base), f"{name}, {case}")

    def _guarded(self, measure: Callable[[], ModelRow], what: str) -> ModelRow | Note:
        try:
            return measure()
        except (FoldkvError, RuntimeError, ImportError, ValueError, TypeError, AssertionError, AttributeError) as error:
            return Note(f"{what}: {(str(error).splitlines() or [type(error).__name__])[0]}")
        finally:
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    # --- our modes ----------------------------------------------------------------------------------------------------

    def _mode_row(self, mode: str, case: Case, base: float | None) -> ModelRow:
        model = self.model
        with swap_kv_cache(model, mode, self.scales, page_size=self.page_size) as swap:
            row = ModelRow(
                mode, str(case), case.batch, case.seq_len, swap.bits_per_element, capacity_tokens=self._capacity(mode)
            )
            try:
                engine = make_engine(model, case, self.steps, self.compiled)
            except PoolExhaustedError as error:
                return replace(row, note=f"{NOT_ENOUGH}: {error}")
            with engine:
                ttft, ttft_tokens = self._first_token(engine, case) if self.ttft else (None, None)
                times = decode_times(engine, case, self.steps)
                peak = engine.memory_report()["peak"]
                rate = case.batch / statistics.mean(times)
                return replace(
                    row, tokens_per_s=rate, itl_ms=1e3 * statistics.median(times[:-1]),
                    itl_p99_ms=1e3 * percentile(times[:-1], 0.99), ttft_ms=ttft, ttft_tokens=ttft_tokens,
                    x_c16=base and rate / base, steps=len(times), pool_gb=engine.memory.pool / 1e9,
                    planned_gb=engine.memory.total / 1e9, peak_gb=peak and peak / 1e9,
                    graph=engine.no_graph_reason or "CUDA graph",
                )  # fmt: skip

    def _capacity(self, mode: str) -> int | None:
        """Tokens that free memory holds beside the weights, by arithmetic."""
        if self.device.type != "cuda":
            return None
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self.device)
        shapes = kv_shapes(self.model.config.get_text_config(decoder=True))
        specs = parse_modes(mode, len(shapes), "bf16" if self.model.dtype == torch.bfloat16 else "fp16")
        return pool_size(shapes, specs, self.page_size, memory=free).num_tokens

    def _first_token(self, engine: Engine, case: Case) -> tuple[float, int]:
        """Milliseconds from a prompt's submission to its first token, the second of two times, and its length."""
        vocab = self.model.config.get_text_config(decoder=True).vocab_size
        elapsed = 0.0
        for _ in range(2):
            prompt = torch.randint(vocab, (case.seq_len,)).tolist()
            synchronize(self.device)
            begin = time.perf_counter()
            sequence = engine.submit(prompt, SamplingParams(1))
            while not sequence.is_finished:
                engine.step()
            elapsed = 1e3 * (time.perf_counter() - begin)
        return elapsed, case.seq_len

    # --- others -------------------------------------------------------------------------------------------------------

    def _peer_row(self, name: str, case: Case, base: float | None) -> ModelRow:
        bits, make = PEERS[name]
        step = make(self.model, case.batch, case.seq_len, self.steps)
        for _ in range(WARM_STEPS):
            step()
        times = intervals(step, self.steps - WARM_STEPS, self.device)
        # Their calls return before the device is done, so the mean over all steps is what is known of one.
        mean = statistics.mean(times)
        return ModelRow(
            name, str(case), case.batch, case.seq_len, bits, tokens_per_s=case.batch / mean, itl_ms=1e3 * mean,
            x_c16=base and case.batch / mean / base, steps=len(times),
        )  # fmt: skip


def make_engine(model: PreTrainedModel, case: Case, steps: int, compiled: bool = False) -> Engine:
    """An engine whose pool holds just this batch and `steps` more tokens of each sequence."""
    longest = case.seq_len + steps
    page_size = 64
    return Engine(
        model, max_batch=case.batch, max_seq_len=longest, num_pages=case.batch * -(-longest // page_size),
        prefill_tokens=min(PROMPT_TOKENS, case.seq_len), buckets=sorted({1, case.batch}), compile=compiled,
    )  # fmt: skip


def decode_times(engine: Engine, case: Case, steps: int) -> list[float]:
    """Seconds of decoding steps of a full batch in the steady state, from one return of `Engine.step` to the next."""
    for layer in engine.runner.paged.layers:
        fill_random(layer.k, is_k=True)
        fill_random(layer.v, is_k=False)
    sequences = running_sequences(engine, case, steps)
    for _ in range(WARM_STEPS):
        engine.step()
    times = intervals(engine.step, steps - WARM_STEPS - 2, engine.runner.device)
    for sequence in sequences:
        engine.cancel(sequence)
    engine.scheduler.drain()
    return times


def running_sequences(engine: Engine, case: Case, steps: int) -> list[EngineSequence]:
    """Sequences that decode as if their first `seq_len` tokens had just been appended, over what the pool holds."""
    scheduler, vocab = engine.scheduler, engine.model.get_input_embeddings().weight.shape[0]
    sequences = []
    for idx in range(case.batch):
        prompt = torch.randint(vocab, (case.seq_len,)).tolist()
        sequence = EngineSequence(prompt, SamplingParams(steps), frozenset(), idx, status=Status.RUNNING)
        sequence.row = scheduler.table.allocate()
        scheduler.take(sequence.row, case.seq_len - 1)
        sequences.append(sequence)
    scheduler.running += sequences
    scheduler.set_rows(sequences, [s.prompt[-1] for s in sequences], [case.seq_len - 1] * case.batch)
    return sequences


def intervals(step: Callable[[], object], count: int, device: torch.device) -> list[float]:
    """Seconds between the ends of `count` calls, all work on the device done before the first and after the last."""
    synchronize(device)
    marks = [time.perf_counter()]
    for _ in range(count - 1):
        step()
        marks.append(time.perf_counter())
    step()
    synchronize(device)
    marks.append(time.perf_counter())
    return [end - begin for begin, end in zip(marks[:-1], marks[1:], strict=True)]


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of them do not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
