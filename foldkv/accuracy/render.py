"""report.md and report.html from a report's JSON."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from . import plots, present
from .gates import WAYS


def to_markdown(report: Mapping[str, Any]) -> str:
    """The report for a pull request."""
    return _environment().get_template("report.md.j2").render(_view(report)).rstrip() + "\n"


def to_html(report: Mapping[str, Any]) -> str:
    """The report as one page without scripts or anything to load."""
    drawings = {
        "pareto": Markup(plots.pareto(report)),
        "curve": Markup(plots.position_curve(report)),
        "bars": Markup(plots.percentile_bars(report)),
    }
    return _environment().get_template("report.html.j2").render(_view(report) | drawings)


def _view(report: Mapping[str, Any]) -> dict[str, Any]:
    ways = [way for way in WAYS if way in report["base"]]
    return {
        "report": report,
        "p": present,
        "ways": ways,
        "modes": present.mode_rows(report),
        "control": next(check for check in report["checks"] if check["name"] == "control_fails"),
        "failed_checks": [check for check in report["checks"] if not check["ok"]],
    }


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("foldkv.accuracy"),
        autoescape=lambda name: bool(name) and ".html" in str(name),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|")
    return environment
