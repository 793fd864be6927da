"""`foldkv report`: what cache modes cost a model in accuracy."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quant.errors import ArgumentError, describe

from .common import GateError, UsageError, cli_errors, console, emit_json, output
from .report_ops import check_ops_usage, report_ops
from .report_parts import progress_bar, say, scales_folder

if TYPE_CHECKING:
    from foldkv.accuracy.ops_report import OpsReport
    from foldkv.accuracy.report import AccuracyReport


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
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Checkpoint directory or hub id; with --ops it may be left out."),
    ] = None,
    kv: Annotated[str, typer.Option(help="Modes to measure, comma-separated; per layer: c4,0:c8.")] = "c8,k8v4,c4",
    out: Annotated[Path, typer.Option(help="Folder for report.json, report.md, report.html.")] = Path("report"),
    level: Annotated[str, typer.Option(help="quick, standard or full: how much is measured.")] = "standard",
    ops: Annotated[
        bool,
        typer.Option(
            "--ops", help="Measure the attention ops alone, replayed at growing lengths: ops.json, .md, .html."
        ),
    ] = False,
    with_ops: Annotated[
        bool, typer.Option("--with-ops", help="Measure the ops too, after the model: pages that link to each other.")
    ] = False,
    data: Annotated[Path | None, typer.Option(help="Text, .txt or .jsonl (default: the model writes its own)")] = None,
    scales: Annotated[Path | None, typer.Option(help="Folder of the calibration (default: MODEL/kv_cache)")] = None,
    windows: Annotated[int | None, typer.Option(min=0, help="Windows appended in one piece, and in chunks.")] = None,
    window_len: Annotated[int | None, typer.Option(min=2, help="Tokens of each.")] = None,
    decode_windows: Annotated[int | None, typer.Option(min=0, help="Windows decoded token by token.")] = None,
    decode_len: Annotated[int | None, typer.Option(min=2, help="Tokens of each.")] = None,
    new_tokens: Annotated[int | None, typer.Option(min=0, help="Tokens of greedy continuations; 0: none.")] = None,
    baselines: Annotated[
        str | None,
        typer.Option(help="Other formats beside ours: all, none, or names: fp8,q4_0 (default: the level's)."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm-evaluation-harness (pip install lm_eval accelerate), scored through the cache."),
    ] = None,
    tasks_path: Annotated[Path | None, typer.Option(help="Folder of their YAML files, for tasks of your own.")] = None,
    task_limit: Annotated[int | None, typer.Option(min=1, help="Examples of each task.")] = None,
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
        list[str] | None,
        typer.Option(
            help='Exit with 3 if it holds: "c8.kld_mean > 0.001"; or where a mode is worse than a level: near-lossless, '
            "c8:lossless. May be repeated."
        ),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Forget results of an earlier run that was cut short.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Write report.json to stdout too.")] = False,
    no_progress: Annotated[bool, typer.Option("--no-progress", help="No progress bar.")] = False,
) -> None:
    """Measure what cache modes cost: KL divergence, top-1 agreement, perplexity, beside a noise floor and a control.

    A run that is cut short goes on where it stopped when the same command is given again.
    """
    modes = split_modes(kv)
    if ops or with_ops:
        check_ops_usage(modes, level, dtype)
    ops_too = partial(
        report_ops, modes, out, model, scales=scales, data=data, level=level, dtype=dtype, device=device,
        text_column=text_column, watch=not no_progress and not json,
    )  # fmt: skip
    if ops:
        if fail_if:
            raise UsageError(describe("--fail-if", "none with --ops, which has its own bands", fail_if[0]))
        alone = ops_too()
        _tell_ops(alone, json)
        _judge_ops(alone)
        return
    if model is None:
        raise UsageError(describe("MODEL", "a checkpoint directory or hub id", "none", "or give --ops"))
    sizes = _sizes(level, limit, num_windows=windows, decode_windows=decode_windows)
    gates = _check_usage(modes, fail_if or [], level, sizes | {"new_tokens": new_tokens})
    folder = scales_folder(model, scales)
    from foldkv.accuracy import accuracy_report
    from foldkv.accuracy.partial import Partial
    from foldkv.hf import load_model

    names = {None: None, "none": []}.get(baselines, (baselines or "").split(","))
    if fresh:
        Partial(out, {}).clear()
    loaded, tokenizer = load_model(model, dtype or ("float32" if device == "cpu" else "auto"), device)
    with _resumable(out), progress_bar(not no_progress and not json) as (advance, tell):
        result = accuracy_report(
            loaded, modes, data, tokenizer=tokenizer, scales=folder, level=level, window_len=window_len,
            decode_len=decode_len, new_tokens=new_tokens, baselines=names, seed=seed, text_column=text_column, gates=gates,
            setup={"model": model, "command": "foldkv " + shlex.join(sys.argv[1:])}, work_dir=out,
            tasks=tasks.split(",") if tasks else (), tasks_path=tasks_path, task_limit=task_limit,
            progress=advance, on_result=tell, num_windows=sizes["num_windows"], decode_windows=sizes["decode_windows"],
        )  # fmt: skip
    paths = result.save(out)
    Partial(out, {}).clear()
    if json:
        emit_json(result.data)
    else:
        _print(result)
    console.print("wrote " + ", ".join(str(path) for path in paths), markup=False, highlight=False, soft_wrap=True)
    found = ops_too(loaded=(loaded, tokenizer)) if with_ops else None
    if found is not None and not json:
        _tell_ops(found, json)
    _judge(result)
    if found is not None:
        _judge_ops(found)


@contextmanager
def _resumable(out: Path) -> Iterator[None]:
    """Says, when a run is cut short, that nothing is lost."""
    try:
        yield
    except KeyboardInterrupt:
        text = f"stopped; finished runs are in {out}: the same command goes on from there"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        raise


def _sizes(level: str, limit: int | None, **asked: int | None) -> dict[str, int | None]:
    """Numbers of windows: those asked for, else the level's, never more than `limit`. UsageError for an unknown level."""
    from foldkv.accuracy.effort import effort

    try:
        own = effort(level)
    except ArgumentError as error:
        raise UsageError(str(error)) from error
    if limit is not None:
        defaults = {"num_windows": own.windows, "decode_windows": own.decode_windows}
        asked = {key: min(limit, defaults[key] if value is None else value) for key, value in asked.items()}
    if asked["num_windows"] == 0 and asked["decode_windows"] == 0:
        raise UsageError(describe("--windows and --decode-windows", "one of them above 0", "0 and 0"))
    return asked


