"""One sequence of an engine: its tokens, how it is sampled, and where it stands."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from .sampling import SamplingParams


class Status(Enum):
    """Waiting for a row and pages, its prompt being appended, decoding, or over."""

    WAITING = "waiting"
    PREFILL = "prefill"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False)
class Sequence:
    """A prompt and what was generated after it, `output`, as far as the host has heard of it.

    finish_reason: None while it runs, then "length" (max_new_tokens), "stop" (a stop token, kept) or "cancelled".
    num_preemptions: times that it gave its pages to others and was computed again.
    """

    prompt: list[int]
    params: SamplingParams
    stop_ids: frozenset[int]
    seed: int
    output: list[int] = field(default_factory=list)
    status: Status = Status.WAITING
    finish_reason: str | None = None
    num_preemptions: int = 0
    row: int = -1
    prefilled: int = 0  # tokens appended so far, while its prompt is
    sampled: int = 0  # tokens of the output, those included that the device has not reported yet

    @property
    def tokens(self) -> list[int]:
        """The prompt, then the output."""
        return self.prompt + self.output

    @property
    def is_finished(self) -> bool:
        return self.status is Status.FINISHED


class Output(NamedTuple):
    """A token of a sequence, in order; finish_reason is set with its last one. A cancelled sequence gets none."""

    sequence: Sequence
    token: int
    finish_reason: str | None
