"""foldkv::append_attention on a GPU against fp64 over the stored bytes, held to the error of plain PyTorch."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from ops_helpers import OPTIONS, Batch, make_batch, make_ragged, params_for, with_sinks

from quant.plan import Plan

from .helpers import DEVICE, check_precision, device_workers, is_split, make_source

pytestmark = pytest.mark.gpu

MODES = ["c16", "c16b", "c8", "c8h", "c8d", "k8v4", "c4s", "c4", "c4r", "c4x"]
PAIRS = ["c16/c4r", "c4/c16", "c8/c16", "c8d/c4", "c8/c8d", "c4r/c8", "c16/c8h", "c4s/c8d", "c8d/c4s"]
Lengths = list[tuple[int, ...]]
BATCHES: dict[str, Lengths] = {
    "decode": [(300, 1), (1, 1), (523, 1), (0, 1), (256, 1), (90, 0), (1800, 1), (17, 1)],
    "ragged": [(300, 1), (37, 37), (0, 1), (1, 1), (523, 5), (90, 0), (3, 5), (270, 16)],
    "prefill": [(130, 130), (700, 300), (0, 0), (513, 37), (64, 1), (1030, 8)],
    "padded": [(300, 1, 17), (37, 37, 5), (0, 1, 0), (523, 5, 300), (8, 3, 8), (9, 2, 12), (400, 130, 99)],
}
# h_kv, query heads a kv head, head_dim, page_size: every head_dim with several groups and page sizes
SHAPES = [
    (2, 1, 64, 16), (8, 4, 64, 64), (1, 7, 64, 32), (1, 2, 96, 64), (2, 8, 96, 128), (2, 4, 128, 32), (8, 4, 128, 16),
    (1, 16, 128, 128), (1, 20, 128, 64), (4, 1, 256, 64), (1, 8, 256, 16),
]  # fmt: skip
DTYPES = (torch.float16, torch.bfloat16)


def plan_for(batch: Batch, options: dict[str, Any], workers: int = 0) -> Plan:
    """A plan for few workers, so that short sequences are cut, or (0) for those of the device."""
    workers = workers or device_workers(batch.source.h_kv)
    return batch.plan(options.get("window_size", (-1, -1))[0], max_q_tokens=1024, num_workers=workers)


# Every mode with every shape; batch, options, dtype and workers take turns.
CASES = [
    (mode, *shape, list(BATCHES)[(i + j) % 4], OPTIONS[(2 * i + j) % 5], DTYPES[(i + j // 2) % 2], (8, 0, 40)[(i + j) % 3])
    for (i, mode), (j, shape) in itertools.product(enumerate(MODES), enumerate(SHAPES))
]  # fmt: skip


@pytest.mark.parametrize(("mode", "h_kv", "group", "d", "page_size", "name", "options", "dtype", "workers"), CASES)
def test_against_fp64(
    mode: str, h_kv: int, group: int, d: int, page_size: int, name: str, options: dict[str, Any], dtype: torch.dtype,
    workers: int,
) -> None:  # fmt: skip
    source = make_source(mode, h_kv, group, d, page_size, dtype)
    batch = make_ragged(source, BATCHES[name], spare_rows=3)
    options = with_sinks(options, h_kv * group, DEVICE)
    out, lse = check_precision(batch, plan_for(batch, options, workers), **options)
    assert out.is_contiguous() and not out[-3:].any() and torch.isneginf(lse[-3:]).all()


@pytest.mark.parametrize("mode", PAIRS)
@pytest.mark.parametrize("name", ["decode", "prefill"])
@pytest.mark.parametrize("options", OPTIONS[:3:2], ids=["plain", "softcap-sinks"])
def test_mixed_pairs(mode: str, name: str, options: dict[str, Any]) -> None:
    batch = make_ragged(make_source(mode, 2, 4, 128, 64), BATCHES[name])
    options = with_sinks(options, 8, DEVICE)
    check_precision(batch, plan_for(batch, options), **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp16", "bf16"])
@pytest.mark.parametrize("mode", MODES)
def test_query_lengths(mode: str, dtype: torch.dtype) -> None:
    """Every length of a speculative draft, and lengths around a tile's."""
    source = make_source(mode, 2, 4, 128, 32, dtype)
    for q_lens in (range(1, 9), range(9, 17), (15, 16, 17, 31, 33, 63, 65, 129)):
        batch = make_ragged(source, [(200 + 37 * q_len, q_len) for q_len in q_lens])
        check_precision(batch, plan_for(batch, {}))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("group", "q_len"), [(4, 1), (4, 3), (8, 3), (4, 16), (4, 33)])
