"""`foldkv report --ops`: the attention ops alone."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from quant.errors import ArgumentError, describe

from .common import GateError, UsageError, console, emit_json
from .report_parts import progress_bar, say, scales_folder


def report_ops(
    model: str | None,
    modes: list[str],
    out: Path,
    *,
    scales: Path | None,
    data: Path | None,
    level: str,
    dtype: str | None,
    device: str,
    fail_if: list[str] | None,
    json: bool,
    watch: bool,
) -> None:
    """Measure, write ops.json, ops.md and ops.html into `out`, say what came of it. GateError where a band is left.

    Errors: UsageError for modes per layer, gates, an unknown level or dtype.
    """
    import torch

    from foldkv.accuracy.effort import effort
    from foldkv.accuracy.ops_report import SEQUENCES, TOKENS, ops_report
    from quant.spec import resolve_mode

    try:
        effort(level)
        for mode in modes:
            resolve_mode(mode)
    except ArgumentError as error:
        raise UsageError(str(error)) from error
    if fail_if:
        raise UsageError(describe("--fail-if", "none with --ops, which has its own bands", fail_if[0]))
    kinds = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if dtype is not None and dtype not in kinds:
        raise UsageError(describe("--dtype with --ops", f"one of {', '.join(kinds)}", dtype))
    loaded = ids = known = None
    if model is not None:
        from foldkv.accuracy.windows import make_text
        from foldkv.hf import load_model
        from quant.scales import KVScales

        folder = scales_folder(model, scales)
        loaded, tokenizer = load_model(model, "float32" if device == "cpu" else "auto", device)
        known = KVScales.load(folder, loaded.config)
        limit = getattr(loaded.config.get_text_config(decoder=True), "max_position_embeddings", None) or TOKENS[level]
        ids = make_text(loaded, tokenizer, data, SEQUENCES, min(TOKENS[level], limit), seed=None, scales=known).ids
    with progress_bar(watch) as (advance, _):
        result = ops_report(
            modes, device=device, dtype=kinds.get(dtype or ""), level=level, model=loaded, ids=ids, scales=known,
            setup={"command": "foldkv " + shlex.join(sys.argv[1:])}, progress=advance,
        )  # fmt: skip
    paths = result.save(out)
    if json:
        emit_json(result.data)
    else:
        from foldkv.accuracy.ops_render import verdict

        say(verdict(result.data), style="bold")
    console.print("wrote " + ", ".join(str(path) for path in paths), markup=False, highlight=False, soft_wrap=True)
    if not result.ok:
        raise GateError("; ".join(result.data["outside"][:10]))
