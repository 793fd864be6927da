"""From scores to the JSON of a report; `report.schema.json` beside this file says what it holds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

from quant.scales import KVScales
from quant.spec import CONTROL_MODE

from . import verdict
from .gates import NOISE_METRICS
from .measure import Found
from .notes import notes
from .probe import Probe
from .sources import CacheSource
from .summary import summarise, worst

SCHEMA_VERSION = 2

GIB = 1 << 30


@cache
def schema(kind: str = "report") -> dict[str, Any]:
    """The JSON Schema (2020-12) of report.json, or with "ops" of ops.json."""
    return json.loads(resources.files("foldkv.accuracy").joinpath(f"{kind}.schema.json").read_text(encoding="utf-8"))


def assemble(
    base: CacheSource,
    sources: Sequence[CacheSource],
    baselines: Sequence[CacheSource],
    found: Found,
    setup: dict[str, Any],
    scales: KVScales | None,
) -> dict[str, Any]:
    """What report.json holds."""
    noise = {way: {run: _figures(found, way, f"noise.{run}") for run in ("split", "stock")} for way in found.runs}
    floor = {
        key: worst(key, [figures[key] for way in noise.values() for figures in way.values()]) for key in NOISE_METRICS
    }
    modes = {source.name: _mode_entry(source, found) for source in sources}
    levels = [level.within(floor) for level in verdict.LEVELS]
    checks = _checks(base, sources, modes, found, floor["kld_mean"])
    for name, entry in modes.items():
        entry.update(verdict.grade(entry, levels))
        if any(not check.ok and check.mode == name for check in checks):
            entry |= {"level": verdict.SUSPECT, "level_rank": verdict.rank(verdict.SUSPECT)}
        entry["answer"] = verdict.answer(entry, found.details.get(name, {}))
    base_figures = {
        way: {key: noise[way]["split"][f"base_{key}"] for key in ("ppl", "ppl_se")}
        | {"mode": base.name, "tokens_per_s": found.speed[way].get("base")}
        for way in found.runs
    }
    return {
        "schema_version": SCHEMA_VERSION,
        "verdict": verdict.headline(modes, checks),
        "modes": modes,
        "baselines": {source.name: _baseline_entry(source, found) for source in baselines},
        "base": base_figures,
        "noise_floor": {**floor, **noise, "stored_logits": found.store_floor},
        "generation": found.texts,
        "base_scores": found.details.get(base.name, {}),
        "checks": [check.to_json() for check in checks],
        "gates": [],
        "notes": notes(setup, modes, scales, levels),
        "levels": [level._asdict() for level in levels],
        "setup": setup,
    }


def _figures(found: Found, way: str, run: str) -> dict[str, Any]:
    return summarise(found.runs[way][run]) | {"tokens_per_s": found.speed[way].get(run)}


def _mode_entry(source: CacheSource, found: Found) -> dict[str, Any]:
    entry = {"control": source.name == CONTROL_MODE, "quantised": source.quantised, **source.describe()}
    measured = next(iter(found.probes[source.name].values()), None)
    if measured and measured.layers:
        entry["bits_per_element"] = measured.bits_per_element
        entry["bytes_per_token"] = measured.bytes_per_token
    entry["capacity_ratio"] = 16 / entry["bits_per_element"]
    size = entry.get("bytes_per_token")
    entry["tokens_per_gib"] = int(GIB // size) if size else None
    details = found.details.get(source.name, {})
    entry |= {way: _figures(found, way, source.name) for way in found.runs}
    entry |= {"reference": {way: one.to_json() for way, one in found.crosschecks.get(source.name, {}).items()}}
    return entry | details | {"worst": worst_places(details)}


def _baseline_entry(source: CacheSource, found: Found) -> dict[str, Any]:
    entry = {"note": "", **source.describe()}
    entry["capacity_ratio"] = 16 / entry["bits_per_element"]
    ways = [way for way, runs in found.runs.items() if source.name in runs]
    return entry | {way: summarise(found.runs[way][source.name]) for way in ways}


def worst_places(details: Mapping[str, Any]) -> dict[str, Any]:
    """Where a mode is worst: the layer and the head that cost most alone, and the head with the largest of each figure."""
    result: dict[str, Any] = {}
    for kind, keys in (("layers", ("layer",)), ("heads", ("layer", "head"))):
        entries = [entry for entry in details.get(kind, []) if entry["alone"]["kld_mean"] is not None]
        if entries:
            found = max(entries, key=lambda entry: entry["alone"]["kld_mean"])
            name = kind.removesuffix("s")
            result |= {name: [found[key] for key in keys], f"{name}_kld": found["alone"]["kld_mean"]}
    for key in ("k_clip", "v_clip", "softmax_kl", "out_error"):
        values = [
            (value, entry["layer"], head)
            for entry in details.get("damage", [])
            for head, value in enumerate(entry[key])
        ]
        if values:
            value, layer, head = max(values)
            result |= {key: value, f"{key}_at": [layer, head]}
    return result


def _checks(
    base: CacheSource,
    sources: Sequence[CacheSource],
    modes: dict[str, Any],
    found: Found,
    floor: float | None,
) -> list[verdict.Check]:
    probes: Mapping[str, Mapping[str, Probe]] = found.probes
    checks = [verdict.kernel_check(base.name, probes[base.name], mode="")]
    for source in sources:
        if probes[source.name]:
            checks.append(verdict.kernel_check(source.name, probes[source.name], source.name))
        if source.quantised:
            checks += verdict.exercised_checks(source.name, found.runs)
        crosschecks = found.crosschecks.get(source.name, {})
        checks += verdict.reference_checks(source.name, crosschecks, source.searches, source.shapes)
        agree = verdict.ways_check(source.name, found.runs, floor)
        checks += [agree] if agree else []
        if source.name != CONTROL_MODE:
            checks.append(verdict.damage_check(source.name, modes))
    # A broken mode must not hide behind a control that looks fine beside it.
    broken = {check.mode for check in checks if not check.ok}
    sound = {name: entry for name, entry in modes.items() if name not in broken or entry["control"]}
    return [verdict.control_check(sound, floor), *checks]
