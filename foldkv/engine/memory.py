"""How many bytes an engine takes, and how many tokens fit: arithmetic over a config, nothing allocated."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from quant.errors import ArgumentError, PoolExhaustedError, describe
from quant.layout import meta_page_bytes, page_bytes, shaping_bytes
from quant.pages import NUM_PARAM_ROWS
from quant.spec import LayerSpecs

_UNITS = {"": 1, "b": 1} | {
    prefix + tail: base**power
    for power, prefix in enumerate("kmgt", start=1)
    for tail, base in (("", 1000), ("b", 1000), ("ib", 1024))
}


def parse_bytes(size: int | float | str) -> int:
    """Bytes of a number or a text: "40GB" (10^9), "40GiB" (2^30), "512M". ArgumentError for anything else."""
    number: float = 0
    if isinstance(size, str):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", size)
        factor = _UNITS.get(found[2].lower()) if found else None
        number = float(found[1]) * factor if found and factor else 0
    else:
        number = size
    if number < 1:
        raise ArgumentError(describe("memory", "bytes, or a text like '40GB' or '32GiB'", repr(size)))
    return int(number)


def format_bytes(size: float) -> str:
    """A size for people: `1.5 GB`, powers of 10."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.4g} {unit}"


@dataclass(frozen=True)
class PoolSize:
    """The pool of a cache: what a page takes over all layers (K, V and scale data), what does not grow, and the number."""

    page_size: int
    page_bytes: int
    fixed_bytes: int
    num_pages: int

    @property
    def nbytes(self) -> int:
        return self.fixed_bytes + self.num_pages * self.page_bytes

    @property
    def num_tokens(self) -> int:
        return self.num_pages * self.page_size

    @property
    def bytes_per_token(self) -> float:
        return self.page_bytes / self.page_size

    def num_sequences(self, seq_len: int) -> int:
        """Sequences of `seq_len` tokens that fit."""
        return self.num_pages // -(-seq_len // self.page_size)


def pool_size(
    shapes: Sequence[tuple[int, int]], specs: LayerSpecs, page_size: int, *, memory: int | None = None,
    num_pages: int | None = None,
) -> PoolSize:  # fmt: skip
    """The pool of `num_pages` pages, or of as many as `memory` bytes hold, for layers of `shapes` (K/V heads, head_dim).

    Errors: PoolExhaustedError where not even one page fits.
    """
    one, fixed = 0, 0
    for idx, (h_kv, head_dim) in enumerate(shapes):
        spec = specs[idx]
        for fmt in (spec.k, spec.v):
            one += h_kv * (page_bytes(fmt, head_dim, page_size) + meta_page_bytes(fmt, page_size))
            fixed += NUM_PARAM_ROWS * 4 * h_kv * head_dim + shaping_bytes(fmt, h_kv, head_dim)
    if num_pages is None:
        num_pages = ((memory or 0) - fixed) // one
        if num_pages < 1:
            got = format_bytes(memory or 0)
            raise PoolExhaustedError(
                describe("memory of the cache", f"at least {format_bytes(one + fixed)}, one page", got)
            )
    return PoolSize(page_size, one, fixed, num_pages)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that an engine means to hold, by part; `total` is what its peak should come to.

    activations: the largest forward pass beside the cache, measured once on a GPU before the pool is made; 0 on a CPU.
    """

    weights: int
    pool: int
    workspace: int
    tables: int
    activations: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "total": self.total}
