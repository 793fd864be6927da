"""The best map within a budget: a multiple-choice knapsack over the tensors, costs taken to add up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from foldkv.engine.memory import parse_bytes
from quant.errors import ArgumentError, describe

from .candidates import FULL, STATIC, WIDE, Choice, TensorSize


@dataclass(frozen=True)
class Budget:
    """What a plan may cost; one of the two. bits: mean stored bits per element. kld: mean KL divergence, nats."""

    bits: float | None = None
    kld: float | None = None

    def __post_init__(self) -> None:
        if (self.bits is None) == (self.kld is None):
            raise ArgumentError(describe("budget", "bits or KLD, one of them", f"bits {self.bits}, kld {self.kld}"))
        value = self.bits if self.bits is not None else self.kld
        if value is None or not 0 < value < float("inf"):
            raise ArgumentError(describe("budget", "a finite number > 0", str(value)))

    @classmethod
    def of_memory(cls, memory: str, tokens: int, elements: int) -> Budget:
        """The budget of `memory` ("4GiB", "500MB") for a cache of `tokens` tokens of `elements` elements each."""
        if tokens < 1:
            raise ArgumentError(describe("tokens of a memory budget", "at least 1", str(tokens)))
        return cls(bits=8 * parse_bytes(memory) / (tokens * elements))

    def __str__(self) -> str:
        return f"{self.bits:.4g} bits" if self.bits is not None else f"KLD {self.kld:.2g}"


@dataclass(frozen=True)
class Solution:
    """A choice for every tensor. bits: mean per element. cost: sum of the choices' costs."""

    chosen: tuple[Choice, ...]
    bits: float
    cost: float

    @property
    def modes(self) -> dict[int, str]:
        """layer -> "K/V"."""
        by_place = {(choice.layer, choice.tensor): choice.mode for choice in self.chosen}
        return {layer: f"{by_place[layer, 'k']}/{by_place[layer, 'v']}" for layer, tensor in by_place if tensor == "k"}


CLEARLY = 0.8
"""Another dynamic 4-bit format is offered where it costs less than this part of the one with all transforms."""


def without_chance(
    options: Sequence[tuple[TensorSize, Mapping[Choice, float]]],
) -> list[tuple[TensorSize, dict[Choice, float]]]:
    """The options without dynamic 4-bit formats that are not clearly better than that with mean, balance and rotation.

    Costs are known to about 10 %: with two formats much alike, the least measured cost would pick the luckier one.
    """
    kept = []
    for size, costs in options:
        full = next((cost for choice, cost in costs.items() if choice.mode == FULL), None)
        kept.append((size, {
            choice: cost for choice, cost in costs.items()
            if choice.mode in (FULL, STATIC, *WIDE) or full is None or cost < CLEARLY * full
        }))  # fmt: skip
    return kept


def frontier(options: Sequence[tuple[TensorSize, Mapping[Choice, float]]]) -> list[Solution]:
    """Every map that no other beats in both bits and cost, fewest bits first.

    options: for each tensor its choices with their costs. Exact: states of equal total bits keep the cheapest.
    """
    total = sum(size.elements for size, _ in options)
    # Stored bits of a token -> (cost, the last choice, the state before it): chains, as tuples would be copied.
    states: dict[float, tuple[float, object]] = {0.0: (0.0, None)}
    for size, costs in options:
        after: dict[float, tuple[float, object]] = {}
        for bits, (cost, chain) in states.items():
            for choice, extra in costs.items():
                key = round(bits + choice.bits(size.head_dim) * size.elements, 3)
                if key not in after or cost + extra < after[key][0]:
                    after[key] = (cost + extra, (choice, chain))
        states = _undominated(after)
    return [
        Solution(_unchain(chain), bits / total if total else 0.0, cost)
        for bits, (cost, chain) in sorted(states.items())
    ]


def _undominated(states: Mapping[float, tuple[float, object]]) -> dict[float, tuple[float, object]]:
    kept: dict[float, tuple[float, object]] = {}
    least = float("inf")
    for bits, state in sorted(states.items()):
        if state[0] < least:
            kept[bits], least = state, state[0]
    return kept


def _unchain(chain: Any) -> tuple[Choice, ...]:
    found: list[Choice] = []
    while chain is not None:
        choice, chain = chain
        found.append(choice)
    return tuple(reversed(found))


def within(solutions: Sequence[Solution], budget: Budget) -> Solution:
    """The cheapest map of at most the budget's bits, or the smallest of at most its KLD. ArgumentError where none is."""
    if budget.bits is not None:
        fitting = [solution for solution in solutions if solution.bits <= budget.bits + 1e-9]
        if not fitting:
            got = f"{budget.bits:.4g}"
            raise ArgumentError(describe("budget", f"at least {solutions[0].bits:.4g} bits per element", got))
        return fitting[-1]
    fitting = [solution for solution in solutions if solution.cost <= (budget.kld or 0.0)]
    if not fitting:
        raise ArgumentError(describe("budget", f"a KLD of at least {solutions[-1].cost:.2g}", f"{budget.kld:.2g}"))
    return fitting[0]
