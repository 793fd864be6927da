"""NVIDIA ModelOpt's Hugging Face export, as TensorRT-LLM and vLLM read it: one fp8 scale for K and one for V a layer."""

from __future__ import annotations

import json
from pathlib import Path

from quant.errors import ArgumentError, ScaleFileError, describe
from quant.scales import KVScales

from ..provenance import versions
from .engine_checkpoint import layer_name, read_tensors, write_checkpoint
from .external import ExternalScales, ExternalTensor, fp8_scale

CONFIG = "hf_quant_config.json"


def write(scales: KVScales, model_dir: Path, out: Path, *, per: str = "tensor") -> None:
    """A checkpoint with scalar fp32 `...k_proj.k_scale` and `...v_proj.v_scale`, absmax / 448, and `hf_quant_config.json`.

    vLLM wants a weight format beside the cache's; this one has none, so TensorRT-LLM is the reader.
    """
    if per != "tensor":
        raise ArgumentError(describe("per", "tensor, all that ModelOpt knows", repr(per)))
    stem = layer_name(model_dir)
    tensors = {
        f"{stem}{idx}.self_attn.{name}_proj.{name}_scale": fp8_scale(getattr(layer, name), per).view(())
        for idx, layer in enumerate(scales.layers)
        if layer is not None
        for name in ("k", "v")
    }
    quantization = {"quant_algo": None, "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    producer = {"name": "foldkv", "version": versions()["foldkv"]}
    files = {CONFIG: {"producer": producer, "quantization": quantization}}
    scheme = {"dynamic": False, "num_bits": 8, "type": "float"}
    config = {"quant_method": "modelopt", "quant_algo": None, "kv_cache_scheme": scheme, "producer": producer}
    write_checkpoint(model_dir, out, tensors, {"quantization_config": config}, files)


def read(path: Path) -> ExternalScales:
    """The scales of such a checkpoint."""
    try:
        quantization = json.loads((path / CONFIG).read_text(encoding="utf-8"))["quantization"]
    except (OSError, ValueError, KeyError) as error:
        raise ScaleFileError(describe(str(path / CONFIG), "ModelOpt's quantisation", str(error))) from error
    if quantization.get("kv_cache_quant_algo") != "FP8":
        raise ScaleFileError(describe("kv_cache_quant_algo", "FP8", repr(quantization.get("kv_cache_quant_algo"))))
    tensors = read_tensors(path)
    count = max(layer for layer, _, _ in tensors) + 1
    pairs = [
        (ExternalTensor(tensors[idx, "k", "scale"].flatten()), ExternalTensor(tensors[idx, "v", "scale"].flatten()))
        for idx in range(count)
    ]
    return ExternalScales([*pairs], {"format": "modelopt"})
