"""Shaped rounding: the definition against a plain walk, its limits, and the kernels against the definition."""

from __future__ import annotations

import pytest
import torch
from ops_helpers import odd_rows, pools, same_bytes, shaping_for, strided, twin
from torch import Tensor

from quant import ops, reference
from quant.dynamic import quantize_rows
from quant.pages import LayerPages, identity_params
from quant.shaping import shape_codes
from quant.spec import MODES, Format, KVSpec

INT4 = MODES["c4r"].k
INT4_PLAIN = Format("int4", "token", symmetric=False)
INT8, INT8_ASYM = MODES["c8d"].k, Format("int8", "token", symmetric=False)
SHAPED = [INT4, INT4_PLAIN, INT8, INT8_ASYM]
HEAD_DIMS = (16, 64, 80, 96, 128, 256)


def walked(codes: list[int], error: list[int], step: int, matrix: list[list[int]], most: int) -> list[int]:
    """One row by the words of the definition, in Python's own numbers."""
    d = len(codes)
    codes, error = list(codes), list(error)
    for _ in range(8):
        slope = [sum(matrix[c][k] * error[k] for k in range(d)) for c in range(d)]
        best, found = 0, -1
        for c in range(d):
            move = 1 if slope[c] < 0 else -1
            if not 0 <= codes[c] + move <= most:
                continue
            change = step * matrix[c][c] + 2 * move * slope[c]
            if change < best:
                best, found = change, c
        if found < 0:
            break
        move = 1 if slope[found] < 0 else -1
        codes[found] += move
        error[found] += move * step
    return codes


def matrices(h: int, d: int) -> Tensor:
    found = shaping_for(INT4, h + 1, d)
    assert found is not None
    return found[:h]


@pytest.mark.parametrize(("step", "most"), [(30, 15), (32, 15), (32, 255)])
def test_codes_are_those_of_the_walk(step: int, most: int) -> None:
    tokens, h, d = 12, 2, 32
    shaping = matrices(h, d)
    codes = torch.randint(0, most + 1, (tokens, h, d)).float()
    codes[:3] = most * torch.randint(0, 2, (3, h, d))  # many at the ends
    error = torch.randint(-23, 24, (tokens, h, d)).float()
    got = shape_codes(codes, error, torch.tensor([float(step)]), shaping, most)
    for t in range(tokens):
        for head in range(h):
            row = [codes[t, head].int().tolist(), error[t, head].int().tolist(), step, shaping[head].tolist(), most]
            assert got[t, head].tolist() == walked(*row)
    assert not torch.equal(got, codes)


def test_first_of_equals_and_ends() -> None:
    """Under the identity a flip never pays; with twins that pull together the first one goes."""
    shaping = torch.zeros(1, 16, 16, dtype=torch.int8)
    shaping[0, range(16), range(16)] = 100
    shaping[0, 0, 0] = 1
    error = torch.zeros(1, 1, 16)
    error[..., 4], error[..., 5] = 16.0, 16.0
    codes = torch.full((1, 1, 16), 7.0)
    step = torch.tensor([32.0])
    assert torch.equal(shape_codes(codes, error, step, shaping, 15), codes)
    shaping[0, 4, 5] = shaping[0, 5, 4] = 100
    want = codes.clone()
    want[..., 4] = 6
    assert torch.equal(shape_codes(codes, error, step, shaping, 15), want)
    codes[..., 4] = 0  # no room below
    want = codes.clone()
    want[..., 5] = 6
    assert torch.equal(shape_codes(codes, error, step, shaping, 15), want)


def test_sums_stay_exact_at_the_bounds() -> None:
    """d = 256, every entry 127 and every error at its largest: exact in fp32, as in whole numbers."""
    shaping = torch.full((1, 256, 256), 127, dtype=torch.int8)
    error = torch.full((1, 1, 256), 23.0)
    codes = torch.full((1, 1, 256), 15.0)
    got = shape_codes(codes, error, torch.tensor([32.0]), shaping, 15)
    assert got[0, 0].int().tolist() == walked([15] * 256, [23] * 256, 32, shaping[0].tolist(), 15)
    assert got[0, 0, 0] == 7 and (got[0, 0, 1:] == 15).all()
    assert torch.equal(shape_codes(codes, 1000 * error, torch.tensor([32.0]), shaping, 15), got)


