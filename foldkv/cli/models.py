"""`foldkv models`: which models work, and which do not and why."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from .common import cli_errors, emit_json, output


@cli_errors()
def models(
    json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False,
) -> None:
    """List the model families whose KV cache can be swapped, and those that are refused."""
    from foldkv.hf.models import REFUSED, SUPPORTED

    if json:
        supported = [{**asdict(family), "tested": family.tested} for family in SUPPORTED]
        emit_json({"supported": supported, "refused": [asdict(family) for family in REFUSED]})
        return
    from rich.table import Table

    for title, families in (("supported, tested against the stock cache", SUPPORTED), ("refused", REFUSED)):
        table = Table(title=title, title_justify="left", box=None, header_style="bold")
        refused = families is REFUSED
        for column in ("model_type", "models", *([] if refused else ["tested"]), "why" if refused else "note"):
            table.add_column(column, overflow="fold")
        for family in families:
            table.add_row(family.model_type, family.name, *([] if refused else [family.tested]), family.note)
        output.print(table)
    note = "Others are tried: the first forward pass ends in an error if their attention does not reach the cache."
    output.print(note, soft_wrap=True)
