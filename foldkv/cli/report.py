"""`foldkv report`: what cache modes cost a model in accuracy."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quant.errors import ArgumentError, describe

from .common import GateError, UsageError, cli_errors, console, emit_json, output

if TYPE_CHECKING:
    from foldkv.accuracy.report import AccuracyReport

KV_CACHE_DIR = "kv_cache"


def split_modes(text: str) -> list[str]:
    """The modes of a comma-separated list; a part with a colon is an exception of the mode before: `c8,c4,0:c8`."""
    modes: list[str] = []
    for part in (part.strip() for part in text.split(",")):
        if ":" in part and modes:
            modes[-1] += f",{part}"
        elif part:
            modes.append(part)
    return modes


@cli_errors()
def report(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Checkpoint directory or hub id.")],
    kv: Annotated[str, typer.Option(help="Modes to measure, comma-separated; per layer: c4,0:c8.")] = "c8,k8v4,c4",
    out: Annotated[Path, typer.Option(help="Folder for report.json, report.md, report.html.")] = Path("report"),
    data: Annotated[Path | None, typer.Option(help="Text, .txt or .jsonl (default: the model writes its own)")] = None,
    scales: Annotated[Path | None, typer.Option(help="Folder of the calibration (default: MODEL/kv_cache)")] = None,
    windows: Annotated[int, typer.Option(min=0, help="Windows appended in one piece (prefill).")] = 8,
    window_len: Annotated[int, typer.Option(min=2, help="Tokens of each.")] = 512,
    decode_windows: Annotated[int, typer.Option(min=0, help="Windows decoded token by token.")] = 8,
    decode_len: Annotated[int, typer.Option(min=2, help="Tokens of each.")] = 256,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many windows, for a quick look.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Compute dtype (default: float32 on a CPU, else the checkpoint's)")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    seed: Annotated[
        int | None, typer.Option(help="Of the model's own text (default: one that the calibration did not use)")
    ] = None,
    text_column: Annotated[str, typer.Option(help="Field of a .jsonl file that holds the text.")] = "text",
    fail_if: Annotated[
        list[str] | None, typer.Option(help='Exit with 3 if it holds: "c8.kld_mean > 0.001". May be repeated.')
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Write report.json to stdout too.")] = False,
    no_progress: Annotated[bool, typer.Option("--no-progress", help="No progress bar.")] = False,
) -> None:
    """Measure what cache modes cost: KL divergence, top-1 agreement, perplexity, beside a noise floor and a control."""
    modes = split_modes(kv)
    cap = limit if limit is not None else max(windows, decode_windows)
    windows, decode_windows = min(windows, cap), min(decode_windows, cap)
    gates = _check_usage(modes, fail_if or [], windows, decode_windows)
    folder = scales if scales is not None else Path(model) / KV_CACHE_DIR
    if not folder.is_dir():
        fix = f"run foldkv calibrate {shlex.quote(model)}, or name its folder with --scales"
        raise ArgumentError(describe("scales", f"the folder {folder}, which the control needs", "none", fix))

    from foldkv.accuracy import accuracy_report
    from foldkv.hf import load_model

    loaded, tokenizer = load_model(model, dtype or ("float32" if device == "cpu" else "auto"), device)
    with _bar(not no_progress and not json) as (advance, tell):
        result = accuracy_report(
            loaded, modes, data, tokenizer=tokenizer, scales=folder, num_windows=windows, window_len=window_len,
            decode_windows=decode_windows, decode_len=decode_len, seed=seed, text_column=text_column, gates=gates,
            setup={"model": model, "command": "foldkv " + shlex.join(sys.argv[1:])},
            progress=advance, on_result=tell,
        )  # fmt: skip
    paths = result.save(out)
    if json:
        emit_json(result.data)
    else:
        _print(result)
    console.print("wrote " + ", ".join(str(path) for path in paths), markup=False, highlight=False, soft_wrap=True)
    _judge(result)


def _check_usage(modes: list[str], fail_if: list[str], windows: int, decode_windows: int) -> list[Any]:
    """The gates; UsageError for what can be told to be wrong before anything is loaded."""
    from foldkv.accuracy.gates import check_gate, parse_gate
    from quant.spec import CONTROL_MODE, parse_modes

    if not modes:
        raise UsageError(describe("--kv", "at least one mode", "none"))
    ways = [way for way, count in (("prefill", windows), ("decode", decode_windows)) if count]
    if not ways:
        raise UsageError(describe("--windows and --decode-windows", "one of them above 0", "0 and 0"))
    try:
        for mode in modes:
            parse_modes(mode, num_layers=sys.maxsize, plan="c8")
        gates = [parse_gate(text) for text in fail_if]
        for gate in gates:
            check_gate(gate, [*(mode for mode in modes if mode != CONTROL_MODE), CONTROL_MODE], ways)
    except ArgumentError as error:
        raise UsageError(str(error)) from error
    return gates


@contextmanager
def _bar(wanted: bool) -> Iterator[tuple[Callable[[str, int, int], None], Callable[[str, str, dict[str, Any]], None]]]:
    """A progress bar, and a line for each result as it comes; nothing where nobody watches."""
    if not wanted or not console.is_terminal:
        yield (lambda what, done, total: None), (lambda way, mode, figures: None)
        return
    from rich.progress import Progress, TimeRemainingColumn

    with Progress(*Progress.get_default_columns()[:-1], TimeRemainingColumn(), console=console, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def advance(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        def tell(way: str, mode: str, figures: dict[str, Any]) -> None:
            from foldkv.accuracy.present import percent, sci

            text = f"{way:8}{mode:12} KLD {sci(figures['kld_mean'])}, same top-1 {percent(figures['top1_agreement'])}"
            bar.console.print(text, highlight=False)

        yield advance, tell


def _print(result: AccuracyReport) -> None:
    """How it was measured, the verdict and the table, on stdout."""
    from rich.box import SIMPLE
    from rich.table import Table

    from foldkv.accuracy import present

    def say(text: str, style: str | None = None) -> None:
        output.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    for line in present.how(result.data):
        say(line)
    table = Table(box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("mode", "level", "bits", "tokens", "KLD", "99 %", "same top-1", "PPL"):
        table.add_column(name, no_wrap=True)
    for row in present.mode_rows(result.data):
        keys = ("name", "level", "bits", "capacity", "kld_alone", "p99", "top1_alone", "ppl_alone")
        table.add_row(*(row[key] for key in keys))
    output.print(table)
    say("The worst of the ways; (?): no difference shown. " + present.noise_text(result.data))
    for note in result.data["notes"]:
        say(f"Note: {note}")
    say(result.data["verdict"]["text"], style="bold")


def _judge(result: AccuracyReport) -> None:
    """Failed checks on stderr; GateError where a gate failed, or where gates were set and the figures mean nothing."""
    for check in result.data["checks"]:
        if not check["ok"]:
            console.print(f"[bold red]check failed[/] {check['name']}:", check["text"], highlight=False)
    if result.failed_gates:
        raise GateError("; ".join(f"gate failed: {failed}" for failed in result.failed_gates))
    if result.gates and not result.trusted:
        raise GateError("gates cannot pass: a check of the harness failed, so the figures mean nothing")
