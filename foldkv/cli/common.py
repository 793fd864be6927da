"""What all commands share: consoles, exit codes, errors as one line, progress bars, JSON.

Results go to stdout (`output`, `emit_json`), everything else to stderr (`console`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from rich.console import Console

from quant.errors import FoldkvError

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_GATE = 3

console = Console(stderr=True)
output = Console()


class GateError(Exception):
    """A `--fail-if` condition holds: the command worked, its result is not good enough. Exit code 3."""


class UsageError(Exception):
    """Options that contradict each other or name what does not exist. Exit code 2."""


def fail(error: BaseException | str, code: int = EXIT_FAILED) -> NoReturn:
    """Print one line that says what is wrong on stderr, and end the command with `code`."""
    console.print("[bold red]error[/]", end=" ")
    console.print(str(error), markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(code)


@contextmanager
def cli_errors() -> Iterator[None]:
    """Turn errors into exit codes: FoldkvError 1, UsageError 2, GateError 3. Also a decorator: `@cli_errors()`."""
    try:
        yield
    except FoldkvError as error:
        fail(error, EXIT_FAILED)
    except UsageError as error:
        fail(error, EXIT_USAGE)
    except GateError as error:
        fail(error, EXIT_GATE)


@contextmanager
def progress(description: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """A progress bar on a terminal, nothing elsewhere. Yields `advance(steps=1)`; `total` None shows a spinner."""
    if not console.is_terminal:
        yield lambda steps=1: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda steps=1: bar.advance(task, steps)


def emit_json(value: Any) -> None:
    """Write `value` as JSON to stdout, for machines. NaN and infinities are written as Python writes them."""
    json.dump(value, sys.stdout, indent=2)
    sys.stdout.write("\n")
