"""SGLang's `--quantization-param-path`: a JSON file of one fp8 scale for K and V together, by rank and layer."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from quant.errors import ArgumentError, ScaleFileError, describe
from quant.scale_files import replace_files
from quant.scales import KVScales

from .external import FP8_MAX, ExternalScales, ExternalTensor, absmax

_DTYPE = "float8_e4m3fn"


def write(scales: KVScales, model_dir: Path, out: Path, *, per: str = "tensor", ranks: int = 1) -> None:
    """The JSON file `out`: the larger of K's and V's absmax / 448, for each of `ranks` tensor-parallel ranks."""
    if per != "tensor":
        raise ArgumentError(describe("per", "tensor, all that SGLang knows", repr(per)))
    if out.exists():
        raise ArgumentError(describe("--out", "a file that is not there yet", str(out)))
    factors: dict[str, dict[str, float]] = {str(rank): {} for rank in range(ranks)}
    for idx, layer in enumerate(scales.layers):
        if layer is None:
            raise ArgumentError(describe(f"layer {idx}", "a cache of its own, as SGLang wants all", "none"))
        if layer.k.h_kv % ranks:
            raise ArgumentError(describe("ranks", f"a divisor of {layer.k.h_kv} kv heads", str(ranks)))
        both = torch.maximum(absmax(layer.k, "head"), absmax(layer.v, "head")).view(ranks, -1).amax(-1) / FP8_MAX
        for rank in range(ranks):
            factors[str(rank)][str(idx)] = float(both[rank].float())
    model_type = json.loads((model_dir / "config.json").read_text(encoding="utf-8")).get("model_type")
    value = {"model_type": model_type, "kv_cache": {"dtype": _DTYPE, "scaling_factor": factors}}
    replace_files({out: (json.dumps(value, indent=2) + "\n").encode()})


def read(path: Path) -> ExternalScales:
    """The scales of such a file. K and V share one by the format's design: facts["merged"] says so.

    Errors: ScaleFileError for another dtype, and for layers that a rank lacks.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        cache = value["kv_cache"]
        factors = {
            int(rank): {int(idx): float(x) for idx, x in of.items()} for rank, of in cache["scaling_factor"].items()
        }
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ScaleFileError(describe(str(path), "SGLang's kv_cache scaling factors", str(error))) from error
    if cache.get("dtype") != _DTYPE:
        raise ScaleFileError(describe(f"{path} kv_cache.dtype", _DTYPE, repr(cache.get("dtype"))))
    count = max((idx for of in factors.values() for idx in of), default=-1) + 1
    for rank in range(max(factors, default=0) + 1):
        for idx in range(count):
            if idx not in factors.get(rank, {}):
                raise ScaleFileError(describe(f"{path}: rank {rank}, layer {idx}", "a scale", "none"))
    pairs = []
    for idx in range(count):
        scale = torch.tensor([factors[rank][idx] for rank in sorted(factors)])
        pairs.append((ExternalTensor(scale), ExternalTensor(scale)))
    facts = {"format": "sglang", "merged": True, "ranks": len(factors), "model_type": value.get("model_type")}
    return ExternalScales([*pairs], facts)
