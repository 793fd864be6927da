"""The ops as PyTorch ops: schemas, fake kernels, torch.compile, out arguments, strides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops_helpers import SPECS, Batch, Source, make_ragged, same_bytes, strided, twin
from torch import Tensor

from quant import ops
from quant.pages import LayerPages
from quant.plan import Plan

foldkv = torch.ops.foldkv
OP_MODES = ["c16", "k8v4"]


def cache_args(pages: LayerPages) -> tuple[Tensor, ...]:
    k, v = pages.k, pages.v
    return k.codes, v.codes, k.meta, v.meta, k.params, v.params


def codes(pages: LayerPages) -> tuple[int, int, int]:
    return pages.k.fmt.code, pages.v.fmt.code, pages.page_size


@pytest.fixture(params=OP_MODES)
def batch(request: pytest.FixtureRequest) -> Batch:
    return make_ragged(Source(SPECS[request.param], 1, 2, 32), [(40, 3), (300, 1)])


def test_every_op_is_defined_once_with_its_schema() -> None:
    for name, schema in ops.SCHEMAS.items():
        assert str(getattr(foldkv, name).default._schema).replace(" ", "") == f"foldkv::{name}{schema}".replace(" ", "")


def test_opcheck_append_kv(batch: Batch) -> None:
    one, slots = batch.sequences[0], batch.slots(0)
    tail = codes(batch.pages)
    cache = cache_args(batch.pages)
    shaping = batch.pages.k.shaping, batch.pages.v.shaping
    torch.library.opcheck(
        foldkv.append_kv, (one.k, one.v, *cache, *shaping, slots, None, None, None, False, None, *tail)
    )
    cos, sin = torch.rand(2, 64, 8)
    rope = (cos, sin, torch.arange(40), True, torch.zeros(1, dtype=torch.int64))
    torch.library.opcheck(foldkv.append_kv, (strided(one.k), one.v, *cache, None, None, slots, *rope, *tail))


def test_opcheck_plan(batch: Batch) -> None:
    plan = Plan(batch.source.capacity())
    limits = plan.capacity.limits
    for starts in (None, torch.zeros(2, dtype=torch.int32)):
        arguments = (batch.seq_lens, batch.cu_seqlens_q, starts, plan.buffer, -1, *limits)
        torch.library.opcheck(foldkv.plan, arguments)


def test_opcheck_append_attention(batch: Batch) -> None:
    plan = batch.plan(num_workers=3)
    plan.workspace.zero_()  # opcheck compares tensors, and NaN is not equal to itself
    out = torch.zeros(batch.q.shape)
    tables = (batch.block_table, batch.seq_lens, batch.cu_seqlens_q, None, plan.buffer, plan.workspace)
    for lse, sinks in ((None, None), (torch.zeros(out.shape[:2]), torch.randn(2))):
        options = (out, lse, sinks, 0.2, -1, 0.0, *codes(batch.pages))
        arguments = (batch.q, *cache_args(batch.pages), *tables, *options)
        torch.library.opcheck(foldkv.append_attention, arguments)
        torch.library.opcheck(foldkv.append_attention_static_grid, (*arguments, plan.capacity.num_workers))


def test_opcheck_merge() -> None:
    o, lse = torch.randn(3, 5, 2, 16), torch.randn(3, 5, 2)
    torch.library.opcheck(foldkv.merge, (o, lse, torch.zeros(5, 2, 16), torch.zeros(5, 2)))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_fullgraph(backend: str, batch: Batch) -> None:
    """append + plan + attend as one graph: the same bytes and bits as without torch.compile."""
    one = batch.sequences[1]
    plan, pages = Plan(batch.source.capacity()), twin(batch.pages)

    def step(pages: LayerPages, k: Tensor, v: Tensor, slots: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        ops.append_kv(pages, 2 * k, v, slots)
        plan.update(batch.seq_lens, batch.cu_seqlens_q)
        tables = (batch.block_table, batch.seq_lens, batch.cu_seqlens_q)
        out, lse = ops.append_attention(pages, q, *tables, plan, return_lse=True)
        return out + 1, lse

    arguments = (one.k, one.v, batch.slots(1), batch.q)
    want = step(batch.pages, *arguments)
    torch._dynamo.reset()
    got = torch.compile(step, fullgraph=True, backend=backend)(pages, *arguments)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert same_bytes(pages, batch.pages)


def test_compile_merge_states() -> None:
    a, b = torch.randn(2, 5, 2, 32)
    lse_a, lse_b = torch.randn(2, 5, 2)
    torch._dynamo.reset()
    got = torch.compile(ops.merge_states, fullgraph=True, backend="aot_eager")(a, lse_a, b, lse_b)
    want = ops.merge_states(a, lse_a, b, lse_b)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


def attend(batch: Batch, q: Tensor, **options: Any) -> Any:
    tables = (batch.block_table, batch.seq_lens, batch.cu_seqlens_q)
    return ops.append_attention(batch.pages, q, *tables, batch.plan(), **options)


def test_out_and_lse_are_written_in_place(batch: Batch) -> None:
    want, want_lse = batch.attend()
    out, lse = torch.full(batch.q.shape, float("nan")), torch.full(batch.q.shape[:2], float("nan"))
    got = attend(batch, batch.q, out=out)
    assert got is out and torch.equal(out, want)
    got = attend(batch, batch.q, out=out, lse=lse, return_lse=True)
    assert got[0] is out and got[1] is lse and torch.equal(lse, want_lse)
    fresh, fresh_lse = attend(batch, batch.q, return_lse=True)
    assert torch.equal(fresh, want) and torch.equal(fresh_lse, want_lse)


def test_strides_of_q_do_not_matter(batch: Batch) -> None:
    want, _ = batch.attend()
    assert not batch.q.is_contiguous()
    for q in (batch.q.contiguous(), strided(batch.q), batch.q[None].expand(3, -1, -1, -1)[1]):
        assert torch.equal(attend(batch, q), want)
    fused = torch.randn(*batch.q.shape[:1], 5 * 32)  # q inside a fused projection
    view = fused[:, 64:128].view(-1, 2, 32)
    view.copy_(batch.q)
    assert torch.equal(attend(batch, view), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_out_has_the_dtype_of_q(dtype: torch.dtype) -> None:
    """The cache's own dtype does not matter: any q may read any cache."""
    batch = make_ragged(Source(SPECS["c8"], 1, 2, 32), [(40, 3), (300, 1)])
    q = batch.q.to(dtype)
    out, lse = attend(batch, q, return_lse=True)
    want, want_lse = attend(batch, q.float(), return_lse=True)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert torch.equal(out, want.to(dtype)) and torch.equal(lse, want_lse)


def test_empty_batches() -> None:
    source = Source(SPECS["c4"], 1, 2, 32)
    batch = make_ragged(source, [])
    out, lse = batch.attend()
    assert out.shape == (0, 2, 32) and lse.shape == (0, 2)
    spare = make_ragged(source, [], spare_rows=4)
    assert not spare.attend()[0].any()
    nothing = source.sequence(0, 0)
    before = twin(batch.pages)
    ops.append_kv(batch.pages, nothing.k, nothing.v, torch.empty(0, dtype=torch.int64))
    assert same_bytes(batch.pages, before)