def _check_usage(modes: list[str], fail_if: list[str], level: str, sizes: dict[str, int | None]) -> list[Any]:
    """The gates; UsageError for what can be told to be wrong before anything is loaded."""
    from foldkv.accuracy.effort import effort
    from foldkv.accuracy.evaluate import CHUNK
    from foldkv.accuracy.gates import check_gate, parse_gates
    from foldkv.accuracy.measure import extra_paths
    from quant.spec import CONTROL_MODE, parse_modes

    if not modes:
        raise UsageError(describe("--kv", "at least one mode", "none"))
    given = {"windows": sizes["num_windows"], **sizes}
    fitted = effort(level).fit(float("inf"), **{key: given[key] for key in ("windows", "decode_windows", "new_tokens")})
    ways = [way for way, count in (("prefill", fitted.windows), ("decode", fitted.decode_windows)) if count]
    ways += ["chunked"] if fitted.chunked_windows and fitted.windows and fitted.window_len > CHUNK else []
    try:
        for mode in modes:
            parse_modes(mode, num_layers=sys.maxsize, plan="c8")
        own = [mode for mode in modes if mode != CONTROL_MODE]
        gates = parse_gates(fail_if, own)
        for gate in gates:
            check_gate(gate, [*own, CONTROL_MODE], ways, extra_paths(fitted))
    except ArgumentError as error:
        raise UsageError(str(error)) from error
    return gates


def _print(result: AccuracyReport) -> None:
    """How it was measured, the answers and the table, on stdout."""
    from rich.box import SIMPLE
    from rich.table import Table

    from foldkv.accuracy import present

    for line in present.how(result.data):
        say(line)
    table = Table(box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("mode", "use it?", "level", "bits", "KLD", "same top-1", "PPL"):
        table.add_column(name, no_wrap=True)
    for row in present.mode_rows(result.data):
        keys = ("name", "answer", "level", "bits", "kld_alone", "top1_alone", "ppl_alone")
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


def _tell_ops(found: OpsReport, json: bool) -> None:
    """What came of the ops, on stdout."""
    from foldkv.accuracy.ops_render import verdict

    if json:
        emit_json(found.data)
    else:
        say(verdict(found.data), style="bold")


def _judge_ops(found: OpsReport) -> None:
    """GateError where an error of an op lies outside its band."""
    if not found.ok:
        raise GateError("; ".join(found.data["outside"][:10]))
