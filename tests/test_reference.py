"""The reference itself: rotation, rounding, bytes and the treatment of odd numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_helpers import FORMATS, HEAD_DIMS, Source, params_for
from torch import Tensor

from quant import reference
from quant.dynamic import round_up_to_bf16
from quant.pages import BALANCE, MEAN, QUERY, identity_params
from quant.spec import MODES, Format

INTEGER = {name: fmt for name, fmt in FORMATS.items() if fmt.element.is_integer}
DYNAMIC = {name: fmt for name, fmt in INTEGER.items() if fmt.is_dynamic}
ROUND = 2.0**-22  # what a few fp32 roundings of a number may add to it, relatively


def round_trip(x: Tensor, fmt: Format, params: Tensor) -> Tensor:
    """fp64 values of `x` after storage."""
    return reference.decode(*reference.encode(x, fmt, params), fmt, params)


# --- rotation ---------------------------------------------------------------------------------------------------------


def hadamard_matrix(d: int) -> Tensor:
    """The transform written out: Sylvester's matrix of the largest power of two in d, on the diagonal."""
    block = torch.ones(1, 1, dtype=torch.float64)
    while d % (2 * len(block)) == 0:
        block = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), block)
    return torch.block_diag(*[block / math.sqrt(len(block))] * (d // len(block)))


@pytest.mark.parametrize("d", HEAD_DIMS)
def test_hadamard_is_the_orthonormal_matrix_and_its_own_inverse(d: int) -> None:
    x = torch.randn(3, 2, d, dtype=torch.float64)
    y = reference.hadamard(x)
    torch.testing.assert_close(y, x @ hadamard_matrix(d), rtol=0, atol=1e-13)
    torch.testing.assert_close(reference.hadamard(y), x, rtol=0, atol=1e-13)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-13, atol=0)
    assert reference.hadamard_block(d) == {48: 16, 80: 16, 96: 32}.get(d, d)


def test_hadamard_keeps_dot_products_and_spreads_an_outlier() -> None:
    q, k = torch.randn(2, 5, 96, dtype=torch.float64)
    torch.testing.assert_close((reference.hadamard(q) * reference.hadamard(k)).sum(-1), (q * k).sum(-1))
    spike = torch.zeros(128)
    spike[77] = 128.0
    assert torch.equal(reference.hadamard(spike).abs(), torch.full((128,), 128 / math.sqrt(128)))


# --- quantise ---------------------------------------------------------------------------------------------------------


def steps_and_error(x: Tensor, fmt: Format, params: Tensor) -> tuple[Tensor, Tensor]:
    """Half the step, plus what rounding the zero adds, and the error, both where codes are made (balanced, rotated)."""
    _, scale, zero = reference.quantize(x, fmt, params)

    def transform(values: Tensor) -> Tensor:
        y = (values - params[MEAN].double()) / params[BALANCE].double()
        return reference.hadamard(y) if fmt.rotate else y

    y = transform(x.double())
    allowed = (
        scale * (0.5 + (zero.abs() * 2**-11 if fmt.is_dynamic and not fmt.symmetric else 0)) + y.abs().amax() * ROUND
    )
    return allowed.expand_as(y), transform(round_trip(x, fmt, params)) - y


# What the search of a range does to the error is the matter of test_dynamic.py.
@pytest.mark.parametrize("name", [name for name, fmt in INTEGER.items() if not fmt.searches_range])
@pytest.mark.parametrize("d", [48, 128])
def test_error_is_at_most_half_a_step(name: str, d: int) -> None:
    fmt = INTEGER[name]
    source = Source(MODES["c16"], d=d)
    x = source.sequence(200, 0).k
    params = params_for(fmt, x)
    params[QUERY] = 0.0  # steered codes are the matter of test_steering.py
    allowed, error = steps_and_error(x, fmt, params)
    inside = torch.ones_like(error, dtype=torch.bool)
    if fmt.clip < 1:
        codes, _, _ = reference.quantize(x, fmt, params)
        inside = (codes > 0) & (codes < fmt.element.max_code)
        assert 0 < int((~inside).sum()) < inside.numel() / 5
    assert (error.abs() <= allowed)[inside].all()
    assert error.abs().max() > allowed.min() / 4  # the bound is no idle one


@pytest.mark.parametrize("name", MODES)
def test_more_bits_make_less_error(name: str) -> None:
    spec = MODES[name]
    source = Source(MODES["c32"], d=64)
    one = source.sequence(400, 0)
    for fmt, x in ((spec.k, one.k), (spec.v, one.v)):
        relative = (round_trip(x, fmt, params_for(fmt, x)) - x.double()).norm() / x.double().norm()
        assert relative < {32: 1e-12, 16: 3e-4, 8: 0.015, 4: 0.25}[fmt.element.bits]


def test_dynamic_scale_is_the_least_bf16_that_covers_the_row() -> None:
    x = torch.randn(500, 1, 64)
    fmt = Format("int8", "token")
    codes, scale, _ = reference.quantize(x, fmt, identity_params(fmt, 1, 64))
    exact = x.abs().amax(-1, keepdim=True) / 127
    assert (scale >= exact).all() and (scale <= exact * (1 + 2**-7)).all()
    assert torch.equal(scale, scale.bfloat16().float())
    assert codes.min() >= 1 and codes.max() <= 255


def test_rounding_is_half_to_even() -> None:
    fmt = Format("int4", "channel", symmetric=False)
    x = torch.tensor([0.5, 1.5, 2.5, 3.5, -0.5, -1.5, 100.0, -100.0] * 2).view(1, 1, 16)
    codes, _, _ = reference.quantize(x, fmt, identity_params(fmt, 1, 16))
    assert codes.flatten().tolist() == [8, 10, 10, 12, 8, 6, 15, 0] * 2


# --- odd numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, fmt in DYNAMIC.items() if not fmt.rotate and not fmt.balance])
@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 0.1, 1 / 3, -65280.0, 2.0**-14, 1e-3, 1e30, -1e-30])
def test_constant_rows_decode_to_the_constant(name: str, value: float) -> None:
    fmt = DYNAMIC[name]
    # A symmetric format writes the constant as a bf16 scale, an asymmetric one as a power of two and an fp16 zero.
    x = torch.full((1, 1, 32), value).to(torch.bfloat16).float()
    assert torch.equal(round_trip(x, fmt, identity_params(fmt, 1, 32)), x.double())
    if not fmt.symmetric and 1e-3 < abs(value) < 1e4:
        x = x.new_full((1, 1, 32), value).half().float()
        assert torch.equal(round_trip(x, fmt, identity_params(fmt, 1, 32)), x.double())


