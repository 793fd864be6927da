"""Each estimator against brute force on small data: the range it names is the one with the least loss."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from calib_helpers import capture, rows_of, stats_of
from hf_helpers import tiny_model, tokens
from torch import Tensor

from calib import calibrate
from calib.derive import grid, static_scale
from calib.estimators import ESTIMATORS, Target, estimate, estimator, parse_estimators
from calib.estimators.target import FACTORS
from calib.sequences import LayerSequences, SequenceSample
from quant.errors import ArgumentError, CalibrationError
from quant.scales import StaticScale, TensorStats
from quant.spec import Format

CHANNEL = Format("int4", "channel", symmetric=False)
HEAD = Format("int4", "head", symmetric=True)


def heavy(n: int = 300, h: int = 2, d: int = 16, seed: int = 0) -> Tensor:
    """Rows with heavy tails, so that the widest range is not the best."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(n, h, d, generator=generator)
    spread = torch.randn(n, h, d, 3, generator=generator).square().mean(-1).sqrt()
    return normal / spread.clamp(min=0.05) + torch.randn(h, d, generator=generator)


def back(x: Tensor, scale: StaticScale, fmt: Format) -> Tensor:
    """x through codes by the definition, in fp64."""
    s, z = scale.scale[:, 0].double(), scale.zero_point[:, 0].double()
    codes = (x.double() / s + z).round().clamp(0, fmt.element.max_code)
    return (codes - z) * s


def shrunk(stats: TensorStats, fmt: Format, factor: float) -> StaticScale:
    middle, half = (stats.max + stats.min) / 2, (stats.max - stats.min) / 2 * factor
    if fmt.symmetric:
        middle, half = torch.zeros_like(middle), stats.absmax * factor
    return grid(middle - half, middle + half, fmt)


# --- from statistics --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fmt", [CHANNEL, HEAD, Format("int8", "channel", symmetric=False), Format("int4", "channel", clip=0.8)]
)
def test_minmax_is_the_default_scale(fmt: Format) -> None:
    stats = stats_of(heavy())
    got, wanted = estimate(ESTIMATORS["minmax"], Target(stats, fmt)), static_scale(stats, fmt)
    assert torch.equal(got.scale, wanted.scale) and torch.equal(got.zero_point, wanted.zero_point)


def test_absmax_and_percentile_ranges() -> None:
    rows = heavy(2000)
    stats = stats_of(rows)
    symmetric = estimate(ESTIMATORS["absmax"], Target(stats, CHANNEL))
    torch.testing.assert_close(symmetric.scale[:, 0], 2 * stats.absmax / 15)
    torch.testing.assert_close(symmetric.zero_point, torch.full_like(symmetric.zero_point, 7.5))
    cut = estimate(ESTIMATORS["percentile"], Target(stats, CHANNEL))
    low, high = torch.quantile(rows, torch.tensor([0.001, 0.999]), dim=0)
    torch.testing.assert_close(cut.scale[:, 0], (high - low) / 15, rtol=1e-4, atol=1e-6)
    still = stats_of(torch.cat((torch.zeros(1999, 1, 16), torch.ones(1, 1, 16))))
    still.percentiles.zero_()
    assert (estimate(ESTIMATORS["percentile"], Target(still, CHANNEL)).scale > 0).all()


# --- by search --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fmt", [CHANNEL, HEAD, Format("int4", "channel"), Format("int4", "head", symmetric=False)], ids=str
)
def test_mse_finds_the_least_error(fmt: Format) -> None:
    """Per channel, or per head where the scale is: no factor of the grid has a smaller one, and 1 is beaten."""
    rows = heavy()
    stats = stats_of(rows)
    found = estimate(ESTIMATORS["mse"], Target(stats, fmt))

    def error(scale: StaticScale) -> Tensor:
        each = (back(rows, scale, fmt) - rows).square().mean(0)
        return each.mean(-1, keepdim=True) if fmt.scaling == "head" else each

    best = torch.stack([error(shrunk(stats, fmt, factor)) for factor in FACTORS]).amin(0)
    torch.testing.assert_close(error(found), best, rtol=1e-4, atol=1e-9)
    assert (best < error(shrunk(stats, fmt, 1.0))).any()


def attention(seed: int = 0, n: int = 40, window: int | None = None) -> tuple[LayerSequences, Tensor, Tensor]:
    """Two sequences with 4 query heads on 2 kv heads, and all rows of K and V."""
    sequences = LayerSequences(0.3, window)
    for idx in range(2):
        generator = torch.Generator().manual_seed(seed + idx)
        sequences.q.append(torch.randn(n, 4, 16, generator=generator))
        sequences.k.append(heavy(n, seed=seed + 10 + idx))
        sequences.v.append(heavy(n, seed=seed + 20 + idx))
    return sequences, torch.cat(sequences.k), torch.cat(sequences.v)


