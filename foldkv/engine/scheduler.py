"""The host's part of an engine: who has a row and pages, what the next step is, what came of earlier ones.

The host runs ahead of the device. It knows an upper bound of every length (a row may have met a stop token that the host
has not heard of), takes pages for that bound before a step is launched, and reads tokens some steps later. What it changes
on the device (pages, rows that join or leave) is queued between two steps, so steps in flight never see it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from quant import ops
from quant.errors import ArgumentError, PoolExhaustedError, describe

from .rows import upload
from .runner import Piece, Runner
from .sampling import MAX_STOP_IDS, common_kind
from .sequence import Output, Sequence, Status


@dataclass
class _InFlight:
    """A step whose tokens the host has not read: who had which row, and the copy that the device writes."""

    rows: list[tuple[Sequence, int]]
    out: Tensor
    event: torch.cuda.Event | None


class Scheduler:
    """Continuous batching over a `Runner`: first come, first served; the newest gives way where pages run out.

    lag: steps that may be in flight when the host waits for a token. waiting, prefilling, running: sequences, oldest first.
    """

    def __init__(self, runner: Runner, lag: int) -> None:
        self.runner, self.lag = runner, lag
        self.table = runner.paged.table
        self.waiting: deque[Sequence] = deque()
        self.prefilling: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._in_flight: deque[_InFlight] = deque()
        self._outputs: list[Output] = []
        pinned = runner.device.type == "cuda"
        self._spare = [torch.empty(self.table.max_batch, dtype=torch.int64, pin_memory=pinned) for _ in range(lag + 2)]

    @property
    def is_idle(self) -> bool:
        """Nothing left to do, and every token read."""
        return not (self.waiting or self.prefilling or self.running or self._in_flight)

    # --- one iteration ------------------------------------------------------------------------------------------------

    def step(self) -> list[Output]:
        """Admit, append a piece of the prompts, decode a token of every running row; returns what tokens came in."""
        self._admit()
        launched = self._prefill()
        launched |= self._decode()
        self._collect(self.lag if launched else 0)
        outputs, self._outputs = self._outputs, []
        return outputs

    def drain(self) -> None:
        """Wait until every token of the steps launched so far is known; `step` will return them."""
        self._collect(0)

    def _admit(self) -> None:
        """Give rows and pages to those that wait, in order, as long as every running row keeps a page to grow into."""
        while self.waiting and not all(self.table.active):
            sequence = self.waiting[0]
            count = len(sequence.tokens)
            others = len(self.running) + len(self.prefilling)
            spare = others + 1 if others else 0
            if self.table.num_pages_for(count) + spare > len(self.table.free_pages):
                return
            self.waiting.popleft()
            sequence.row, sequence.prefilled, sequence.status = self.table.allocate(), 0, Status.PREFILL
            self.take(sequence.row, count)
            self.prefilling.append(sequence)

    def _prefill(self) -> bool:
        """Append at most `max_tokens` tokens of the prompts; those that are complete start to run."""
        if not self.prefilling:
            return False
        room, pieces, complete, wanted, end = self.runner.max_tokens, [], [], [], 0
        for sequence in self.prefilling:
            tokens = sequence.tokens
            part = tokens[sequence.prefilled : sequence.prefilled + room]
            if not part:
                break
            pieces.append(Piece(sequence.row, sequence.prefilled, part, self.table.pages[sequence.row]))
            sequence.prefilled += len(part)
            room, end = room - len(part), end + len(part)
            if sequence.prefilled == len(tokens):
                complete.append(sequence)
                wanted.append(end - 1)
        logits = self.runner.prefill(pieces, wanted or [end - 1])
        if complete:
            self._join(complete, logits)
        return True

    def _join(self, sequences: list[Sequence], logits: Tensor) -> None:
        """Let sequences whose tokens are all in the cache run on, from the logits after them."""
        self.prefilling = [sequence for sequence in self.prefilling if sequence not in sequences]
        self.running += sequences
        self.set_rows(sequences, [0] * len(sequences), [len(sequence.tokens) for sequence in sequences])
        kind = common_kind({sequence.params.kind for sequence in sequences})
        self.runner.first_token([sequence.row for sequence in sequences], logits, kind)
        self._launched(sequences)

    def set_rows(self, sequences: list[Sequence], tokens: list[int], seq_lens: list[int]) -> None:
        """Bring the device's rows up to date: the token to feed next, the length in the cache, sampling, ends."""
        for sequence in sequences:
            sequence.status, sequence.sampled = Status.RUNNING, len(sequence.output)
        params = [sequence.params for sequence in sequences]
        stop_ids = [[*s.stop_ids, *[-1] * (MAX_STOP_IDS - len(s.stop_ids))] for s in sequences]
        self.runner.rows.set(
            [sequence.row for sequence in sequences], tokens=tokens, seq_lens=seq_lens, active=[1] * len(sequences),
            remaining=[s.params.max_new_tokens - len(s.output) for s in sequences],
            temperature=[p.temperature for p in params], top_k=[p.top_k for p in params],
            top_p=[p.top_p for p in params], seeds=[s.seed for s in sequences], stop_ids=stop_ids,
        )  # fmt: skip

    def _decode(self) -> bool:
        """Launch one decoding step for every running row that may get another token."""
        rows = self._grow()
        if not rows:
            return False
        self._compact()
        kind = common_kind({sequence.params.kind for sequence in rows})
        self.runner.decode(1 + max(sequence.row for sequence in rows), kind)
        self._launched(rows)
        return True

    def _grow(self) -> list[Sequence]:
        """Pages for one more token of those that may get one; the newest sequences give way where there are none."""
        while True:
            rows = [s for s in self.running if s.sampled < s.params.max_new_tokens]
            try:
                self._extend([sequence.row for sequence in rows])
                return rows
            except PoolExhaustedError:
                if self._in_flight:
                    self.drain()  # some may have ended meanwhile
                else:
                    self._preempt((self.prefilling or self.running)[-1])

    def _preempt(self, sequence: Sequence) -> None:
        """Take its row and pages from a sequence; its tokens are kept and will be appended again."""
        self._release(sequence)
        sequence.status, sequence.num_preemptions = Status.WAITING, sequence.num_preemptions + 1
        self.num_preemptions += 1
        self.waiting.appendleft(sequence)

    def preempt_all(self) -> None:
        """Take every page back; sequences wait to be computed again, in the order in which they came."""
        for sequence in (*self.prefilling[::-1], *self.running[::-1]):
            self._preempt(sequence)

    def take_over(self, other: Scheduler) -> None:
        """Go on with what waits in a scheduler whose runner is gone, and with tokens it has not handed out."""
        self.waiting, self._outputs, self.num_preemptions = other.waiting, other._outputs, other.num_preemptions

    def _release(self, sequence: Sequence) -> None:
        """Give back the row and the pages of a sequence that has them."""
        if sequence.status is Status.RUNNING:
            self.runner.rows.set([sequence.row], active=[0])
        self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        self.table.free(sequence.row)
        (self.prefilling if sequence.status is Status.PREFILL else self.running).remove(sequence)
        sequence.row = -1

    def take(self, row: int, count: int) -> None:
        """Pages for the first `count` tokens of an empty row. PoolExhaustedError where there are too few."""
        self.table.commit(self.table.prepare({row: count}))
        self.runner.rows.set_pages([(row, index, page) for index, page in enumerate(self.table.pages[row])])

    def _extend(self, rows: list[int]) -> None:
        """One token more for each row: shared pages that will be written are copied, new ones told to the device."""
        reservation = self.table.extend(rows)
        if reservation.copies:
            ids = zip(*reservation.copies, strict=True)
            source, target = (upload(pages, torch.int64, self.runner.device) for pages in ids)
            for layer in self.runner.paged.layers:
                ops.copy_pages(layer, source, target)
        self.runner.rows.set_pages([(row, len(pages) - 1, pages[-1]) for row, pages in reservation.pages.items()])

    def _compact(self) -> None:
        """Move rows down where that makes the step's bucket smaller."""
        count = len(self.running) + len(self.prefilling)
        while True:
            last = max((*self.running, *self.prefilling), key=lambda sequence: sequence.row)
            if self.runner.bucket(last.row + 1) == self.runner.bucket(count):
                return
            target = self.table.active.index(False)
            self.table.move(last.row, target)
            self.runner.rows.move(last.row, target)
            last.row = target

    # --- what came of it ----------------------------------------------------------------------------------------------

    def _launched(self, sequences: list[Sequence]) -> None:
        """Have the tokens of the step just launched copied to the host, after it."""
        out, event = self._spare.pop(), None
        out.copy_(self.runner.rows.out, non_blocking=True)
        if self.runner.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        self._in_flight.append(_InFlight([(sequence, sequence.row) for sequence in sequences], out, event))
        for sequence in sequences:
            sequence.sampled += 1
        self._collect(self.lag)

    def _collect(self, most: int) -> None:
        """Read the tokens of all steps in flight but the newest `most`."""
        while len(self._in_flight) > most:
            step = self._in_flight.popleft()
            if step.event is not None:
                step.event.synchronize()
            tokens = step.out.tolist()
            self._spare.append(step.out)
            for sequence, row in step.rows:
                if sequence.status is Status.RUNNING and tokens[row] >= 0:
                    self._receive(sequence, tokens[row])

    def _receive(self, sequence: Sequence, token: int) -> None:
        sequence.output.append(token)
        if token in sequence.stop_ids:
            sequence.finish_reason = "stop"
        elif len(sequence.output) == sequence.params.max_new_tokens:
            sequence.finish_reason = "length"
        self._outputs.append(Output(sequence, token, sequence.finish_reason))
        if sequence.finish_reason:  # The device ended the row by itself.
            self._forget(sequence)
            sequence.status = Status.FINISHED

    # --- asked for by the user ----------------------------------------------------------------------------------------

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence now; tokens in flight are dropped. Nothing for one that is over."""
        if sequence.is_finished:
            return
        if sequence.status is Status.WAITING:
            self.waiting.remove(sequence)
        else:
            self._release(sequence)
        sequence.status, sequence.finish_reason = Status.FINISHED, "cancelled"

    def fork(self, sequence: Sequence, copy: Sequence) -> None:
        """Start `copy`, which has the tokens of `sequence`: in its pages while it runs, else from the beginning.

        Errors: PoolExhaustedError where every row is taken; nothing has changed then.
        """
        if sequence.status is not Status.RUNNING:
            self.waiting.append(copy)
            return
        copy.row = self.table.fork(sequence.row)
        pages = self.table.pages[copy.row]
        self.runner.rows.set_pages([(copy.row, index, page) for index, page in enumerate(pages)])
        self.running.append(copy)
        self.set_rows([copy], copy.tokens[-1:], [len(copy.tokens) - 1])

    def rollback(self, sequence: Sequence, count: int) -> None:
        """Forget the newest `count` tokens of the output, of a sequence with nothing in flight."""
        if not 0 <= count <= len(sequence.output):
            wanted = f"0 .. {len(sequence.output)}, the tokens of its output"
            raise ArgumentError(describe("tokens to roll back", wanted, str(count)))
        del sequence.output[len(sequence.output) - count :]
        if sequence.status is Status.PREFILL and sequence.prefilled > len(sequence.tokens) - 1:
            sequence.prefilled = len(sequence.tokens) - 1
        if sequence.status is Status.PREFILL:
            self.table.truncate(sequence.row, len(sequence.tokens))
        elif sequence.status is Status.RUNNING:
            self.table.truncate(sequence.row, len(sequence.tokens) - 1)
            self.set_rows([sequence], sequence.tokens[-1:], [len(sequence.tokens) - 1])

    def clear(self) -> None:
        """Cancel everything."""
        for sequence in list(self._all()):
            self.cancel(sequence)
        self.drain()

    def _all(self) -> Iterable[Sequence]:
        yield from self.waiting
        yield from self.prefilling
        yield from self.running
