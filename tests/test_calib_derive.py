"""Parameters from statistics: what was calibrated decodes to within half a step, and constants decode exactly."""

from __future__ import annotations

import pytest
import torch
from calib_helpers import random_scales, stats_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from calib.derive import (
    HEAD_ROOM_8BIT,
    MAX_BALANCE,
    balance,
    layer_params,
    layer_shaping,
    static_scale,
    tensor_params,
    tensor_shaping,
)
from quant.errors import ArgumentError, ScaleFileError
from quant.gram import normalised
from quant.pages import BALANCE, MEAN, SCALE, ZERO, PagedTensor, identity_params
from quant.reference import decode, encode, hadamard
from quant.scales import StaticScale, TensorStats
from quant.spec import MODES, Format

STATIC = [
    Format(codec, scaling, symmetric=symmetric)
    for codec in ("int8", "int4")
    for scaling in ("channel", "head")
    for symmetric in (True, False)
]


def round_trip(rows: Tensor, fmt: Format, params: Tensor) -> Tensor:
    return decode(*encode(rows, fmt, params), fmt, params)


# --- static -----------------------------------------------------------------------------------------------------------

# Numbers as a model has them: down to small, never denormal.
number = st.floats(-1e4, 1e4, width=32).filter(lambda x: x == 0 or abs(x) > 1e-20)


