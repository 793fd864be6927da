"""The application: every command by name, in the order in which a user meets them."""

from __future__ import annotations

from typing import Annotated

import typer

from foldkv.version import __version__

from .bench import bench
from .calibrate import calibrate
from .compare import compare
from .doctor import doctor
from .generate import generate
from .inspect import inspect
from .interchange import export, import_
from .models import models
from .plan import plan
from .report import report
from .rewrite import rewrite

app = typer.Typer(
    name="foldkv",
    help="8-bit and 4-bit KV cache for Hugging Face decoder models: calibrate, swap, report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"foldkv {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    del version


for _command in (calibrate, inspect, generate, report, compare, bench, plan, models, doctor, rewrite):
    app.command()(_command)
app.command("export")(export)
app.command("import")(import_)


def main() -> None:
    """Run the command line; exit codes: 0 ok, 1 failed, 2 usage, 3 gate failed."""
    app(prog_name="foldkv")


if __name__ == "__main__":
    main()
