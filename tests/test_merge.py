"""Merging partial results: the algebra in the reference, then foldkv::merge against it."""

from __future__ import annotations

import pytest
import torch
from ops_helpers import check_merge
from torch import Tensor

from quant import ops, reference

INF = float("inf")


def parts(
    n: int, tokens: int = 5, h: int = 3, d: int = 32, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Random outputs `[n, tokens, h, d]` and LSEs `[n, tokens, h]` that differ widely."""
    return torch.randn(n, tokens, h, d, dtype=dtype), torch.randn(n, tokens, h, dtype=torch.float64) * 5


def close(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x.double(), y.double(), rtol=1e-12, atol=1e-12)


# --- the algebra ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [(), (1,), (7, 8, 40), (10, 20, 30, 60, 63)])
def test_parts_of_a_sequence_give_the_whole(cuts: tuple[int, ...]) -> None:
    q, k, v = torch.randn(1, 4, 16).double(), torch.randn(64, 2, 16).double(), torch.randn(64, 2, 16).double()
    whole = reference.attention(q, k, v)
    edges = [0, *cuts, 64]
    pieces = [reference.attention(q, k[a:b], v[a:b]) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    merged = reference.merge(torch.stack([o for o, _ in pieces]), torch.stack([lse for _, lse in pieces]))
    close(merged, whole)


def test_order_and_grouping_do_not_matter() -> None:
    o, lse = parts(6)
    want = reference.merge(o, lse)
    order = torch.randperm(6)
    close(reference.merge(o[order], lse[order]), want)
    halves = [reference.merge(o[half], lse[half]) for half in (slice(0, 2), slice(2, 6))]
    close(reference.merge(*(torch.stack(x) for x in zip(*halves, strict=True))), want)


def test_one_part_is_itself_and_empty_parts_count_for_nothing() -> None:
    o, lse = parts(3)
    close(reference.merge(o[:1], lse[:1]), (o[0], lse[0]))
    padded_o = torch.cat((torch.full_like(o[:1], float("nan")), o, torch.full_like(o[:1], INF)))
    padded_lse = torch.cat((torch.full_like(lse[:1], -INF), lse, torch.full_like(lse[:1], -INF)))
    close(reference.merge(padded_o, padded_lse), reference.merge(o, lse))
    out, total = reference.merge(padded_o[[0, 4]], padded_lse[[0, 4]])
    assert not out.any() and torch.isneginf(total).all()


# --- the op -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("n", "tokens", "h", "d"), [(1, 3, 2, 16), (2, 5, 8, 128), (9, 4, 1, 80), (40, 1, 3, 512)])
def test_against_fp64(dtype: torch.dtype, n: int, tokens: int, h: int, d: int) -> None:
    o, lse = parts(n, tokens, h, d, dtype=dtype)
    got, got_lse = check_merge(o, lse)
    if n == 1:
        assert torch.equal(got, o[0]) and torch.equal(got_lse, lse[0].float())
    lse[torch.rand(lse.shape) < 0.4] = -INF
    o = o.masked_fill(torch.isneginf(lse)[..., None], float("nan"))
    check_merge(o, lse)


def test_no_part_at_all() -> None:
    o, lse = ops.merge(torch.full((2, 3, 2, 16), float("nan")), torch.full((2, 3, 2), -INF))
    assert torch.equal(o, torch.zeros(3, 2, 16)) and torch.isneginf(lse).all()
    o, lse = ops.merge(torch.empty(0, 3, 2, 16), torch.empty(0, 3, 2))
    assert torch.equal(o, torch.zeros(3, 2, 16)) and torch.isneginf(lse).all()
    assert ops.merge(torch.empty(2, 0, 2, 16), torch.empty(2, 0, 2))[0].shape == (0, 2, 16)


def test_merge_states_in_both_orders() -> None:
    (a, b), (lse_a, lse_b) = parts(2, dtype=torch.float32)
    lse_a, lse_b = lse_a.float(), lse_b.float()
    lse_b[0], lse_a[1] = -INF, -INF
    lse_a[2], lse_b[2] = 1.5, 1.5
    want = reference.merge(torch.stack((a, b)), torch.stack((lse_a, lse_b)))
    for pair in ((a, lse_a, b, lse_b), (b, lse_b, a, lse_a)):
        out, lse = ops.merge_states(*pair)
        torch.testing.assert_close(out.double(), want[0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(lse.double(), want[1], rtol=1e-6, atol=1e-6)
        assert torch.equal(out[0], a[0]) and torch.equal(out[1], b[1])


@pytest.mark.parametrize(("low", "high"), [(-1e4, 1e4), (-3e38, 3e38), (88.0, 90.0)])
def test_far_apart(low: float, high: float) -> None:
    o = parts(1, dtype=torch.float32)[0][0]
    both = torch.stack((o, -o))
    lse = torch.stack((torch.full(o.shape[:2], low), torch.full(o.shape[:2], high)))
    out, total = ops.merge(both, lse)
    want, want_lse = reference.merge(both, lse)
    torch.testing.assert_close(out.double(), want, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(total.double(), want_lse, rtol=1e-6, atol=0)
