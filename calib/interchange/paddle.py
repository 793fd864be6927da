"""PaddlePaddle's FastDeploy: three conventions behind one pair of names.

`<stem>layers.N.self_attn.cachek_matmul.activation_scale` and `cachev_matmul...` hold, per kv head and channel (int8,
int4) or per kv head (fp8):

int8: absmax; the engine's own scale is 127 / absmax. In `kv_cache_scales.safetensors`.
int4: the step, a value is (code - zero point) * step, beside `...activation_zero_point`. In the same file.
fp8:  absmax / 448, which the loader multiplies by 448 again. In `kv_cache_scale.json`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import Tensor

from quant.errors import ArgumentError, ScaleFileError, describe
from quant.scale_files import replace_files
from quant.scales import KVScales

from .external import ExternalScales, ExternalTensor, absmax, fp8_scale, int4_steps

JSON_FILE, TENSOR_FILE = "kv_cache_scale.json", "kv_cache_scales.safetensors"
CONVENTIONS = ("int8", "int4", "fp8")
_STEM = "ernie."
_NAME = re.compile(r"layers\.(\d+)\.self_attn\.cache([kv])_matmul\.activation_(scale|zero_point)$")


def write(scales: KVScales, model_dir: Path, out: Path, *, kind: str = "fp8", stem: str = _STEM) -> None:
    """The file of one convention, in the folder `out`. stem: what stands before "layers."."""
    if kind not in CONVENTIONS:
        raise ArgumentError(describe("kind", f"one of {', '.join(CONVENTIONS)}", repr(kind)))
    tensors: dict[str, Tensor] = {}
    for idx, layer in enumerate(scales.layers):
        if layer is None:
            continue
        for name, stats in (("k", layer.k), ("v", layer.v)):
            key = f"{stem}layers.{idx}.self_attn.cache{name}_matmul.activation_"
            if kind == "int4":
                tensors[f"{key}scale"], tensors[f"{key}zero_point"] = (part.flatten() for part in int4_steps(stats))
            else:
                found = absmax(stats, "channel").float() if kind == "int8" else fp8_scale(stats, "head")
                tensors[f"{key}scale"] = found.flatten()
    path = out / (JSON_FILE if kind == "fp8" else TENSOR_FILE)
    if path.exists():
        raise ArgumentError(describe("--out", "a folder without these scales", str(path)))
    out.mkdir(parents=True, exist_ok=True)
    if kind == "fp8":
        data = json.dumps({name: value.tolist() for name, value in tensors.items()}, indent=2).encode()
    else:
        tensors = {name: value.contiguous().clone() for name, value in tensors.items()}
        data = save_tensors(tensors, metadata={"kind": kind})
    replace_files({path: data})


def read(path: Path, *, kind: str | None = None) -> ExternalScales:
    """The scales of a folder, or of one of its files. kind: the convention; by default fp8 in JSON, in tensors int4 where
    there are zero points, else int8. Errors: ScaleFileError for a layer that lacks K or V."""
    if path.is_dir():
        path = path / (JSON_FILE if (path / JSON_FILE).is_file() else TENSOR_FILE)
    try:
        if path.suffix == ".json":
            values = {name: torch.tensor(x).flatten() for name, x in json.loads(path.read_text("utf-8")).items()}
        else:
            values = load_file(path)
    except (OSError, ValueError, SafetensorError, TypeError) as error:
        raise ScaleFileError(describe(str(path), "FastDeploy's cache scales", str(error).splitlines()[0])) from error
    found = {(int(m[1]), m[2], m[3]): value for name, value in values.items() if (m := _NAME.search(name))}
    if not found:
        wanted = "...layers.N.self_attn.cachek_matmul.activation_scale"
        raise ScaleFileError(describe(str(path), f"tensors named {wanted}", "none"))
    if kind is None:
        zeros = any(part == "zero_point" for _, _, part in found)
        kind = "fp8" if path.suffix == ".json" else "int4" if zeros else "int8"
    pairs = []
    for idx in range(max(layer for layer, _, _ in found) + 1):
        for name in ("k", "v"):
            parts = ("scale", "zero_point") if kind == "int4" else ("scale",)
            missing = next((part for part in parts if (idx, name, part) not in found), None)
            if missing:
                raise ScaleFileError(describe(f"{path}: layer {idx} {name}, activation_{missing}", "a tensor", "none"))
        pairs.append((_tensor(found, idx, "k", kind), _tensor(found, idx, "v", kind)))
    return ExternalScales([*pairs], {"format": "paddle", "kind": kind})


def _tensor(found: dict[tuple[int, str, str], Tensor], idx: int, name: str, kind: str) -> ExternalTensor:
    scale = found[idx, name, "scale"].float()
    if kind == "int4":
        return ExternalTensor(scale, "int4", found[idx, name, "zero_point"].float())
    # absmax as a range: the symmetric scale of int8 with its half-range of 127.5 codes.
    return ExternalTensor(scale / 127.5, "int8") if kind == "int8" else ExternalTensor(scale, "fp8")
