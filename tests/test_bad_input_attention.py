"""Bad input to foldkv::append_attention: an error that says what was expected and what came, and no output written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from ops_helpers import SPECS, Batch, Source, fails, int32, make_ragged
from torch import Tensor

from quant import backend
from quant.errors import ArgumentError
from quant.plan import Plan

pytestmark = pytest.mark.skipif(not backend.has_kernels("cpu"), reason="the extension is not built")
foldkv = torch.ops.foldkv


def make() -> Batch:
    """12 pages of 16 tokens; sequences of 40 and 90 tokens with 2 queries each; K int8 static, V int4 dynamic."""
    return make_ragged(Source(SPECS["k8v4"], 2, 2, 32), [(40, 2), (90, 2)])


ATTEND_NAMES = (
    "q k_cache v_cache k_meta v_meta k_params v_params block_table seq_lens cu_seqlens_q seq_starts plan workspace out lse "
    "sinks softmax_scale window_left softcap k_format v_format page_size"
).split()


def attend_arguments(batch: Batch) -> dict[str, Any]:
    k, v, plan = batch.pages.k, batch.pages.v, batch.plan()
    out = torch.full(batch.q.shape, 7.0)
    values = [
        batch.q, k.codes, v.codes, k.meta, v.meta, k.params, v.params, batch.block_table, batch.seq_lens,
        batch.cu_seqlens_q, None, plan.buffer, plan.workspace, out, None, None, 0.2, -1, 0.0, k.fmt.code, v.fmt.code, 16,
    ]  # fmt: skip
    return dict(zip(ATTEND_NAMES, values, strict=True))


def table_with(b: int, page: int, page_id: int) -> Callable[[Batch], dict[str, Tensor]]:
    def change(batch: Batch) -> dict[str, Tensor]:
        table = batch.block_table.clone()
        table[b, page] = page_id
        return {"block_table": table}

    return change


BAD_ATTENDS: list[tuple[dict[str, Any] | Callable[[Batch], dict[str, Tensor]], str]] = [
    ({"q": torch.randn(4, 4, 48)}, "q: expected shape [*, *, 32] (tokens, h_q, d), got [4, 4, 48]"),
    ({"q": torch.randn(4, 3, 32)}, "q: expected a number of heads that the 2 kv heads divide, got 3"),
    ({"q": torch.randn(4, 0, 32)}, "q: expected a number of heads that the 2 kv heads divide, got 0"),
    ({"q": torch.randn(4, 4, 32).double()}, "q: expected torch.float32 or torch.float16 or torch.bfloat16"),
    ({"q": torch.randn(4, 32, 4).mT}, "q: expected a contiguous last dimension, got shape [4, 4, 32] with strides [128, 1, 4]"),
    ({"out": torch.zeros(4, 4, 32).half()}, "out: expected torch.float32, got torch.float16"),
    ({"out": torch.zeros(5, 4, 32)}, "out: expected shape [4, 4, 32] (as q), got [5, 4, 32]"),
    ({"out": torch.zeros(4, 4, 64)[..., ::2]}, "out: expected a contiguous tensor, got shape [4, 4, 32] with strides"),
    ({"lse": torch.zeros(4, 2)}, "lse: expected shape [4, 4] (tokens, h_q), got [4, 2]"),
    ({"lse": torch.zeros(4, 4).half()}, "lse: expected torch.float32, got torch.float16"),
    ({"sinks": torch.zeros(2)}, "sinks: expected shape [4] (h_q), got [2]"),
    ({"sinks": torch.zeros(4).bfloat16()}, "sinks: expected torch.float32, got torch.bfloat16"),
    ({"block_table": torch.zeros(2, 8)}, "block_table: expected torch.int32, got torch.float32"),
    ({"block_table": torch.zeros(2, 8).long()}, "block_table: expected torch.int32, got torch.int64"),
    ({"block_table": torch.zeros(8).int()}, "block_table: expected shape [*, *] (batch, max_pages), got [8]"),
    ({"block_table": torch.zeros(8, 2).int().T}, "block_table: expected a contiguous last dimension, got shape [2, 8]"),
    ({"block_table": torch.zeros(3, 8).int()}, "seq_lens: expected shape [3] (batch), got [2]"),
    (table_with(0, 2, 12), "block_table: expected page ids in 0 .. 11, got 12 for sequence 0, page 2"),
    (table_with(1, 5, -1), "block_table: expected page ids in 0 .. 11, got -1 for sequence 1, page 5"),
    ({"seq_lens": int32(40, 129)}, "seq_lens: expected 0 .. 128 (table width * page_size), got 129 at index 1"),
    ({"seq_lens": int32(-1, 90)}, "seq_lens: expected 0 .. 128 (table width * page_size), got -1 at index 0"),
    ({"seq_lens": torch.tensor([40, 90])}, "seq_lens: expected torch.int32, got torch.int64"),
    ({"cu_seqlens_q": int32(0, 3, 2)}, "cu_seqlens_q: expected numbers that do not fall, got 2 after 3"),
    ({"cu_seqlens_q": int32(0, 2, 5)}, "cu_seqlens_q: expected 0 first and at most 4 (rows of q) last, got 0 and 5"),
    ({"cu_seqlens_q": int32(1, 2, 4)}, "cu_seqlens_q: expected 0 first and at most 4 (rows of q) last, got 1 and 4"),
    ({"cu_seqlens_q": int32(0, 4)}, "cu_seqlens_q: expected shape [3] (batch + 1), got [2]"),
    ({"seq_starts": int32(0, 0, 0)}, "seq_starts: expected shape [2] (batch), got [3]"),
    ({"plan": torch.zeros(4).int()}, "plan: expected at least 16 numbers, got 4"),
    ({"plan": torch.zeros(800).int()}, "plan: expected a work list, got a buffer that holds none; call Plan.update first"),
    ({"plan": torch.full((800,), -1).int()}, "plan: expected a work list, got a buffer that holds none"),
    ({"workspace": torch.zeros(100).half()}, "workspace: expected torch.float32, got torch.float16"),
    ({"softcap": -1.0}, "softcap: expected a number >= 0, got -1"),
    ({"window_left": 2**40}, f"window_left: expected 0 .. 2^31 - 1, got {2**40}"),
    ({"page_size": 17}, "page_size: expected 16, 32, 64 or 128, got 17"),
    ({"v_format": 7}, "v_format: expected a code of quant.spec.Format.code, got 7"),
    ({"k_params": torch.zeros(5, 2, 20)}, "head_dim: expected a multiple of 16 up to 512, got 20"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD_ATTENDS, ids=range(len(BAD_ATTENDS)))
def test_append_attention(changes: Any, message: str) -> None:
    batch = make()
    assert batch.pages.num_pages == 12 and batch.block_table.shape == (2, 8)
    arguments = attend_arguments(batch)
    with fails(message):
        foldkv.append_attention(*(arguments | (changes(batch) if callable(changes) else changes)).values())
    assert (arguments["out"] == 7).all()
    foldkv.append_attention(*arguments.values())
    assert torch.isfinite(arguments["out"]).all() and (arguments["out"] != 7).all()


STALE = "plan: expected a work list for these lengths and this window, got one for others; call Plan.update once a step"


@pytest.mark.parametrize(
    ("lengths", "queries", "starts", "window"),
    [
        ((200, 600), (2, 2), (0, 0), -1), ((512, 300), (2, 2), (0, 0), -1), ((512, 600), (2, 3), (0, 0), -1),
        ((512, 600), (1, 3), (0, 0), -1), ((512, 600), (2, 2), (256, 0), -1), ((512, 600), (2, 2), (0, 0), 100),
        ((512,), (2,), (0,), -1), ((512, 600, 1), (2, 2, 1), (0, 0, 0), -1), ((512, 1024), (2, 2), (0, 0), -1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("workers", [1, 16])
def test_a_stale_plan_is_an_error(
    lengths: tuple[int, ...], queries: tuple[int, ...], starts: tuple[int, ...], window: int, workers: int
) -> None:
    """A plan made for `lengths` and so on must not serve (512, 600) with 2 queries each, nor the other way round."""
    source = Source(SPECS["c8"], 1, 8, 16)
    base = make_ragged(source, [(512, 2), (600, 2)])
    other = make_ragged(source, list(zip(lengths, queries, starts, strict=True)))
    plans = base.plan(num_workers=workers), other.plan(window, num_workers=workers)
    base.attend(plans[0])
    other.attend(plans[1], window_size=(window, 0))
    with fails(STALE):
        base.attend(plans[1])
    with fails(STALE):
        other.attend(plans[0], window_size=(window, 0))


def test_a_plan_still_holds_where_nothing_it_depends_on_has_changed() -> None:
    """One more token inside the same chunk needs no other work list."""
    source = Source(SPECS["c8"], 1, 8, 16)
    batch, longer = make_ragged(source, [(300, 2)]), make_ragged(source, [(301, 2)])
    assert torch.equal(longer.attend(batch.plan())[0], longer.attend()[0])


def test_a_workspace_too_small_is_an_error() -> None:
    batch = make_ragged(Source(SPECS["c8"], 1, 8, 16), [(2000, 1)])
    plan = batch.plan(num_workers=16)
    groups = 128 * (64 + 4)  # of one sequence and kv head
    plan.workspace = plan.workspace[: 2 * 8 * 18 + groups]
    with fails("workspace: expected room for 8 partials, got 2; use the workspace of the Plan that was updated"):
        batch.attend(plan)


def test_a_plan_for_other_heads_is_an_error() -> None:
    batch = make()
    plan = batch.plan()
    plan.buffer[12] = 3
    with fails("plan: expected one for 2 kv heads (Capacity.h_kv), got one for 3"):
        batch.attend(plan)
    other = Plan(replace(batch.source.capacity(), h_kv=1))
    other.update(batch.seq_lens, batch.cu_seqlens_q)
    with fails(
        "plan: expected one for the pages' 2 kv heads, got a Capacity of h_kv 1; plan with that h_kv", ArgumentError
    ):
        batch.attend(other)


def test_a_plan_never_updated_is_an_error() -> None:
    batch = make()
    with fails("plan: expected a work list, got a buffer that holds none; call Plan.update first"):
        batch.attend(Plan(batch.source.capacity()))


def test_a_window_to_the_right_is_an_error() -> None:
    with fails("window_size: expected (left, -1 or 0), as attention is causal, got (4, 2)", ValueError):
        make().attend(window_size=(4, 2))