@settings(max_examples=60, deadline=None)
@given(
    low=st.lists(number, min_size=16, max_size=16),
    width=st.lists(st.one_of(st.just(0.0), st.floats(0, 1e4, width=32)), min_size=16, max_size=16),
    seed=st.integers(0, 2**31),
)
def test_values_inside_the_range_decode_within_half_a_step(low: list[float], width: list[float], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    start = torch.tensor(low)
    rows = start + torch.rand(9, 1, 16, generator=generator) * torch.tensor(width)
    # The ends of the range are the values that matter most.
    rows = torch.cat((rows, start.expand(1, 1, 16), (start + torch.tensor(width)).expand(1, 1, 16)))
    stats = stats_of(rows)
    if not stats.absmax.any():
        return
    for fmt in STATIC:
        params = tensor_params(stats, fmt)
        error = (round_trip(rows, fmt, params) - rows.double()).abs()
        # fp32 codes are as good as 2^-7 of a step where the offset is 2^16 steps, the finest step there is.
        assert (error <= params[SCALE].double() * (0.5 + 2**-6)).all(), fmt


@settings(max_examples=60, deadline=None)
@given(values=st.lists(number, min_size=16, max_size=16))
def test_constant_channels_decode_exactly(values: list[float]) -> None:
    rows = torch.tensor(values).expand(5, 1, 16)
    stats = stats_of(rows)
    if not stats.absmax.any():
        return
    for fmt in (fmt for fmt in STATIC if fmt.scaling == "channel"):
        assert torch.equal(round_trip(rows, fmt, tensor_params(stats, fmt)), rows.double()), fmt


@pytest.mark.parametrize("fmt", [fmt for fmt in STATIC if fmt.scaling == "head"], ids=str)
@pytest.mark.parametrize("value", [-3.7, 0.1, 1e4])
def test_constant_heads_decode_exactly(fmt: Format, value: float) -> None:
    rows = torch.full((5, 2, 16), value)
    assert torch.equal(round_trip(rows, fmt, tensor_params(stats_of(rows), fmt)), rows.double())


def test_a_constant_that_drifts_afterwards_is_followed() -> None:
    """One part in eight either way, at the step of 1/1024 of the constant."""
    fmt = MODES["c8"].k
    params = tensor_params(stats_of(torch.full((5, 1, 16), 64.0)), fmt)
    later = torch.full((1, 1, 16), 64.0) * (1 + torch.linspace(-0.12, 0.12, 16))
    assert (round_trip(later, fmt, params) - later).abs().max() <= 64 / 1024 / 2 + 1e-5


def test_a_dead_channel_among_living_ones() -> None:
    """Zeros come back as zeros, and a value that turns up later is not lost."""
    rows = torch.randn(50, 1, 16)
    rows[..., 3] = 0
    for fmt in STATIC:
        params = tensor_params(stats_of(rows), fmt)
        assert (round_trip(rows, fmt, params)[..., 3] == 0).all() or fmt.scaling == "head"
        woken = rows.clone()
        woken[..., 3] = 0.9
        assert (round_trip(woken, fmt, params)[..., 3] - 0.9).abs().max() <= params[SCALE].max() * 0.51


def test_scale_and_zero_are_what_the_formulas_say() -> None:
    rows = torch.randn(200, 2, 16) + torch.randn(2, 16) * 5
    stats = stats_of(rows)
    low, high = stats.min.double(), stats.max.double()
    four = static_scale(stats, Format("int4", "channel", symmetric=False))
    torch.testing.assert_close(four.scale[:, 0].double(), (high - low) / 15, rtol=1e-6, atol=0)
    torch.testing.assert_close((four.scale * four.zero_point)[:, 0].double(), -low, rtol=1e-5, atol=1e-5)
    clipped = static_scale(stats, Format("int4", "channel", symmetric=False, clip=0.8))
    torch.testing.assert_close(clipped.scale, four.scale * 0.8)
    middle = (7.5 - clipped.zero_point) * clipped.scale
    torch.testing.assert_close(middle[:, 0].double(), (low + high) / 2, rtol=1e-5, atol=1e-5)
    symmetric = static_scale(stats, Format("int4", "head", symmetric=True))
    assert symmetric.scale.shape == (2, 1, 1)
    torch.testing.assert_close(symmetric.scale[:, 0, 0], stats.absmax.amax(-1) / 7)
    assert (symmetric.zero_point == 8).all()
    eight = static_scale(stats, Format("int8", "channel", symmetric=False))
    torch.testing.assert_close(eight.scale[:, 0].double(), (high - low) / 255 * HEAD_ROOM_8BIT, rtol=1e-6, atol=0)


def test_head_room_widens_the_range() -> None:
    stats, fmt = stats_of(torch.randn(50, 1, 16)), MODES["c8"].k
    torch.testing.assert_close(static_scale(stats, fmt, 2.0).scale, 2 * static_scale(stats, fmt, 1.0).scale)
    params = tensor_params(stats, fmt, 2.0)
    outside = torch.stack((stats.max * 1.4, stats.min * 1.4))
    assert ((round_trip(outside, fmt, params) - outside).abs() <= params[SCALE] * 0.51).all()


@pytest.mark.parametrize("head_room", [0.0, -1.0, float("nan"), float("inf")])
def test_unusable_head_room(head_room: float) -> None:
    with pytest.raises(ArgumentError, match="head_room: expected a finite factor > 0"):
        tensor_params(stats_of(torch.randn(50, 1, 16)), MODES["c8"].k, head_room)


def test_stored_scales_serve_the_format_they_were_made_for() -> None:
    stats = stats_of(torch.randn(50, 1, 16))
    stored = StaticScale(str(MODES["c8"].k), torch.full((1, 1, 1), 0.25), torch.full((1, 1, 1), 100.0))
    stats.static = stored
    params = tensor_params(stats, MODES["c8"].k)
    assert (params[SCALE] == 0.25).all() and (params[ZERO] == 100).all()
    assert not (tensor_params(stats, MODES["c8h"].k)[SCALE] == 0.25).any()
    assert not (tensor_params(stats, MODES["c8"].k, head_room=1.0)[SCALE] == 0.25).any()


# --- dynamic ----------------------------------------------------------------------------------------------------------


def test_mean_and_balance_only_where_the_format_has_them() -> None:
    scales = random_scales()
    for name, spec in MODES.items():
        for params, fmt, stats in zip(
            layer_params(scales, 1, spec), (spec.k, spec.v), (scales[1].k, scales[1].v), strict=True
        ):
            assert params.shape == (5, 2, 16) and params.dtype == torch.float32
            PagedTensor.empty(fmt, 1, 16, 2, 16, "cpu").set_params(params)
            assert torch.equal(params[MEAN], stats.mean if fmt.center else torch.zeros(2, 16)), name
            assert torch.equal(params[BALANCE], balance(stats) if fmt.balance else torch.ones(2, 16)), name
            if not fmt.is_static:
                assert torch.equal(params[[SCALE, ZERO]], identity_params(fmt, 2, 16)[[SCALE, ZERO]]), name


def test_balance_is_the_formula_at_geometric_mean_one() -> None:
    rows = torch.randn(500, 2, 16) * torch.rand(2, 16).add(0.5)
    weight = torch.rand(2, 16) + 0.5
    stats = stats_of(rows, weight)
    wanted = (stats.var / weight) ** 0.25
    wanted = wanted / wanted.log().mean(-1, keepdim=True).exp()
    torch.testing.assert_close(balance(stats), wanted)
    torch.testing.assert_close(balance(stats).log().sum(-1), torch.zeros(2), atol=1e-5, rtol=0)


def test_balance_does_not_depend_on_how_channels_are_scaled_apart() -> None:
    """Scaling K by s and Q by 1/s changes nothing in the model, and nothing in the balanced K."""
    rows, s = torch.randn(500, 1, 16), torch.logspace(-1, 1, 16)
    plain, apart = stats_of(rows), stats_of(rows * s, 1 / s**2)
    torch.testing.assert_close(rows / balance(plain), rows * s / balance(apart), rtol=1e-4, atol=1e-5)


def test_balance_lowers_the_weighted_error_of_a_rotated_format() -> None:
    s = torch.logspace(-1, 1, 32)
    rows, weight = torch.randn(400, 1, 32) * s, 1 / s[None] ** 2
    spec = MODES["c4r"].k
    params = tensor_params(stats_of(rows, weight), spec)
    flat = params.clone()
    flat[BALANCE] = 1
    weighted = [((round_trip(rows, spec, p) - rows).square() * weight).mean() for p in (params, flat)]
    assert weighted[0] < weighted[1] / 10


@pytest.mark.parametrize(("var", "weight"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0), (1e30, 1.0), (1.0, 1e30)])
def test_degenerate_channels_are_clamped(var: float, weight: float) -> None:
    stats = stats_of(torch.randn(50, 1, 16))
    stats.var[:], stats.weight[:] = 1, 1
    stats.var[0, 5], stats.weight[0, 5] = var, weight
    found = balance(stats)
    assert torch.isfinite(found).all() and (found > 0).all()
    assert float(found.max() / found.min()) <= MAX_BALANCE * 1.001
    assert (found[0, :5] == found[0, 0]).all()


