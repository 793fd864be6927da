"""`foldkv rewrite`: a checkpoint whose K and V are easier to quantise, with the same function."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import typer

from .common import UsageError, cli_errors, console


@cli_errors()
def rewrite(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint directory or hub id.")],
    out: Annotated[Path, typer.Option(help="Folder of the new checkpoint.")],
    data: Annotated[
        str | None, typer.Option(help="Text to calibrate on, as `calibrate` takes it; default: the model's own.")
    ] = None,
    k: Annotated[
        str, typer.Option(help="K: balance (equal on RoPE pairs, into q_proj and k_proj), or none.")
    ] = "balance",
    v: Annotated[
        str, typer.Option(help="V: rotate (balance, then Hadamard, into v_proj and o_proj), balance, none.")
    ] = "rotate",
    num_samples: Annotated[int | None, typer.Option(help="Windows of text; default as for `calibrate`.")] = None,
    max_seq_len: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the new weights; default the checkpoint's. Balance rounds.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
) -> None:
    """Write balance and rotation into the weights of MODEL, for engines that know neither. Calibrate the result again."""
    from quant.errors import describe

    if out.exists():
        raise UsageError(describe("--out", "a folder that is not there yet", str(out)))

    import calib
    from calib.rewrite import rewrite_model
    from foldkv.hf.loading import load_model

    loaded, tokenizer = load_model(model, dtype=dtype, device=device)
    scales = calib.calibrate(loaded, data, tokenizer=tokenizer, num_samples=num_samples, max_seq_len=max_seq_len)
    rewrite_model(loaded, scales, k=k, v=v)
    staged = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(staged, ignore_errors=True)
    loaded.save_pretrained(staged)
    tokenizer.save_pretrained(staged)
    staged.rename(out)
    console.print(f"wrote {out}; calibrate it before use", markup=False, highlight=False, soft_wrap=True)
