"""The report's tables beyond the figures of the ways: the summary, other formats, where the damage is, texts, speed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quant.spec import CONTROL_MODE

from .gates import WAYS
from .generation import marks
from .present import Rows, mode_rows, percent, plain, sci

Table = tuple[list[str], Rows]


def summary_table(report: Mapping[str, Any]) -> Table:
    """The modes at a glance, the worst of the ways."""
    texts = report["generation"] is not None
    mark = marks(report["generation"]["tokens"])[0] if texts else 0
    head = ["mode", "level", "bits", "tokens", "mean KLD", "99 % KLD", "same top-1", "perplexity"]
    rows = []
    for m in mode_rows(report):
        note = f" ({m['ppl_note']})" if m["ppl_note"] else ""
        row = [m["name"], m["level"], m["bits"], m["capacity"], m["kld"], m["p99"], m["top1"], m["ppl"] + note]
        figures = report["modes"][m["name"]].get("generation")
        rows.append([*row, percent(figures[f"same_{mark}"])] if texts and figures else [*row, *([""] if texts else [])])
    return [*head, *([f"same tokens, first {mark}"] if texts else [])], rows


def baseline_table(report: Mapping[str, Any]) -> Table | None:
    """Other people's formats and ours, by bits; None where there are none."""
    if not report["baselines"]:
        return None
    rows = []
    for name, entry in [*report["modes"].items(), *report["baselines"].items()]:
        figures = next(entry[way] for way in WAYS if way in entry)
        ours = name in report["modes"]
        note = f"foldkv: K {entry.get('k_format', '?')}, V {entry.get('v_format', '?')}" if ours else entry["note"]
        cells = [
            sci(figures["kld_mean"], figures["kld_se"]),
            sci(figures["kld_p99"]),
            percent(figures["top1_agreement"]),
        ]
        rows.append((entry["bits_per_element"], [name, f"{entry['bits_per_element']:.3g}", *cells, note]))
    return ["cache", "bits", "mean KLD", "99 % KLD", "same top-1", "what it is"], [row for _, row in sorted(rows)]


def parts_table(report: Mapping[str, Any]) -> Table | None:
    """K alone, V alone, the worst layer and head; None where that was not measured."""
    rows = []
    for name, entry in report["modes"].items():
        if not entry.get("parts"):
            continue
        worst, found = entry["worst"], entry["parts"]
        where = {
            key: "" if key not in worst else f"{sci(worst[f'{key}_kld'])} in {place(worst[key])}"
            for key in ("layer", "head")
        }
        at = {
            key: "none" if not worst.get(key) else f"{percent(worst[key])} in {place(worst[f'{key}_at'])}"
            for key in ("k_clip", "v_clip")
        }
        weights = f"{sci(worst['softmax_kl'])} in {place(worst['softmax_kl_at'])}" if "softmax_kl" in worst else ""
        rows.append([
            name, sci(found["k_only"]["kld_mean"]), sci(found["v_only"]["kld_mean"]), where["layer"], where["head"], weights,
            at["k_clip"], at["v_clip"],
        ])  # fmt: skip
    head = ["mode", "K alone", "V alone", "worst layer alone", "worst head alone", "worst attention weights (KL)",
            "most clipped K", "most clipped V"]  # fmt: skip
    return (head, rows) if rows else None


def place(at: list[int]) -> str:
    """A layer, or a head of one, in words."""
    return f"layer {at[0]}" + (f", head {at[1]}" if len(at) > 1 else "")


def layer_table(report: Mapping[str, Any], mode: str) -> Table | None:
    """One row a layer of a mode."""
    entry = report["modes"][mode]
    if not entry.get("layers"):
        return None
    inner = {one["layer"]: one for one in entry.get("damage", [])}

    def mean(layer: int, key: str) -> float | None:
        values = inner.get(layer, {}).get(key)
        return sum(values) / len(values) if values else None

    rows = []
    for one in entry["layers"]:
        layer = one["layer"]
        rows.append([
            str(layer), sci(one["alone"]["kld_mean"], one["alone"]["kld_se"]), sci(one["without"]["kld_mean"]),
            *(percent(mean(layer, key)) for key in ("k_error", "v_error", "out_error")), sci(mean(layer, "softmax_kl")),
            *(percent(mean(layer, key)) for key in ("k_clip", "v_clip")),
        ])  # fmt: skip
    head = ["layer", "KLD, it alone", "KLD, all but it", "error of K", "of V", "of the output", "KL of the weights",
            "K clipped", "V clipped"]  # fmt: skip
    return head, rows


