"""The sets of rows that `foldkv bench` measures on a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from quant.errors import ArgumentError, describe

from . import targets
from .cuda_cases import Workload

FEW_MODES = ("c16", "c8", "c4")


@dataclass(frozen=True)
class Item:
    """One workload of a suite, to be run for each mode.

    op: attend, plan, append or step (plan, append and attend). modes: a choice among the wanted ones, None for all.
    goals: microseconds on an H200 by class. limit_us, limit_share: one goal for every mode.
    """

    suite: str
    work: Workload
    op: str = "attend"
    modes: tuple[str, ...] | None = None
    peers: bool = False
    goals: Mapping[int, float] = field(default_factory=dict)
    peer_us: Mapping[int, float] = field(default_factory=dict)
    limit_us: float | None = None
    limit_share: float | None = None

    @property
    def in_tflops(self) -> bool:
        """True where the work is bound by arithmetic, so that the rate is one of operations."""
        return self.suite == "prefill"


def _batch(batch: int, seq_len: int, extra: str = "", **sizes: Any) -> Workload:
    return Workload(f"{batch} x {seq_len}{extra}", (seq_len,) * batch, **sizes)


def _decode() -> list[Item]:
    rows = (*targets.DECODE, *targets.MIXES)
    return [
        Item("decode", Workload(row.name, row.lengths), peers=True, goals=row.goal_us, peer_us=row.peer_us)
        for row in rows
    ]


def _goals(name: str, slack: float = 1.0) -> dict[int, float]:
    row = next(row for row in targets.DECODE if row.name == name)
    return {width: us * slack for width, us in row.goal_us.items()}


def _capacity() -> list[Item]:
    works = {size: _batch(256, 1024, f", for {size}", max_seq_len=size) for size in (4096, 131072)}
    slacks = {4096: 1.0, 131072: targets.CAPACITY_SLACK}
    items = [
        Item("capacity", work, modes=FEW_MODES, goals=_goals("256 x 1024", slacks[size]))
        for size, work in works.items()
    ]
    seeds = (replace(work, name=work.name + ", static grid", static_grid=True) for work in works.values())
    return items + [Item("capacity", work, modes=FEW_MODES) for work in seeds]


def _groups() -> list[Item]:
    return [
        Item("groups", _batch(32, 8192, f", group {group}", h_q=8 * group), modes=FEW_MODES)
        for group in (1, 4, 7, 8, 16)
    ]


def _spec() -> list[Item]:
    batch, seq_len = targets.SPEC_BATCH, targets.SPEC_LEN
    one = _goals(f"{batch} x {seq_len}")
    more = _goals(f"{batch} x {seq_len}", targets.SPEC_SLACK)
    return [
        Item(
            "spec", _batch(batch, seq_len, f", q {q_len}", q_len=q_len), peers=True,
            goals=one if q_len == 1 else targets.SPEC_GOAL_US.get(q_len, more),
            peer_us=targets.SPEC_PEER_US.get(q_len, {}),
        )
        for q_len in (1, 2, 4, 8)
    ] + [
        Item("spec", _batch(*shape, f", q {q_len}", q_len=q_len), peers=True)
        for shape in ((1, 4096), (1, 32768), (8, 8192)) for q_len in (4, 8)
    ]  # fmt: skip


def _prefill() -> list[Item]:
    items = []
    for (batch, q_len, seq_len), peers in targets.PREFILL_PEER_TFLOPS.items():
        work = Workload(f"{batch} x {q_len} at {seq_len}", (seq_len,) * batch, q_len=q_len)
        first = work.flops / peers[targets.PREFILL_FIRST_PEER] / 1e6
        quantised = first / targets.PREFILL_QUANTISED_SHARE
        goals = {16: first, 8: quantised, 4: quantised}
        best = {16: work.flops / peers["FA3 bf16"] / 1e6, 8: work.flops / peers["FA3 fp8"] / 1e6}
        items.append(Item("prefill", work, peers=True, goals=goals, peer_us=best))
    # Short prompts behind a long past.
    few = (Workload(f"1 x {q_len} at {past}", (past,), q_len=q_len) for q_len, past in ((32, 8192), (64, 32768)))
    return items + [Item("prefill", work, peers=True) for work in few]


def _append() -> list[Item]:
    decode = _batch(256, 1024)
    prefill = Workload("1 x 8192, all new", (8192,), q_len=8192)
    return [
        Item("append", decode, "plan", modes=("c16",), limit_us=targets.PLAN_256_US),
        Item("append", decode, "append", limit_us=targets.APPEND_256_US),
        Item("append", prefill, "append", limit_share=targets.APPEND_COPY_SHARE),
        Item("append", _batch(64, 4096), "step"),
    ]


def _pages() -> list[Item]:
    return [
        Item("pages", _batch(64, 4096, f", page {size}", page_size=size), modes=FEW_MODES) for size in (16, 32, 64, 128)
    ]


def _dims() -> list[Item]:
    return [Item("dims", _batch(64, 4096, f", d {dim}", head_dim=dim), modes=FEW_MODES) for dim in (64, 96, 128, 256)]


_MAKERS = {
    "decode": _decode, "capacity": _capacity, "groups": _groups, "spec": _spec, "prefill": _prefill,
    "append": _append, "pages": _pages, "dims": _dims,
}  # fmt: skip
SUITES = tuple(_MAKERS)


def suite_items(names: Iterable[str]) -> list[Item]:
    """The rows of these suites in order; "all" stands for every suite."""
    wanted = list(names)
    unknown = [name for name in wanted if name not in (*SUITES, "all")]
    if unknown or not wanted:
        raise ArgumentError(describe("suite", f"all, or some of {', '.join(SUITES)}", ", ".join(unknown) or "none"))
    return [item for name in (SUITES if "all" in wanted else wanted) for item in _MAKERS[name]()]


def shape_items(work: Workload) -> list[Item]:
    """The rows of one shape of the user's own: attention beside its peers, then the ops around it."""
    return [
        Item("shape", work, peers=True),
        Item("shape", work, "plan", modes=("c16",)),
        Item("shape", work, "append"),
        Item("shape", work, "step"),
    ]
