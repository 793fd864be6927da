"""What a cache mode costs in accuracy: measured both ways, beside a noise floor and a control that must fail."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .gates import Gate, GateResult, parse_gate
    from .mode_source import ModeSource, make_source
    from .report import AccuracyReport, accuracy_report
    from .sources import CacheSource, StockSource
    from .tasks import evaluate_tasks

_HOMES = {
    "AccuracyReport": "report",
    "CacheSource": "sources",
    "Gate": "gates",
    "GateResult": "gates",
    "ModeSource": "mode_source",
    "StockSource": "sources",
    "accuracy_report": "report",
    "evaluate_tasks": "tasks",
    "make_source": "mode_source",
    "parse_gate": "gates",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


__all__ = [
    "AccuracyReport", "CacheSource", "Gate", "GateResult", "ModeSource", "StockSource", "accuracy_report", "evaluate_tasks",
    "make_source", "parse_gate",
]  # fmt: skip
