"""What a reader must know before he carries a report's figures elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quant.scales import KVScales

SMALL_MODEL = 1_000_000_000
"""Parameters below which figures order the methods and say little about larger models."""

FEW_WINDOWS = 4


def notes(setup: Mapping[str, Any], modes: Mapping[str, Any], scales: KVScales | None) -> list[str]:
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
    borderline = [name for name, entry in modes.items() if entry["borderline"] and not entry["control"]]
    if borderline:
        found.append(
            f"{', '.join(borderline)}: mean KLD or top-1 lies within two standard errors of a limit, so the level "
            "could be another one. Four times the windows halve the error."
        )
    if setup["dtype"] != "float32":
        found.append(
            f"The model computed in {setup['dtype']}: its own rounding is in every figure and sets the noise floor. "
            "With --dtype float32 smaller differences show."
        )
    return found
