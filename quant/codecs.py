"""The element codecs of the KV cache, read from `codecs.def`, the table that the C++ side includes too."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import resources

from .errors import ArgumentError, describe

_ROW = re.compile(r"^FOLDKV_CODEC\((\d+), (\w+), (\d+), (Float|Integer)\)$", re.MULTILINE)


@dataclass(frozen=True)
class Codec:
    """How one element is stored: `bits` wide; integer codecs hold unsigned codes 0 .. 2**bits - 1."""

    id: int
    name: str
    bits: int
    kind: str

    @property
    def is_integer(self) -> bool:
        return self.kind == "Integer"

    @property
    def max_code(self) -> int:
        """Largest code of an integer codec."""
        return (1 << self.bits) - 1

    @property
    def mid_code(self) -> int:
        """The code that a symmetric integer format decodes to zero."""
        return 1 << (self.bits - 1)


def _read_table() -> dict[str, Codec]:
    text = resources.files(__package__).joinpath("codecs.def").read_text(encoding="utf-8")
    rows = (Codec(int(i), name, int(bits), kind) for i, name, bits, kind in _ROW.findall(text))
    return {codec.name: codec for codec in rows}


# Read once, at import: torch.compile cannot trace the reading of a file.
_TABLE = _read_table()


def codecs() -> dict[str, Codec]:
    """Every codec of the table, by name."""
    return _TABLE


def codec(name: str) -> Codec:
    """The codec called `name`; ArgumentError names those that exist."""
    table = codecs()
    if name not in table:
        raise ArgumentError(describe("codec", f"one of {', '.join(table)}", repr(name)))
    return table[name]
