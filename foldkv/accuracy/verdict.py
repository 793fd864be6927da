"""From figures to words: levels, the control, and checks that the harness measures what it says.

The limits stand in `LEVELS` and the constants below, nowhere else; the report prints them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from quant.spec import CONTROL_MODE

from .crosscheck import CrossCheck
from .gates import PRESETS, WAYS
from .metrics import TokenScores
from .probe import Probe
from .summary import block_mean, students_t, worst


class Level(NamedTuple):
    """A mode is at a level where its mean KLD and its top-1 agreement, the worst of the ways, keep both limits.

    floors: where above 0, what the noise floor hides is not held against a mode: the KLD may reach so many noise floors,
    and the agreement may fall to the floor's.
    """

    name: str
    max_kld: float
    min_top1: float
    floors: float = 0.0

    def within(self, floor: Mapping[str, float | None]) -> Level:
        """The level with the limits that hold beside this noise floor."""
        if not self.floors:
            return self
        kld, top1 = floor["kld_mean"], floor["top1_agreement"]
        max_kld = max(self.max_kld, self.floors * (kld or 0.0))
        return self._replace(max_kld=max_kld, min_top1=min(self.min_top1, 1.0 if top1 is None else top1))


LEVELS = (
    Level("lossless", 1e-4, 0.99, floors=3.0),
    Level("near-lossless", 1e-3, 0.99),
    Level("usable", 2e-2, 0.93),
)
NOT_RECOMMENDED = "not recommended"
SUSPECT = "suspect"

CONTROL_OVER_C8 = 10.0
"""The control's KLD must exceed this many times that of the worst mode of at least 8 bits."""
CONTROL_OVER_FLOOR = 20.0
"""... and this many noise floors."""
WAYS_RATIO = 3.0
"""Prefill and decode over the same positions may differ by this factor in mean KLD."""
REFERENCE_SHARE = 0.25
"""A mode's KLD from its reference may be this share of the reference's own from the base ..."""
REFERENCE_SHARE_SEARCHED = 0.5
"""... this one where rows are searched: a rounding that tips the choice of a grid changes the row's whole error ..."""
REFERENCE_SHARE_SHAPED = 2.0
"""... and this one where rounding is shaped: a rounding that turns one choice turns those that follow, so rows err anew from
the second layer on (six layers: 0.37 to 0.71; errors that have nothing in common, which deep models may reach, are at 2) ..."""
REFERENCE_NOISE = 10.0
"""... and this many times what rounding does to the base, measured the same way, besides ..."""
REFERENCE_FLIPS = 4.0
"""... and this many times the geometric mean of both: rounding that moves a value by e flips its code, a step s, with
probability e / s, which adds 12 e / s of the quantisation's own variance s^2 / 12, where e^2 is the rounding's."""
REFERENCE_LEAST = 1e-7
"""... and this much, nats, in any case."""
REFERENCE_RATIO = 2.0
"""How many times more or less than its reference a shaped mode may lie from the base: a cache that quantises nothing, which
`REFERENCE_SHARE_SHAPED` lets pass, is at 0."""
SAME_SHARE = 0.5
"""Share of positions with logits equal to the last bit beyond which a quantised cache cannot have been used."""


@dataclass(frozen=True)
class Check:
    """One thing that must hold for the figures to mean anything. mode: whose figures are in doubt, "" for all."""

    name: str
    ok: bool
    text: str
    mode: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def rank(level: str) -> int:
    """0 for the strictest level; one more for each weaker one, then `NOT_RECOMMENDED`, then `SUSPECT`."""
    return [*PRESETS, NOT_RECOMMENDED, SUSPECT].index(level)


def grade(entry: Mapping[str, Any], levels: Sequence[Level]) -> dict[str, Any]:
    """The level of a mode's JSON entry, with the rule it met and whether a figure's 95 % interval holds a limit."""
    ways = [entry[way] for way in WAYS if way in entry]
    kld, top1 = (worst(key, [way[key] for way in ways]) for key in ("kld_mean", "top1_agreement"))
    if kld is None or top1 is None:
        return _graded(NOT_RECOMMENDED, "figures are not finite", False)
    kld_error, top1_error = (max(way[key] or 0.0 for way in ways) for key in ("kld_se", "top1_se"))
    times = students_t(min(way.get("windows") or 2 for way in ways))
    borderline = any(
        abs(kld - level.max_kld) <= times * kld_error or abs(top1 - level.min_top1) <= times * top1_error
        for level in levels
    )
    for level in levels:
        if kld <= level.max_kld and top1 >= level.min_top1:
            rule = f"mean KLD {kld:.2g} <= {level.max_kld:.2g} and top-1 {top1:.2%} >= {level.min_top1:.2%}"
            return _graded(level.name, rule, borderline)
    last = levels[-1]
    high, low = f"mean KLD {kld:.2g} > {last.max_kld:.2g}", f"top-1 {top1:.2%} < {last.min_top1:.2%}"
    return _graded(NOT_RECOMMENDED, high if kld > last.max_kld else low, borderline)