def test_balance_of_a_head_that_never_moved_is_one() -> None:
    stats = stats_of(torch.randn(1, 2, 16).expand(9, 2, 16))
    assert torch.equal(balance(stats), torch.ones(2, 16))


def test_a_constant_row_survives_every_dynamic_format() -> None:
    """The mean removed, nothing is left, and nothing comes back but the mean."""
    rows = torch.randn(1, 2, 16).expand(9, 2, 16).contiguous()
    for name in ("c8d", "c4r"):
        fmt = MODES[name].k
        params = tensor_params(stats_of(rows), fmt)
        torch.testing.assert_close(round_trip(rows, fmt, params), rows.double(), rtol=1e-5, atol=1e-5)


def test_rotation_leaves_the_energy_where_the_reference_says() -> None:
    """The balanced, centred, rotated rows are those that the reference quantises: its step bounds the error."""
    rows = torch.randn(64, 1, 32) * 3 + 5
    fmt = MODES["c8d"].k
    params = tensor_params(stats_of(rows), fmt)
    turned = hadamard((rows - params[MEAN]) / params[BALANCE])
    step = turned.abs().amax(-1) / 127 * 1.01
    back = hadamard((round_trip(rows, fmt, params).float() - params[MEAN]) / params[BALANCE])
    assert ((back - turned).abs().amax(-1) <= step * 0.51).all()


def with_gram(rows: Tensor, weight: Tensor | None = None, rank: int = 4) -> TensorStats:
    """Statistics whose Gram matrix is of a few directions and a little of every one."""
    stats = stats_of(rows, weight)
    part = torch.randn(rows.shape[1], rows.shape[2], rank)
    stats.gram = normalised(part @ part.mT + 0.05 * torch.eye(rows.shape[2]))
    return stats


SHAPED = [MODES["c4r"].k, MODES["c8d"].k, MODES["c8d"].v, Format("int4", "token", symmetric=False)]


