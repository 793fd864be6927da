"""What `foldkv report` and `foldkv report --ops` share: the folder of the scales, progress, lines of the result."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quant.errors import ArgumentError, describe

from .common import console, output

KV_CACHE_DIR = "kv_cache"


def scales_folder(model: str, scales: Path | None) -> Path:
    """The folder of the calibration. ArgumentError where there is none."""
    folder = scales if scales is not None else Path(model) / KV_CACHE_DIR
    if not folder.is_dir():
        fix = f"run foldkv calibrate {shlex.quote(model)}, or name its folder with --scales"
        raise ArgumentError(describe("scales", f"the folder {folder}, which the control needs", "none", fix))
    return folder


@contextmanager
def progress_bar(
    wanted: bool,
) -> Iterator[tuple[Callable[[str, int, int], None], Callable[[str, str, dict[str, Any]], None]]]:
    """A progress bar, and a line for each result as it comes; nothing where nobody watches."""
    if not wanted or not console.is_terminal:
        yield (lambda what, done, total: None), (lambda way, mode, figures: None)
        return
    from rich.progress import Progress, TimeElapsedColumn, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:-1], TimeRemainingColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
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


def say(text: str, style: str | None = None) -> None:
    """A line of the result, on stdout."""
    output.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
