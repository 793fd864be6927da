"""Calibration: statistics of K and V, and the scales that follow from them. Users import `foldkv`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import calibrate

__all__ = ["calibrate"]


def __getattr__(name: str) -> Any:
    # Loaded on first use: it needs transformers, which takes seconds to import; `calib.derive` does not.
    if name in __all__:
        from .api import calibrate

        return calibrate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