def weights_of(q: Tensor, k: Tensor, head: int, window: int | None) -> Tensor:
    """Softmax weights of one query head by loops, fp64."""
    rows = []
    for place in range(len(q)):
        first = 0 if window is None else max(0, place - window + 1)
        logits = torch.tensor(
            [0.3 * float(q[place, head].double() @ k[t, head // 2].double()) for t in range(first, place + 1)]
        )
        row = torch.zeros(len(q), dtype=torch.float64)
        row[first : place + 1] = logits.double().softmax(-1)
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("window", [None, 7])
def test_softmax_kl_finds_the_least_divergence(window: int | None) -> None:
    """Over all query heads of a group, with the layer's own scale and window; by loops at a few factors."""
    sequences, k, _ = attention(n=14, window=window)
    target = Target(stats_of(k), CHANNEL, sequences)
    low, high = ESTIMATORS["softmax_kl"].find_range(target)
    chosen = ((high - low) / (target.stats.max - target.stats.min)).mean(-1)

    def divergence(factor: float, head: int) -> float:
        total = 0.0
        for q, rows in zip(sequences.q, sequences.k, strict=True):
            stored = back(rows, shrunk(target.stats, CHANNEL, factor), CHANNEL)
            for query_head in (2 * head, 2 * head + 1):
                p, other = (weights_of(q, x, query_head, window) for x in (rows, stored))
                total += float(torch.where(p > 0, p * (p / other).log(), 0.0).sum())
        return total

    for head in range(2):
        best = divergence(float(chosen[head]), head)
        for factor in (0.5, 0.6, 0.75, 0.9, 1.0, 1.1):
            assert best <= divergence(factor, head) * (1 + 1e-3), (head, factor)


def test_attention_output_finds_the_least_error_behind_the_output_projection() -> None:
    sequences, _, v = attention(n=20)
    weight = torch.rand(2, 16, generator=torch.Generator().manual_seed(5)) + 0.1
    for fmt in (CHANNEL, HEAD):
        target = Target(stats_of(v, weight), fmt, sequences)
        found = estimate(ESTIMATORS["attention_output"], target)

        def error(scale: StaticScale, fmt: Format = fmt) -> Tensor:
            total = torch.zeros(2, 16, dtype=torch.float64)
            for q, k, rows in zip(sequences.q, sequences.k, sequences.v, strict=True):
                for head in range(4):
                    change = back(rows, scale, fmt)[:, head // 2] - rows[:, head // 2].double()
                    total[head // 2] += (weights_of(q, k, head, None) @ change).square().sum(0)
            total = total * weight
            return total.mean(-1, keepdim=True) if fmt.scaling == "head" else total

        best = torch.stack([error(shrunk(target.stats, fmt, factor)) for factor in FACTORS]).amin(0)
        torch.testing.assert_close(error(found), best, rtol=1e-3, atol=1e-9)


def test_head_room_widens_for_few_tokens_and_not_for_many() -> None:
    """At 8 bits, unseen uniform values fall outside the range of 4 tokens, never outside that of 2000."""
    fmt = Format("int8", "channel", symmetric=False)

    def factor(n: int) -> float:
        stats = stats_of(torch.rand(n, 1, 64, generator=torch.Generator().manual_seed(1)))
        low, high = ESTIMATORS["head_room"].find_range(Target(stats, fmt))
        return float(((high - low) / (stats.max - stats.min)).mean())

    assert factor(8) > 1.2 > 1.06 > factor(2000)


# --- names, what they need, where they come from ----------------------------------------------------------------------


def test_names() -> None:
    k, v = parse_estimators("softmax_kl/mse")
    assert (k.name, v.name) == ("softmax_kl", "mse")
    assert [found.name for found in parse_estimators("mse")] == ["mse", "mse"]
    with pytest.raises(ArgumentError, match="estimator: expected one of minmax, absmax"):
        parse_estimators("median")
    with pytest.raises(ArgumentError, match="estimator of V: expected one of .*attention_output.*got 'softmax_kl'"):
        parse_estimators("softmax_kl")
    with pytest.raises(ArgumentError, match="NAME, or K/V of two names"):
        parse_estimators("mse/mse/mse")
    for found in ESTIMATORS.values():
        assert found.find_range.__doc__ and found is estimator(found.name, found.tensors[0])


def test_what_is_not_there_is_said() -> None:
    stats = stats_of(heavy())
    stats.sample = None
    with pytest.raises(CalibrationError, match="sampled tokens"):
        estimate(ESTIMATORS["mse"], Target(stats, CHANNEL))
    with pytest.raises(CalibrationError, match="sampled sequences"):
        estimate(ESTIMATORS["softmax_kl"], Target(stats, CHANNEL))


def test_sampled_sequences_are_those_of_the_model() -> None:
    """q, k and v as captured by plain means, GQA and window with them; the log weights are the model's attention."""
    from calib.collect import collect

    model, ids = tiny_model("mistral"), tokens(6, 20)
    sample = SequenceSample.spread(6, 3)
    collect(model, ids.split(2), sequences=sample)
    seen = capture(model, ids)
    for idx, layer in sample.layers.items():
        assert len(layer.q) == 3 and layer.window == model.config.sliding_window
        for number, row in enumerate((0, 2, 4)):
            for kept, part in zip((layer.q, layer.k, layer.v), seen[idx], strict=True):
                torch.testing.assert_close(kept[number], rows_of(part[row : row + 1]))
        weights = layer.log_weights(layer.q[0], layer.k[0]).exp()
        assert weights.shape == (2, 2, 20, 20)
        assert torch.equal((weights > 0).sum(-1)[0, 0], torch.arange(1, 21).clamp(max=layer.window))


@pytest.mark.parametrize("name", ["mse", "softmax_kl/attention_output", "percentile/head_room"])
def test_calibrate_takes_estimators(name: str) -> None:
    model, ids = tiny_model(), tokens(4, 32)
    scales = calibrate(model, ids, mode="c4s", estimator=name, num_samples=4, max_seq_len=32)
    plain = calibrate(model, ids, mode="c4s", estimator="minmax", num_samples=4, max_seq_len=32)
    assert scales.config["estimator"] == name and plain.config["estimator"] == "minmax"
    for a, b in ((scales[0].k, plain[0].k), (scales[0].v, plain[0].v)):
        assert a.static is not None and b.static is not None
        assert a.static.fmt == b.static.fmt and not torch.equal(a.static.scale, b.static.scale)


def test_the_default_is_what_serves_the_formats_of_the_mode() -> None:
    model, ids = tiny_model(), tokens(4, 32)
    wanted = {
        "c8": "minmax", "c4": "percentile/minmax", "c4s": "percentile/attention_output", "c4x": "minmax", "c4r": "minmax",
        "c8,1:c4s": "minmax, percentile/attention_output",
    }  # fmt: skip
    for mode, name in wanted.items():
        assert calibrate(model, ids, mode=mode, num_samples=4, max_seq_len=32).config["estimator"] == name


# --- without data -----------------------------------------------------------------------------------------------------


def biased_model() -> Any:
    model = tiny_model("qwen2")
    generator = torch.Generator().manual_seed(3)
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.data = torch.randn(32, generator=generator) * 5
        layer.self_attn.v_proj.bias.data = torch.randn(32, generator=generator) * 3
    return model


def test_offsets_without_data_are_those_of_the_data() -> None:
    """A K bias turns with RoPE: the means and middles of every channel agree with measured ones to a part of the spread."""
    model = biased_model()
    free = calibrate(model, estimator="bias", mode="c4s", max_seq_len=48)
    seen = calibrate(model, tokens(32, 48), num_samples=32, max_seq_len=48, mode="c4s")
    assert free.config["data"]["source"] == "none, the weights alone" and free.calibrated_len == 48
    for idx in range(2):
        for tensor in ("k", "v"):
            a, b = getattr(free[idx], tensor), getattr(seen[idx], tensor)
            together = torch.corrcoef(torch.stack((a.mean.flatten(), b.mean.flatten())))[0, 1]
            assert float(together) > 0.9, (idx, tensor)
            if idx == 0:  # Inputs of later layers have a mean of their own.
                assert float((a.mean - b.mean).abs().max()) < 0.25 * float(b.mean.std()), (idx, tensor)
            # The guessed range holds what was seen, and is not absurdly wide.
            assert ((a.min <= b.min + 1e-3) & (a.max >= b.max - 1e-3)).float().mean() > 0.98
            assert float(((a.max - a.min) / (b.max - b.min)).median()) < 10


def test_without_data_where_the_weights_do_not_say() -> None:
    from quant.errors import UnsupportedModelError

    for family in ("qwen3", "phi3", "gpt2"):
        with pytest.raises(UnsupportedModelError, match="estimator bias: expected q_proj"):
            calibrate(tiny_model(family), estimator="bias")


def test_moments_of_weights_are_exact_for_normalised_noise() -> None:
    """K = W n + b with independent unit n: the variances are those of a large sample, turned by RoPE."""
    from calib.data_free import bias_stats

    model = biased_model()
    attention, gamma = model.model.layers[0].self_attn, model.model.layers[0].input_layernorm.weight
    noise = torch.randn(20000, 64, generator=torch.Generator().manual_seed(0)) * gamma
    k = attention.k_proj(noise).view(1, 20000, 2, 16).transpose(1, 2)
    from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

    cos, sin = model.model.rotary_emb(k, (torch.arange(20000) % 40)[None])
    turned = rows_of(apply_rotary_pos_emb(k, k, cos, sin)[0])
    stats = bias_stats(model, 40)[0]
    assert stats is not None
    torch.testing.assert_close(stats.k.mean, turned.mean(0), rtol=0.05, atol=0.08)
    assert math.isclose(float((stats.k.var / turned.var(0)).log().mean().exp()), 1.0, rel_tol=0.03)
    assert float((stats.k.var / turned.var(0)).log().abs().max()) < 0.15
