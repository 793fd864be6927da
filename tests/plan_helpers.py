"""Steps for the tests of the planner, and what a planner made of one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from ops_helpers import int32

from quant.plan import ENTRY, HEADER, Capacity, Plan, arrivals_at, item_at


class Step(NamedTuple):
    """A capacity and a batch: lengths, query lengths, starts (or None), window."""

    capacity: Capacity
    lengths: list[int]
    q_lens: list[int]
    starts: list[int] | None = None
    window: int = -1


def bounds(q_lens: list[int]) -> list[int]:
    return [sum(q_lens[:i]) for i in range(len(q_lens) + 1)]


def planned(step: Step, device: torch.device | str = "cpu") -> tuple[list[int], list[list[int]], list[list[int]]]:
    """Header, items and merges that the op wrote; everything else in the buffer must be as it was."""
    capacity, lengths, q_lens, starts, window = step
    plan = Plan(capacity, window, device)
    plan.buffer.fill_(-77)
    tensors = (None if row is None else int32(*row, device=device) for row in (lengths, bounds(q_lens), starts))
    plan.update(*tensors)  # type: ignore[arg-type]
    return entries(plan)


def entries(plan: Plan) -> tuple[list[int], list[list[int]], list[list[int]]]:
    """Header, items and merges of a buffer that held -77 everywhere before the op."""
    numbers, num_workers = plan.buffer.tolist(), plan.capacity.num_workers
    header = numbers[: HEADER + num_workers + 1]
    num_items, num_merges, _, merge_at = header[:4]
    limits = plan.capacity.limits
    arrivals, first = arrivals_at(limits), item_at(limits)
    assert header[8:10] == [first, num_workers] and header[12:HEADER] == [limits.kv_heads, 0, 0, 0]
    counts_end = arrivals + num_merges * limits.kv_heads
    assert set(numbers[arrivals:counts_end]) <= {0} and counts_end <= first
    untouched = (
        numbers[len(header) : arrivals] + numbers[counts_end:first] + numbers[first + ENTRY * num_items : merge_at]
    )
    assert set(untouched + numbers[merge_at + ENTRY * num_merges :]) <= {-77}
    items = [numbers[at : at + ENTRY] for at in range(first, first + ENTRY * num_items, ENTRY)]
    merges = [numbers[at : at + ENTRY] for at in range(merge_at, merge_at + ENTRY * num_merges, ENTRY)]
    return header, items, merges
