"""The CUDA benchmark: every row of the wanted suites, beside the device's rates and the peers of the same run."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quant import backend
from quant.errors import ArgumentError, FoldkvError, describe
from quant.spec import KVSpec, resolve_mode

from . import targets
from .cuda_cases import DTYPES, PagedCase
from .cuda_peers import Peer, PeerUnavailableError, peers
from .cuda_suites import Item
from .cuda_timing import Timer, device_rates, graph_time
from .result import stamp

OP_NAMES = {
    "attend": ("plan", "append_attention"),
    "plan": ("plan",),
    "append": ("append_kv",),
    "step": ("plan", "append_kv", "append_attention"),
}


@dataclass(frozen=True)
class Rates:
    """GB/s of the device, first of all results: reading 4 GiB, and copying (bytes read and written)."""

    read: float
    copy: float


@dataclass(frozen=True)
class Note:
    """Why a row is missing."""

    text: str


@dataclass(frozen=True)
class CudaRow:
    """One line. GB/s counts the K and V that a step reads (append: what it reads and writes); plan has none.

    share: of the read rate, for append of the copy rate. x_peer: times the fastest peer of this run that stores no fewer
    bits, `peer`. goal_us, goal_share, peer_us: figures of an H200 (see `targets`).
    """

    suite: str
    op: str
    name: str
    bits: float
    shape: str
    us: float
    gb_per_s: float | None
    share: float | None
    tflops: float | None
    x_c16: float | None
    x_peer: float | None
    peer: str | None
    goal_us: float | None
    goal_share: float | None
    peer_us: float | None
    runs: int
    calls: int


Result = Rates | Note | CudaRow


class CudaBench:
    """Runs items one row after another; iterate over `results()`."""

    def __init__(
        self, modes: Iterable[str], dtype: str = "fp16", seconds: float = 0.25, device: str = "cuda",
        timer: Timer = graph_time,
    ) -> None:  # fmt: skip
        if dtype not in ("fp16", "bf16"):
            raise ArgumentError(describe("dtype", "fp16 or bf16", repr(dtype)))
        self.specs = {name: resolve_mode(name, dtype) for name in modes}
        self.dtype, self.seconds, self.timer = DTYPES[dtype], seconds, timer
        self.device = torch.device(device)
        self.rates = Rates(0.0, 0.0)
        self._told: set[str] = set()

    def results(self, items: Iterable[Item]) -> Iterator[Result]:
        """The device's rates, then each row as it is measured, and a note for each that cannot be."""
        torch.manual_seed(0)
        self.rates = Rates(*device_rates(self.device, self.timer, self.seconds))
        yield self.rates
        for item in items:
            missing = [op for op in OP_NAMES[item.op] if not backend.has_kernels(self.device.type, op)]
            if missing:
                yield from self._note(f"{item.op}: this build has no {self.device.type} kernel of {', '.join(missing)}")
                continue
            yield from self._rows(item)

    def _rows(self, item: Item) -> Iterator[Result]:
        fastest: list[CudaRow] = []
        for peer in peers() if item.peers else ():
            result = self._guarded(partial(self._peer_row, peer, item), f"{peer.name}, {item.work.name}")
            if isinstance(result, CudaRow):
                fastest.append(result)
                yield result
            elif result is not None:
                yield result
        c16: float | None = None
        for name, spec in self.specs.items():
            if item.modes is not None and name not in item.modes:
                continue
            result = self._guarded(
                partial(self._mode_row, name, spec, item, c16, fastest),
                f"{name}, {item.work.name}, {item.op}",
            )
            if isinstance(result, CudaRow) and name == "c16":
                c16 = result.us
            if result is not None:
                yield result

    def _guarded(self, measure: Callable[[], CudaRow], what: str) -> CudaRow | Note | None:
        """A row, or a note where it cannot be had; a fault that leaves the device unusable ends the run."""
        try:
            return measure()
        except PeerUnavailableError as error:
            return next(iter(self._note(str(error))), None)
        except (FoldkvError, RuntimeError, ImportError, OSError, TypeError, ValueError, AssertionError) as error:
            if self.device.type == "cuda":
                try:
                    torch.cuda.synchronize()
                except RuntimeError as fault:
                    raise FoldkvError(f"{what}: the GPU reports {str(fault).splitlines()[0]}") from error
            return Note(f"{what}: {(str(error).splitlines() or [type(error).__name__])[0]}")
        finally:
            gc.collect()

    def _note(self, text: str) -> Iterator[Note]:
        if text not in self._told:
            self._told.add(text)
            yield Note(text)

    def _peer_row(self, peer: Peer, item: Item) -> CudaRow:
        case = peer.make(item.work, self.device)
        timing = self.timer(case.call, case.copies, self.seconds)
        return self._row(item, peer.name, peer.bits, timing.us, runs=timing.runs, calls=timing.calls)

    def _mode_row(self, name: str, spec: KVSpec, item: Item, c16: float | None, rivals: list[CudaRow]) -> CudaRow:
        case = PagedCase(spec, item.work, self.device, dtype=self.dtype)
        timing = self.timer(case.call(item.op), case.copies, self.seconds)
        bits = spec.bits_per_element(item.work.head_dim)
        width = max(spec.k.element.bits, spec.v.element.bits)
        best = min((row for row in rivals if row.bits >= width), key=lambda row: row.us, default=None)
        goal = item.limit_us or targets.goal_for(spec, item.goals)
        share = item.limit_share
        if goal is not None and item.op == "attend" and not item.in_tflops:
            share = item.work.kv_bytes(width) / goal / 1e3 / targets.READ_CEILING_GB_PER_S
        return self._row(
            item, name, bits, timing.us, runs=timing.runs, calls=timing.calls, x_c16=c16 and c16 / timing.us,
            x_peer=best and best.us / timing.us, peer=best and best.name, goal_us=goal, goal_share=share,
            peer_us=item.peer_us.get(targets.width_class(spec) or 0),
        )  # fmt: skip

    def _row(self, item: Item, name: str, bits: float, us: float, **rest: Any) -> CudaRow:
        work = item.work
        rate = None if item.op == "plan" else work.kv_bytes(bits) / us / 1e3
        ceiling = self.rates.read
        if item.op == "append":
            rate, ceiling = work.append_bytes(bits) / us / 1e3, self.rates.copy
        tflops = work.flops / us / 1e6 if item.in_tflops else None
        empty: dict[str, Any] = dict.fromkeys(("x_c16", "x_peer", "peer", "goal_us", "goal_share", "peer_us"))
        return CudaRow(
            suite=item.suite, op=item.op, name=name, bits=bits, shape=work.name, us=us, gb_per_s=rate,
            share=None if rate is None else rate / ceiling, tflops=tflops, **(empty | rest),
        )  # fmt: skip


class Recorder:
    """A result file that is whole after every row, so that a run which is cut off keeps what it measured."""

    def __init__(self, command: str, device: str, path: Path | None, kind: str = "cuda") -> None:
        self.path = path
        self.data = stamp(device, command) | {"kind": kind, "rates_gb_per_s": {}, "notes": [], "rows": []}
        cuda = torch.version.cuda
        self.data["versions"] |= {"cuda": cuda} if cuda else {}
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, result: Any) -> None:
        """Keep the rates, a note, or a row (a dataclass)."""
        if isinstance(result, Rates):
            self.data["rates_gb_per_s"] = asdict(result)
        elif isinstance(result, Note):
            self.data["notes"].append(result.text)
        else:
            self.data["rows"].append(asdict(result))
        if self.path is not None:
            scratch = self.path.with_name(self.path.name + ".part")
            scratch.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
            scratch.replace(self.path)
