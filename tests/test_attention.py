"""Attention: the reference against PyTorch's, then foldkv::append_attention against the reference."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from ops_helpers import DTYPES, FORMATS, OPTIONS, SPECS, Source, check_attention, make_ragged, with_sinks
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from quant import backend, reference
from quant.spec import KVSpec

# --- the reference ----------------------------------------------------------------------------------------------------


def rows(q_len: int, seq_len: int, h_q: int = 6, h_kv: int = 2, d: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((q_len, h_q, d), (seq_len, h_kv, d), (seq_len, h_kv, d))
    q, k, v = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return q, k, v


@pytest.mark.parametrize(("h_q", "h_kv"), [(4, 4), (6, 2), (7, 1)])
@pytest.mark.parametrize(
    ("q_len", "seq_len", "window"), [(1, 1, -1), (1, 40, -1), (17, 17, -1), (5, 40, -1), (9, 40, 6), (9, 9, 0)]
)
def test_reference_is_sdpa(h_q: int, h_kv: int, q_len: int, seq_len: int, window: int) -> None:
    q, k, v = rows(q_len, seq_len, h_q, h_kv)
    out, _ = reference.attention(q, k, v, window_left=window)
    distance = torch.arange(seq_len - q_len, seq_len)[:, None] - torch.arange(seq_len)
    mask = (distance >= 0) & ((distance <= window) if window >= 0 else True)
    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
    want = scaled_dot_product_attention(*heads_first, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(out, want[0].transpose(0, 1), rtol=1e-12, atol=1e-12)
    if q_len == seq_len and window < 0:
        heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
        causal = scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(out, causal[0].transpose(0, 1), rtol=1e-12, atol=1e-12)


def test_reference_by_the_formula() -> None:
    """One query and head, written out: scale, softcap, sink, left padding, LSE."""
    q, k, v = rows(1, 12, 1, 1)
    sink, cap, start = torch.tensor([0.7], dtype=torch.float64), 1.5, 4
    out, lse = reference.attention(q, k, v, softmax_scale=0.3, softcap=cap, sinks=sink, start=start)
    logits = [cap * math.tanh(0.3 * float(q[0, 0] @ k[t, 0]) / cap) for t in range(start, 12)]
    total = sum(math.exp(x) for x in logits) + math.exp(0.7)
    want = sum(math.exp(x) / total * v[start + i, 0] for i, x in enumerate(logits))
    torch.testing.assert_close(out[0, 0], want)
    assert lse.item() == pytest.approx(math.log(total), abs=1e-12)


def test_reference_of_queries_that_see_nothing() -> None:
    q, k, v = rows(5, 3)
    out, lse = reference.attention(q, k, v)  # the two oldest queries stand before position 0
    assert not out[:2].any() and torch.isneginf(lse[:2]).all() and torch.isfinite(lse[2:]).all()
    sinks = torch.linspace(-1, 1, 6, dtype=torch.float64)
    out, lse = reference.attention(q, k, v, sinks=sinks)
    assert not out[:2].any()
    torch.testing.assert_close(lse[:2], sinks.expand(2, -1))


# --- the op -----------------------------------------------------------------------------------------------------------

Lengths = list[tuple[int, ...]]
RAGGED: Lengths = [(300, 1), (37, 37), (0, 1), (1, 1), (523, 5), (90, 0), (3, 5), (256, 1)]
PADDED: Lengths = [(300, 1, 17), (37, 37, 5), (0, 1, 0), (523, 5, 300), (8, 3, 8), (9, 2, 12), (270, 37, 99)]
# h_kv, query heads a kv head, head_dim, page_size
SHAPES = [
    (2, 1, 64, 16), (1, 2, 96, 64), (2, 4, 128, 32), (1, 7, 48, 128), (2, 8, 16, 16), (1, 16, 80, 32), (1, 20, 256, 64),
    (1, 2, 512, 16), (3, 3, 64, 128),
]  # fmt: skip
# Every mode with every shape; dtype, padding and the other options take turns.
CASES = [
    (mode, *shape, DTYPES[(i + j) % 3], OPTIONS[(i + 2 * j) % 5], (i + j) % 2)
    for (i, mode), (j, shape) in itertools.product(enumerate(SPECS), enumerate(SHAPES))
]


@pytest.mark.parametrize(("mode", "h_kv", "group", "d", "page_size", "dtype", "options", "padded"), CASES)
def test_against_fp64(
    mode: str, h_kv: int, group: int, d: int, page_size: int, dtype: torch.dtype, options: dict[str, Any], padded: int
) -> None:
    source = Source(SPECS[mode], h_kv, group, d, page_size, dtype)
    batch = make_ragged(source, PADDED if padded else RAGGED, spare_rows=3)
    out, lse = check_attention(batch, **with_sinks(options, h_kv * group))
    assert out.is_contiguous() and not out[-3:].any() and torch.isneginf(lse[-3:]).all()


# K and V of every format, paired with one that works differently.
PAIRS = [(k, list(FORMATS)[(i * 5 + 3) % len(FORMATS)]) for i, k in enumerate(FORMATS)]


@pytest.mark.parametrize(("k", "v"), PAIRS)
@pytest.mark.parametrize("options", OPTIONS[1:3], ids=["window", "softcap-sinks"])
def test_any_pair_of_formats(k: str, v: str, options: dict[str, Any]) -> None:
    source = Source(KVSpec(FORMATS[k], FORMATS[v]), 2, 3, 80)
    check_attention(make_ragged(source, RAGGED), **with_sinks(options, 6))


@pytest.mark.parametrize("mode", SPECS)
def test_many_splits(mode: str) -> None:
    """One long sequence among short ones, so that most of its chunks become partials."""
    source = Source(SPECS[mode], 1, 4, 64)
    batch = make_ragged(source, [(30, 1), (2900, 3), (10, 1)])
    assert int(batch.plan().buffer[1]) == 1  # it is split
    check_attention(batch)


@pytest.mark.parametrize("mode", SPECS)
def test_one_token_is_its_value(mode: str) -> None:
    source = Source(SPECS[mode], 2, 4, 48)
    batch = make_ragged(source, [(1, 1)])
    out, lse = batch.attend()
    value = reference.read(batch.pages.v, 16, batch.block_table[0], 1)[0].repeat_interleave(4, 0)
    torch.testing.assert_close(out[0].double(), value, rtol=1e-4, atol=1e-4 * float(value.abs().max()))
    if mode == "c32":
        assert torch.equal(out[0].double(), value)
    assert torch.isfinite(lse).all()


@pytest.mark.parametrize("mode", ["c32", "c16", "c8", "c4r"])
def test_queries_that_see_nothing(mode: str) -> None:
    """Empty sequences, padding up to the end, queries before position 0: 0 and -inf, or the sink alone."""
    source = Source(SPECS[mode], 2, 2, 64)
    warm = make_ragged(source, [(600, 40)])
    for sinks in (None, torch.tensor([-2.0, 0.0, 3.0, 50.0])):
        warm.attend(sinks=sinks)  # leaves its numbers where the next call keeps its own
        batch = make_ragged(source, [(0, 3), (20, 2, 20), (20, 2, 33), (2, 5), (0, 0)])
        out, lse = batch.attend(sinks=sinks)
        blind = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
        want = torch.full((10, 4), -torch.inf) if sinks is None else sinks.expand(10, 4)
        assert not out[blind].any()
        torch.testing.assert_close(lse[blind], want)
        assert torch.isfinite(lse[10:]).all() and out[10:].any()


@pytest.mark.skipif(not backend.has_kernels("cpu"), reason="the extension is not built")
@pytest.mark.parametrize("mode", ["c32", "c8", "c4"])
def test_a_query_that_is_not_finite_spoils_its_own_row_only(mode: str) -> None:
    source = Source(SPECS[mode], 1, 2, 64)
    batch = make_ragged(source, [(700, 6), (40, 1)])
    want, want_lse = batch.attend()
    batch.q[2, 1, 5], batch.q[3, 0, 0] = float("nan"), float("inf")
    out, lse = batch.attend()
    bad = torch.zeros(7, 2, dtype=torch.bool)
    bad[2, 1] = bad[3, 0] = True
    assert torch.isnan(out[bad]).all() and torch.isnan(lse[bad]).all()
    assert torch.equal(out[~bad], want[~bad]) and torch.equal(lse[~bad], want_lse[~bad])


@pytest.mark.parametrize("mode", ["c32", "c16", "c8", "c8d", "c4"])
@pytest.mark.parametrize("factor", [1e-6, 1e2])
def test_flat_and_peaked_softmax(mode: str, factor: float) -> None:
    """Logits all alike, and logits hundreds apart."""
    source = Source(SPECS[mode], 2, 2, 64)
    batch = make_ragged(source, [(400, 5), (30, 1)])
    batch.q.mul_(factor)
    check_attention(batch)
