"""`choose_plan` and `calibrate_auto`: a format for every layer within a budget, checked on text it was not chosen on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

import calib
from calib.api import DATA_FREE, NUM_OWN_SAMPLES, NUM_SAMPLES, default_seq_len, text_windows
from quant.errors import ArgumentError, describe
from quant.scales import KVScales
from quant.spec import LayerSpecs, parse_modes

from .candidates import UNIFORM, TensorSize, bits_of, exempt_maps, mode_text, sizes
from .search import Budget, Solution, frontier, within, without_chance
from .sensitivity import Figures, Progress, float_codec, measure, sensitivities
from .transforms import AUTO, Screened, offer, parse_transforms, screen

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from calib.data import Data

WINDOWS, HELD_OUT, WINDOW_LEN = 4, 6, 512
"""Windows that costs are measured on, windows that the maps are compared on, tokens of each."""
_TRIES = 4


@dataclass(frozen=True)
class AutoPlan:
    """A chosen map and how it was chosen.

    mode: the map, as `parse_modes` reads it. bits: per element. kld: on the held-out text. budget, why: in words.
    layers: for every layer its modes and the measured cost of each choice. table: every map compared, fewest bits first.
    """

    mode: str
    bits: float
    kld: float
    budget: str
    why: str
    layers: list[dict[str, Any]] = field(default_factory=list)
    table: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def choose_plan(
    model: PreTrainedModel,
    scales: KVScales,
    tokens: Tensor,
    held_out: Tensor,
    budget: Budget,
    *,
    transforms: str = AUTO,
    progress: Progress | None = None,
) -> AutoPlan:
    """The map of modes with the least loss within `budget`.

    tokens: int64 `[windows, len]`, to measure what each tensor costs at each width, alone (KVTuner, Li et al. 2025,
    searches the same space). Costs are taken to add up and an exact knapsack finds the map. held_out: other text; on it
    the map is compared with every uniform mode and with the first and last layers exempt, and the best of those
    within the budget wins, so the plan is never worse there than a uniform mode of as many bits.
    transforms: which of mean, balance and rotation dynamic 4-bit formats may take, as `parse_transforms` reads it: "auto"
    screens all combinations for each tensor, a list offers those in it to all tensors.
    """
    listed = parse_transforms(transforms)
    shapes = {idx: (layer.k.h_kv, layer.k.head_dim) for idx, layer in enumerate(scales.layers) if layer is not None}
    skip = ("c8d",) if budget.bits is not None and budget.bits < 6 else ()
    tensors = sizes(shapes)
    screened = screen(scales, tensors) if listed is None else {}
    dynamic = offer(screened, tensors) if listed is None else {size: tuple(listed) for size in tensors}
    options = sensitivities(model, tensors, scales, tokens, skip=skip, dynamic=dynamic, progress=progress)
    offered = without_chance(options)
    solutions = frontier(offered)
    codec, count = float_codec(model), len(scales.layers)
    specs: dict[str, LayerSpecs] = {}
    texts = {name: name for name in UNIFORM} | exempt_maps(sorted(shapes))
    found = _first_plans(offered, solutions, budget)
    texts |= {name: mode_text(solution.modes) for name, solution in found.items()}
    specs = {name: parse_modes(text, count, codec) for name, text in texts.items()}
    figures = measure(model, specs, scales, held_out, what="comparing maps", progress=progress)
    if budget.kld is not None:
        _tighten(model, scales, held_out, budget, solutions, texts, specs, figures)
    rows = sorted((_row(name, texts[name], specs[name], figures[name], shapes) for name in specs), key=_by_bits)
    best = _pick(rows, budget)
    return AutoPlan(
        mode=best["mode"], bits=best["bits"], kld=best["kld"], budget=str(budget), why=_why(best, rows, budget),
        layers=_layer_rows(options, specs[best["name"]], screened), table=rows,
    )  # fmt: skip


def _first_plans(options: Any, solutions: list[Solution], budget: Budget) -> dict[str, Solution]:
    """The knapsack's map, and the same without static 4-bit formats, whose costs vary most from text to text."""
    found = {"auto": within(solutions, budget)}
    sturdy = [
        (size, {choice: cost for choice, cost in costs.items() if choice.mode != "c4s"}) for size, costs in options
    ]
    try:
        found["auto, dynamic"] = within(frontier(sturdy), budget)
    except ArgumentError:
        return found
    return {name: plan for name, plan in found.items() if name == "auto" or plan != found["auto"]}


def _tighten(
    model: PreTrainedModel,
    scales: KVScales,
    held_out: Tensor,
    budget: Budget,
    solutions: list[Solution],
    texts: dict[str, str],
    specs: dict[str, LayerSpecs],
    figures: dict[str, Figures],
) -> None:
    """Larger maps until one keeps the KLD on the held-out text: costs add up only roughly."""
    assert budget.kld is not None
    aim, name = budget.kld, "auto"
    for number in range(1, _TRIES + 1):
        measured = figures[name]["kld_mean"] or float("inf")
        if measured <= budget.kld:
            return
        aim *= max(min(budget.kld / measured, 0.95), 0.25)
        try:
            solution = within(solutions, Budget(kld=aim))
        except ArgumentError:
            return
        name = f"auto, try {number + 1}"
        texts[name] = mode_text(solution.modes)
        specs[name] = parse_modes(texts[name], len(scales.layers), float_codec(model))
        figures |= measure(model, {name: specs[name]}, scales, held_out)