@pytest.mark.parametrize("name", [name for name, fmt in DYNAMIC.items() if fmt.center])
def test_the_calibrated_mean_itself_is_exact(name: str) -> None:
    fmt = DYNAMIC[name]
    params = params_for(fmt, torch.randn(50, 2, 64) + 5)
    x = params[MEAN].expand(3, -1, -1)
    assert torch.equal(round_trip(x, fmt, params), x.double())


@pytest.mark.parametrize("offset", [1000.0, -1000.0, 3e5])
@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_nearly_constant_rows_far_from_zero_keep_their_offset(codec: str, offset: float) -> None:
    fmt = Format(codec, "token", symmetric=False)
    x = offset + torch.randn(20, 1, 64) * 1e-4 * abs(offset)
    params = identity_params(fmt, 1, 64)
    _, _, zero = reference.quantize(x, fmt, params)
    error = (round_trip(x, fmt, params) - x.double()).abs() / x.abs()
    assert zero.abs().max() <= 1024
    assert error.max() <= (1 + 2**-7) / 1024  # half a step, and half a step of the zero's rounding
    # Without the floor of absmax / 1024 the zero would need more digits than fp16 has.
    assert (offset / ((x.amax(-1) - x.amin(-1)) / fmt.element.max_code)).abs().min() > 2048


