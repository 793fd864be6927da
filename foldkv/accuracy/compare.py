"""Two reports side by side: what changed, and whether the change shows."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quant.errors import ArgumentError, describe

from .assemble import SCHEMA_VERSION
from .gates import WAYS
from .summary import students_t

READABLE = (1, SCHEMA_VERSION)
"""Schema versions that `load_report` takes; what is compared is the same in all of them."""

COMPARED = (("kld_mean", "kld_se"), ("top1_agreement", "top1_se"), ("ln_ppl_ratio", "ln_ppl_ratio_se"))
"""Figures and their standard errors; by window under their own names where both reports have them."""

BETTER_IS_LARGER = {"top1_agreement"}


@dataclass(frozen=True)
class Change:
    """One figure of one mode and way. error: standard error of the difference, paired where the windows are the same.

    verdict: "better", "worse", "no difference shown", or "not comparable" where a figure is missing or not finite.
    """

    mode: str
    way: str
    figure: str
    before: float | None
    after: float | None
    error: float | None
    paired: bool
    verdict: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def load_report(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON of a report, given its file or folder. ArgumentError for another file or an unknown version."""
    file = Path(path) / "report.json" if Path(path).is_dir() else Path(path)
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        got = error.strerror or str(error)
        raise ArgumentError(describe(str(file), "a report.json", got, "make one with foldkv report")) from None
    except ValueError as error:
        raise ArgumentError(describe(str(file), "JSON", str(error))) from None
    version = data.get("schema_version") if isinstance(data, Mapping) else None
    if version not in READABLE or not isinstance(data.get("modes"), Mapping):
        wanted = f"a report of schema version {' or '.join(map(str, READABLE))}"
        raise ArgumentError(describe(str(file), wanted, f"version {version!r}", "make it anew with foldkv report"))
    return data


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What is not the same in the set-ups, in words; the first ones make figures incomparable."""
    a, b = before["setup"], after["setup"]
    found = []
    for key, what in (("model_config_sha256", "another model"), ("architecture", "another architecture")):
        if a.get(key) != b.get(key):
            found.append(what)
    if a["data"]["tokens_sha256"] != b["data"]["tokens_sha256"]:
        found.append(f"other text: {a['data']['source']} and {b['data']['source']}, so differences are unpaired")
    if (a.get("scales") or {}).get("sha256") != (b.get("scales") or {}).get("sha256"):
        found.append("other scales")
    for key in ("dtype", "device_name", "kernels", "commit"):
        if a.get(key) != b.get(key):
            found.append(f"{key.replace('_', ' ')}: {a.get(key)} and {b.get(key)}")
    versions = {key for key in {*a["versions"], *b["versions"]} if a["versions"].get(key) != b["versions"].get(key)}
    found += [f"{key} {a['versions'].get(key)} and {b['versions'].get(key)}" for key in sorted(versions)]
    return found


def compare_reports(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """The figures of modes and ways that both reports have."""
    same_text = before["setup"]["data"]["tokens_sha256"] == after["setup"]["data"]["tokens_sha256"]
    changes = []
    for mode in (mode for mode in before["modes"] if mode in after["modes"]):
        a, b = before["modes"][mode], after["modes"][mode]
        for way in (way for way in WAYS if way in a and way in b):
            same = same_text and all(a[way][key] == b[way][key] for key in ("positions", "windows"))
            changes += [_change(mode, way, key, se, a[way], b[way], same) for key, se in COMPARED]
    return changes


def _change(
    mode: str, way: str, key: str, se_key: str, a: Mapping[str, Any], b: Mapping[str, Any], same: bool
) -> Change:
    before, after = a[key], b[key]
    rows = [x.get("by_window", {}).get(key) for x in (a, b)]
    paired = same and all(row and None not in row for row in rows)
    if paired:
        error = _paired_error(*rows)
    else:
        errors = [x[se_key] for x in (a, b)]
        error = None if None in errors else math.hypot(*errors)
    times = students_t(min(x["windows"] for x in (a, b)))
    return Change(mode, way, key, before, after, error, paired, _judge(key, before, after, error, times))


def _paired_error(a: list[float], b: list[float]) -> float | None:
    gaps = [y - x for x, y in zip(a, b, strict=True)]
    if len(gaps) < 2:
        return None
    mean = sum(gaps) / len(gaps)
    return math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1) / len(gaps))


def _judge(key: str, before: float | None, after: float | None, error: float | None, times: float) -> str:
    """times: standard errors that a difference must pass to show."""
    if before is None or after is None:
        return "not comparable"
    gap = after - before
    if key == "ln_ppl_ratio":  # a change away from 0 is damage whichever its sign
        gap = abs(after) - abs(before)
    if gap == 0 or error is None or abs(gap) <= times * error:
        return "no difference shown"
    return "better" if (gap > 0) == (key in BETTER_IS_LARGER) else "worse"


def only_in_one(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Modes that one of the reports lacks."""
    return sorted({*before["modes"]} ^ {*after["modes"]})
