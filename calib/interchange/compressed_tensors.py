"""compressed-tensors, as llm-compressor writes and vLLM reads it: fp8 KV scales per tensor or per head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from quant.errors import ArgumentError, ScaleFileError, describe
from quant.scales import KVScales

from .engine_checkpoint import layer_name, read_tensors, write_checkpoint
from .external import ExternalScales, ExternalTensor, fp8_scale

STRATEGIES = {"tensor": "tensor", "head": "attn_head"}
_KINDS = {("float", 8): "fp8", ("int", 8): "int8", ("int", 4): "int4"}


def write(scales: KVScales, model_dir: Path, out: Path, *, per: str = "tensor") -> None:
    """A checkpoint with `model.layers.N.self_attn.k_scale`, fp32 `(1,)` per tensor or `(h_kv, 1, 1)` per head.

    A value is code * scale; scale = absmax / 448. Only fp8: vLLM refuses to load a checkpoint whose config.json says int8
    or int4 for the cache. Per head works with vLLM's FlashAttention backend.
    """
    if per not in STRATEGIES:
        raise ArgumentError(describe("per", f"one of {', '.join(STRATEGIES)}", repr(per)))
    stem = layer_name(model_dir)
    tensors: dict[str, Tensor] = {}
    for idx, layer in enumerate(scales.layers):
        if layer is not None:
            for name, stats in (("k_scale", layer.k), ("v_scale", layer.v)):
                scale = fp8_scale(stats, per)
                tensors[f"{stem}{idx}.self_attn.{name}"] = scale if per == "tensor" else scale.view(-1, 1, 1)
    write_checkpoint(model_dir, out, tensors, {"quantization_config": _config(STRATEGIES[per])}, {})


def _config(strategy: str) -> dict[str, Any]:
    scheme = {
        "num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False, "group_size": None,
        "block_structure": None, "actorder": None, "observer": "static_minmax", "observer_kwargs": {},
        "scale_dtype": None, "zp_dtype": None,
    }  # fmt: skip
    return {
        "quant_method": "compressed-tensors", "format": "dense", "quantization_status": "compressed",
        "config_groups": {}, "ignore": [], "kv_cache_scheme": scheme, "global_compression_ratio": None,
        "sparsity_config": {}, "transform_config": {},
    }  # fmt: skip


def read(path: Path) -> ExternalScales:
    """The scales of such a checkpoint: fp8, or the int8 and int4 that compressed-tensors can write too."""
    config = json.loads((path / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
    scheme = config.get("kv_cache_scheme")
    if config.get("quant_method") != "compressed-tensors" or not scheme:
        got = str(config.get("quant_method"))
        raise ScaleFileError(describe(f"{path / 'config.json'}", "compressed-tensors with a kv_cache_scheme", got))
    kind = _KINDS.get((scheme.get("type"), scheme.get("num_bits")))
    if kind is None or scheme.get("dynamic"):
        got = f"{scheme.get('type')} {scheme.get('num_bits')}, dynamic {scheme.get('dynamic')}"
        raise ScaleFileError(describe("kv_cache_scheme", "static fp8, int8 or int4", got))
    tensors = read_tensors(path)
    count = max(layer for layer, _, _ in tensors) + 1
    shift = {"int8": 128.0, "int4": 8.0}.get(kind, 0.0)

    def tensor(layer: int, name: str) -> ExternalTensor:
        zero = tensors.get((layer, name, "zero_point"))
        # Signed codes and zero points there, unsigned ones here.
        symmetric = zero is None or scheme.get("symmetric")
        shifted = None if symmetric or zero is None else zero.flatten() + shift
        return ExternalTensor(tensors[layer, name, "scale"].flatten(), kind, shifted)

    facts = {"format": "compressed-tensors", "scheme": scheme}
    return ExternalScales([(tensor(idx, "k"), tensor(idx, "v")) for idx in range(count)], facts)
