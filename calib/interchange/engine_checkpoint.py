"""A checkpoint with KV scales in it: linked beside the original, with one more shard; or its scales read."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from quant.errors import ArgumentError, ScaleFileError, describe

from ..checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint

SCALE_SHARD = "model-kv-scales.safetensors"
# Where engines put scales: behind self_attn, its projections, or the cache; of K and V apart.
_NAME = re.compile(
    r"(?:^|\.)layers\.(\d+)\.[\w.]*?(?:"
    r"(?:self_attn|attn|attention|mixer)\.(?:[kv]_proj\.|qkv_proj\.|attn\.)?([kv])_(scale|zero_point)"
    r"|([kv])_cache\.(scale))$"
)
_MERGED = re.compile(r"(?:^|\.)layers\.(\d+)\.[\w.]*(?:\.kv_scale|kv_cache_scaling_factor|qkv_proj\.kv_scales)$")


def write_checkpoint(
    model_dir: Path, out: Path, tensors: dict[str, Tensor], config: Mapping[str, Any], files: Mapping[str, Any]
) -> None:
    """`out`: the files of `model_dir`, hard-linked where that works, with `tensors` in a shard of their own.

    config: entries for config.json. files: further JSON files. `out` appears whole or not at all; ArgumentError where it
    exists, where the checkpoint is none, or where it is quantised already.
    """
    if out.exists():
        raise ArgumentError(describe("--out", "a folder that is not there yet", str(out)))
    checkpoint = Checkpoint(model_dir)
    old = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    if "quantization_config" in config and old.get("quantization_config"):
        got = str(old["quantization_config"].get("quant_method"))
        raise ArgumentError(
            describe("checkpoint", "one without a quantization_config", got, "export from the original")
        )
    shards = dict(checkpoint.shards)
    # transformers prefers model.safetensors to an index, so a single file gets a shard's name.
    renamed = {SINGLE_FILE: "model-00001-of-00001.safetensors"} if SINGLE_FILE in shards.values() else {}
    weight_map = {name: renamed.get(shard, shard) for name, shard in shards.items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    staged = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    staged.mkdir()
    try:
        replaced = {"config.json", INDEX_FILE, *files}
        for path in sorted(model_dir.iterdir()):
            if path.is_file() and path.name not in replaced:
                _link(path, staged / renamed.get(path.name, path.name))
        save_file(tensors, staged / SCALE_SHARD, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, SCALE_SHARD)
        size = sum((staged / name).stat().st_size for name in set(weight_map.values()))
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        for name, value in {"config.json": {**old, **config}, INDEX_FILE: index, **files}.items():
            (staged / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
        os.rename(staged, out)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path.resolve(), target)
    except OSError:
        shutil.copyfile(path, target)


def read_tensors(folder: Path) -> dict[tuple[int, str, str], Tensor]:
    """(layer, "k" or "v", "scale" or "zero_point") -> fp32 tensor, of a checkpoint's K and V scales.

    Errors: ScaleFileError for none, for a scale that K and V share, or for a layer that lacks one of the two.
    """
    checkpoint = Checkpoint(folder)
    merged = sorted(name for name in checkpoint.shards if _MERGED.search(name))
    if merged:
        fix = "one scale for K and V fits neither: calibrate the model"
        raise ScaleFileError(describe(f"scales of {folder}", "K and V apart", f"a merged one, {merged[0]}", fix))
    found: dict[tuple[int, str, str], str] = {}
    for name in checkpoint.shards:
        match = _NAME.search(name)
        if match is None:
            continue
        layer, tensor, part = int(match[1]), match[2] or match[4], match[3] or match[5]
        if (layer, tensor, part) in found:
            got = f"{found[layer, tensor, part]} and {name}"
            raise ScaleFileError(describe(f"layer {layer} {tensor}_{part}", "one tensor", got))
        found[layer, tensor, part] = name
    if not found:
        wanted = "tensors named ...self_attn.k_scale, ...k_proj.k_scale or the like"
        raise ScaleFileError(describe(f"scales of {folder}", wanted, "none"))
    layers = range(max(layer for layer, _, _ in found) + 1)
    absent = [(layer, t) for layer in layers for t in ("k", "v") if (layer, t, "scale") not in found]
    if absent:
        layer, tensor = absent[0]
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise ScaleFileError(describe(f"layer {layer} {tensor}_scale{more}", "a tensor", "none; calibrate the model"))
    values = checkpoint.load(found.values())
    return {key: values[name].float() for key, name in found.items()}


def layer_name(folder: Path) -> str:
    """What the checkpoint puts before a layer's number, as "model.layers."."""
    stems = {match[1] for name in Checkpoint(folder).shards if (match := re.match(r"(.*\blayers\.)\d+\.", name))}
    if len(stems) != 1:
        raise ArgumentError(
            describe(f"checkpoint {folder}", "tensors named ...layers.0...", ", ".join(stems) or "none")
        )
    return stems.pop()
