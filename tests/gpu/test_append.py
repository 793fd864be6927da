"""foldkv::append_kv on a GPU: the bytes of the reference, in the slots asked for and nowhere else."""

from __future__ import annotations

import itertools

import pytest
import torch
from ops_helpers import (
    DTYPES,
    FORMATS,
    SPECS,
    Source,
    calibrated,
    check_idempotent,
    odd_rows,
    params_for,
    poisoned,
    pools,
    same_bytes,
    strided,
    twin,
)
from torch import Tensor

from quant import ops, reference
from quant.pages import LayerPages, identity_params
from quant.spec import PAGE_SIZES, KVSpec

from .helpers import DEVICE, capture, cuda_only

pytestmark = pytest.mark.gpu

NAMES = list(FORMATS)
HEAD_DIMS = (64, 96, 128, 256, 80, 16)
# Every format with every head_dim; dtype, page size and the format of V take turns.
CASES = [
    (NAMES[i], NAMES[(i + 5 + j) % len(NAMES)], d, DTYPES[(i + j) % 3], PAGE_SIZES[(i + 2 * j) % 4])
    for (i, _), (j, d) in itertools.product(enumerate(NAMES), enumerate(HEAD_DIMS))
]


def rows(tokens: int, h_kv: int, d: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows whose channels have means and widths of their own."""
    return (torch.randn(tokens, h_kv, d) * (torch.rand(h_kv, d) + 0.1) + 2 * torch.randn(h_kv, d)).to(dtype)


def make(spec: KVSpec, k: Tensor, v: Tensor, page_size: int = 16, num_pages: int = 4) -> tuple[LayerPages, LayerPages]:
    """A poisoned cache on the device with params fitted to the rows, and its twin on the CPU."""
    want = poisoned(LayerPages.empty(spec, num_pages, page_size, *k.shape[1:]))
    calibrated(want, params_for(spec.k, k), params_for(spec.v, v))
    return twin(want, DEVICE), want


def on_device(*tensors: Tensor) -> list[Tensor]:
    """The tensors on the device; rows as views with gaps."""
    return [strided(x.to(DEVICE)) if x.dim() == 3 else x.to(DEVICE) for x in tensors]


def shuffled_slots(tokens: int, pages: LayerPages) -> Tensor:
    """Random slots, one in ten of them skipped."""
    slots = torch.randperm(pages.num_pages * pages.page_size)[:tokens]
    slots[::10] = -1 - slots[::10]
    return slots


@pytest.mark.parametrize(("k_name", "v_name", "d", "dtype", "page_size"), CASES)
def test_same_bytes_as_the_reference(k_name: str, v_name: str, d: int, dtype: torch.dtype, page_size: int) -> None:
    k, v = rows(57, 3, d, dtype), rows(57, 3, d, dtype)
    mine, want = make(KVSpec(FORMATS[k_name], FORMATS[v_name]), k, v, page_size)
    slots = shuffled_slots(57, want)
    ops.append_kv(mine, *on_device(k, v, slots))
    reference.append_kv(want, k, v, slots)
    assert same_bytes(mine, want)


@pytest.mark.parametrize("tokens", [0, 1, 2, 5000])
@pytest.mark.parametrize("mode", ["c16", "c8", "c8d", "k8v4", "c4r"])
def test_any_number_of_tokens(mode: str, tokens: int) -> None:
    k, v = rows(max(tokens, 9), 8, 128, torch.float16), rows(max(tokens, 9), 8, 128, torch.float16)
    mine, want = make(SPECS[mode], k, v, 64, num_pages=80)
    k, v, slots = k[:tokens], v[:tokens], shuffled_slots(tokens, want)
    ops.append_kv(mine, *on_device(k, v, slots))
    reference.append_kv(want, k, v, slots)
    assert same_bytes(mine, want)


@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "interleaved"])
@pytest.mark.parametrize(("d", "rot"), [(64, 64), (128, 128), (96, 32), (80, 18), (256, 64), (16, 2)])
@pytest.mark.parametrize("mode", ["c32", "c16", "c8d", "c4r", "c8"])
def test_rope_before_quantisation(mode: str, d: int, rot: int, interleaved: bool) -> None:
    dtype = DTYPES[(d // 16 + interleaved) % 3]
    k, v = rows(23, 2, d, dtype), rows(23, 2, d, dtype)
    position, angle = torch.randperm(200)[:23], torch.rand(200, rot // 2) * 6
    cos, sin = angle.cos(), angle.sin()
    mine, want = make(SPECS[mode], k, v, 32)
    slots = shuffled_slots(23, want)
    turn = {"cos": cos.to(DEVICE), "sin": sin.to(DEVICE), "positions": position.to(DEVICE), "interleaved": interleaved}
    ops.append_kv(mine, *on_device(k, v, slots), **turn)
    reference.append_kv(want, reference.apply_rope(k, cos, sin, position, interleaved), v, slots)
    assert same_bytes(mine, want)


@pytest.mark.parametrize("name", FORMATS)
def test_numbers_that_are_not_finite(name: str) -> None:
    k, v = rows(9, 2, 64), rows(9, 2, 64)
    mine, want = make(KVSpec(FORMATS[name], FORMATS[name]), k, v)
    nan, inf = float("nan"), float("inf")
    k[0, 0, :3] = torch.tensor([nan, inf, -inf])
    k[1], v[2, 1] = nan, inf
    v[3, 0, 63] = -inf
    v[4] = 3e38
    v[5, :, ::2], v[5, :, 1::2] = -3.4e38, 3.4e38
    k[8, 1, 7] = nan  # in a skipped row
    slots = torch.tensor([*range(8), -1])
    nonfinite = torch.tensor([100], device=DEVICE)
    for _ in range(2):
        ops.append_kv(mine, *on_device(k, v, slots), nonfinite=nonfinite)
    reference.append_kv(want, k, v, slots)
    assert same_bytes(mine, want)
    assert nonfinite.item() == 100 + 2 * (3 + 2 * 64 + 64 + 1)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("d", [64, 96])
def test_constant_tiny_and_huge_rows(name: str, d: int) -> None:
    """Rows of one value, zeros, subnormal numbers, and magnitudes from the least to the greatest."""
    spec = KVSpec(FORMATS[name], FORMATS[name])
    sample = rows(30, 1, d)
    values = torch.tensor([0.0, -0.0, 1.0, -3.3, 1e-45, -1e-40, 1.2e-38, 65504.0, 7e4, 3.4e38, -1e-5])
    k = values[:, None, None].expand(-1, 1, d)
    v = torch.randn(11, 1, d) * 10.0 ** torch.arange(-44, 33, 7)[:, None, None]
    mine, want = make(spec, sample, sample)
    slots = torch.arange(11)
    ops.append_kv(mine, *on_device(k, v, slots))
    reference.append_kv(want, k, v, slots)
    assert same_bytes(mine, want)


@pytest.mark.parametrize("name", FORMATS)
def test_ties_go_to_the_even_code(name: str) -> None:
    fmt = FORMATS[name]
    x = (torch.arange(32)[:, None] * 0.5 + torch.arange(32) * 0.25 - 7).repeat(1, 2)[:, None]
    mine, want = make(KVSpec(fmt, fmt), x, x)
    slots = torch.arange(32)
    ops.append_kv(mine, *on_device(x, x, slots))
    reference.append_kv(want, x, x, slots)
    assert same_bytes(mine, want)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("d", [16, 80, 128, 512])
def test_odd_rows(name: str, d: int) -> None:
    fmt, sample = FORMATS[name], rows(30, 1, d)
    k, v = odd_rows(d)[:, None], odd_rows(d).flip(-1)[:, None]
    mine, want = make(KVSpec(fmt, fmt), sample, sample)
    for part in (mine.k, mine.v, want.k, want.v):
        if fmt.is_dynamic:
            part.set_params(identity_params(fmt, 1, d))
    slots = torch.randperm(64)[: len(k)]
    ops.append_kv(mine, *on_device(k, v, slots))
    reference.append_kv(want, k, v, slots)
    assert same_bytes(mine, want)


@pytest.mark.parametrize("mode", SPECS)
def test_appends_are_idempotent(mode: str) -> None:
    check_idempotent(Source(SPECS[mode], d=96, device=DEVICE), torch.randperm(64)[:40].to(DEVICE))


@pytest.mark.parametrize("name", FORMATS)
def test_only_the_bytes_of_the_slots_change(name: str) -> None:
    k, v = rows(6, 3, 48), rows(6, 3, 48)
    pages, _ = make(KVSpec(FORMATS[name], FORMATS[name]), k, v)
    for pool in pools(pages):
        pool.random_(0, 256)
    before = twin(pages)
    slots = torch.tensor([5, -1, 63, 16, -7, 31])
    ops.append_kv(pages, *on_device(k, v, slots))
    written = torch.zeros(4, 3, 16, dtype=torch.bool)
    kept = slots[slots >= 0]
    written[kept // 16, :, kept % 16] = True
    for pool, old in zip(pools(pages), pools(before), strict=True):
        tokens, old_tokens = (x.cpu().view(4, 3, 16, -1) for x in (pool, old))
        assert torch.equal(tokens[~written], old_tokens[~written])
        if pool.numel():
            assert (tokens != old_tokens).any(-1)[written].float().mean() > 0.9


@cuda_only
@pytest.mark.parametrize("mode", ["c16", "c8d", "c4r"])
def test_slots_past_the_pool_are_skipped(mode: str) -> None:
    """The host cannot look at them without waiting for the device."""
    k, v = rows(6, 2, 64), rows(6, 2, 64)
    mine, want = make(SPECS[mode], k, v)
    slots = torch.tensor([3, 64, 2**31, 2**40, 63, 2**62])
    ops.append_kv(mine, *on_device(k, v, slots))
    kept = torch.tensor([0, 4])
    reference.append_kv(want, k[kept], v[kept], slots[kept])
    assert same_bytes(mine, want)


@pytest.mark.parametrize("mode", ["c16", "c8", "c8d", "k8v4", "c4r"])
def test_a_captured_graph_appends_other_rows_to_other_slots(mode: str) -> None:
    k, v = rows(16, 2, 128, torch.bfloat16), rows(16, 2, 128, torch.bfloat16)
    mine, want = make(SPECS[mode], k, v)
    buffers = [x.to(DEVICE) for x in (k, v, torch.full((16,), -1))]
    replay = capture(lambda: ops.append_kv(mine, *buffers))
    assert same_bytes(mine, want)
    for tokens in (0, 1, 16, 5):
        k, v = rows(16, 2, 128, torch.bfloat16), rows(16, 2, 128, torch.bfloat16)
        slots = torch.randperm(64)[:16]
        slots[tokens:] = -1
        for buffer, x in zip(buffers, (k, v, slots), strict=True):
            buffer.copy_(x)
        replay()
        reference.append_kv(want, k, v, slots)
        assert same_bytes(mine, want)