def _graded(level: str, rule: str, borderline: bool) -> dict[str, Any]:
    return {"level": level, "level_rank": rank(level), "rule": rule, "borderline": borderline}


ANSWERS = {"lossless": "yes", "near-lossless": "yes", "usable": "with care", NOT_RECOMMENDED: "no", SUSPECT: "no"}
"""May a mode be used? By its level."""


def answer(entry: Mapping[str, Any], details: Mapping[str, Any]) -> dict[str, str]:
    """{"answer": "yes", "with care" or "no", "why": a sentence for someone who asks whether to use the mode}."""
    level, said = entry["level"], ANSWERS[entry["level"]]
    if entry["control"]:
        return {"answer": "no", "why": "the control, which must fail"}
    if level == SUSPECT:
        return {"answer": "no", "why": "a check of the harness failed for this mode: its figures mean nothing"}
    why = {
        "lossless": "what it changes cannot be told from rounding, or nearly so",
        "near-lossless": "it changes the most likely token less than once in a hundred",
        "usable": "it visibly changes what the model says",
        NOT_RECOMMENDED: "it changes the model too much",
    }[level]
    if entry["borderline"]:
        why += "; close to a limit, so more text could change the answer"
    text = details.get("parts") or {}
    k, v = (text.get(part, {}).get("kld_mean") for part in ("k_only", "v_only"))
    if said != "yes" and k is not None and v is not None and max(k, v) > 3 * min(k, v):
        why += f"; nearly all of it comes from {'K' if k > v else 'V'}"
    return {"answer": said, "why": why}


def control_check(modes: Mapping[str, Mapping[str, Any]], floor: float | None) -> Check:
    """The control must be far worse than every 8-bit mode and than the noise floor, and unusable, in each way."""
    for way in (way for way in WAYS if way in modes[CONTROL_MODE]):
        kld = modes[CONTROL_MODE][way]["kld_mean"]
        if kld is None:
            continue
        near = [
            (entry[way]["kld_mean"], name)
            for name, entry in modes.items()
            if name != CONTROL_MODE and entry["bits_per_element"] >= 8 and entry[way]["kld_mean"] is not None
        ]
        bars = [(LEVELS[-1].max_kld, f"what counts as {LEVELS[-1].name}")]
        bars += [(CONTROL_OVER_FLOOR * (floor or 0.0), f"{CONTROL_OVER_FLOOR:g} noise floors")]
        bars += [(CONTROL_OVER_C8 * value, f"{CONTROL_OVER_C8:g} times {name}'s") for value, name in near]
        bar, name = max(bars)
        if not kld > bar:
            text = (
                f"the control {CONTROL_MODE} should fail and does not: its {way} KLD {kld:.2g} is no more than {name}"
            )
            return Check("control_fails", False, f"{text} ({bar:.2g}). The harness is suspect: trust no figure here")
    figures = ", ".join(
        f"{way} KLD {_number(modes[CONTROL_MODE][way]['kld_mean'])}" for way in WAYS if way in modes[CONTROL_MODE]
    )
    text = f"the control failed as it must: {CONTROL_MODE} (symmetric static int4) has {figures}"
    return Check("control_fails", True, text)


def exercised_checks(name: str, runs: Mapping[str, Mapping[str, TokenScores]]) -> list[Check]:
    """A quantised cache must change the logits, against the base and against the stock cache, in each way.

    runs: way -> run -> scores.
    """
    checks = []
    for way, scores in runs.items():
        mode, stock = scores[name].logsumexp, scores["noise.stock"].logsumexp
        others = {"the 16-bit base": scores[name].base_logsumexp, "the stock cache": stock}
        share, other = max((float((mode == values).double().mean()), what) for what, values in others.items())
        text = f"{name}, {way}: {share:.0%} of the positions have the very logits of {other}"
        ok = share <= SAME_SHARE
        checks.append(Check(f"exercised_{way}", ok, text + ("" if ok else ": the quantised cache was not used"), name))
    return checks


def reference_checks(
    name: str, found: Mapping[str, CrossCheck], searches: bool = False, shapes: bool = False
) -> list[Check]:
    """A mode's logits must be near those of the reference for the same formats and scales, each way.

    searches, shapes: as the source has them.
    """
    checks = []
    share = REFERENCE_SHARE_SHAPED if shapes else REFERENCE_SHARE_SEARCHED if searches else REFERENCE_SHARE
    for way, one in found.items():
        flips = REFERENCE_FLIPS * math.sqrt(one.own_kld * one.noise)
        bar = share * one.own_kld + REFERENCE_NOISE * one.noise + flips + REFERENCE_LEAST
        ok = one.kld <= bar
        text = f"{name}, {way}: KLD {_number(one.kld)} from what the reference gives for the same formats, at most {bar:.2g}"
        if shapes and one.ratio is not None:
            ok = ok and 1 / REFERENCE_RATIO <= one.ratio <= REFERENCE_RATIO
            text += f", and {_number(one.ratio)} times its KLD from the base, {1 / REFERENCE_RATIO:g} to {REFERENCE_RATIO:g}"
        fault = ": the cache is not read as it should, or not this mode's"
        checks.append(Check(f"reference_{way}", ok, text + ("" if ok else fault), name))
    return checks


