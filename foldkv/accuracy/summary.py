"""The figures of a run: means with standard errors, percentiles with intervals, position buckets, a histogram.

Errors are by window: the windows are the independent samples, positions inside one window are not. Standard errors come
from the spread of the windows' means, intervals from a bootstrap that draws whole windows (a block bootstrap).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from .metrics import TokenScores

BUCKET_EDGES = (0, 16, 64, 256, 1024, 4096, 16384, 65536)
"""Where position buckets begin: cached tokens before the scored position."""

CURVE_POINTS = 24

RESAMPLES, TAIL_RESAMPLES = 1000, 200
"""Bootstrap samples for means, and for the 99th percentile."""

HISTOGRAM_EDGES = tuple(x / 2 for x in range(-18, 5))
"""log10 of the KLD at which bins of the histogram begin; the first bin holds all below, the last all above."""


class Mean(NamedTuple):
    """A mean over all positions and its standard error by window; the error is None with a single window."""

    value: float
    se: float | None


class Metric(NamedTuple):
    """A scalar of every run: its key, what it is, and which of two values is the worse one."""

    key: str
    text: str
    worse: Callable[[float, float], float] = max


METRICS = (
    Metric("kld_mean", "mean KLD to the base, nats"),
    Metric("kld_se", "standard error of kld_mean"),
    Metric("kld_p50", "median KLD"),
    Metric("kld_p90", "90th percentile of the KLD"),
    Metric("kld_p95", "95th percentile of the KLD"),
    Metric("kld_p99", "99th percentile of the KLD"),
    Metric("kld_p999", "99.9th percentile of the KLD"),
    Metric("kld_max", "largest KLD"),
    Metric("top1_agreement", "share of positions where the most likely token is the base's", min),
    Metric("top1_se", "standard error of top1_agreement"),
    Metric("ppl", "perplexity of the mode"),
    Metric("ppl_se", "standard error of ppl"),
    Metric("base_ppl", "perplexity of the base"),
    Metric("base_ppl_se", "standard error of base_ppl"),
    Metric("ln_ppl_ratio", "ln(ppl / base_ppl), paired"),
    Metric("ln_ppl_ratio_se", "standard error of ln_ppl_ratio"),
    Metric("ppl_change", "ppl / base_ppl - 1"),
    Metric("delta_p_mean", "mean change of the following token's probability", min),
    Metric("delta_p_se", "standard error of delta_p_mean"),
    Metric("delta_p_rms", "root mean square change of the following token's probability"),
    Metric("nonfinite", "positions whose logits are not finite"),
    Metric("positions", "positions scored", min),
    Metric("windows", "windows scored", min),
)

_PERCENTILES = {"kld_p50": 50, "kld_p90": 90, "kld_p95": 95, "kld_p99": 99, "kld_p999": 99.9, "kld_max": 100}


def worst(key: str, values: list[float | None]) -> float | None:
    """The worst of a metric's values over the ways; None (not finite) is worse than any number."""
    if not values or any(value is None for value in values):
        return None
    pick = next(metric.worse for metric in METRICS if metric.key == key)
    result = values[0]
    for value in values[1:]:
        result = pick(result, value)  # type: ignore[arg-type]
    return result


def students_t(windows: int) -> float:
    """Standard errors to either side that hold 95 % of the cases, with an error told from so many windows."""
    return next((t for count, t in _STUDENT if windows <= count), 2.0)


def share_mean(values: Tensor) -> Mean:
    """`block_mean` of values that are 0 or 1: the error is at least that of independent positions.

    Few windows may happen to have one share, as where each has a single change.
    """
    mean = block_mean(values)
    if mean.se is None:
        return mean
    n = values.numel()
    # Wilson's point estimate, so that a share of exactly 1 has an error too.
    share = (mean.value * n + 1.92) / (n + 3.84)
    return Mean(mean.value, max(mean.se, math.sqrt(share * (1 - share) / n)))


_STUDENT = ((2, 12.7), (3, 4.3), (4, 3.2), (5, 2.8), (6, 2.6), (8, 2.4), (12, 2.2), (30, 2.1))


def block_mean(values: Tensor) -> Mean:
    """Mean of `[windows, positions]` and its standard error by window."""
    by_window = values.double().mean(dim=1)
    n = by_window.numel()
    se = None if n < 2 else float(by_window.std(unbiased=True)) / math.sqrt(n)
    return Mean(float(by_window.mean()), se)