@pytest.mark.parametrize("query", [True, False])
@pytest.mark.parametrize("fmt", SHAPED, ids=str)
def test_shaping_is_the_gram_matrix_of_stored_rows(fmt: Format, query: bool) -> None:
    """Its quadratic form on an error of a stored row is that of the Gram matrix on the value's, damped."""
    stats = with_gram(torch.randn(300, 2, 32) * torch.logspace(-1, 1, 32))
    stats.query = torch.randn(2, 32) if query else None
    shaping, params = tensor_shaping(stats, fmt), tensor_params(stats, fmt)
    assert shaping is not None and shaping.dtype == torch.int8 and stats.gram is not None
    assert torch.equal(shaping, shaping.mT) and (shaping.amax((1, 2)) == 127).all()
    PagedTensor.empty(fmt, 1, 16, 2, 32, "cpu").set_shaping(shaping)
    y = torch.eye(32, dtype=torch.float64)[:, None].expand(-1, 2, -1)
    x = (hadamard(y) if fmt.rotate else y) * params[BALANCE].double()
    cost = torch.einsum("ihd,hde,jhe->hij", x, stats.gram.double(), x)
    cost = cost / cost.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None] + 0.1 * torch.eye(32)
    cost = cost * 127 / cost.abs().amax((1, 2), keepdim=True)
    assert (shaping - cost).abs().max() <= 0.5 + 1e-3


def test_shaping_lowers_the_error_that_counts() -> None:
    stats = with_gram(torch.randn(300, 2, 64) + torch.randn(2, 64))
    rows = stats.sample
    assert rows is not None and stats.gram is not None
    for fmt in SHAPED:
        params = tensor_params(stats, fmt)
        costs = []
        for shaping in (tensor_shaping(stats, fmt), None):
            left = decode(*encode(rows, fmt, params, shaping), fmt, params) - rows
            costs.append(float(torch.einsum("thd,hde,the->", left, stats.gram.double(), left)))
        assert costs[0] < 0.5 * costs[1], (str(fmt), costs)


def test_who_is_shaped_and_how_it_is_balanced() -> None:
    stats = with_gram(torch.randn(300, 2, 16) * torch.logspace(-1, 1, 16), torch.rand(2, 16) + 0.1)
    plain = balance(stats)
    for fmt in (MODES["c4"].k, MODES["c8"].v, Format("int4", "token"), MODES["c16"].k):
        assert tensor_shaping(stats, fmt) is None
    assert torch.equal(tensor_params(stats, MODES["c4r"].v)[BALANCE], plain)
    stats.query = torch.randn(2, 16)  # of K
    other = tensor_params(stats, MODES["c4r"].k)[BALANCE]
    log = 0.33 * stats.var.log() - 0.17 * stats.weight.log()
    torch.testing.assert_close(other, (log - log.mean(-1, keepdim=True)).exp())
    assert torch.equal(tensor_params(stats, Format("int4", "token", balance=True))[BALANCE], plain)
    gram, stats.gram = stats.gram, None
    assert tensor_shaping(stats, MODES["c4r"].k) is None
    assert torch.equal(tensor_params(stats, MODES["c4r"].k)[BALANCE], plain)
    assert gram is not None
    stats.gram = gram * torch.tensor([1.0, 0.0])[:, None, None]
    shaping = tensor_shaping(stats, MODES["c4r"].k)
    assert shaping is not None and shaping[0].any() and not shaping[1].any()


def test_a_shaped_head_has_a_positive_diagonal() -> None:
    """A channel that counts for all: the others' share rounds to nothing, and still the head is shaped."""
    stats = stats_of(torch.randn(50, 1, 128))
    stats.gram = normalised(torch.diag_embed(torch.where(torch.arange(128) == 100, 1e6, 1e-3))[None])
    shaping = tensor_shaping(stats, MODES["c8d"].v)
    assert shaping is not None and (shaping.diagonal(dim1=1, dim2=2) >= 1).all()


def test_shaping_goes_with_the_parameters_of_its_layer() -> None:
    scales = random_scales()
    scales[0].k.gram = with_gram(torch.randn(50, *scales[0].k.min.shape)).gram
    k, v = layer_shaping(scales, 0, MODES["c4r"])
    want = tensor_shaping(scales[0].k, MODES["c4r"].k)
    assert v is None and k is not None and want is not None and torch.equal(k, want)
    with pytest.raises(ScaleFileError, match="layer"):
        layer_shaping(scales, 99, MODES["c4r"])


def test_a_layer_without_statistics() -> None:
    scales = random_scales()
    scales.layers[1] = None
    with pytest.raises(ScaleFileError, match="layer 1: expected statistics, got none"):
        layer_params(scales, 1, MODES["c8"])
    with pytest.raises(ScaleFileError, match="layer: expected 0 .. 1, got 2"):
        layer_params(scales, 2, MODES["c8"])
