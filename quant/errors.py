"""The errors foldkv raises. Each message names what was expected, what came, and what to do."""

from __future__ import annotations


class FoldkvError(Exception):
    """Base of every error that foldkv raises on purpose."""


class ArgumentError(FoldkvError, ValueError):
    """A shape, dtype, device, name or number that a function cannot take."""


class PoolExhaustedError(FoldkvError, RuntimeError):
    """The page pool has too few free pages; nothing was allocated or written."""


class ScaleFileError(FoldkvError, ValueError):
    """A calibration file that is damaged, incomplete, or made for another model."""


class CalibrationError(FoldkvError, RuntimeError):
    """Calibration saw data from which no sound scale can be derived."""


class UnsupportedModelError(FoldkvError, TypeError):
    """A model whose KV cache cannot be swapped."""


def describe(what: str, expected: str, got: str, fix: str = "") -> str:
    """One error sentence: `what: expected E, got G; fix`."""
    return f"{what}: expected {expected}, got {got}" + (f"; {fix}" if fix else "")
