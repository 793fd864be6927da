"""A format for every layer: what each costs, and the best map within a budget."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import AutoPlan, calibrate_auto, choose_plan
    from .search import Budget

_HOMES = {"AutoPlan": "api", "Budget": "search", "calibrate_auto": "api", "choose_plan": "api"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


__all__ = ["AutoPlan", "Budget", "calibrate_auto", "choose_plan"]
