"""foldkv: the KV cache of a decoder language model in 8 or 4 bits: calibrate, swap, report.

scales = foldkv.calibrate(model, data, mode="c8", tokenizer=tokenizer)
foldkv.swap_kv_cache(model, "c8", scales=scales)              # model.generate() now runs on the paged int8 cache
report = foldkv.accuracy_report(model, ["c8", "c4"], data, tokenizer=tokenizer, scales=scales)
report.save("report/")                                        # report.json, report.md, report.html
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from calib import calibrate
    from foldkv.accuracy import AccuracyReport, accuracy_report
    from foldkv.auto import Budget, calibrate_auto
    from foldkv.engine import Engine, SamplingParams, explain, swap_kv_cache
    from foldkv.hf import FoldCache, KVSwap, load_model
    from quant.cache import PagedKVCache
    from quant.errors import FoldkvError
    from quant.scales import KVScales
    from quant.spec import MODES, Format, KVSpec, LayerSpecs

# Imported on first use: torch and transformers take seconds, `foldkv --help` should not.
_HOMES = {
    "AccuracyReport": "foldkv.accuracy",
    "accuracy_report": "foldkv.accuracy",
    "Budget": "foldkv.auto",
    "calibrate": "calib",
    "calibrate_auto": "foldkv.auto",
    "Engine": "foldkv.engine",
    "explain": "foldkv.engine",
    "FoldCache": "foldkv.hf",
    "FoldkvError": "quant.errors",
    "Format": "quant.spec",
    "KVScales": "quant.scales",
    "KVSpec": "quant.spec",
    "KVSwap": "foldkv.hf",
    "LayerSpecs": "quant.spec",
    "load_model": "foldkv.hf",
    "MODES": "quant.spec",
    "PagedKVCache": "quant.cache",
    "SamplingParams": "foldkv.engine",
    "swap_kv_cache": "foldkv.engine",  # which serves generate() of the swapped model
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


__all__ = [
    "AccuracyReport", "Budget", "Engine", "FoldCache", "FoldkvError", "Format", "KVScales", "KVSpec", "KVSwap", "LayerSpecs",
    "MODES", "PagedKVCache", "SamplingParams", "__version__", "accuracy_report", "calibrate", "calibrate_auto", "explain",
    "load_model", "swap_kv_cache",
]  # fmt: skip
