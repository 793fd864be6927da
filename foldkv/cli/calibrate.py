"""`foldkv calibrate`: run text through a model and write its KV scales."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .common import UsageError, cli_errors, console, emit_json, progress
from .plan_table import drift_lines, show_plan

if TYPE_CHECKING:
    from calib.stream import StreamedCheckpoint
    from foldkv.auto import Budget

_FOLDER = "kv_cache"


@cli_errors()
def calibrate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint directory or hub id.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="Text: a .txt, .jsonl or .parquet file, or hub:NAME[:CONFIG][:SPLIT]. Default: the model writes its own."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the scales; default MODEL/kv_cache.")] = None,
    mode: Annotated[
        str, typer.Option(help="Mode whose static scales are stored, any other can be derived; auto: a plan per layer.")
    ] = "c8",
    budget_bits: Annotated[
        float | None, typer.Option(help="auto: at most so many bits per element; default 4.5.")
    ] = None,
    budget_kld: Annotated[float | None, typer.Option(help="auto: the smallest cache of at most this KLD.")] = None,
    memory: Annotated[str | None, typer.Option(help="auto: bytes for the cache, as 8GiB, of --tokens tokens.")] = None,
    tokens: Annotated[int, typer.Option(help="auto: tokens that --memory shall hold.")] = 131072,
    transforms: Annotated[
        str,
        typer.Option(
            help="auto: mean, balance, rotation of 4-bit formats, for each tensor what its statistics favour; or lists of "
            "them for all: mean+balance+rotate,mean+rotate,none."
        ),
    ] = "auto",
    estimator: Annotated[
        str | None,
        typer.Option(help="Ranges of static scales, NAME or K/V: minmax, percentile, mse, ... (default: by mode)"),
    ] = None,
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
    text_column: Annotated[str, typer.Option(help="Field of a record that holds the text.")] = "text",
    compare: Annotated[
        str | None, typer.Option(help="Another corpus: print how far its statistics lie from those of --data.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the percentile sample and of the model's own text.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="float32, float16, bfloat16; default the checkpoint's.")] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="One layer in memory at a time; a killed run goes on where it stopped.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace scales that are there.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the written configuration as JSON.")] = False,
    no_progress: Annotated[bool, typer.Option("--no-progress", help="No progress bars.")] = False,
) -> None:
    """Run text through MODEL and write its KV scales."""
    folder = _output_folder(model, out, overwrite)
    _check_budget(mode, budget_bits, budget_kld, memory)
    _check_transforms(mode, transforms)
    for name, value in (("--data", data), ("--compare", compare)):
        _check_data(name, value)

    import calib
    from foldkv.auto import calibrate_auto
    from foldkv.hf.loading import load_model, load_tokenizer
    from quant.scales import KVScales
    from quant.spec import AUTO_MODE

    streamed = _open_stream(model, folder, mode, data, dtype, device) if stream else None
    if streamed is not None:
        loaded, tokenizer = streamed.model, load_tokenizer(model)
    else:
        loaded, tokenizer = load_model(model, dtype=dtype, device=device)
    options: dict[str, Any] = {
        "tokenizer": tokenizer, **({} if estimator is None else {"estimator": estimator}),
        "num_samples": num_samples, "max_seq_len": max_seq_len,
        "max_position": max_position, "batch_size": batch_size, "seed": seed, "text_column": text_column,
        "compare": compare, **({"gather": streamed.collect} if streamed is not None else {}),
    }  # fmt: skip
    start = time.perf_counter()
    with _bars(shown=not no_progress) as report:
        if mode == AUTO_MODE:
            budget = _budget(loaded, budget_bits, budget_kld, memory, tokens)
            scales = calibrate_auto(loaded, data, budget=budget, transforms=transforms, progress=report, **options)
        else:
            scales = calib.calibrate(loaded, data, mode=mode, progress=report, **options)
    seconds = time.perf_counter() - start
    scales.save(folder)
    if streamed is not None:
        streamed.clear()
    if json:
        emit_json({"out": str(folder), "seconds": seconds, **KVScales.load(folder).config})
    elif scales.plan is not None:
        show_plan(scales.config["plan"])
    about = scales.config["data"]
    layers = sum(layer is not None for layer in scales.layers)
    amount = f"{about['num_samples']} x {about['max_seq_len']} tokens of " if "num_samples" in about else ""
    text = f"calibrated {layers} layers for {scales.config['mode']} on {amount}{about['source']} in {seconds:.1f} s: {folder}"
    for line in (*drift_lines(about.get("drift", {})), text):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _open_stream(
    model: str, folder: Path, mode: str, data: str | None, dtype: str | None, device: str
) -> StreamedCheckpoint:
    """The checkpoint, its layers to be loaded one at a time; what is done so far lies beside the scales' folder."""
    from calib.stream import StreamedCheckpoint
    from foldkv.hf.loading import parse_dtype
    from quant.errors import describe
    from quant.spec import AUTO_MODE

    if mode == AUTO_MODE or data is None:
        got = f"--mode {mode}" if mode == AUTO_MODE else "no --data"
        raise UsageError(describe("--stream", "text and a mode, as the whole model never runs", got))
    if not Path(model).is_dir():
        raise UsageError(describe("--stream", "a checkpoint directory", model, "download it first"))
    wanted = parse_dtype(dtype)
    work = folder.with_name(f"{folder.name}.partial")
    return StreamedCheckpoint(model, work, dtype=None if isinstance(wanted, str) else wanted, device=device)


def _check_data(name: str, value: str | None) -> None:
    """UsageError for a file that is not there."""
    from quant.errors import describe

    if value is not None and not value.startswith("hub:") and not Path(value).is_file():
        raise UsageError(describe(name, "a file, or hub:NAME", f"{value}, which is none"))


def _check_budget(mode: str, bits: float | None, kld: float | None, memory: str | None) -> None:
    """UsageError for more than one budget, or one without `--mode auto`."""
    from quant.errors import describe
    from quant.spec import AUTO_MODE

    given = [
        name
        for name, value in (("--budget-bits", bits), ("--budget-kld", kld), ("--memory", memory))
        if value is not None
    ]
    if len(given) > 1:
        raise UsageError(describe("budget", "one of --budget-bits, --budget-kld and --memory", " and ".join(given)))
    if given and mode != AUTO_MODE:
        raise UsageError(describe(given[0], f"--mode {AUTO_MODE} with it", f"--mode {mode}"))


def _check_transforms(mode: str, transforms: str) -> None:
    """UsageError for a combination that there is not, or one without `--mode auto`."""
    from foldkv.auto.transforms import AUTO, parse_transforms
    from quant.errors import ArgumentError, describe
    from quant.spec import AUTO_MODE

    if transforms != AUTO and mode != AUTO_MODE:
        raise UsageError(describe("--transforms", f"--mode {AUTO_MODE} with it", f"--mode {mode}"))
    try:
        parse_transforms(transforms)
    except ArgumentError as error:
        raise UsageError(f"--{error}") from error


def _budget(model: Any, bits: float | None, kld: float | None, memory: str | None, tokens: int) -> Budget:
    from foldkv.auto import Budget
    from foldkv.hf.models import kv_shapes

    if memory is not None:
        shapes = kv_shapes(model.config.get_text_config(decoder=True))
        return Budget.of_memory(memory, tokens, sum(2 * h_kv * d for h_kv, d in shapes))
    return Budget(kld=kld) if kld is not None else Budget(bits=4.5 if bits is None else bits)


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
