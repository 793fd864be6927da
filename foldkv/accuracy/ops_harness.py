"""append -> plan -> attention as one step, captured at lengths of one token and replayed while sequences grow.

On a GPU the step is a CUDA graph; on a CPU it is called. Either way its buffers, its plan and its pages stay where they
were, and what changes between steps is their contents.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch

from calib.derive import layer_params, layer_shaping
from quant import ops
from quant.pages import LayerPages
from quant.plan import CHUNK_SIZE, Capacity, Plan
from quant.spec import KVSpec

from .ops_cases import Data, Shape

MAX_NEW = 96
"""New tokens of a step, all sequences together."""


class Step:
    """One mode's layer in a captured step. seq_lens and rows of the step are what `load` put there.

    data: rows to append, in order. dtype: of queries and output. yardstick: the precision that the kernels may work in.
    """

    def __init__(self, spec: KVSpec, shape: Shape, data: Data, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.data, self.device, self.dtype = shape, data, device, dtype
        self.count, tokens = data.k.shape[:2]
        per_seq = -(-tokens // shape.page_size)
        # Pages of a sequence lie anywhere in the pool.
        order = torch.randperm(self.count * per_seq, generator=torch.Generator().manual_seed(0)).int()
        self.table = order.view(self.count, per_seq)
        integer = spec.k.element.is_integer or spec.v.element.is_integer
        self.yardstick = torch.float16 if integer and dtype == torch.float32 else dtype
        self.block_table = self.table.to(device)
        self.pages = LayerPages.empty(spec, self.count * per_seq, shape.page_size, shape.h_kv, shape.d, device)
        given = layer_params(data.scales, data.layer, spec), layer_shaping(data.scales, data.layer, spec)
        for part, params, shaping in zip((self.pages.k, self.pages.v), *given, strict=True):
            part.set_params(params)
            part.set_shaping(shaping)
        h_q = shape.h_kv * shape.group
        capacity = Capacity.for_device(
            device, max_batch=self.count, max_q_tokens=MAX_NEW, max_seq_len=tokens, total_tokens=self.count * tokens,
            h_q=h_q, h_kv=shape.h_kv, head_dim=shape.d, page_size=shape.page_size,
        )  # fmt: skip
        self.plan = Plan(capacity, -1, device)
        self.q = torch.zeros(MAX_NEW, h_q, shape.d, dtype=dtype, device=device)
        self.k, self.v = (torch.zeros(MAX_NEW, shape.h_kv, shape.d, dtype=dtype, device=device) for _ in range(2))
        self.slots = torch.full((MAX_NEW,), -1, dtype=torch.int64, device=device)
        self.seq_lens = torch.zeros(self.count, dtype=torch.int32, device=device)
        self.cu_seqlens_q = torch.zeros(self.count + 1, dtype=torch.int32, device=device)
        self.out = torch.zeros_like(self.q)
        self.lse = torch.zeros(MAX_NEW, h_q, dtype=torch.float32, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None

    def run(self) -> None:
        """The step itself."""
        self.plan.update(self.seq_lens, self.cu_seqlens_q)
        ops.append_kv(self.pages, self.k, self.v, self.slots)
        ops.append_attention(
            self.pages,
            self.q,
            self.block_table,
            self.seq_lens,
            self.cu_seqlens_q,
            self.plan,
            out=self.out,
            lse=self.lse,
        )

    def capture(self) -> None:
        """Capture the step at the lengths that are loaded; nothing to do on a CPU."""
        self.run()
        if self.device.type != "cuda":
            return
        torch.cuda.synchronize(self.device)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.run()

    def replay(self) -> None:
        """Run the captured step on what is loaded now."""
        if self._graph is None:
            self.run()
        else:
            self._graph.replay()

    def load(self, lengths: Sequence[int], new: Sequence[int]) -> None:
        """Put the newest `new[b]` tokens of each sequence, `lengths[b]` long with them, into the buffers."""
        bounds = [0, *itertools.accumulate(new)]
        slots = torch.full((MAX_NEW,), -1, dtype=torch.int64)
        for b, (length, count) in enumerate(zip(lengths, new, strict=True)):
            position = torch.arange(length - count, length)
            rows = slice(bounds[b], bounds[b + 1])
            page = self.table[b].long()[position // self.shape.page_size]
            slots[rows] = page * self.shape.page_size + position % self.shape.page_size
            for buffer, source in ((self.q, self.data.q), (self.k, self.data.k), (self.v, self.data.v)):
                buffer[rows] = source[b, length - count : length].to(self.device, self.dtype)
        for buffer, values in (
            (self.seq_lens, torch.tensor(lengths, dtype=torch.int32)),
            (self.cu_seqlens_q, torch.tensor(bounds, dtype=torch.int32)),
            (self.slots, slots),
        ):
            buffer.copy_(values)

    def rows(self, b: int) -> slice:
        """Rows of the step that belong to sequence b."""
        first, last = self.cu_seqlens_q[b : b + 2].tolist()
        return slice(first, last)


def borders(tokens: int, page_size: int) -> list[int]:
    """Lengths around the borders of pages and of chunks, up to `tokens`."""
    marks = [1, page_size, 4 * page_size, *range(CHUNK_SIZE, tokens + 1, CHUNK_SIZE), tokens]
    near = {mark + step for mark in marks for step in (-1, 0, 1)}
    return sorted(length for length in near if 1 <= length <= tokens)


def schedule(count: int, tokens: int, page_size: int) -> Iterator[tuple[list[int], list[int], bool]]:
    """Steps (lengths, new tokens, whether to measure) that take `count` sequences from one token to all of them.

    Each goes from border to border, the later ones behind the earlier; on the way to a border in the largest pieces that fit
    in a step, across it token by token.
    """
    targets = borders(tokens, page_size)
    lengths = [1] * count
    yield list(lengths), [1] * count, True
    share = MAX_NEW // count
    for turn in range(1, len(targets) + count - 1):
        wanted = [targets[min(max(turn - b, 0), len(targets) - 1)] for b in range(count)]
        while True:
            new = [min(share, goal - length) for goal, length in zip(wanted, lengths, strict=True)]
            if not any(new):
                break
            lengths = [length + count for length, count in zip(lengths, new, strict=True)]
            yield list(lengths), new, lengths == wanted
