"""`foldkv report --ops`: the attention ops alone."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant.errors import ArgumentError, describe

from .common import UsageError, console
from .report_parts import progress_bar, scales_folder

if TYPE_CHECKING:
    from foldkv.accuracy.ops_report import OpsReport


DTYPES = ("float32", "float16", "bfloat16")


def check_ops_usage(modes: list[str], level: str, dtype: str | None) -> None:
    """UsageError for modes per layer, an unknown mode, level or dtype."""
    from foldkv.accuracy.effort import effort
    from quant.spec import resolve_mode

    try:
        effort(level)
        for mode in modes:
            resolve_mode(mode)
    except ArgumentError as error:
        raise UsageError(str(error)) from error
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(describe("--dtype with ops", f"one of {', '.join(DTYPES)}", dtype))


def report_ops(
    modes: list[str],
    out: Path,
    model: str | None,
    *,
    scales: Path | None,
    data: Path | None,
    level: str,
    dtype: str | None,
    device: str,
    text_column: str,
    watch: bool,
    loaded: tuple[Any, Any] | None = None,
) -> OpsReport:
    """Measure, and write ops.json, ops.md and ops.html into `out`.

    loaded: the model and its tokenizer, where they are loaded already.
    """
    import torch

    from foldkv.accuracy.ops_report import SEQUENCES, TOKENS, ops_report

    network = ids = known = None
    if model is not None:
        from foldkv.accuracy.windows import make_text
        from foldkv.hf import load_model
        from quant.scales import KVScales

        folder = scales_folder(model, scales)
        network, tokenizer = loaded or load_model(model, "float32" if device == "cpu" else "auto", device)
        known = KVScales.load(folder, network.config)
        limit = getattr(network.config.get_text_config(decoder=True), "max_position_embeddings", None) or TOKENS[level]
        ids = make_text(network, tokenizer, data, SEQUENCES, min(TOKENS[level], limit), seed=None,
                        scales=known, text_column=text_column).ids  # fmt: skip
    with progress_bar(watch) as (advance, _):
        result = ops_report(
            modes, device=device, dtype=getattr(torch, dtype) if dtype else None, level=level, model=network, ids=ids,
            scales=known, setup={"command": "foldkv " + shlex.join(sys.argv[1:])}, progress=advance,
        )  # fmt: skip
    paths = result.save(out)
    console.print("wrote " + ", ".join(str(path) for path in paths), markup=False, highlight=False, soft_wrap=True)
    return result
