"""A report's JSON in words and table cells, for the Markdown and the HTML alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from quant.spec import CONTROL_MODE

from . import verdict
from .gates import WAYS
from .summary import students_t, worst

Rows = list[list[str]]


def sci(value: float | None, error: float | None = None) -> str:
    """A small positive figure: 1.31e-4 ± 5.2e-6."""
    if value is None:
        return "not finite"
    if value == 0:
        return "0"
    text = _exponent(f"{value:.2e}") if value < 0.1 else f"{value:.3g}"
    if error is None:
        return text
    return f"{text} ± {_exponent(f'{error:.1e}') if value < 0.1 else f'{error:.2g}'}"


def percent(value: float | None, error: float | None = None, signed: bool = False) -> str:
    """A share: 99.32 % ± 0.05; shares beyond 10 as a multiple."""
    if value is None:
        return "not finite"
    if abs(value) >= 10:
        return f"{value:+.3g}x" if signed else f"{value:.3g}x"
    text = f"{100 * value:{'+' if signed else ''}.2f} %"
    return text + ("" if error is None else f" ± {100 * error:.2f}")


def plain(value: float | None, error: float | None = None) -> str:
    """A figure of ordinary size, with three digits of its error: 43.12 ± 3.51."""
    if value is None:
        return "not finite"
    if not error:
        return f"{value:.4g}"
    decimals = max(0, 2 - math.floor(math.log10(error)))
    if decimals > 6 or abs(value) >= 1e6:
        return f"{_exponent(f'{value:.2e}')} ± {_exponent(f'{error:.1e}')}"
    return f"{value:.{decimals}f} ± {error:.{decimals}f}"


def how(report: Mapping[str, Any]) -> list[str]:
    """How the cache was exercised, a sentence a way."""
    lines = []
    for way in report["setup"]["ways"]:
        text = f"{way['name']}: {way['windows']} windows of {way['length']} tokens"
        if way["chunk"] == 1:
            how = "every step one replay of a captured CUDA graph" if _replays(report, way) else "without CUDA graphs"
            lines.append(
                f"{text}, teacher-forced one token at a time, {how}; every token is quantised into the cache before "
                "attention reads it back"
            )
        elif way["chunk"] < way["length"]:
            lines.append(f"{text}, appended {way['chunk']} tokens at a time; attention reads them back quantised")
        else:
            lines.append(
                f"{text}, each appended in one piece; every query attends to K and V read back from the "
                "quantised cache, its own token's included, never to unquantised ones"
            )
    return lines


def how_short(report: Mapping[str, Any]) -> str:
    """The same in one line, for the head of the page."""
    parts = []
    for way in report["setup"]["ways"]:
        size = f"{way['windows']} × {way['length']} tokens"
        graph = " by graph replay" if _replays(report, way) else ""
        kind = f"decoded one by one{graph}" if way["chunk"] == 1 else f"in chunks of {way['chunk']}"
        parts.append(f"{size} {'in one piece' if way['chunk'] >= way['length'] else kind}")
    text = report["setup"]["data"]["source"]
    return f"Measured through the quantised cache itself: {', '.join(parts)}. Text: {text}."


def text_route(report: Mapping[str, Any]) -> str:
    """How many greedy texts there are, and which way they were written."""
    texts = report["generation"]
    graphs = "each step one replay of a captured CUDA graph" if texts.get("graphs") else "without CUDA graphs"
    route = f"foldkv's engine in one batch, {graphs}" if texts.get("engine") else "the swapped model's forward pass"
    size = f"{texts['texts']} prompts of {texts['prompt_len']} tokens, continued by {texts['tokens']}"
    return f"{size} through {route}; the stock cache through transformers."


def _replays(report: Mapping[str, Any], way: Mapping[str, Any]) -> bool:
    """On a CPU the engine takes the same steps without graphs."""
    return bool(way.get("graphs")) and report["setup"]["device"] == "cuda"


def model_name(report: Mapping[str, Any]) -> str:
    """A hub id as it is, a folder by its last name."""
    name = str(report["setup"]["model"])
    return name if name.count("/") <= 1 and name[:1] not in "/.~" else name.rstrip("/").rpartition("/")[2]


def compared_with(report: Mapping[str, Any]) -> str:
    """What the figures are measured against and over which positions."""
    base = next(iter(report["base"].values()))["mode"]
    return (
        f"Compared with a 16-bit cache ({base}) through the same kernels and the same way. Every position but the last of "
        "a window is scored, from the first on, by its prediction of the next token; standard errors are by window."
    )


def mode_rows(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """One entry a mode, fewest bits last, the control at the end: its level and its figures, the worst of the ways."""
    modes = report["modes"]
    order = sorted(modes, key=lambda name: (modes[name]["control"], -modes[name]["bits_per_element"]))
    return [_mode_row(name, modes[name], report) for name in order]


def _mode_row(name: str, entry: Mapping[str, Any], report: Mapping[str, Any]) -> dict[str, str]:
    ways = [entry[way] for way in WAYS if way in entry]
    kld, p99, top1 = (worst(key, [way[key] for way in ways]) for key in ("kld_mean", "kld_p99", "top1_agreement"))
    by = max(ways, key=lambda way: way["kld_mean"] if way["kld_mean"] is not None else float("inf"))
    low = min(ways, key=lambda way: way["top1_agreement"] if way["top1_agreement"] is not None else -1.0)
    ppl = max(ways, key=lambda way: way["ppl_change"] if way["ppl_change"] is not None else float("inf"))
    return {
        "name": name,
        "level": "control" if entry["control"] else entry["level"],
        "level_class": ("control" if entry["control"] else entry["level"]).replace(" ", "-"),
        "rule": entry["rule"],
        "bits": f"{entry['bits_per_element']:.2f}".removesuffix(".00"),
        "capacity": f"{entry['capacity_ratio']:.2f}x",
        "kld": sci(kld, by["kld_se"]) + (" (noise)" if in_noise(by, report) else ""),
        "kld_alone": sci(kld),
        "p99": sci(p99),
        "top1": percent(top1, low["top1_se"]),
        "top1_alone": percent(top1),
        "ppl": percent(ppl["ppl_change"], ppl["ln_ppl_ratio_se"], signed=True),
        "ppl_alone": percent(ppl["ppl_change"], signed=True) + ("" if ppl_shown(ppl) else " (?)"),
        "ppl_note": "" if ppl_shown(ppl) else "no difference shown",
        "answer": entry["answer"]["answer"],
        "answer_class": entry["answer"]["answer"].replace(" ", "-"),
        "why": entry["answer"]["why"],
        "formats": f"K {entry.get('k_format', '?')}, V {entry.get('v_format', '?')}",
    }


def in_noise(figures: Mapping[str, Any], report: Mapping[str, Any]) -> bool:
    """The mean KLD does not stand out from the noise floor."""
    floor, kld = report["noise_floor"]["kld_mean"], figures["kld_mean"]
    return kld is not None and floor is not None and kld <= floor + 2 * (figures["kld_se"] or 0.0)


def ppl_shown(figures: Mapping[str, Any]) -> bool:
    """The 95 % interval of the paired perplexity ratio does not hold 1; with one window there is no telling."""
    error, ratio = figures["ln_ppl_ratio_se"], figures["ln_ppl_ratio"]
    return error is None or ratio is None or abs(ratio) > students_t(figures["windows"]) * error


def divergence_table(report: Mapping[str, Any], way: str) -> tuple[list[str], Rows]:
    """Head and rows of the KLD of one way, the noise floor's runs last."""
    keys = ("kld_p50", "kld_p90", "kld_p95", "kld_p99", "kld_p999", "kld_max")
    head = ["KLD", "mean", "median", "90 %", "95 %", "99 %", "99.9 %", "max"]
    return head, [
        [name, sci(x["kld_mean"], x["kld_se"]), *(sci(x[key]) for key in keys)] for name, x in _runs(report, way)
    ]


