"""`foldkv doctor`: what was built, what runs here, and why not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from .common import cli_errors, emit_json, output

if TYPE_CHECKING:
    from foldkv.doctor import Diagnosis


@cli_errors()
def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Tell what was built, what runs on this machine, and why not."""
    from foldkv.doctor import diagnose

    found = diagnose()
    if json:
        emit_json(found.to_json())
    else:
        _show(found)


def _show(found: Diagnosis) -> None:
    build = found.build
    cuda = f"{build['cuda']} for {', '.join(build['cuda_archs'])}" if build.get("cuda") else "not built"
    _section("versions", found.versions)
    _section(
        "extension",
        {
            "file": found.extension,
            "compiler": build.get("compiler", ""),
            "instruction sets built": ", ".join(build.get("isas", [])),
            "instruction set in use": _isa(found),
            "CUDA": cuda,
        },
    )
    for device in found.devices:
        _section(f"{device.name}: {device.description}", {**device.ops, "trial copy": device.check})
    if found.notes:
        _line("[bold]notes[/]")
    for note in found.notes:
        _line(f"  {escape(note)}")


def _isa(found: Diagnosis) -> str:
    if not found.cpu_isa:
        return "none" if found.extension else ""
    return found.cpu_isa + (" (forced by FOLDKV_ISA)" if found.cpu_isa_forced else "")


def _section(title: str, facts: dict[str, str]) -> None:
    _line(f"[bold]{escape(title)}[/]")
    width = max([22, *map(len, facts)]) + 2
    for name, value in facts.items():
        _line(f"  {name:<{width}}{escape(value or '-')}")


def _line(text: str) -> None:
    output.print(text, highlight=False, soft_wrap=True)
