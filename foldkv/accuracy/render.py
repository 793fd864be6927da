"""report.md and report.html from a report's JSON."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from . import plots, present, tables
from .gates import WAYS


def to_markdown(report: Mapping[str, Any]) -> str:
    """The report for a pull request."""
    return environment().get_template("report.md.j2").render(_view(report)).rstrip() + "\n"


def to_html(report: Mapping[str, Any]) -> str:
    """The report as one page without scripts or anything to load."""
    drawings = {
        "pareto": Markup(plots.pareto(report)),
        "curve": Markup(plots.position_curve(report)),
        "bars": Markup(plots.percentile_bars(report)),
        "histogram": Markup(plots.histogram(report)),
        "parts": Markup(plots.parts(report)),
        "heat_maps": [(mode, Markup(picture)) for mode, picture in plots.heat_maps(report)],
        "heat_is_kld": any(entry.get("heads") for entry in report["modes"].values()),
    }
    return environment().get_template("report.html.j2").render(_view(report) | drawings)


def _view(report: Mapping[str, Any]) -> dict[str, Any]:
    ways = [way for way in WAYS if way in report["base"]]
    return {
        "report": report,
        "p": present,
        "t": tables,
        "ways": ways,
        "modes": present.mode_rows(report),
        "control": next(check for check in report["checks"] if check["name"] == "control_fails"),
        "failed_checks": [check for check in report["checks"] if not check["ok"]],
    }


@cache
def environment() -> Environment:
    """Where the templates are rendered."""
    environment = Environment(
        loader=PackageLoader("foldkv.accuracy"),
        autoescape=lambda name: bool(name) and ".html" in str(name),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|")
    return environment