def summarise(scores: TokenScores) -> dict[str, Any]:
    """One run: the scalars of `METRICS`, `buckets`, `curve`, `by_window`, `ci95`, `histogram`, `second_half`.

    A figure that is not finite is None.
    """
    result: dict[str, Any] = {**_scalars(scores), "buckets": _buckets(scores), "curve": _curve(scores)}
    # llama.cpp scores the second half of each window alone: the same figures for comparison.
    result |= {"by_window": _by_window(scores), "ci95": _intervals(scores), "histogram": _histogram(scores.kld)}
    half = _scalars(scores.span(scores.num_positions // 2, scores.num_positions))
    result["second_half"] = {key: half[key] for key in ("kld_mean", "kld_p99", "top1_agreement", "ppl", "base_ppl")}
    return result


@np.errstate(invalid="ignore")  # between infinities, which become None
def _scalars(scores: TokenScores) -> dict[str, float | int | None]:
    kld, top, delta = block_mean(scores.kld), share_mean(scores.same_top), block_mean(scores.delta_p)
    nll, base_nll = block_mean(scores.nll), block_mean(scores.base_nll)
    ratio = block_mean(scores.nll - scores.base_nll)
    ppl, base_ppl = _exp(nll.value), _exp(base_nll.value)
    flat = scores.kld.flatten().numpy()
    figures = {
        "kld_mean": kld.value,
        "kld_se": kld.se,
        **{key: float(np.percentile(flat, percent)) for key, percent in _PERCENTILES.items()},
        "top1_agreement": top.value,
        "top1_se": top.se,
        "ppl": ppl,
        "ppl_se": None if nll.se is None else ppl * nll.se,
        "base_ppl": base_ppl,
        "base_ppl_se": None if base_nll.se is None else base_ppl * base_nll.se,
        "ln_ppl_ratio": ratio.value,
        "ln_ppl_ratio_se": ratio.se,
        "ppl_change": _exp(ratio.value) - 1,
        "delta_p_mean": delta.value,
        "delta_p_se": delta.se,
        "delta_p_rms": math.sqrt(float(scores.delta_p.square().mean())),
        "nonfinite": int((~scores.logsumexp.isfinite()).sum()),
        "positions": scores.kld.numel(),
        "windows": scores.num_windows,
    }
    return {key: finite(value) for key, value in figures.items()}


def _buckets(scores: TokenScores) -> list[dict[str, Any]]:
    result = []
    edges = [edge for edge in BUCKET_EDGES if edge < scores.num_positions] + [scores.num_positions]
    for begin, end in zip(edges, edges[1:], strict=False):
        part = scores.span(begin, end)
        kld, top = block_mean(part.kld), block_mean(part.same_top)
        ratio = block_mean(part.nll - part.base_nll)
        figures = {"kld_mean": kld.value, "kld_se": kld.se, "top1_agreement": top.value, "ln_ppl_ratio": ratio.value}
        result.append({"begin": begin, "end": end, **{key: finite(value) for key, value in figures.items()}})
    return result


def _curve(scores: TokenScores) -> list[list[float | None]]:
    """[middle position, mean KLD] of at most CURVE_POINTS equal spans."""
    count = min(CURVE_POINTS, scores.num_positions)
    edges = [round(i * scores.num_positions / count) for i in range(count + 1)]
    return [
        [(begin + end - 1) / 2, finite(float(scores.kld[:, begin:end].mean()))]
        for begin, end in zip(edges, edges[1:], strict=False)
    ]


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def _by_window(scores: TokenScores) -> dict[str, list[float | None]]:
    """Means of each window, for paired comparisons with another report of the same text."""
    rows = {"kld_mean": scores.kld, "top1_agreement": scores.same_top, "ln_ppl_ratio": scores.nll - scores.base_nll}
    return {key: [finite(x) for x in values.double().mean(dim=1).tolist()] for key, values in rows.items()}


@np.errstate(invalid="ignore")
def _intervals(scores: TokenScores) -> dict[str, list[float | None] | None]:
    """95 % intervals, [low, high], of a bootstrap over windows; None with a single window."""
    kld = scores.kld.double().numpy()
    rows = _by_window(scores)
    if len(kld) < 2:
        return dict.fromkeys((*rows, "kld_p99"))
    rng = np.random.default_rng(0)
    picks = rng.integers(len(kld), size=(RESAMPLES, len(kld)))
    result: dict[str, list[float | None] | None] = {}
    for key, values in rows.items():
        means = np.array([math.nan if x is None else x for x in values])[picks].mean(axis=1)
        result[key] = [finite(float(x)) for x in np.percentile(means, (2.5, 97.5))]
    tails = _resampled_tail(kld, picks[:TAIL_RESAMPLES])
    result["kld_p99"] = [finite(float(x)) for x in np.percentile(tails, (2.5, 97.5))]
    return result


def _resampled_tail(kld: np.ndarray, picks: np.ndarray) -> list[float]:
    """The 99th percentile of each resample of the windows `[resamples, windows]`, off the sorted tail of `[windows, n]`."""
    flat = np.nan_to_num(kld.flatten(), nan=np.inf)
    order = np.argsort(-flat, kind="stable")[: max(1, flat.size // 5)]
    drawn = np.stack([np.bincount(pick, minlength=len(kld)) for pick in picks])[:, order // kld.shape[1]]
    reached = drawn.cumsum(axis=1) >= 0.01 * flat.size
    return [float(flat[order[row.argmax() if row.any() else -1]]) for row in reached]


def _histogram(kld: Tensor) -> dict[str, list[float] | list[int]]:
    """Positions by the decade, in halves, of their KLD."""
    logs = np.log10(np.maximum(np.nan_to_num(kld.numpy(), nan=np.inf), 1e-300))
    bins = np.clip(np.digitize(logs, HISTOGRAM_EDGES) - 1, 0, len(HISTOGRAM_EDGES) - 1)
    counts = np.bincount(bins.flatten(), minlength=len(HISTOGRAM_EDGES))
    return {"log10": list(HISTOGRAM_EDGES), "counts": [int(x) for x in counts]}


def finite(value: float | int | None) -> float | int | None:
    """The value, or None where it is not finite, as JSON has no such numbers."""
    return value if value is not None and math.isfinite(value) else None
