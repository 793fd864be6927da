"""Figures of the accuracy report against direct float64 computation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from foldkv.accuracy import store as store_module
from foldkv.accuracy.metrics import TokenScores, compare
from foldkv.accuracy.notes import advice
from foldkv.accuracy.store import BaseStore
from foldkv.accuracy.summary import METRICS, block_mean, share_mean, summarise, worst
from foldkv.accuracy.verdict import LEVELS, grade


def random_logits(windows: int = 3, positions: int = 40, vocab: int = 17) -> tuple[Tensor, Tensor, Tensor]:
    base = 3 * torch.randn(windows, positions, vocab)
    return base, base + 0.3 * torch.randn_like(base), torch.randint(vocab, (windows, positions))


def test_token_scores_are_those_of_the_definition() -> None:
    base, mode, tokens = random_logits()
    scores = compare(base, mode, tokens)
    for w in range(3):
        for t in range(0, 40, 7):
            p = np.exp(base[w, t].double().numpy())
            q = np.exp(mode[w, t].double().numpy())
            token = int(tokens[w, t])
            assert float(scores.logsumexp[w, t]) == pytest.approx(math.log(q.sum()), rel=1e-12)
            p, q = p / p.sum(), q / q.sum()
            assert float(scores.kld[w, t]) == pytest.approx((p * np.log(p / q)).sum(), rel=1e-9)
            assert float(scores.same_top[w, t]) == float(p.argmax() == q.argmax())
            assert float(scores.nll[w, t]) == pytest.approx(-math.log(q[token]), rel=1e-12)
            assert float(scores.base_nll[w, t]) == pytest.approx(-math.log(p[token]), rel=1e-12)
            assert float(scores.delta_p[w, t]) == pytest.approx(q[token] - p[token], rel=1e-9, abs=1e-15)


def test_comparing_in_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    base, mode, tokens = random_logits()
    whole = compare(base, mode, tokens)
    monkeypatch.setattr("foldkv.accuracy.metrics._BLOCK", 50)
    pieces = compare(base, mode, tokens)
    assert all(torch.equal(getattr(whole, name), getattr(pieces, name)) for name in vars(whole))


def test_equal_logits_have_no_divergence_and_a_shift_adds_none() -> None:
    base, _, tokens = random_logits()
    same = compare(base, base.clone(), tokens)
    assert same.kld.max() == 0 and same.same_top.min() == 1 and same.delta_p.abs().max() == 0
    assert torch.equal(same.logsumexp, same.base_logsumexp)
    assert compare(base.double(), base.double() + 2, tokens).kld.max() < 1e-14


def test_small_divergences_are_resolved() -> None:
    """A float32 log-softmax would drown these: the KLD of a step h is h^2 p (1 - p) / 2."""
    base = torch.randn(1, 1, 1000, dtype=torch.float64)
    mode = base.clone()
    mode[0, 0, 5] += 1e-5
    p = float(base.softmax(-1)[0, 0, 5])
    kld = float(compare(base, mode, torch.zeros(1, 1, dtype=torch.int64)).kld)
    assert kld == pytest.approx(0.5e-10 * p * (1 - p), rel=1e-3)


def test_masked_vocabulary_adds_nothing_and_a_lost_token_is_infinite() -> None:
    base, mode, tokens = random_logits()
    base[..., 16] = mode[..., 16] = -math.inf
    tokens.clamp_(max=15)
    masked = compare(base, mode, tokens)
    assert torch.allclose(masked.kld, compare(base[..., :16], mode[..., :16], tokens).kld, rtol=1e-12)
    mode[0, 3, 2] = -math.inf
    assert math.isinf(float(compare(base, mode, tokens).kld[0, 3]))


def test_non_finite_logits_are_counted_and_leave_no_number() -> None:
    base, mode, tokens = random_logits()
    mode[1, 4, 0] = math.nan
    figures = summarise(compare(base, mode, tokens))
    assert figures["nonfinite"] == 1
    assert figures["kld_mean"] is None and figures["ppl"] is None and figures["kld_p99"] is None
    assert worst("kld_mean", [figures["kld_mean"], 0.1]) is None


def test_summary_against_numpy() -> None:
    base, mode, tokens = random_logits(windows=5, positions=90)
    scores = compare(base, mode, tokens)
    figures = summarise(scores)
    kld, nll, base_nll = (getattr(scores, name).numpy() for name in ("kld", "nll", "base_nll"))

    def se(values: np.ndarray) -> float:
        return float(values.mean(axis=1).std(ddof=1) / math.sqrt(5))

    assert figures["kld_mean"] == pytest.approx(kld.mean())
    assert figures["kld_se"] == pytest.approx(se(kld))
    for key, percent in (("kld_p50", 50), ("kld_p90", 90), ("kld_p95", 95), ("kld_p99", 99), ("kld_p999", 99.9)):
        assert figures[key] == pytest.approx(np.percentile(kld, percent))
    assert figures["kld_max"] == kld.max()
    assert figures["top1_agreement"] == pytest.approx(scores.same_top.numpy().mean())
    assert figures["top1_se"] == pytest.approx(se(scores.same_top.numpy()))
    assert figures["ppl"] == pytest.approx(math.exp(nll.mean()))
    assert figures["ppl_se"] == pytest.approx(math.exp(nll.mean()) * se(nll))
    assert figures["base_ppl"] == pytest.approx(math.exp(base_nll.mean()))
    assert figures["ln_ppl_ratio"] == pytest.approx(math.log(figures["ppl"] / figures["base_ppl"]))
    assert figures["ln_ppl_ratio_se"] == pytest.approx(se(nll - base_nll))
    assert figures["ppl_change"] == pytest.approx(figures["ppl"] / figures["base_ppl"] - 1)
    assert figures["delta_p_mean"] == pytest.approx(scores.delta_p.numpy().mean())
    assert figures["delta_p_rms"] == pytest.approx(math.sqrt((scores.delta_p.numpy() ** 2).mean()))
    assert (figures["positions"], figures["windows"], figures["nonfinite"]) == (450, 5, 0)
    assert {metric.key for metric in METRICS} <= figures.keys()


def test_pairing_makes_the_ratio_surer_than_the_perplexities() -> None:
    base = 3 * torch.randn(6, 200, 17) * torch.linspace(0.5, 2, 6)[:, None, None]  # windows of different difficulty
    figures = summarise(compare(base, base + 0.01 * torch.randn_like(base), torch.randint(17, (6, 200))))
    assert figures["ln_ppl_ratio_se"] < 0.1 * figures["ppl_se"] / figures["ppl"]


def test_standard_error_is_by_window_not_by_position() -> None:
    """All positions of a window alike: 400 numbers, yet only 4 independent ones."""
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None].expand(4, 100)
    assert block_mean(values).se == pytest.approx(np.std([1, 2, 3, 4], ddof=1) / 2)
    assert block_mean(values[:1]).se is None


def test_buckets_and_curve_partition_the_positions() -> None:
    base, mode, tokens = random_logits(windows=2, positions=300)
    scores = compare(base, mode, tokens)
    figures = summarise(scores)
    spans = [(bucket["begin"], bucket["end"]) for bucket in figures["buckets"]]
    assert spans == [(0, 16), (16, 64), (64, 256), (256, 300)]
    for bucket in figures["buckets"]:
        part = scores.kld[:, bucket["begin"] : bucket["end"]]
        assert bucket["kld_mean"] == pytest.approx(float(part.mean()))
    assert len(figures["curve"]) == 24
    assert np.mean([kld for _, kld in figures["curve"]]) == pytest.approx(float(scores.kld.mean()), rel=0.05)
    assert figures["second_half"]["kld_mean"] == pytest.approx(float(scores.kld[:, 150:].mean()))


def test_joining_and_cropping() -> None:
    base, mode, tokens = random_logits()
    whole = compare(base, mode, tokens)
    halves = [compare(base[:, i : i + 20], mode[:, i : i + 20], tokens[:, i : i + 20]) for i in (0, 20)]
    joined = TokenScores.cat(halves, dim=1)
    assert torch.equal(joined.kld, whole.kld)
    assert TokenScores.cat([whole, whole], dim=0).num_windows == 6
    crop = whole.crop(2, 5)
    assert crop.kld.shape == (2, 5) and torch.equal(crop.nll, whole.nll[:2, :5])


def test_worst_of_the_ways() -> None:
    assert worst("kld_mean", [0.1, 0.3]) == 0.3
    assert worst("top1_agreement", [0.9, 0.99]) == 0.9
    assert worst("ppl", []) is None


# --- levels -----------------------------------------------------------------------------------------------------------


def entry(kld: float | None, top1: float | None, windows: int = 40) -> dict[str, dict[str, float | None]]:
    """A mode whose prefill is flawless and whose decode has these figures."""
    fine = {"kld_mean": 0.0, "kld_se": 0.0, "top1_agreement": 1.0, "top1_se": None, "windows": windows}
    figures = {"kld_mean": kld, "kld_se": 1e-6, "top1_agreement": top1, "top1_se": 1e-3, "windows": windows}
    return {"prefill": fine, "decode": figures}


@pytest.mark.parametrize(
    ("kld", "top1", "level"),
    [
        (9e-5, 0.995, "lossless"),
        (9e-4, 0.991, "near-lossless"),
        (9e-5, 0.98, "usable"),
        (1.9e-2, 0.94, "usable"),
        (2.1e-2, 0.99, "not recommended"),
        (1e-3, 0.92, "not recommended"),
        (None, 0.99, "not recommended"),
    ],
)
def test_levels(kld: float | None, top1: float, level: str) -> None:
    levels = [level.within({"kld_mean": 1e-6, "top1_agreement": 0.999}) for level in LEVELS]
    assert grade(entry(kld, top1), levels)["level"] == level


def test_what_the_noise_floor_hides_is_not_held_against_a_mode() -> None:
    levels = [level.within({"kld_mean": 1e-3, "top1_agreement": 0.97}) for level in LEVELS]
    assert grade(entry(2.9e-3, 0.975), levels)["level"] == "lossless"
    assert grade(entry(3.1e-3, 0.975), levels)["level"] == "usable"


def test_a_figure_near_a_limit_is_borderline() -> None:
    assert grade(entry(1e-3 - 1e-6, 0.995), LEVELS)["borderline"]
    assert grade(entry(5e-4, 0.9915), LEVELS)["borderline"]
    assert not grade(entry(5e-4, 0.995), LEVELS)["borderline"]
    assert grade(entry(5e-4, 0.995, windows=2), LEVELS)["borderline"]  # an error of two windows is itself unsure


def test_a_share_that_is_the_same_in_few_windows_still_has_an_error() -> None:
    """Two changes in 94 positions, one a window: the spread of the windows is 0, the truth anywhere about 2 %."""
    same = torch.ones(2, 47, dtype=torch.float64)
    same[:, 5] = 0
    assert block_mean(same).se == 0 and share_mean(same).se == pytest.approx(0.0198, rel=0.1)
    assert share_mean(torch.ones(4, 100)).se > 0.003
    mixed = torch.ones(4, 100)
    mixed[0] = 0
    assert share_mean(mixed) == block_mean(mixed)


# --- what is kept of the base -----------------------------------------------------------------------------------------


def test_the_compact_base_costs_less_than_it_says_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written and read in pieces; its floor is the divergence that it really adds."""
    base, mode, tokens = random_logits(4, 30, 500)
    exact = compare(base, mode, tokens)
    monkeypatch.setattr(store_module, "EXACT_BYTES", 0)
    store = BaseStore(4, 30, 500)
    assert not store.exact
    for row in (0, 2):
        for begin in (0, 12):
            store.write(row, begin, base[row : row + 2, begin : begin + (12 if begin == 0 else 18)])
    kept = torch.cat([store.read(0, 4, a, b, base.device) for a, b in ((0, 7), (7, 30))], dim=1)
    assert kept.shape == base.shape
    true = compare(base, kept, tokens).kld
    assert 0 < float(true.mean()) <= store.floor * 1.01 and store.floor < 1e-7
    found = compare(kept, mode, tokens)
    assert float(found.kld.mean()) == pytest.approx(float(exact.kld.mean()), rel=1e-3)
    assert torch.equal(found.same_top, exact.same_top)