def ways_check(name: str, runs: Mapping[str, Mapping[str, TokenScores]], floor: float | None) -> Check | None:
    """Prefill and decode store the same codes, so over the positions both scored they must agree. None with one way."""
    if not {"prefill", "decode"} <= runs.keys():
        return None
    both = [runs[way][name] for way in ("prefill", "decode")]
    windows, positions = (min(getattr(x, key) for x in both) for key in ("num_windows", "num_positions"))
    prefill, decode = (x.crop(windows, positions).kld for x in both)
    a, b = block_mean(prefill).value, block_mean(decode).value
    gap = block_mean(prefill - decode)
    apart = max(a, b) > WAYS_RATIO * min(a, b) and max(a, b) > CONTROL_OVER_FLOOR * (floor or 0.0)
    clear = gap.se is None or abs(gap.value) > 3 * gap.se
    text = f"{name}: over the same positions prefill KLD is {a:.2g}, decode KLD {b:.2g}"
    ok = not (apart and clear)
    return Check("ways_agree", ok, text + ("" if ok else ": one of them does not use the cache as it should"), name)


def kernel_check(name: str, probes: Mapping[str, Probe], mode: str) -> Check:
    """Every layer's attention went through foldkv's ops, in each way."""
    ok = all(probe.sound for probe in probes.values())
    parts = [
        f"{way}, {probe.forwards} passes: {probe.append_calls} appends, {probe.attention_calls} attentions"
        for way, probe in probes.items()
    ]
    layers = max(len(probe.layers) for probe in probes.values())
    text = f"{name}: {layers} layers; {'; '.join(parts)}"
    return Check("kernels_called", ok, text + ("" if ok else ": attention did not go through the cache"), mode)


def damage_check(name: str, modes: Mapping[str, Mapping[str, Any]]) -> Check:
    """A mode must be better than the control, and its logits finite."""
    for way in (way for way in WAYS if way in modes[name]):
        kld, bar = modes[name][way]["kld_mean"], modes[CONTROL_MODE][way]["kld_mean"]
        if modes[name][way]["nonfinite"]:
            return Check("better_than_control", False, f"{name}, {way}: logits are not finite", name)
        if kld is None or (bar is not None and kld >= bar):
            text = f"{name}, {way}: KLD {_number(kld)} is no better than the control's {_number(bar)}: broken"
            return Check("better_than_control", False, text, name)
    return Check("better_than_control", True, f"{name} is better than the control", name)


def headline(modes: Mapping[str, Mapping[str, Any]], checks: Sequence[Check]) -> dict[str, Any]:
    """The sentence that a reader takes away, and whether the checks let him."""
    broken = [check for check in checks if not check.ok]
    if any(not check.mode for check in broken):
        return {"trusted": False, "recommended": None, "text": "Do not rely on these figures: " + broken[0].text}
    ranked = sorted((entry["bits_per_element"], name) for name, entry in modes.items() if not entry["control"])
    names = [level.name for level in LEVELS[:2]]
    good = [name for _, name in ranked if modes[name]["level"] in names and modes[name]["quantised"]]
    usable = [name for _, name in ranked if modes[name]["level"] == LEVELS[-1].name]
    parts = []
    if good:
        entry = modes[good[0]]
        parts.append(f"{_size(good[0], entry)} is {entry['level']} on this model and text.")
    else:
        parts.append("No mode measured here is near-lossless on this model and text.")
    if usable and (not good or modes[usable[0]]["bits_per_element"] < modes[good[0]]["bits_per_element"]):
        parts.append(f"{_size(usable[0], modes[usable[0]])} is usable, with visible damage.")
    bad = [name for _, name in ranked if modes[name]["level"] == NOT_RECOMMENDED]
    if bad:
        parts.append(f"Not recommended: {', '.join(bad)}.")
    if broken:
        parts.append(f"Suspect: {', '.join(sorted({check.mode for check in broken}))}; see the checks.")
    return {"trusted": not broken, "recommended": good[0] if good else None, "text": " ".join(parts)}


def _size(name: str, entry: Mapping[str, Any]) -> str:
    return f"{name} ({entry['bits_per_element']:.3g} bits, {entry['capacity_ratio']:.3g}x the tokens)"


def _number(value: float | None) -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.2g}"