def test_many_splits(mode: str, group: int, q_len: int) -> None:
    """One long sequence among short ones, so that most of its chunks become partials: of one row tile, or of several."""
    batch = make_ragged(make_source(mode, 1, group, 128, 64), [(30, 1), (12_000, q_len), (10, 1)])
    plan = batch.plan(max_seq_len=16384, total_tokens=65536, num_workers=132)
    assert is_split(plan)
    check_precision(batch, plan)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("factor", [1e-4, 30.0])
def test_flat_and_peaked_softmax(mode: str, factor: float) -> None:
    """Logits all alike, and logits hundreds apart."""
    batch = make_ragged(make_source(mode), [(400, 5), (30, 1), (600, 70)])
    batch.q.mul_(factor)
    check_precision(batch, plan_for(batch, {}))


@pytest.mark.parametrize("mode", ["c16", "c8", "c4r"])
def test_queries_that_see_nothing(mode: str) -> None:
    """Empty sequences, padding up to the end, queries before position 0: 0 and -inf, or the sink alone."""
    source = make_source(mode)
    for sinks in (None, torch.tensor([-2.0, 0.0, 3.0, 50.0], device=DEVICE)):
        batch = make_ragged(source, [(0, 3), (20, 2, 20), (20, 2, 33), (2, 5), (0, 0)])
        out, lse = batch.attend(sinks=sinks)
        want = torch.full((10, 4), -torch.inf, device=DEVICE) if sinks is None else sinks.expand(10, 4)
        assert not out[:10].any()
        torch.testing.assert_close(lse[:10], want)
        assert torch.isfinite(lse[10:]).all() and out[10:].any()


@pytest.mark.parametrize("mode", ["c16", "c8", "c8d", "c4", "c4r"])
@pytest.mark.parametrize("q_len", [1, 6, 80])
def test_a_query_that_is_not_finite_spoils_its_own_row_only(mode: str, q_len: int) -> None:
    batch = make_ragged(make_source(mode), [(700, q_len), (40, 1)])
    want, want_lse = batch.attend()
    bad = torch.zeros(want.shape[:2], dtype=torch.bool, device=DEVICE)
    bad[q_len // 2, 1] = bad[q_len, 0] = True
    batch.q[q_len // 2, 1, 5], batch.q[q_len, 0, 0] = float("nan"), float("inf")
    out, lse = batch.attend()
    assert torch.isnan(out[bad]).all() and torch.isnan(lse[bad]).all()
    assert torch.equal(out[~bad], want[~bad]) and torch.equal(lse[~bad], want_lse[~bad])


@pytest.mark.parametrize("mode", ["c16", "c8", "c8d", "c4", "c4r"])
@pytest.mark.parametrize("even", [True, False], ids=["even-products", "wide-products"])
def test_channels_decades_apart(mode: str, even: bool) -> None:
    """Scales of K whose products with q span four decades, or queries that span them so that the products do not."""
    source, plain = make_source(mode, 2, 4, 128, 64), make_source(mode, 2, 4, 128, 64)
    width = 10.0 ** torch.linspace(-2, 2, 128)[torch.randperm(128)]
    source.width, source.mean = source.width * width, source.mean * width
    source.params = params_for(source.spec.k, source.sequence(400, 0).k.cpu()), plain.params[1]
    lengths = [(700, 1), (300, 40)]
    batch = make_batch(source, [replace(source.sequence(*one), v=plain.sequence(*one).v) for one in lengths])
    if even:
        batch.q.div_(width.to(DEVICE))
    check_precision(batch, softmax_scale=0.05 if even else 1e-4)
