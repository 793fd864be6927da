"""What a reader must know before he carries a report's figures elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quant.scales import KVScales

from .gates import WAYS
from .summary import students_t, worst

if TYPE_CHECKING:
    from .verdict import Level

SMALL_MODEL = 1_000_000_000
"""Parameters below which figures order the methods and say little about larger models."""

FEW_WINDOWS = 4

MANY_WINDOWS = 1000

LONG_TEXT = 2048
"""Windows shorter than this say nothing of long contexts."""


def notes(
    setup: Mapping[str, Any], modes: Mapping[str, Any], scales: KVScales | None, levels: Sequence[Level]
) -> list[str]:
    """Sentences, in order of weight."""
    found = []
    ways = setup["ways"]
    longest = max(way["length"] for way in ways)
    if setup["data"]["sampled"]:
        found.append(
            "The text was sampled from the model itself, as no data was given. A model is surer of its own text than of "
            "yours: give --data with text like that which it will serve."
        )
    calibration = scales.config.get("data", {}) if scales is not None else {}
    same = {"seed": setup["seed"]} if setup["data"]["sampled"] else {"source": setup["data"]["source"]}
    if setup["data"]["source"] == calibration.get("source") and same.items() <= calibration.items():
        found.append(
            f"The scales were calibrated on text of the same source ({setup['data']['source']}), and perhaps on this very "
            "text, which flatters static scales. Measure on other text."
        )
    if scales is not None and scales.calibrated_len and longest > scales.calibrated_len:
        found.append(
            f"Windows of {longest} tokens are longer than the {scales.calibrated_len} that the scales were calibrated "
            "on: static ranges of K may not hold there. Calibrate with a larger --max-seq-len."
        )
    if setup["parameters"] < SMALL_MODEL:
        found.append(
            f"The model has {setup['parameters'] / 1e6:.3g} M parameters. Figures of a small model order the methods; "
            "they do not carry over to larger ones."
        )
    if min(way["windows"] for way in ways) < FEW_WINDOWS:
        found.append(f"Fewer than {FEW_WINDOWS} windows in a way: standard errors are rough or missing.")
    found += [advice(name, entry, levels, max(way["windows"] for way in ways)) for name, entry in modes.items()
              if entry["borderline"] and entry["quantised"] and not entry["control"]]  # fmt: skip
    if setup["dtype"] != "float32":
        found.append(
            f"The model computed in {setup['dtype']}: its own rounding is in every figure and sets the noise floor. "
            "With --dtype float32 smaller differences show."
        )
    longest_text = max(way["length"] for way in ways)
    if longest_text < LONG_TEXT:
        found.append(
            f"No window is longer than {longest_text} tokens, so damage that grows with the length does not show. Measure as "
            "long as you serve: --window-len."
        )
    if setup.get("left_out"):
        found.append("Left out: " + "; ".join(setup["left_out"]) + ".")
    if setup.get("resumed"):
        found.append(
            f"{setup['resumed']} results were taken from an earlier run of the same set-up that was cut short."
        )
    return found


def advice(name: str, entry: Mapping[str, Any], levels: Sequence[Level], windows: int) -> str:
    """What a figure within two errors of a limit would need to be told apart from it."""
    ways = [entry[way] for way in WAYS if way in entry]
    wanted, times = 0.0, students_t(min(way["windows"] for way in ways))
    for key, se_key, limits in (
        ("kld_mean", "kld_se", [level.max_kld for level in levels]),
        ("top1_agreement", "top1_se", [level.min_top1 for level in levels]),
    ):
        value, error = worst(key, [way[key] for way in ways]), max(way[se_key] or 0.0 for way in ways)
        for limit in limits:
            if value is not None and error and abs(value - limit) <= times * error:
                wanted = max(wanted, windows * (times * error / max(abs(value - limit), error / 5)) ** 2)
    fewest = min(way["windows"] for way in ways)
    if fewest < FEW_WINDOWS:
        more = f"{fewest} windows tell no spread: take at least 8"
    elif wanted > MANY_WINDOWS:
        more = f"it lies so near that more than {MANY_WINDOWS} windows would be needed"
    else:
        more = f"with this spread about {_round_up(max(wanted, windows + 1))} windows would settle it"
    return (
        f"{name}: mean KLD or top-1 cannot be told from a limit, so the level could be another one; "
        f"{more} (--windows, --decode-windows; now {windows})."
    )


def _round_up(count: float) -> int:
    """To two digits."""
    step = 10 ** max(0, math.floor(math.log10(max(count, 1))) - 1)
    return math.ceil(count / step) * step
