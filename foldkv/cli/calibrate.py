"""`foldkv calibrate`: run text through a model and write its KV scales."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import typer

from .common import UsageError, cli_errors, console, emit_json, progress

_FOLDER = "kv_cache"


@cli_errors()
def calibrate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint directory or hub id.")],
    data: Annotated[
        Path | None,
        typer.Option(
            help="Text: a .txt or .jsonl file. Without it the model writes its own.", exists=True, dir_okay=False
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the scales; default MODEL/kv_cache.")] = None,
    mode: Annotated[str, typer.Option(help="Mode whose static scales are stored; any other can be derived.")] = "c8",
    estimator: Annotated[
        str, typer.Option(help="Ranges of static scales: minmax, absmax, percentile, mse, softmax_kl (K), ....")
    ] = "minmax",
    num_samples: Annotated[
        int | None, typer.Option(help="Windows of text; default 64, or 16 where the model writes them.")
    ] = None,
    max_seq_len: Annotated[
        int | None, typer.Option(help="Tokens per window; default 1024, or the model's maximum if less.")
    ] = None,
    max_position: Annotated[
        int | None,
        typer.Option(help="Positions that the scales shall hold for, beyond the windows; default --max-seq-len."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows per forward pass.")] = 4,
    text_column: Annotated[str, typer.Option(help="Field of a .jsonl record that holds the text.")] = "text",
    seed: Annotated[int, typer.Option(help="Seed of the percentile sample and of the model's own text.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="float32, float16, bfloat16; default the checkpoint's.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace scales that are there.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the written configuration as JSON.")] = False,
    no_progress: Annotated[bool, typer.Option("--no-progress", help="No progress bars.")] = False,
) -> None:
    """Run text through MODEL and write its KV scales."""
    folder = _output_folder(model, out, overwrite)

    import calib
    from foldkv.hf.loading import load_model
    from quant.scales import KVScales

    loaded, tokenizer = load_model(model, dtype=dtype, device=device)
    start = time.perf_counter()
    with _bars(shown=not no_progress) as report:
        scales = calib.calibrate(
            loaded,
            data,
            tokenizer=tokenizer,
            mode=mode,
            estimator=estimator,
            num_samples=num_samples,
            max_seq_len=max_seq_len,
            max_position=max_position,
            batch_size=batch_size,
            seed=seed,
            text_column=text_column,
            progress=report,
        )
    seconds = time.perf_counter() - start
    scales.save(folder)
    if json:
        emit_json({"out": str(folder), "seconds": seconds, **KVScales.load(folder).config})
    about = scales.config["data"]
    layers = sum(layer is not None for layer in scales.layers)
    console.print(
        f"calibrated {layers} layers for {scales.config['mode']} on {about['num_samples']} x {about['max_seq_len']} "
        f"tokens of {about['source']} in {seconds:.1f} s: {folder}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _output_folder(model: str, out: Path | None, overwrite: bool) -> Path:
    """Where the files go; UsageError unless it is known, writable and free (or may be overwritten)."""
    from quant.errors import describe

    if out is None and not Path(model).is_dir():
        raise UsageError(describe("--out", "a folder, as MODEL is no local one", "none"))
    folder = Path(model) / _FOLDER if out is None else out
    if folder.exists() and not folder.is_dir():
        raise UsageError(describe("--out", "a folder", f"the file {folder}"))
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(parent, os.W_OK):
        raise UsageError(describe("--out", "a folder that can be written", str(folder), "choose another with --out"))
    if not overwrite and any(folder.glob("kv_cache_*")):
        raise UsageError(describe("--out", "no scales yet", f"some in {folder}", "replace them with --overwrite"))
    return folder


@contextmanager
def _bars(shown: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """A `calib.calibrate` progress callback that shows one bar after another, one per kind of work."""
    if not shown:
        yield None
        return
    advance: Callable[..., None] = lambda steps=1: None  # noqa: E731
    current, reached = "", 0

    with ExitStack() as bars:

        def report(what: str, done: int, total: int) -> None:
            nonlocal advance, current, reached
            if what != current:
                bars.close()
                advance, current, reached = bars.enter_context(progress(what, total)), what, 0
            advance(done - reached)
            reached = done

        yield report
