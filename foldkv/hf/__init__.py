"""foldkv in transformers: swap the KV cache of an unmodified model, load checkpoints, say which models work."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache import FoldCache
    from .loading import load_model
    from .models import REFUSED, SUPPORTED, check_model
    from .swap import KVSwap, current_swap, swap_kv_cache

# Imported on first use, so that the table of models needs neither torch nor transformers.
_HOMES = {
    "FoldCache": "cache",
    "KVSwap": "swap",
    "REFUSED": "models",
    "SUPPORTED": "models",
    "check_model": "models",
    "current_swap": "swap",
    "load_model": "loading",
    "swap_kv_cache": "swap",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


__all__ = [
    "FoldCache", "KVSwap", "REFUSED", "SUPPORTED", "check_model", "current_swap", "load_model", "swap_kv_cache",
]  # fmt: skip
