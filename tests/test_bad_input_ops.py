"""Bad input to the ops: an error that says what was expected and what came, and nothing written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops_helpers import SPECS, Batch, Source, fails, int32, make_ragged, pools, twin
from torch import Tensor

from quant import backend, ops
from quant.errors import ArgumentError
from quant.pages import LayerPages, PagedTensor, identity_params
from quant.plan import Capacity, Plan
from quant.spec import MODES, Format, resolve_mode

pytestmark = pytest.mark.skipif(not backend.has_kernels("cpu"), reason="the extension is not built")
foldkv = torch.ops.foldkv


def make() -> Batch:
    """12 pages of 16 tokens; sequences of 40 and 90 tokens with 2 queries each; K int8 static, V int4 dynamic."""
    return make_ragged(Source(SPECS["k8v4"], 2, 2, 32), [(40, 2), (90, 2)])


# What the messages have in common.
FLOATS = "expected torch.float32 or torch.float16 or torch.bfloat16, got"
CODES = "(num_pages, h_kv, page_size * row_bytes), got"
META = "(num_pages, h_kv, page_size * meta_bytes), got"
PARAMS = "(scale/zero/mean/balance/query, h_kv, d), got"
SLOTS = "slot_mapping: expected slots below 192 (num_pages * page_size) or negative ones, got"
POSITIONS = "positions: expected 0 .. 49 (rows of cos and sin), got"
FORMAT = "expected a code of quant.spec.Format.code, got"
DYNAMIC = "expected stored zeros and rotation only with dynamic scales, got code"

# --- append_kv --------------------------------------------------------------------------------------------------------

APPEND_NAMES = (
    "k v k_cache v_cache k_meta v_meta k_params v_params k_shaping v_shaping slot_mapping cos sin positions interleaved "
    "nonfinite k_format v_format page_size"
).split()


def append_arguments(batch: Batch) -> dict[str, Any]:
    k, v = batch.pages.k, batch.pages.v
    new = torch.randn(2, 3, 2, 32)
    values = [
        *new, k.codes, v.codes, k.meta, v.meta, k.params, v.params, k.shaping, v.shaping, torch.tensor([1, -1, 7]), None,
        None, None, False, None, k.fmt.code, v.fmt.code, 16,
    ]  # fmt: skip
    return dict(zip(APPEND_NAMES, values, strict=True))


EYE = torch.eye(32).to(torch.int8).repeat(2, 1, 1)
ROPE = {"cos": torch.ones(50, 8), "sin": torch.ones(50, 8), "positions": torch.tensor([0, 99, 49])}
BAD_APPENDS: list[tuple[dict[str, Any], str]] = [
    ({"k": torch.randn(3, 2, 48)}, "k: expected shape [*, 2, 32] (tokens, h_kv, d), got [3, 2, 48]"),
    ({"k": torch.randn(3, 4, 32)}, "k: expected shape [*, 2, 32] (tokens, h_kv, d), got [3, 4, 32]"),
    ({"k": torch.randn(3, 64)}, "k: expected shape [*, 2, 32] (tokens, h_kv, d), got [3, 64]"),
    ({"v": torch.randn(4, 2, 32)}, "v: expected shape [3, 2, 32] (tokens, h_kv, d), got [4, 2, 32]"),
    ({"k": torch.randn(3, 2, 32).double()}, f"k: {FLOATS} torch.float64"),
    ({"v": torch.ones(3, 2, 32).int()}, f"v: {FLOATS} torch.int32"),
    (
        {"k": torch.randn(3, 32, 2).transpose(1, 2)},
        "k: expected a contiguous last dimension, got shape [3, 2, 32] with strides [64, 1, 2]; call .contiguous()",
    ),
    ({"k_cache": torch.zeros(12, 2, 100).byte()}, f"k_cache: expected shape [12, 2, 512] {CODES} [12, 2, 100]"),
    ({"k_cache": torch.zeros(12, 3, 512).byte()}, "k_cache: expected shape [*, 2, *] (num_pages, h_kv, page_bytes)"),
    ({"v_cache": torch.zeros(11, 2, 256).byte()}, f"v_cache: expected shape [12, 2, 256] {CODES} [11, 2, 256]"),
    ({"v_cache": torch.zeros(12, 2, 256)}, "v_cache: expected torch.uint8, got torch.float32"),
    (
        {"v_cache": torch.zeros(12, 2, 512).byte()[..., ::2]},
        "v_cache: expected a contiguous tensor, got shape [12, 2, 256] with strides [1024, 512, 2]",
    ),
    ({"v_meta": torch.zeros(12, 2, 32).byte()}, f"v_meta: expected shape [12, 2, 64] {META} [12, 2, 32]"),
    ({"k_meta": torch.zeros(12, 2, 64).byte()}, f"k_meta: expected shape [12, 2, 0] {META} [12, 2, 64]"),
    ({"k_params": torch.zeros(4, 2, 32)}, f"k_params: expected shape [5, *, *] {PARAMS} [4, 2, 32]"),
    ({"v_params": torch.zeros(5, 2, 16)}, f"v_params: expected shape [5, 2, 32] {PARAMS} [5, 2, 16]"),
    ({"v_params": torch.zeros(5, 2, 32).half()}, "v_params: expected torch.float32, got torch.float16"),
    ({"k_params": torch.zeros(5, 2, 20)}, "head_dim: expected a multiple of 16 up to 512, got 20"),
    ({"k_params": torch.zeros(5, 2, 528)}, "head_dim: expected a multiple of 16 up to 512, got 528"),
    ({"k_shaping": EYE}, "k_shaping: expected none for a format whose codes are rounded alone, got shape [2, 32, 32]"),
    ({"v_shaping": EYE.float()}, "v_shaping: expected torch.int8, got torch.float32"),
    ({"v_shaping": EYE[:1]}, "v_shaping: expected shape [2, 32, 32] (h_kv, d, d), got [1, 32, 32]"),
    ({"v_shaping": EYE[:1].expand(2, 32, 32)}, "v_shaping: expected a contiguous tensor, got shape [2, 32, 32]"),
    ({"page_size": 24}, "page_size: expected 16, 32, 64 or 128, got 24"),
    ({"page_size": 32}, f"k_cache: expected shape [12, 2, 1024] {CODES} [12, 2, 512]"),
    ({"k_format": 99}, f"k_format: {FORMAT} 99"),
    ({"k_format": -1}, f"k_format: {FORMAT} -1"),
    ({"v_format": 4 | 1 << 12}, f"v_format: {FORMAT} {4 | 1 << 12}"),
    ({"k_format": 1 | 1 << 8}, f"k_format: expected a float codec without scales, got code {1 | 1 << 8}"),
    ({"k_format": 3 | 1 << 10}, f"k_format: {DYNAMIC} {3 | 1 << 10}"),
    ({"slot_mapping": torch.tensor([0, 1, 192])}, f"{SLOTS} 192 at index 2; nothing was written"),
    ({"slot_mapping": torch.tensor([2**40, 1, 0])}, f"{SLOTS} {2**40} at index 0"),
    ({"slot_mapping": int32(0, 1, 2)}, "slot_mapping: expected torch.int64, got torch.int32"),
    ({"slot_mapping": torch.tensor([0, 1])}, "slot_mapping: expected shape [3] (tokens), got [2]"),
    (ROPE | {"sin": None}, "cos, sin, positions: expected all three or none, got some of them"),
    (ROPE | {"positions": None}, "cos, sin, positions: expected all three or none, got some of them"),
    ({"sin": ROPE["sin"]}, "cos, sin, positions: expected all three or none, got some of them"),
    (ROPE | {"cos": torch.ones(50, 8).half()}, "cos: expected torch.float32, got torch.float16"),
    (ROPE | {"sin": torch.ones(50, 9)}, "sin: expected shape [50, 8] (as cos), got [50, 9]"),
    (ROPE | {"cos": torch.ones(50, 17), "sin": torch.ones(50, 17)}, "cos: expected at most d / 2 = 16 columns, got 17"),
    (ROPE | {"positions": torch.tensor([0, 1, 50])}, f"{POSITIONS} 50 at index 2; nothing was written"),
    (ROPE | {"positions": torch.tensor([-1, 1, 2])}, f"{POSITIONS} -1 at index 0"),
    (ROPE | {"positions": int32(0, 1, 2)}, "positions: expected torch.int64, got torch.int32"),
    ({"nonfinite": torch.zeros(1)}, "nonfinite: expected torch.int64, got torch.float32"),
    ({"nonfinite": torch.zeros(2).long()}, "nonfinite: expected shape [1], got [2]"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD_APPENDS, ids=range(len(BAD_APPENDS)))
def test_append_kv(changes: dict[str, Any], message: str) -> None:
    batch = make()
    before = twin(batch.pages)
    with fails(message):
        foldkv.append_kv(*(append_arguments(batch) | changes).values())
    assert all(torch.equal(mine, old) for mine, old in zip(pools(batch.pages), pools(before), strict=True))


def test_append_kv_takes_the_arguments_that_the_errors_start_from() -> None:
    """Also: a position is not looked at where its slot is skipped."""
    batch = make()
    foldkv.append_kv(*(append_arguments(batch) | ROPE).values())


# --- plan -------------------------------------------------------------------------------------------------------------

BAD_PLANS: list[tuple[dict[str, Any], str]] = [
    ({"seq_lens": int32(5, -2)}, "seq_lens: expected lengths >= 0, got -2 at index 1"),
    ({"seq_lens": torch.tensor([5, 5])}, "seq_lens: expected torch.int32, got torch.int64"),
    ({"seq_lens": int32(5, 5)[:, None]}, "seq_lens: expected shape [*] (batch), got [2, 1]"),
    ({"cu_seqlens_q": int32(0, 1)}, "cu_seqlens_q: expected shape [3] (batch + 1), got [2]"),
    ({"cu_seqlens_q": int32(0, 3, 2)}, "cu_seqlens_q: expected numbers that do not fall, got 2 after 3"),
    ({"cu_seqlens_q": int32(1, 2, 3)}, "cu_seqlens_q: expected 0 first, got 1"),
    ({"seq_starts": int32(0)}, "seq_starts: expected shape [2] (batch), got [1]"),
    ({"plan": torch.zeros(10).int()}, "plan: expected shape ["),
    ({"plan": torch.zeros(1000)}, "plan: expected torch.int32, got torch.float32"),
    ({"chunk_size": 128}, "chunk_size: expected 256, got 128"),
    ({"tile_q": 0}, "plan limits: expected those of a quant.plan.Capacity, got tile_q 0"),
    ({"max_items": 3}, "plan limits: expected those of a quant.plan.Capacity, got tile_q 8"),
    ({"kv_heads": 0}, "plan limits: expected those of a quant.plan.Capacity, got tile_q 8"),
    (
        {"cu_seqlens_q": int32(0, 1, 4000)},
        "plan: expected at most 40 query tiles of 8 tokens (Capacity.max_batch and max_q_tokens), "
        "got 4000 query tokens in 2 sequences; plan with a larger Capacity",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD_PLANS, ids=range(len(BAD_PLANS)))
def test_plan(changes: dict[str, Any], message: str) -> None:
    plan = Plan(Source(SPECS["c8"]).capacity())
    arguments: dict[str, Any] = {
        "seq_lens": int32(5, 300), "cu_seqlens_q": int32(0, 1, 2), "seq_starts": None, "plan": plan.buffer,
        "window_left": -1, **plan.capacity.limits._asdict(),
    }  # fmt: skip
    foldkv.plan(*arguments.values())
    before = plan.buffer.clone()
    with fails(message):
        foldkv.plan(*(arguments | changes).values())
    assert torch.equal(plan.buffer, before)


# --- merge ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3, 32), torch.zeros(2, 3, 2)), "o: expected shape [*, *, *, *] (parts, tokens, h, d), got [2, 3, 32]"),
        ((torch.zeros(2, 3, 2, 20), torch.zeros(2, 3, 2)), "o: expected a head_dim that is a multiple of 16 up to 512, got 20"),
        ((torch.zeros(2, 3, 2, 32), torch.zeros(2, 3, 4)), "lse: expected shape [2, 3, 2] (parts, tokens, h), got [2, 3, 4]"),
        ((torch.zeros(2, 3, 2, 32), torch.zeros(2, 3, 2).half()), "lse: expected torch.float32, got torch.float16"),
        ((torch.zeros(2, 3, 2, 32).double(), torch.zeros(2, 3, 2)), f"o: {FLOATS} torch.float64"),
        ((torch.zeros(2, 3, 2, 64)[..., :32], torch.zeros(2, 3, 2)), "o: expected a contiguous tensor, got shape [2, "),
    ],
    ids=range(6),
)  # fmt: skip
def test_merge(arguments: tuple[Tensor, Tensor], message: str) -> None:
    with fails(message):
        ops.merge(*arguments)


# --- the Python side --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LayerPages.empty(MODES["c8"], 4, 16, 2, 20), "head_dim: expected a multiple of 16 up to 512, got 20"),
        (lambda: LayerPages.empty(MODES["c8"], 4, 16, 2, 528), "head_dim: expected a multiple of 16 up to 512, got 528"),
        (lambda: LayerPages.empty(MODES["c8"], 4, 20, 2, 64), "page_size: expected one of 16, 32, 64, 128, got 20"),
        (lambda: Capacity(0, 1, 1, 1, 1, 1, 64, 16), "Capacity.max_batch: expected at least 1, got 0"),
        (lambda: Capacity(1, 1, 1, 1, 7, 2, 64, 16), "query heads: expected a multiple of the 2 kv heads, got 7"),
        (lambda: Capacity(1, 1, 1, 1, 2, 2, 64, 16, chunk_size=100), "Capacity.chunk_size: expected 256, got 100"),
        (lambda: Format("int3", "token"), "codec: expected one of fp32, fp16, bf16, int8, int4, got 'int3'"),
        (lambda: Format("int8"), "Format.scaling of codec int8: expected 'head', 'channel' or 'token', got 'none'"),
        (lambda: Format("fp16", "token"), "Format.scaling of codec fp16: expected 'none', got 'token'"),
        (lambda: Format("int8", "row"), "Format.scaling: expected one of none, head, channel, token, got 'row'"),
        (lambda: Format("int8", "head", rotate=True), "Format: expected center, balance and rotate only with scaling='token'"),
        (lambda: Format("int8", "head", clip=0.0), "Format.clip: expected a fraction in (0, 2], got 0.0"),
        (lambda: resolve_mode("c5"), "mode: expected one of c32, c16, c8,"),
    ],
    ids=range(13),
)  # fmt: skip
def test_descriptions(build: Callable[[], object], message: str) -> None:
    with fails(message, ArgumentError):
        build()


def test_params_must_be_usable() -> None:
    fmt = MODES["c8"].k
    paged = PagedTensor.empty(fmt, 1, 16, 2, 32, "cpu")
    before = paged.params.clone()
    with fails("params: expected shape (5, 2, 32), got (5, 2, 16)", ArgumentError):
        paged.set_params(identity_params(fmt, 2, 16))
    for row, value in ((0, 0.0), (0, float("nan")), (1, float("inf")), (3, -1.0)):
        params = identity_params(fmt, 2, 32)
        params[row, 1, 3] = value
        with fails("params: expected finite values, scale and balance > 0", ArgumentError):
            paged.set_params(params)
    assert torch.equal(paged.params, before)


def test_shaping_must_be_usable() -> None:
    paged = PagedTensor.empty(MODES["c4r"].k, 1, 16, 2, 32, "cpu")
    assert paged.shaping is not None
    paged.set_shaping(EYE)
    address = paged.shaping.data_ptr()
    with fails("shaping: expected torch.int8 of shape (2, 32, 32), got torch.int8 of shape (2, 32, 16)", ArgumentError):
        paged.set_shaping(EYE[..., :16])
    with fails("shaping: expected torch.int8 of shape (2, 32, 32), got torch.float32 of shape", ArgumentError):
        paged.set_shaping(EYE.float())
    for row, column, value in ((1, 2, 5), (3, 3, -1)):
        shaping = EYE.clone()
        shaping[1, row, column] = value
        with fails("shaping: expected symmetric matrices, diagonal >= 0, got others; calibrate", ArgumentError):
            paged.set_shaping(shaping)
    assert torch.equal(paged.shaping, EYE)
    paged.set_shaping(None)
    assert not paged.shaping.any() and paged.shaping.data_ptr() == address
    for fmt, d in ((MODES["c8"].k, 32), (MODES["c4"].k, 32), (MODES["c16"].k, 32), (MODES["c4r"].k, 512)):
        plain = PagedTensor.empty(fmt, 1, 16, 2, d, "cpu")
        plain.set_shaping(None)
        assert plain.shaping is None
        with fails(f"shaping: expected None for {fmt}, got shape (2, 32, 32)", ArgumentError):
            plain.set_shaping(EYE)


def test_no_shaping_of_large_heads() -> None:
    pages = LayerPages.empty(MODES["c4r"], 1, 16, 1, 512)
    x, shaping = torch.randn(1, 1, 512), torch.zeros(1, 512, 512, dtype=torch.int8)
    arguments = [
        x, x, pages.k.codes, pages.v.codes, pages.k.meta, pages.v.meta, pages.k.params, pages.v.params, shaping, None,
        torch.tensor([0]), None, None, None, False, None, pages.k.fmt.code, pages.v.fmt.code, 16,
    ]  # fmt: skip
    with fails("k_shaping: expected none for a head_dim above 256, got head_dim 512"):
        foldkv.append_kv(*arguments)