def text_table(report: Mapping[str, Any]) -> Table | None:
    """Greedy continuations beside the band of 16 bits against 16 bits; None where there are none."""
    texts = report["generation"]
    if texts is None:
        return None
    found = marks(texts["tokens"])
    head = ["greedy texts", "parts after (median)", "surer by, there", *(f"same text, {n}" for n in found),
            *(f"same tokens, {n}" for n in found), "nats a token, base", "repeats"]  # fmt: skip
    rows = []
    other = "other split and batch" if texts.get("engine") else "other split"
    band = {f"16 bits, {other}": texts["band"]["split"], "16 bits, stock cache": texts["band"]["stock"]}
    modes = {name: entry["generation"] for name, entry in report["modes"].items() if entry.get("generation")}
    for name, one in {**band, **modes}.items():
        whole = one["first_median"] >= one["tokens"]
        rows.append([
            name, "never" if whole else plain(one["first_median"]), "" if one["margin"] is None else percent(one["margin"]),
            *(percent(one[f"match_{n}"]) for n in found), *(percent(one[f"same_{n}"]) for n in found),
            plain(one["base_nll"]), percent(one["repeated"]),
        ])  # fmt: skip
    rows.append(["the base's own", "", "", *[""] * (2 * len(found)), plain(texts["base"]["base_nll"]),
                 percent(texts["base"]["repeated"])])  # fmt: skip
    return head, rows


def memory_table(report: Mapping[str, Any]) -> Table:
    """Memory and speed of the modes and of the base, as measured in this run."""
    base = report["base"]
    ways = [way for way in WAYS if way in base]
    head = ["mode", "bytes a token", "tokens a GiB", "tokens in the same memory",
            *(f"{way}, tokens/s" for way in ways), *(f"{way}, x base" for way in ways)]  # fmt: skip
    rows = []
    for name, entry in report["modes"].items():
        speeds = [entry[way].get("tokens_per_s") for way in ways]
        own = [base[way].get("tokens_per_s") for way in ways]
        size, room = entry.get("bytes_per_token"), entry.get("tokens_per_gib")
        rows.append([
            name, "" if size is None else plain(size), "" if room is None else f"{room:,}",
            f"{entry['capacity_ratio']:.2f}x", *("" if s is None else f"{s:,.0f}" for s in speeds),
            *("" if not s or not o else f"{s / o:.2f}x" for s, o in zip(speeds, own, strict=True)),
        ])  # fmt: skip
    plain_speeds = [base[way].get("tokens_per_s") for way in ways]
    mode = next(iter(base.values()))["mode"]
    rows.append(
        [f"{mode} (base)", "", "", "1x", *("" if s is None else f"{s:,.0f}" for s in plain_speeds), *[""] * len(ways)]
    )
    return head, rows


def reference_rows(report: Mapping[str, Any]) -> Rows:
    """How far each mode lies from its own reference."""
    return [
        [name, way, sci(one["kld"]), sci(one["own_kld"]), sci(one["noise"])]
        for name, entry in report["modes"].items()
        for way, one in entry["reference"].items()
    ]


def measured_modes(report: Mapping[str, Any]) -> list[str]:
    """Modes that were looked into."""
    return [name for name, entry in report["modes"].items() if entry.get("layers") and name != CONTROL_MODE]


def task_table(report: Mapping[str, Any]) -> Table | None:
    """Tasks of lm-evaluation-harness, a row a task and metric."""
    scores = _scores(report, "tasks")
    if not scores:
        return None
    first = next(iter(scores.values()))
    metrics = [(task, key) for task, found in first.items() for key in found if not key.endswith("_stderr")]
    rows = [
        [task, key, *(plain(one[task][key], one[task].get(f"{key}_stderr")) for one in scores.values())]
        for task, key in metrics
    ]
    return ["task", "metric", *scores], rows


def needle_table(report: Mapping[str, Any]) -> Table | None:
    """Pass keys found, over all depths, a row a length."""
    scores = _scores(report, "needle")
    if not scores:
        return None
    first = next(iter(scores.values()))
    rows = [
        [f"{length:,} tokens", *(percent(sum(one["right"][i]) / len(one["right"][i])) for one in scores.values())]
        for i, length in enumerate(first["lengths"])
    ]
    return ["pass keys found", *scores], rows


def _scores(report: Mapping[str, Any], key: str) -> dict[str, Any]:
    """What the base and the modes have under a key; empty where they have not."""
    name = next(iter(report["base"].values()))["mode"]
    found = {name: report["base_scores"].get(key), **{mode: entry.get(key) for mode, entry in report["modes"].items()}}
    return {mode: one for mode, one in found.items() if one}
