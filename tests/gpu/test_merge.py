"""foldkv::merge on a GPU against the reference."""

from __future__ import annotations

import pytest
import torch
from ops_helpers import check_merge
from torch import Tensor

from quant import ops, reference

from .helpers import DEVICE, capture, same_bits

pytestmark = pytest.mark.gpu

INF = float("inf")


def parts(
    n: int, tokens: int = 5, h: int = 3, d: int = 64, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Random outputs `[n, tokens, h, d]` and LSEs `[n, tokens, h]` that differ widely."""
    return torch.randn(n, tokens, h, d).to(DEVICE, dtype), (torch.randn(n, tokens, h) * 5).to(DEVICE)


def check(o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    return check_merge(o, lse, ulps=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "tokens", "h", "d"), [(1, 3, 2, 16), (2, 5, 8, 128), (9, 4, 1, 80), (40, 1, 3, 512), (3, 4096, 32, 64)]
)
def test_against_fp64(dtype: torch.dtype, n: int, tokens: int, h: int, d: int) -> None:
    o, lse = parts(n, tokens, h, d, dtype)
    got, got_lse = check(o, lse)
    if n == 1:
        assert torch.equal(got, o[0]) and torch.equal(got_lse, lse[0])
    lse[torch.rand(lse.shape).to(DEVICE) < 0.4] = -INF
    check(o.masked_fill(torch.isneginf(lse)[..., None], float("nan")), lse)


def test_empty_parts_count_for_nothing() -> None:
    o, lse = parts(3)
    padded_o = torch.cat((torch.full_like(o[:1], float("nan")), o, torch.full_like(o[:1], INF)))
    padded_lse = torch.cat((torch.full_like(lse[:1], -INF), lse, torch.full_like(lse[:1], -INF)))
    assert same_bits(ops.merge(padded_o, padded_lse), ops.merge(o, lse))
    for empty_o, empty_lse in ((padded_o[[0, 4]], padded_lse[[0, 4]]), (padded_o[:0], padded_lse[:0])):
        out, total = ops.merge(empty_o, empty_lse)
        assert not out.any() and torch.isneginf(total).all()
    assert ops.merge(o[:, :0], lse[:, :0])[0].shape == (0, 3, 64)


def test_order_and_grouping() -> None:
    """Parts are merged in their order, and any order is right; a part merged with nothing keeps its bits."""
    o, lse = parts(6)
    want = reference.merge(o, lse)
    halves = [ops.merge(o[half], lse[half]) for half in (slice(0, 2), slice(2, 6))]
    for got in (check(o, lse), check(o.flip(0), lse.flip(0)), ops.merge_states(*halves[0], *halves[1])):
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=2e-6)
    assert same_bits(ops.merge(o, lse), ops.merge(o.clone(), lse.clone()))
    nothing = torch.full_like(o[0], float("nan")), torch.full_like(lse[0], -INF)
    assert same_bits(ops.merge_states(o[0], lse[0], *nothing), (o[0], lse[0]))
    assert same_bits(ops.merge_states(*nothing, o[0], lse[0]), (o[0], lse[0]))


@pytest.mark.parametrize(("low", "high"), [(-1e4, 1e4), (-3e38, 3e38), (88.0, 90.0), (-200.0, -199.0)])
def test_far_apart(low: float, high: float) -> None:
    o = parts(1)[0][0]
    lse = torch.tensor([low, high], device=DEVICE)[:, None, None].expand(2, *o.shape[:2]).contiguous()
    check(torch.stack((o, -o)), lse)


def test_under_a_captured_graph() -> None:
    o, lse = parts(4, dtype=torch.float16)
    out, out_lse = torch.empty_like(o[0]), torch.empty_like(lse[0])
    replay = capture(lambda: torch.ops.foldkv.merge(o, lse, out, out_lse))
    for _ in range(3):
        new_o, new_lse = parts(4, dtype=torch.float16)
        new_lse[0] = -INF
        o.copy_(new_o)
        lse.copy_(new_lse)
        replay()
        assert same_bits((out, out_lse), ops.merge(new_o, new_lse))
