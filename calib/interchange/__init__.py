"""KV scales from and for other engines."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from quant.errors import ArgumentError, describe
from quant.scales import KVScales, model_facts, model_hash

from ..provenance import now, versions
from . import compressed_tensors, modelopt, paddle, sglang
from .external import ExternalScales, ExternalTensor, to_scales

FORMATS: dict[str, ModuleType] = {
    "compressed-tensors": compressed_tensors, "vllm": compressed_tensors, "modelopt": modelopt, "sglang": sglang,
    "paddle": paddle,
}  # fmt: skip


def export_scales(scales: KVScales, format_name: str, model_dir: Path, out: Path, **options: Any) -> None:
    """Write `scales` as another engine reads them: see the modules' `write` for what `out` becomes and the options.

    Never an int8 or int4 scheme in config.json: vLLM does not load such a checkpoint. Errors: ArgumentError.
    """
    _module(format_name).write(scales, model_dir, out, **options)


def import_scales(
    path: Path, format_name: str, model_config: Any, shapes: list[tuple[int, int]], **options: Any
) -> KVScales:
    """The scales that another tool wrote at `path`, as ranges of K and V.

    model_config, shapes: of the model; (kv heads, channels) a layer. Modes that remove mean and balance gain nothing from
    such scales. Errors: ScaleFileError naming layer and tensor for merged, missing, all-one or unusable scales.
    """
    external = _module(format_name).read(path, **options)
    external.check(str(path))
    # Scales per channel come flat, those by rank cover equal runs of heads.
    fitted = ExternalScales(
        [
            None if pair is None else tuple(_fit(tensor, shape) for tensor in pair)  # type: ignore[misc]
            for pair, shape in zip(external.layers, [*shapes, *shapes[-1:] * len(external.layers)], strict=False)
        ],
        external.facts,
    )
    config = {
        "mode": "imported",
        "estimator": f"imported from {format_name}",
        "model": {"config": model_facts(model_config), "config_hash": model_hash(model_config)},
        "data": {"source": f"{format_name}: {path.name}"},
        "versions": versions(),
        "date": now(),
    }
    return to_scales(fitted, shapes, config)


def _fit(tensor: ExternalTensor, shape: tuple[int, int]) -> ExternalTensor:
    h_kv, d = shape
    count = tensor.scale.numel()
    scale, zero = tensor.scale.flatten(), None if tensor.zero is None else tensor.zero.flatten()
    if count == h_kv * d:
        return ExternalTensor(scale.view(shape), tensor.kind, None if zero is None else zero.view(shape))
    if 1 < count < h_kv and h_kv % count == 0 and zero is None:
        return ExternalTensor(scale.repeat_interleave(h_kv // count), tensor.kind)
    return ExternalTensor(scale, tensor.kind, zero)


def _module(format_name: str) -> ModuleType:
    if format_name not in FORMATS:
        raise ArgumentError(describe("format", f"one of {', '.join(FORMATS)}", repr(format_name)))
    return FORMATS[format_name]


__all__ = ["FORMATS", "ExternalScales", "ExternalTensor", "export_scales", "import_scales", "to_scales"]
