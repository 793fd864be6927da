"""Generation for many sequences at a time on a quantised cache, each decoding step one CUDA graph; docs/engine.md."""

from __future__ import annotations

from foldkv.hf.swap import swap_kv_cache

from .engine import Engine
from .generation import Explanation, explain
from .memory import MemoryPlan, format_bytes, parse_bytes, pool_size
from .sampling import SamplingParams
from .sequence import Output, Sequence

__all__ = [
    "Engine",
    "Explanation",
    "MemoryPlan",
    "Output",
    "SamplingParams",
    "Sequence",
    "explain",
    "format_bytes",
    "parse_bytes",
    "pool_size",
    "swap_kv_cache",
]
