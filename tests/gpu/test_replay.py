"""Capture anywhere, replay anywhere: a whole step as one graph gives the bits of the eager calls at any lengths."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from ops_helpers import Batch, int32, same_bytes, twin
from torch import Tensor

from quant import ops
from quant.pages import LayerPages
from quant.plan import Plan

from .helpers import DEVICE, ON_GPU, bits, capture, check_precision, device_workers, make_source, same_bits

pytestmark = pytest.mark.gpu

SEQS, MAX_Q, PAGE_SIZE, LAYERS = 6, 192, 16, 2
MAX_LEN = 6000 if ON_GPU else 1000
STEPS = 2100 if ON_GPU else 120


class Engine:
    """The buffers of a decoding loop: sequences come and go in fixed slots, and every layer shares one plan."""

    def __init__(self, mode: str, window: int = -1, d: int = 128) -> None:
        self.source, self.window, self.rng = make_source(mode, 2, 4, d, PAGE_SIZE), window, random.Random(0)
        max_pages = -(-MAX_LEN // PAGE_SIZE)
        self.table = torch.randperm(SEQS * max_pages).int().view(SEQS, max_pages)
        self.lengths, self.q_lens = [0] * SEQS, [0] * SEQS
        self.block_table = self.table.to(DEVICE)
        self.seq_lens, self.cu_seqlens_q = int32(*[0] * SEQS, device=DEVICE), int32(*[0] * (SEQS + 1), device=DEVICE)
        self.slots = torch.full((MAX_Q,), -1, device=DEVICE)
        one = self.source.sequence(MAX_Q, MAX_Q)
        self.q, self.k, self.v = one.q, one.k, one.v
        self.layers = [self._full_pages(SEQS * max_pages) for _ in range(LAYERS)]

    def _full_pages(self, num_pages: int) -> LayerPages:
        """Pages with a token in every slot, so that a sequence may have any length at once."""
        pages = self.source.pages(num_pages)
        one = self.source.sequence(num_pages * PAGE_SIZE, 0)
        ops.append_kv(pages, one.k, one.v, torch.arange(num_pages * PAGE_SIZE, device=DEVICE))
        return pages

    def plan(self, workers: int = 0) -> Plan:
        changes = {"max_batch": SEQS, "max_q_tokens": MAX_Q, "max_seq_len": MAX_LEN, "total_tokens": SEQS * MAX_LEN}
        plan = Plan(
            self.source.capacity(**changes, num_workers=workers or max(16, device_workers(2))), self.window, DEVICE
        )
        plan.buffer.fill_(-1)
        plan.workspace.fill_(float("nan"))
        return plan

    def outputs(self) -> list[tuple[Tensor, Tensor]]:
        """Output and LSE of each layer."""
        nan = float("nan")
        return [(torch.full_like(self.q, nan), torch.full(self.q.shape[:2], nan, device=DEVICE)) for _ in range(LAYERS)]

    def step(self, layers: list[LayerPages], plan: Plan, outputs: list[tuple[Tensor, Tensor]]) -> None:
        """append -> plan -> attention, for every layer."""
        plan.update(self.seq_lens, self.cu_seqlens_q)
        for pages, (out, lse) in zip(layers, outputs, strict=True):
            ops.append_kv(pages, self.k, self.v, self.slots)
            tensors = (self.block_table, self.seq_lens, self.cu_seqlens_q)
            ops.append_attention(pages, self.q, *tensors, plan, window_size=(self.window, 0), out=out, lse=lse)

    def _change(self, b: int, room: int) -> None:
        """Another length for sequence b, and at most `room` new tokens."""
        q_len = self.rng.choice((0, 1, 1, 1, 1, 4, 16, 90))
        length = self.rng.choice((
            self.lengths[b] + q_len, self.lengths[b] + q_len, self.lengths[b] - self.rng.randint(0, 20),
            self.rng.choice((0, 1, MAX_LEN, self.rng.randint(0, MAX_LEN))),
        ))  # fmt: skip
        if length <= 0:  # it left; the next one has the pages in another order
            self.table[b] = self.table[b][torch.randperm(self.table.shape[1])]
        self.lengths[b] = min(max(length, 0), MAX_LEN)
        self.q_lens[b] = min(q_len, self.lengths[b], room)

    def advance(self) -> None:
        """New lengths and new rows, in place."""
        room = MAX_Q
        for b in range(SEQS):
            self._change(b, room)
            room -= self.q_lens[b]
        self.load()

    def load(self) -> None:
        """Put lengths, tables, slots and fresh rows into the buffers."""
        slots = torch.full((MAX_Q,), -1)
        bounds = [0, *itertools.accumulate(self.q_lens)]
        for b, (length, q_len) in enumerate(zip(self.lengths, self.q_lens, strict=True)):
            position = torch.arange(length - q_len, length)
            page = self.table[b].long()[position // PAGE_SIZE]
            slots[bounds[b] : bounds[b + 1]] = page * PAGE_SIZE + position % PAGE_SIZE
        new = (self.table, int32(*self.lengths), int32(*bounds), slots)
        for buffer, values in zip((self.block_table, self.seq_lens, self.cu_seqlens_q, self.slots), new, strict=True):
            buffer.copy_(values)
        for rows in (self.q, self.k, self.v):
            rows.normal_()


def check_values(engine: Engine, pages: LayerPages, plan: Plan) -> None:
    """The step against fp64."""
    tensors = (engine.block_table, engine.seq_lens, engine.cu_seqlens_q)
    batch = Batch(engine.source, [], pages, *tensors, None, engine.q)
    check_precision(batch, plan, window_size=(engine.window, 0))


@pytest.mark.parametrize(
    ("mode", "window", "d", "first"),
    [
        ("c16", -1, 128, 0), ("c8", -1, 128, 1), ("c8d", 300, 64, 0), ("k8v4", -1, 128, 1), ("c4", 1000, 96, 0),
        ("c4r", -1, 128, 1), ("c16b", 300, 256, 0),
    ],
)  # fmt: skip
def test_a_captured_step_replays_at_any_lengths(mode: str, window: int, d: int, first: int) -> None:
    """Captured with all lengths 0 or 1, and every replay compared with the eager calls on pools of their own."""
    engine = Engine(mode, window, d)
    engine.lengths, engine.q_lens = [first] * SEQS, [first] * SEQS
    engine.load()
    eager_layers = [twin(pages) for pages in engine.layers]
    plan, eager_plan = engine.plan(), engine.plan(workers=5)
    outputs, eager_outputs = engine.outputs(), engine.outputs()
    replay = capture(lambda: engine.step(engine.layers, plan, outputs))
    engine.step(eager_layers, eager_plan, eager_outputs)
    wrong, splits = (torch.zeros((), dtype=torch.int64, device=DEVICE) for _ in range(2))
    longest = 0
    for i in range(STEPS):
        engine.advance()
        longest = max(longest, *engine.lengths)
        replay()
        splits += plan.buffer[1] > 0
        for x in itertools.chain([eager_plan.workspace], *eager_outputs):
            x.fill_(float("nan"))
        engine.step(eager_layers, eager_plan, eager_outputs)
        for x, want in zip(itertools.chain(*outputs), itertools.chain(*eager_outputs), strict=True):
            wrong += (bits(x) != bits(want)).sum()
        if i % (STEPS // 6) == STEPS // 6 - 1:
            assert not int(wrong), f"step {i}"
            check_values(engine, engine.layers[-1], eager_plan)
    assert not int(wrong)
    assert longest == MAX_LEN and int(splits) > STEPS // 4
    assert all(same_bytes(a, b) for a, b in zip(engine.layers, eager_layers, strict=True))


@pytest.mark.parametrize("mode", ["c8", "c8h", "c8d", "k8v4", "c4s", "c4", "c4r"])
def test_a_captured_step_sees_new_scales(mode: str) -> None:
    engine = Engine(mode)
    plan, outputs = engine.plan(), engine.outputs()
    replay = capture(lambda: engine.step(engine.layers, plan, outputs))
    engine.lengths, engine.q_lens = [700, 40, 0, 1, 300, 999], [1, 4, 0, 1, 100, 1]
    engine.load()
    replay()
    before = [tuple(x.clone() for x in pair) for pair in outputs]
    for pages in engine.layers:
        for part in (pages.k, pages.v):
            params = part.params.clone()
            params *= torch.rand_like(params) * 0.2 + 0.9
            part.set_params(params)
            if part.shaping is not None:
                part.set_shaping(part.shaping.flip(1, 2))
    replay()
    assert not any(same_bits(pair, old) for pair, old in zip(outputs, before, strict=True))
    eager_plan, eager_outputs = engine.plan(workers=3), engine.outputs()
    engine.step(engine.layers, eager_plan, eager_outputs)
    assert all(same_bits(pair, want) for pair, want in zip(outputs, eager_outputs, strict=True))
    check_values(engine, engine.layers[0], eager_plan)