def prediction_table(report: Mapping[str, Any], way: str) -> tuple[list[str], Rows]:
    """Head and rows of what became of the predictions in one way, the noise floor's runs last."""
    base = report["base"][way]
    head = ["predictions", "same top-1", f"PPL ({base['mode']}: {plain(base['ppl'], base['ppl_se'])})",
            "ln(PPL / base)", "Δp mean", "Δp RMS"]  # fmt: skip
    return head, [
        [
            name, percent(x["top1_agreement"], x["top1_se"]), plain(x["ppl"], x["ppl_se"]),
            plain(x["ln_ppl_ratio"], x["ln_ppl_ratio_se"]), percent(x["delta_p_mean"], x["delta_p_se"], signed=True),
            percent(x["delta_p_rms"]),
        ]
        for name, x in _runs(report, way)
    ]  # fmt: skip


def _runs(report: Mapping[str, Any], way: str) -> list[tuple[str, Mapping[str, Any]]]:
    noise = report["noise_floor"][way]
    entries = [(name, entry[way]) for name, entry in report["modes"].items()]
    entries += [(name, entry[way]) for name, entry in report["baselines"].items() if way in entry]
    return [*entries, ("noise: other split", noise["split"]), ("noise: stock cache", noise["stock"])]


def bucket_table(report: Mapping[str, Any], way: str) -> tuple[list[str], Rows]:
    """Mean KLD and top-1 agreement by cached tokens before the position."""
    modes = {name: entry[way]["buckets"] for name, entry in report["modes"].items()}
    spans = next(iter(modes.values()))
    head = ["cached tokens", *(f"{span['begin']}–{span['end'] - 1}" for span in spans)]
    return head, [
        [name, *(f"{sci(bucket['kld_mean'])} · {percent(bucket['top1_agreement'])}" for bucket in buckets)]
        for name, buckets in modes.items()
    ]