@pytest.mark.parametrize("name", DYNAMIC)
@pytest.mark.parametrize("magnitude", [1e-44, 1e-38, 1e-20, 1e20, 1e29])
def test_magnitudes_from_subnormal_to_huge(name: str, magnitude: float) -> None:
    fmt = DYNAMIC[name]
    x = torch.randn(10, 1, 64) * magnitude
    error = (round_trip(x, fmt, identity_params(fmt, 1, 64)) - x.double()).abs().amax()
    # A bf16 scale is a normal number, so nothing below about 2^-126 can be told from 0.
    assert error <= x.abs().max().double() * 4.5 / fmt.element.max_code + 2.0**-126


@pytest.mark.parametrize("name", FORMATS)
def test_the_largest_floats_stay_finite(name: str) -> None:
    fmt = FORMATS[name]
    x = torch.full((2, 1, 64), torch.finfo(torch.float32).max)
    x[1, 0, ::2] *= -1
    y = round_trip(x, fmt, identity_params(fmt, 1, 64))
    assert torch.isfinite(y).all()
    if not fmt.rotate:
        assert torch.equal(y.sign(), x.double().sign())


@pytest.mark.parametrize("name", FORMATS)
def test_nan_counts_as_zero_and_infinity_as_the_largest(name: str) -> None:
    fmt = FORMATS[name]
    x = torch.randn(4, 1, 64)
    params = params_for(fmt, x)
    x[0, 0, 3], x[1, 0, 5], x[2, 0, 7], x[3] = math.nan, math.inf, -math.inf, math.nan
    repaired = x.clone()
    largest = torch.tensor(torch.finfo(torch.float32).max)
    if fmt.is_dynamic:  # the row's largest finite magnitude
        largest = torch.where(torch.isfinite(x), x.abs(), 0.0).amax(-1)
    repaired[0, 0, 3], repaired[3] = 0.0, 0.0
    repaired[1, 0, 5] = largest if largest.dim() == 0 else largest[1, 0]
    repaired[2, 0, 7] = -(largest if largest.dim() == 0 else largest[2, 0])
    for got, want in zip(reference.encode(x, fmt, params), reference.encode(repaired, fmt, params), strict=True):
        assert torch.equal(got, want)
    assert torch.isfinite(round_trip(x, fmt, params)).all()


# --- bytes ------------------------------------------------------------------------------------------------------------


@given(bits=st.sampled_from([2, 4, 8]), data=st.data())
@settings(max_examples=30, deadline=None)
def test_pack_and_unpack_are_inverse(bits: int, data: st.DataObject) -> None:
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=16, max_size=16))
    rows = reference.pack_codes(torch.tensor(codes, dtype=torch.int32), bits)
    assert rows.dtype == torch.uint8 and rows.numel() == 2 * bits
    assert reference.unpack_codes(rows, bits).tolist() == codes
    assert rows[0] & (2**bits - 1) == codes[0]  # the lowest channel in the lowest bits


@given(st.floats(2.0**-126, 2.0**126, width=32), st.floats(-1024, 1024, width=16), st.booleans())
@settings(max_examples=50, deadline=None)
def test_meta_keeps_scale_and_zero(scale: float, zero: float, symmetric: bool) -> None:
    fmt = Format("int8", "token", symmetric=symmetric)
    stored = round_up_to_bf16(torch.tensor([scale]))
    meta = reference.pack_meta(stored, torch.tensor([zero]), fmt)
    assert meta.numel() == fmt.meta_bytes
    back = reference.unpack_meta(meta, fmt)
    assert back[0].item() == stored.item() >= scale
    assert back[1].item() == (128.0 if symmetric else zero)