def test_a_base_that_fits_is_kept_as_it_is() -> None:
    base, _, _ = random_logits(2, 5, 11)
    store = BaseStore(2, 5, 11)
    store.write(0, 0, base)
    assert store.exact and store.floor == 0 and torch.equal(store.read(1, 1, 2, 4, base.device), base[1:, 2:4])


def test_the_interval_of_the_tail_is_a_bootstrap_over_windows() -> None:
    """Against drawing the windows for real."""
    rng = np.random.default_rng(1)
    scores = summarise_of(np.exp(rng.normal(size=(12, 300)) + rng.normal(size=(12, 1))))
    low, high = scores["ci95"]["kld_p99"]
    kld = scores["raw"]
    tails = [np.percentile(kld[np.random.default_rng(s).integers(12, size=12)], 99) for s in range(400)]
    assert low == pytest.approx(np.percentile(tails, 2.5), rel=0.2)
    assert high == pytest.approx(np.percentile(tails, 97.5), rel=0.2)
    assert low < np.percentile(kld, 99) < high


def summarise_of(kld: np.ndarray) -> dict[str, Any]:
    rest = torch.zeros(kld.shape, dtype=torch.float64)
    return summarise(TokenScores(torch.from_numpy(kld), rest, rest, rest, rest, rest, rest)) | {"raw": kld}


# --- advice -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kld", "windows", "said"),
    [
        (0.95e-3, 8, "about 47 windows"),
        (0.97e-3, 8, "about 130 windows"),
        (0.999e-3, 8, "more than 1000 windows"),
        (0.95e-3, 2, "at least 8"),
    ],
)
def test_advice_on_the_sample(kld: float, windows: int, said: str) -> None:
    """A KLD of `kld` beside the limit of 1e-3, its error 5e-5: as many windows as bring the interval down to the gap."""
    figures = {"kld_mean": kld, "kld_se": 5e-5, "top1_agreement": 0.999, "top1_se": 1e-4, "windows": windows}
    assert said in advice("c8", {"decode": figures}, LEVELS, windows)
