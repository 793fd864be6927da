"""The search of 4-bit dynamic rows: less error than min .. max, dot products without bias, and which rows it leaves alone."""

from __future__ import annotations

import pytest
import torch
from ops_helpers import odd_rows
from torch import Tensor

from quant.dynamic import min_max_scale, quantize_rows, round_up_to_bf16
from quant.spec import Format

INT4 = Format("int4", "token", symmetric=False)
HEAD_DIMS = (16, 64, 128, 512)


def stored(y: Tensor) -> Tensor:
    """fp64 values of rows `y` after storage."""
    codes, scale, zero = quantize_rows(y, INT4)
    return (codes.double() - zero.double()) * scale.double()


def plain(y: Tensor) -> Tensor:
    """The same by min .. max alone."""
    low, high = y.amin(-1, keepdim=True), y.amax(-1, keepdim=True)
    scale, zero = min_max_scale(low, high, INT4)
    codes = torch.round(y / scale + zero).clamp(0, 15)
    return (codes.double() - zero.double()) * scale.double()


def kinds(d: int) -> dict[str, Tensor]:
    """200 rows each, of both signs."""
    x = torch.randn(200, d)
    return {
        "normal": x,
        "uniform": 2 * torch.rand(200, d) - 1,
        "heavy": x * torch.exp(torch.randn(200, d)),
        "skewed": x.abs() * torch.where(torch.arange(d) == 3, -1.0, 1.0),
        "sparse": torch.where(torch.rand(200, d) < 0.2, x, 0.0) + torch.eye(d)[0] - torch.eye(d)[1],
        "few": (2 * x).round() + torch.eye(d)[0] - torch.eye(d)[1],
    }


@pytest.mark.parametrize("d", HEAD_DIMS)
def test_less_error_than_min_max(d: int) -> None:
    for kind, y in kinds(d).items():
        size = y.double().norm(dim=-1)
        mine, theirs = ((values(y) - y).norm(dim=-1) for values in (stored, plain))
        # The grid errs no more than min .. max on units, which round y to 1/64 of a step; a step without bias turns an angle
        # into its tangent; bf16 rounds the step to 2^-8.
        rounding = (y.amax(-1) - y.amin(-1)) / 15 / 64 * d**0.5
        tangent = 1 / (1 - ((theirs + 2 * rounding) / size).clamp(max=0.9) ** 2).sqrt()
        assert (mine <= (theirs + 2 * rounding) * tangent + size / 256).all(), kind
    y = torch.randn(2000, d)
    gain = (stored(y) - y).square().sum() / (plain(y) - y).square().sum()
    assert gain < {16: 0.96, 64: 0.89, 128: 0.87, 512: 0.87}[d]


@pytest.mark.parametrize("d", HEAD_DIMS)
def test_the_dot_product_with_the_row_itself_is_unbiased(d: int) -> None:
    for kind, y in kinds(d).items():
        ratio = (stored(y) * y.double()).sum(-1) / y.double().square().sum(-1)
        before = (plain(y) * y.double()).sum(-1) / y.double().square().sum(-1)
        inside = (ratio - 1).abs() < 1 / 16  # else the step would change by more than an eighth, see the next test
        # Half a bf16 step, the zero's rounding, and what units blur.
        assert ((ratio - 1).abs() <= 2**-8 + 2**-9)[inside].all(), kind
        assert inside.float().mean() > (0.5 if kind in ("heavy", "sparse") else 0.97), kind
        if kind == "normal" and d >= 64:
            assert (ratio - 1).square().mean() < 0.5 * (before - 1).square().mean()


def test_the_step_changes_by_an_eighth_at_most() -> None:
    """Ends that are met exactly and hundreds of values that are all cut alike: the row's error points along the row."""
    y = torch.full((1, 512), 0.02)
    y[0, 0], y[0, 1] = 1.0, -0.001
    codes, scale, zero = quantize_rows(y, INT4)
    assert 0.874 / 16 <= scale.item() <= 1.126 * 1.001 / 15
    assert codes.min() >= 0 and codes.max() <= 15 and 0 <= zero.item() + 1 <= 16.2


@pytest.mark.parametrize("d", HEAD_DIMS)
def test_codes_are_the_nearest_of_the_grid(d: int) -> None:
    """Against the grid before its step is stretched: half a step and half a unit inside, 23 units past its ends."""
    for kind, y in kinds(d).items():
        codes, _, zero = quantize_rows(y, INT4)
        width = (y.amax(-1, keepdim=True) - y.amin(-1, keepdim=True)).double()
        origin = -y.amin(-1, keepdim=True).double() / width * 480
        unit, fits = y.double() / width * 480 + origin, []
        for step, start in ((32.0, 0.0), (30.0, 7.0), (30.0, 15.0), (30.0, 23.0)):
            error = (unit - (start + step * codes)).abs()
            near = torch.where((codes > 0) & (codes < 15), error <= step / 2 + 0.51, error <= 23.51)
            fits.append(near.all(-1) & (((origin - start) / step - zero).abs() <= 2**-8).squeeze(-1))
        assert torch.stack(fits).any(0).all(), kind


def test_channels_may_come_in_any_order() -> None:
    """Sums are of whole numbers, so scale and zero do not depend on how a kernel adds."""
    for d in HEAD_DIMS:
        for kind, y in kinds(d).items():
            order = torch.randperm(d)
            codes, scale, zero = quantize_rows(y, INT4)
            moved = quantize_rows(y[:, order].contiguous(), INT4)
            assert torch.equal(codes[:, order], moved[0]) and torch.equal(scale, moved[1]), kind
            assert torch.equal(zero, moved[2]), kind


def test_what_is_not_searched() -> None:
    """Rows of one sign, tiny rows, symmetric and 8-bit formats: min .. max."""
    one_sign = torch.randn(50, 64).abs() + torch.tensor([[0.01], [5.0]]).repeat(25, 1)
    for y in (one_sign, -one_sign, torch.randn(50, 64) * 2.0**-53, torch.zeros(1, 64), torch.full((1, 64), 3.0)):
        assert torch.equal(stored(y), plain(y))
    y = torch.randn(50, 64)
    assert not torch.equal(stored(y), plain(y))
    for fmt in (Format("int4", "token"), Format("int8", "token"), Format("int8", "token", symmetric=False)):
        assert not fmt.searches_range
        codes, scale, zero = quantize_rows(y, fmt)
        want = min_max_scale(y.amin(-1, keepdim=True), y.amax(-1, keepdim=True), fmt)
        assert torch.equal(scale, want[0]) and torch.equal(zero, want[1])
        assert torch.equal(codes, torch.round(y / scale + zero).clamp(0, fmt.element.max_code))


@pytest.mark.parametrize("d", HEAD_DIMS)
def test_odd_rows_stay_finite_and_near(d: int) -> None:
    y = odd_rows(d)
    values = stored(y)
    assert torch.isfinite(values).all()
    width = (torch.maximum(y.amax(-1), y.new_zeros(())) - torch.minimum(y.amin(-1), y.new_zeros(()))).double()
    # A step past the end, and an eighth more of it; nothing below about 2^-126 can be told from 0.
    assert ((values - y).abs().amax(-1) <= width * (1 / 15 + 0.125) + 2.0**-126).all()


def test_round_up_to_bf16() -> None:
    x = torch.tensor([1.0, 1.0 + 2.0**-20, 3.392e38, 1e-45])
    assert round_up_to_bf16(x).tolist() == [1.0, 1.0 + 2.0**-7, torch.finfo(torch.bfloat16).max, 2.0**-126]
