"""`foldkv compare`: two reports side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import GateError, cli_errors, emit_json, output
from .report import say


@cli_errors()
def compare(
    before: Annotated[Path, typer.Argument(metavar="A", help="report.json, or the folder that holds it.")],
    after: Annotated[Path, typer.Argument(metavar="B", help="The one to hold against it.")],
    fail_if_worse: Annotated[
        bool,
        typer.Option(
            "--fail-if-worse", help="Exit with 3 if a mode is worse in B beyond the 95 % interval of the difference."
        ),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Write the changes as JSON to stdout.")] = False,
) -> None:
    """What changed from report A to report B, and whether the 95 % interval of the difference shows it.

    Reports of the same text are compared window by window, which sees far smaller changes.
    """
    from foldkv.accuracy.compare import compare_reports, differences, load_report, only_in_one

    a, b = load_report(before), load_report(after)
    changes, other = compare_reports(a, b), differences(a, b)
    if json:
        emit_json(
            {"changes": [change.to_json() for change in changes], "setup": other, "only_in_one": only_in_one(a, b)}
        )
    else:
        _print(changes, other, only_in_one(a, b))
    worse = [change for change in changes if change.verdict == "worse"]
    if fail_if_worse and worse:
        raise GateError("worse: " + ", ".join(f"{change.mode} {change.way} {change.figure}" for change in worse))


def _print(changes: list[Any], other: list[str], missing: list[str]) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    from foldkv.accuracy.present import percent, plain, sci

    def show(figure: str, value: float | None) -> str:
        return {"kld_mean": sci, "top1_agreement": percent}.get(figure, plain)(value)

    table = Table(box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("mode", "way", "figure", "A", "B", "± of the difference", ""):
        table.add_column(name, no_wrap=True)
    for c in changes:
        style = {"worse": "red", "better": "green"}.get(c.verdict)
        error = "" if c.error is None else f"{c.error:.1e}" + ("" if c.paired else " (unpaired)")
        table.add_row(
            c.mode, c.way, c.figure, show(c.figure, c.before), show(c.figure, c.after), error, c.verdict, style=style
        )
    output.print(table)
    for text in other:
        say(f"Not the same: {text}")
    if missing:
        say("In one of them only: " + ", ".join(missing))
    shown = {c.verdict for c in changes} & {"better", "worse"}
    say("Changes are shown above." if shown else "No difference shown.", style="bold")