def _row(
    name: str, text: str, specs: LayerSpecs, figures: Figures, shapes: Mapping[int, tuple[int, int]]
) -> dict[str, Any]:
    keys = {"kld": "kld_mean", "kld_se": "kld_se", "kld_p99": "kld_p99", "top1": "top1_agreement", "ppl": "ppl_change"}
    return {"name": name, "mode": text, "bits": bits_of(specs, shapes)} | {
        key: figures[other] for key, other in keys.items()
    }


def _by_bits(row: dict[str, Any]) -> tuple[float, str]:
    return row["bits"], row["name"]


def _pick(rows: list[dict[str, Any]], budget: Budget) -> dict[str, Any]:
    """The best row within the budget; ArgumentError where none is."""
    finite = [row for row in rows if row["kld"] is not None]
    if budget.bits is not None:
        fitting = [row for row in finite if row["bits"] <= budget.bits + 1e-9]
        pick = min(fitting, key=lambda row: row["kld"], default=None)
    else:
        fitting = [row for row in finite if row["kld"] <= (budget.kld or 0.0)]
        pick = min(fitting, key=lambda row: (row["bits"], row["kld"]), default=None)
    if pick is None:
        best = min(finite, key=lambda row: row["kld"], default=None)
        got = "none is finite" if best is None else f"{best['kld']:.2g} at {best['bits']:.3g} bits at best"
        raise ArgumentError(describe("budget", f"a map within {budget}", got, "allow more"))
    return pick


def _why(best: dict[str, Any], rows: list[dict[str, Any]], budget: Budget) -> str:
    uniform = [row for row in rows if row["name"] in UNIFORM and row["kld"] is not None]
    rivals = [row for row in uniform if row["bits"] <= best["bits"] + 1e-9 and row is not best]
    text = f"within {budget}: KLD {best['kld']:.2e} at {best['bits']:.3f} bits on held-out text"
    if best["mode"] in UNIFORM:
        return f"{text}; no map per layer was better than {best['mode']} everywhere"
    if not rivals:
        return f"{text}; no uniform mode is as small"
    rival = min(rivals, key=lambda row: row["kld"])
    share = 1 - best["kld"] / rival["kld"]
    return f"{text}, {share:.0%} below {rival['name']}, the best uniform mode of as few bits ({rival['kld']:.2e})"


def _layer_rows(options: Any, specs: LayerSpecs, screened: Mapping[TensorSize, Screened]) -> list[dict[str, Any]]:
    """For every tensor the format that the plan gives it, what each choice would cost, and how transforms were screened."""
    rows = []
    for size, costs in options:
        spec = specs[size.layer]
        chosen = str(spec.k if size.tensor == "k" else spec.v)
        cost = {choice.mode: kld for choice, kld in costs.items()}
        row = {"layer": size.layer, "tensor": size.tensor, "format": chosen, "cost": cost}
        rows.append(row | ({"screened": screened[size]} if size in screened else {}))
    return rows


def calibrate_auto(
    model: PreTrainedModel,
    data: Data | None = None,
    *,
    tokenizer: Any = None,
    budget: Budget | None = None,
    estimator: str | None = None,
    num_samples: int | None = None,
    max_seq_len: int | None = None,
    seed: int = 0,
    text_column: str = "text",
    windows: int = WINDOWS,
    held_out: int = HELD_OUT,
    window_len: int = WINDOW_LEN,
    transforms: str = AUTO,
    progress: Progress | None = None,
    **options: Any,
) -> KVScales:
    """`calib.calibrate`, then `choose_plan` on the text behind the calibration's; the plan is `KVScales.plan`.

    budget: default 4.5 bits. estimator: of the ranges of static 4-bit formats, which cost most. windows, held_out,
    window_len: how much text the costs are measured on and the maps are compared on. transforms: see `choose_plan`.
    options, and all the rest: see `calib.calibrate`.
    """
    parse_transforms(transforms)
    if estimator == DATA_FREE:
        raise ArgumentError(describe("estimator of a plan", "one that reads text", repr(estimator)))
    budget = budget or Budget(bits=4.5)
    samples = num_samples if num_samples is not None else NUM_OWN_SAMPLES if data is None else NUM_SAMPLES
    seq_len = default_seq_len(model, max_seq_len)
    window_len = min(window_len, seq_len)
    if min(windows, held_out) < 1 or window_len < 2:
        got = f"{windows}, {held_out} windows of {window_len}"
        raise ArgumentError(describe("text of a plan", "at least one window to measure and one to compare", got))
    per_row = seq_len // window_len
    rows = -(-(windows + held_out) // per_row)
    text = text_windows(
        model, data, tokenizer, samples + rows, seq_len, seed=seed, text_column=text_column, progress=progress
    )
    scales = calib.calibrate(
        model, text.tokens[:samples], mode="c4s", estimator=estimator, num_samples=samples, max_seq_len=seq_len,
        seed=seed, progress=progress, **options,
    )  # fmt: skip
    rest = text.tokens[samples:, : per_row * window_len].reshape(-1, window_len)
    chosen = choose_plan(
        model,
        scales,
        rest[:windows],
        rest[windows : windows + held_out],
        budget,
        transforms=transforms,
        progress=progress,
    )
    scales.config["data"]["source"] = text.source
    scales.config |= {"mode": chosen.mode, "plan": chosen.to_json()}
    return scales
