"""`foldkv export` and `foldkv import`: KV scales for and from other engines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import UsageError, cli_errors, console

_FORMATS = "compressed-tensors (vLLM), modelopt, sglang, paddle"


@cli_errors()
def export(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Checkpoint directory.", exists=True, file_okay=False)],
    out: Annotated[
        Path, typer.Option(help="The new checkpoint folder, or the scale file (sglang), or its folder (paddle).")
    ],
    format_name: Annotated[str, typer.Option("--format", help=f"{_FORMATS}.")] = "compressed-tensors",
    scales: Annotated[Path | None, typer.Option(help="Folder of the calibration (default: MODEL/kv_cache)")] = None,
    per: Annotated[str, typer.Option(help="tensor or head (compressed-tensors).")] = "tensor",
    kind: Annotated[str, typer.Option(help="Convention of paddle: fp8, int8, int4.")] = "fp8",
) -> None:
    """Write the KV scales of MODEL as another engine reads them: fp8, or PaddlePaddle's three kinds."""
    from calib.interchange import FORMATS, export_scales
    from quant.errors import describe
    from quant.scales import KVScales

    if format_name not in FORMATS:
        raise UsageError(describe("--format", f"one of {', '.join(FORMATS)}", format_name))
    found = KVScales.load(scales or model / "kv_cache", _config(model))
    options: dict[str, Any] = {"kind": kind} if format_name == "paddle" else {"per": per}
    export_scales(found, format_name, model, out, **options)
    console.print(f"wrote {out}", markup=False, highlight=False, soft_wrap=True)


@cli_errors()
def import_(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Checkpoint folder or scale file.", exists=True)],
    model: Annotated[Path, typer.Option(help="Checkpoint directory of the model.", exists=True, file_okay=False)],
    format_name: Annotated[str, typer.Option("--format", help=f"{_FORMATS}.")] = "compressed-tensors",
    out: Annotated[Path | None, typer.Option(help="Folder for the scales; default MODEL/kv_cache.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace scales that are there.")] = False,
) -> None:
    """Read the KV scales that another tool wrote; modes with static scales then use their ranges."""
    from calib.interchange import FORMATS, import_scales
    from foldkv.hf.models import kv_shapes
    from quant.errors import describe

    if format_name not in FORMATS:
        raise UsageError(describe("--format", f"one of {', '.join(FORMATS)}", format_name))
    folder = out or model / "kv_cache"
    if not overwrite and any(folder.glob("kv_cache_*")):
        raise UsageError(describe("--out", "no scales yet", f"some in {folder}", "replace them with --overwrite"))
    config = _config(model)
    scales = import_scales(source, format_name, config, kv_shapes(config.get_text_config(decoder=True)))
    scales.save(folder)
    text = f"imported the ranges of {len(scales.layers)} layers: {folder}; no means and balances, so prefer c8h or c8"
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _config(model: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model)
