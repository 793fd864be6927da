"""From scores to the JSON of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quant.scales import KVScales
from quant.spec import CONTROL_MODE

from . import verdict
from .gates import NOISE_METRICS
from .metrics import TokenScores
from .notes import notes
from .probe import Probe
from .sources import CacheSource
from .summary import summarise, worst

SCHEMA_VERSION = 1

Runs = Mapping[str, Mapping[str, TokenScores]]
"""Way -> run -> scores; `evaluate` gives one way's."""

Probes = Mapping[str, Mapping[str, Probe]]
"""Source -> way -> what the ops were seen to do; empty for a source without foldkv's kernels."""


def assemble(
    base: CacheSource,
    sources: Sequence[CacheSource],
    runs: Runs,
    probes: Probes,
    setup: dict[str, Any],
    scales: KVScales | None,
) -> dict[str, Any]:
    """What report.json holds."""
    noise = {
        way: {run: summarise(scores[f"noise.{run}"]) for run in ("split", "stock")} for way, scores in runs.items()
    }
    floor = {
        key: worst(key, [figures[key] for way in noise.values() for figures in way.values()]) for key in NOISE_METRICS
    }
    modes = {source.name: _mode_entry(source, runs, probes[source.name]) for source in sources}
    levels = [level.within(floor) for level in verdict.LEVELS]
    checks = _checks(base, sources, modes, runs, probes, floor["kld_mean"])
    for name, entry in modes.items():
        entry.update(verdict.grade(entry, levels))
        if any(not check.ok and check.mode == name for check in checks):
            entry["level"] = verdict.SUSPECT
    base_figures = {
        way: {key: noise[way]["split"][f"base_{key}"] for key in ("ppl", "ppl_se")} | {"mode": base.name}
        for way in runs
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "verdict": verdict.headline(modes, checks),
        "modes": modes,
        "base": base_figures,
        "noise_floor": {**floor, **noise},
        "checks": [check.to_json() for check in checks],
        "gates": [],
        "notes": notes(setup, modes, scales),
        "levels": [level._asdict() for level in levels],
        "setup": setup,
    }


def _mode_entry(source: CacheSource, runs: Runs, probes: Mapping[str, Probe]) -> dict[str, Any]:
    entry = {"control": source.name == CONTROL_MODE, "quantised": source.quantised, **source.describe()}
    measured = next(iter(probes.values()), None)
    if measured and measured.layers:
        entry["bits_per_element"] = measured.bits_per_element
        entry["bytes_per_token"] = measured.bytes_per_token
    entry["capacity_ratio"] = 16 / entry["bits_per_element"]
    return entry | {way: summarise(scores[source.name]) for way, scores in runs.items()}


def _checks(
    base: CacheSource,
    sources: Sequence[CacheSource],
    modes: dict[str, Any],
    runs: Runs,
    probes: Probes,
    floor: float | None,
) -> list[verdict.Check]:
    checks = [verdict.kernel_check(base.name, probes[base.name], mode="")]
    for source in sources:
        if probes[source.name]:
            checks.append(verdict.kernel_check(source.name, probes[source.name], source.name))
        if source.quantised:
            checks += verdict.exercised_checks(source.name, runs)
        agree = verdict.ways_check(source.name, runs, floor)
        checks += [agree] if agree else []
        if source.name != CONTROL_MODE:
            checks.append(verdict.damage_check(source.name, modes))
    # A broken mode must not hide behind a control that looks fine beside it.
    broken = {check.mode for check in checks if not check.ok}
    sound = {name: entry for name, entry in modes.items() if name not in broken or entry["control"]}
    return [verdict.control_check(sound, floor), *checks]
