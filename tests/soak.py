"""Random joins, leaves, cancels, rollbacks, forks and pools too small, for as long as wanted:

    PYTHONPATH=.:tests python tests/soak.py --minutes 10 [--device cuda] [--kv c8d]      the engine
    PYTHONPATH=.:tests python tests/soak.py --minutes 10 --cache                        the paged cache alone, on the CPU

Every sequence must have the tokens that it gets alone, every page must come back, and memory must not grow. The suite runs
a short one (test_soak.py, gpu/test_engine.py).
"""

from __future__ import annotations

import argparse
import random
import resource
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from engine_helpers import check_empty, check_same_or_tied, make_prompts
from hf_helpers import tiny_model

from foldkv import Engine, SamplingParams, swap_kv_cache
from foldkv.engine import Sequence
from quant.errors import PoolExhaustedError

MAX_NEW = 40


@dataclass
class Soak:
    """A random life of `engine`, against what `alone`, an engine of one row, gives for the same work.

    tolerance: logits by which greedy tokens may be apart where a run parts from the one alone (a GPU's products round by the
    batch); None allows no parting. Sampled sequences that part are counted: at most half of them may, each at some token.
    """

    engine: Engine
    alone: Engine
    tolerance: float | None = None
    seed: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    idle_bytes: dict[int, set[int]] = field(default_factory=dict)  # bytes allocated when idle, by captured graphs
    live: list[tuple[Sequence, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        lengths = [self.rng.choice((1, 2, 7, 15, 16, 17, 31, 33, 50, 64)) for _ in range(16)]
        self.prompts = make_prompts(lengths, self.seed)
        self.params = [
            SamplingParams(MAX_NEW, *((0.8, 20, 0.95) if idx % 4 == 3 else ()), seed=idx) for idx in range(len(lengths))
        ]
        self.want = [self.alone.generate([p], own)[0] for p, own in zip(self.prompts, self.params, strict=True)]

    def run(self, until: Callable[[int], bool]) -> Counter[str]:
        """Rounds of random work until `until(round)`; each ends idle and is checked."""
        number = 0
        while not until(number):
            for _ in range(self.rng.randint(10, 60)):
                self._act()
            for output in self.engine.run():
                self.counts["tokens"] += 1
                assert output.token >= 0
            self._check()
            number += 1
        self.counts["rounds"] = number
        self.counts["preempted"] = self.engine.scheduler.num_preemptions
        assert self.counts["sampled that parted"] <= self.counts["sequences"] // 8
        assert all(len(sizes) == 1 for sizes in self.idle_bytes.values()), f"device memory grew: {self.idle_bytes}"
        return self.counts

    def _act(self) -> None:
        action = self.rng.choices(("join", "step", "cancel", "rollback", "fork"), (6, 10, 1, 1, 1))[0]
        going = [(sequence, idx) for sequence, idx in self.live if not sequence.is_finished]
        if action == "join":
            idx = self.rng.randrange(len(self.prompts))
            self._add(self.engine.submit(self.prompts[idx], self._shorter(idx, 1)), idx)
        elif action == "step":
            self.counts["tokens"] += len(self.engine.step())
        elif going:
            sequence, idx = self.rng.choice(going)
            self.engine.scheduler.drain()
            if sequence.is_finished:
                return
            if action == "cancel":
                self.engine.cancel(sequence)
            elif action == "rollback":
                self.engine.rollback(sequence, self.rng.randint(0, len(sequence.output)))
            else:
                params = self._shorter(idx, len(sequence.output) + 1, sequence.params.max_new_tokens)
                try:
                    self._add(self.engine.fork(sequence, params), idx)
                except PoolExhaustedError:
                    self.counts["no row"] += 1
        self.counts[action] += 1

    def _shorter(self, idx: int, least: int, most: int = MAX_NEW) -> SamplingParams:
        own = self.params[idx]
        count = self.rng.randint(least, most)
        return SamplingParams(count, own.temperature, own.top_k, own.top_p, own.seed)

    def _add(self, sequence: Sequence, idx: int) -> None:
        self.live.append((sequence, idx))

    def _check(self) -> None:
        check_empty(self.engine)
        for sequence, idx in self.live:
            want = self.want[idx][: len(sequence.output)]
            cancelled = sequence.finish_reason == "cancelled"
            assert cancelled or len(sequence.output) == sequence.params.max_new_tokens
            if sequence.output == want:
                continue
            assert self.tolerance is not None, f"{sequence.output} is not {want}"
            self.counts["parted"] += 1
            if sequence.params.temperature == 0:
                check_same_or_tied(self.engine, sequence.prompt, want, sequence.output, self.tolerance)
            else:
                self.counts["sampled that parted"] += 1
        self.counts["sequences"] += len(self.live)
        self.live.clear()
        device = self.engine.runner.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            graphs = self.engine.runner.graphs.num_graphs
            self.idle_bytes.setdefault(graphs, set()).add(torch.cuda.memory_allocated(device))


def make_soak(
    device: torch.device | str = "cpu", kv: str = "c32", dtype: torch.dtype = torch.float32,
    tolerance: float | None = None, seed: int = 0,
) -> tuple[Soak, Callable[[], None]]:  # fmt: skip
    """A soak of a tiny Llama with a pool of a third of what its rows could fill; and what undoes the swap."""
    model = tiny_model("llama", dtype=dtype, hidden_size=128, num_attention_heads=4, head_dim=64).to(device)
    swap = swap_kv_cache(model, kv, page_size=16)
    alone = Engine(model, max_batch=1, max_seq_len=128)
    engine = Engine(model, max_batch=8, max_seq_len=128, num_pages=11, prefill_tokens=48)
    return Soak(engine, alone, tolerance, seed), swap.restore


def soak_cache(minutes: float) -> None:
    """Random forks, rollbacks, beams, interruptions and exhausted pools against lists of numbers (see CacheMachine)."""
    from hypothesis import settings  # a machine with a GPU may lack it
    from hypothesis.stateful import run_state_machine_as_test
    from test_cache_properties import CacheMachine

    end, runs = time.monotonic() + 60 * minutes, 0
    rules = settings(
        CacheMachine.TestCase.settings, derandomize=False, max_examples=20, stateful_step_count=200, database=None
    )
    while time.monotonic() < end:
        run_state_machine_as_test(CacheMachine, settings=rules)
        runs += 1
    print(f"{20 * runs} lives of a cache, up to 200 operations each: no token wrong, no page lost")


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--kv", default="c32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", action="store_true")
    options = parser.parse_args()
    if options.cache:
        soak_cache(options.minutes)
        return
    on_gpu = options.device.startswith("cuda")
    tolerance = 0.1 if on_gpu else None if options.kv == "c32" else 0.02
    soak, _ = make_soak(options.device, options.kv, tolerance=tolerance, seed=options.seed)
    soak.run(lambda number: number >= 3)
    before, end = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic() + 60 * options.minutes
    counts = soak.run(lambda number: time.monotonic() > end)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(", ".join(f"{count} {name}" for name, count in counts.items()), f"peak memory +{grown} kB", sep="; ")
    assert grown < 64 << 10, "the host's memory grew"


if __name__ == "__main__":
    _main()