def level_rows(report: Mapping[str, Any]) -> Rows:
    """The rules of the levels, the limits those that hold in this report."""
    rows = []
    for given, level in zip(verdict.LEVELS, report["levels"], strict=True):
        kld, top1 = f"≤ {level['max_kld']:.2g}", f"≥ {level['min_top1']:.4g}"
        if given.floors:
            kld += f" (the larger of {given.max_kld:g} and {given.floors:g} noise floors)"
            top1 += f" (the smaller of {given.min_top1:g} and the floor's)"
        rows.append([level["name"], kld, top1])
    return [*rows, [verdict.NOT_RECOMMENDED, "otherwise", ""], [verdict.SUSPECT, "a check failed for the mode", ""]]


def control_rule() -> str:
    """When the control has failed as it must."""
    return (
        f"The control {CONTROL_MODE} must be worse than usable, worse than {verdict.CONTROL_OVER_C8:g} times the worst mode "
        f"of at least 8 bits, and worse than {verdict.CONTROL_OVER_FLOOR:g} noise floors; else no figure here counts."
    )


def noise_text(report: Mapping[str, Any]) -> str:
    """The noise floor in one sentence."""
    floor = report["noise_floor"]
    return (
        f"Noise floor, 16 bits against 16 bits: mean KLD {sci(floor['kld_mean'])}, 99 % {sci(floor['kld_p99'])}, same "
        f"top-1 {percent(floor['top1_agreement'])}: the worst of the 16-bit cache filled with another split and of "
        "transformers' own cache with torch's attention."
    )


def setup_rows(report: Mapping[str, Any]) -> Rows:
    """The set-up stamp."""
    setup = report["setup"]
    data, scales = setup["data"], setup["scales"]
    rows = [
        ["model", f"{setup['model']} ({setup['architecture']}, {setup['parameters'] / 1e6:.4g} M parameters)"],
        ["config", _hash(setup["model_config_sha256"])],
        ["computed in", f"{setup['dtype']} on {setup['device']}: {setup['device_name']}, {setup['threads']} threads"],
        ["kernels", setup["kernels"]],
        ["text", f"{data['source']}; tokens {_hash(data['tokens_sha256'])}"],
        ["seed", str(setup["seed"])],
        ["scales", "none" if scales is None else _scales(scales)],
        ["versions", ", ".join(f"{name} {version}" for name, version in setup["versions"].items())],
        ["commit", setup["commit"] or "installed package"],
        ["date", setup["date"]],
    ]
    return [[name, str(value)] for name, value in rows]


def gate_lines(report: Mapping[str, Any]) -> list[tuple[bool, str]]:
    """Failed or not, and the text, of each gate."""

    def said(gate: Mapping[str, Any]) -> str:
        return f"{gate['gate']} (is {plain(gate['value'])}{', within its error' if gate['close'] else ''})"

    return [(gate["failed"], said(gate)) for gate in report["gates"]]


def commands(report: Mapping[str, Any]) -> Sequence[str]:
    """What to type for the same figures."""
    return [report["setup"]["command"]] if report["setup"]["command"] else []


def _scales(scales: Mapping[str, Any]) -> str:
    text = f"sha256 {_hash(scales['sha256'])}" if scales.get("sha256") else "given in memory"
    return text + (f", calibrated on {scales['calibrated_len']} tokens a sequence" if scales["calibrated_len"] else "")


def _hash(digest: str) -> str:
    return digest[:16]


def _exponent(text: str) -> str:
    mantissa, _, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}"