def weighed_error(y: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, shaping: Tensor) -> Tensor:
    error = ((codes - zero) * scale - y).double()
    return torch.einsum("thd,hde,the->", error, shaping.double(), error)


@pytest.mark.parametrize("fmt", SHAPED, ids=str)
def test_it_lowers_what_it_means_to(fmt: Format) -> None:
    y, shaping = torch.randn(200, 2, 64), matrices(2, 64)
    plain = weighed_error(y, *quantize_rows(y, fmt), shaping)
    shaped = weighed_error(y, *quantize_rows(y, fmt, shaping), shaping)
    assert shaped < 0.9 * plain


@pytest.mark.parametrize("fmt", [Format("int4", "token"), MODES["c4"].k, MODES["c8"].k, MODES["c8h"].v], ids=str)
def test_other_formats_do_not_look_at_it(fmt: Format) -> None:
    assert not fmt.shapes_rounding
    x, params = torch.randn(5, 2, 64), identity_params(fmt, 2, 64)
    for a, b in zip(reference.encode(x, fmt, params, matrices(2, 64)), reference.encode(x, fmt, params), strict=True):
        assert torch.equal(a, b)


def pages_for(fmt: Format, x: Tensor, shaping: Tensor | None) -> LayerPages:
    pages = LayerPages.empty(KVSpec(fmt, fmt), 4, 16, *x.shape[1:])
    for part in (pages.k, pages.v):
        params = identity_params(fmt, *x.shape[1:])
        if fmt.balance:
            params[3] = torch.rand(x.shape[1:]) + 0.5
        part.set_params(params)
        part.set_shaping(shaping)
    return pages


@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("fmt", SHAPED, ids=str)
def test_kernels_write_the_bytes_of_the_definition(fmt: Format, d: int) -> None:
    """Rows of every odd kind, NaN and infinities among them, strided; one head shaped and another not."""
    x = odd_rows(d)[:, None].expand(-1, 3, -1).clone()
    x[:, 1] = torch.randn(24, d) @ torch.randn(d, d)
    x[3, :, 5], x[4, :, 6], x[5, :, 7] = float("nan"), float("inf"), -float("inf")
    shaping = shaping_for(fmt, 3, d)
    assert shaping is not None
    mine = pages_for(fmt, x, shaping)
    want = twin(mine)
    slots = torch.randperm(64)[:24]
    ops.append_kv(mine, strided(x), strided(x.flip(1).contiguous()), slots)
    reference.append_kv(want, x, x.flip(1), slots)
    assert same_bytes(mine, want)
    before = twin(mine)
    ops.append_kv(mine, x, x.flip(1).contiguous(), slots)
    assert same_bytes(mine, before)  # the same row again: the same bytes


@pytest.mark.parametrize("fmt", SHAPED, ids=str)
def test_no_matrix_no_change(fmt: Format) -> None:
    """Zeros, and a head that is zero, round as without; a head that is not rounds otherwise."""
    x, d = torch.randn(20, 2, 96) @ torch.randn(96, 96), 96
    slots = torch.arange(20)
    plain = pages_for(fmt, x, None)
    zeros, one = twin(plain), twin(plain)
    for part in (one.k, one.v):
        part.set_shaping(shaping_for(fmt, 2, d))
    none = twin(plain)
    none.k.shaping = none.v.shaping = None
    for pages in (plain, zeros, none, one):
        ops.append_kv(pages, x, x, slots)
    assert same_bytes(plain, zeros) and same_bytes(plain, none)
    for mine, theirs in zip(pools(one), pools(plain), strict=True):
        assert torch.equal(mine[:, 1], theirs[:, 1])
    assert not torch.equal(one.k.codes[:, 0], plain.k.codes[:, 0])


def test_one_sign_rows_of_int4_round_plainly() -> None:
    y = torch.rand(10, 1, 64) + 1
    for a, b in zip(quantize_rows(y, INT4_PLAIN, matrices(1, 64)), quantize_rows(y, INT4_PLAIN), strict=True):
        assert torch.equal(a, b)


def test_a_row_depends_on_itself_alone() -> None:
    y, shaping = torch.randn(40, 2, 64), matrices(2, 64)
    whole = quantize_rows(y, INT4, shaping)
    for a, b in zip(quantize_rows(y[7:8], INT4, shaping), whole, strict=True):
        assert torch.equal(a[0], b[7])
