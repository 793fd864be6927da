"""foldkv::append_kv: the bytes of the reference, in the slots asked for and nowhere else."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops_helpers import (
    DTYPES,
    FORMATS,
    HEAD_DIMS,
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

NAMES = list(FORMATS)
# Every format with every head_dim; dtype, page size and the format of V take turns.
CASES = [
    (NAMES[i], NAMES[(i + 5 + j) % len(NAMES)], d, DTYPES[(i + j) % 3], PAGE_SIZES[(i + 2 * j) % 4])
    for (i, _), (j, d) in itertools.product(enumerate(NAMES), enumerate(HEAD_DIMS))
]


def make(spec: KVSpec, k: Tensor, v: Tensor, page_size: int, num_pages: int = 4) -> LayerPages:
    """A poisoned cache with params fitted to the rows."""
    pages = poisoned(LayerPages.empty(spec, num_pages, page_size, *k.shape[1:]))
    return calibrated(pages, params_for(spec.k, k), params_for(spec.v, v))


def rows(tokens: int, h_kv: int, d: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows whose channels have means and widths of their own."""
    return (torch.randn(tokens, h_kv, d) * (torch.rand(h_kv, d) + 0.1) + 2 * torch.randn(h_kv, d)).to(dtype)


def shuffled_slots(tokens: int, pages: LayerPages) -> Tensor:
    return torch.randperm(pages.num_pages * pages.page_size)[:tokens]


@pytest.mark.parametrize(("k_name", "v_name", "d", "dtype", "page_size"), CASES)
def test_same_bytes_as_the_reference(k_name: str, v_name: str, d: int, dtype: torch.dtype, page_size: int) -> None:
    k, v = rows(37, 2, d, dtype), rows(37, 2, d, dtype)
    mine = make(KVSpec(FORMATS[k_name], FORMATS[v_name]), k, v, page_size)
    want, before = twin(mine), twin(mine)
    slots = shuffled_slots(37, mine)
    ops.append_kv(mine, strided(k), strided(v), slots)
    reference.append_kv(want, k, v, slots)
    assert same_bytes(mine, want)
    assert not same_bytes(mine, before)


@given(
    tokens=st.integers(0, 20), h_kv=st.integers(1, 5), d=st.sampled_from(HEAD_DIMS), page_size=st.sampled_from(PAGE_SIZES),
    k_name=st.sampled_from(NAMES), v_name=st.sampled_from(NAMES), dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 2),
    layout=st.permutations(range(2)), magnitude=st.sampled_from([1e-3, 1.0, 1e3]), seed=st.integers(0, 2**16),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_shape_and_stride(
    tokens: int, h_kv: int, d: int, page_size: int, k_name: str, v_name: str, dtypes: tuple[torch.dtype, torch.dtype],
    layout: list[int], magnitude: float, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    sizes = [tokens, h_kv]
    k, v = (
        (torch.randn(sizes[layout[0]], sizes[layout[1]], d + 3) * magnitude)
        .to(dtype)[..., 1 : d + 1]
        .permute(*layout, 2)
        for dtype in dtypes
    )
    sample = torch.randn(20, h_kv, d) * magnitude
    mine = make(KVSpec(FORMATS[k_name], FORMATS[v_name]), sample, sample, page_size, num_pages=2)
    want = twin(mine)
    slots = shuffled_slots(tokens, mine)
    slots[torch.rand(tokens) < 0.2] = -1
    ops.append_kv(mine, k, v, slots)
    reference.append_kv(want, k, v, slots)
    assert same_bytes(mine, want)


@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "interleaved"])
@pytest.mark.parametrize(("d", "rot"), [(64, 64), (96, 32), (80, 18), (16, 2)])
@pytest.mark.parametrize("mode", ["c32", "c8d", "c4r", "c8"])
def test_rope_before_quantisation(mode: str, d: int, rot: int, interleaved: bool) -> None:
    dtype = DTYPES[(d // 16) % 3]
    k, v = rows(23, 2, d, dtype), rows(23, 2, d, dtype)
    position = torch.randperm(200)[:23]
    angle = torch.rand(200, rot // 2) * 6
    cos, sin = angle.cos(), angle.sin()
    mine = make(SPECS[mode], k, v, 32)
    want = twin(mine)
    slots = shuffled_slots(23, mine)
    ops.append_kv(mine, strided(k), v, slots, cos=cos, sin=sin, positions=position, interleaved=interleaved)
    turned = reference.apply_rope(k, cos, sin, position, interleaved)
    reference.append_kv(want, turned, v, slots)
    assert same_bytes(mine, want)
    # The rotation itself, as complex numbers.
    pairs = turned[..., :rot].double()
    given_pairs = k[..., :rot].double()
    if interleaved:
        parts = [(x[..., 0::2], x[..., 1::2]) for x in (given_pairs, pairs)]
    else:
        parts = [x.split(rot // 2, dim=-1) for x in (given_pairs, pairs)]
    before, after = (torch.complex(*part) for part in parts)
    turn = torch.polar(torch.ones(200, rot // 2).double(), angle.double())[position][:, None]
    torch.testing.assert_close(after, before * turn, rtol=0, atol=1e-5)
    assert torch.equal(turned[..., rot:], k[..., rot:].float())


@pytest.mark.parametrize("mode", SPECS)
def test_appends_are_idempotent(mode: str) -> None:
    source = Source(SPECS[mode])
    check_idempotent(source, shuffled_slots(40, source.pages(4)))


@pytest.mark.parametrize("name", FORMATS)
def test_only_the_bytes_of_the_slots_change(name: str) -> None:
    spec = KVSpec(FORMATS[name], FORMATS[name])
    k, v = rows(6, 3, 48), rows(6, 3, 48)
    pages = make(spec, k, v, 16)
    for pool in pools(pages):
        pool.random_(0, 256)
    before = twin(pages)
    slots = torch.tensor([5, -1, 63, 16, -7, 31])
    ops.append_kv(pages, k, v, slots)
    written = torch.zeros(4, 3, 16, dtype=torch.bool)
    kept = slots[slots >= 0]
    written[kept // 16, :, kept % 16] = True
    for pool, old in zip(pools(pages), pools(before), strict=True):
        tokens, old_tokens = (x.view(4, 3, 16, -1) for x in (pool, old))
        assert torch.equal(tokens[~written], old_tokens[~written])
        if pool.numel():
            assert (tokens != old_tokens).any(-1)[written].float().mean() > 0.9
    ops.append_kv(before, k[:1], v[:1], torch.tensor([-1]))
    ops.append_kv(before, k[slots >= 0], v[slots >= 0], kept)
    assert same_bytes(pages, before)


@pytest.mark.parametrize("name", FORMATS)
def test_numbers_that_are_not_finite(name: str) -> None:
    k, v = rows(9, 2, 64), rows(9, 2, 64)
    pages = make(KVSpec(FORMATS[name], FORMATS[name]), k, v, 16)
    nan, inf = float("nan"), float("inf")
    k[0, 0, :3] = torch.tensor([nan, inf, -inf])
    k[1], v[2, 1] = nan, inf
    v[3, 0, 63] = -inf
    v[4] = 3e38
    v[5, :, ::2], v[5, :, 1::2] = -3.4e38, 3.4e38
    k[8, 1, 7] = nan  # in a skipped row
    want = twin(pages)
    slots = torch.tensor([*range(8), -1])
    nonfinite = torch.tensor([100])
    ops.append_kv(pages, k, v, slots, nonfinite=nonfinite)
    reference.append_kv(want, k, v, slots)
    assert same_bytes(pages, want)
    assert nonfinite.item() == 100 + 3 + 2 * 64 + 64 + 1
    table = torch.tensor([0], dtype=torch.int32)
    assert all(torch.isfinite(reference.read(part, 16, table, 8)).all() for part in (pages.k, pages.v))
    ops.append_kv(pages, k[6:8], v[6:8], slots[6:8], nonfinite=nonfinite)
    assert nonfinite.item() == 100 + 3 + 2 * 64 + 64 + 1


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("d", [16, 80, 128, 512])
def test_odd_rows(name: str, d: int) -> None:
    fmt, sample = FORMATS[name], rows(30, 1, d)
    k, v = odd_rows(d)[:, None], odd_rows(d).flip(-1)[:, None]
    mine = make(KVSpec(fmt, fmt), sample, sample, 16)
    for part in (mine.k, mine.v):
        if fmt.is_dynamic:
            part.set_params(identity_params(fmt, 1, d))
    want = twin(mine)
    slots = shuffled_slots(len(k), mine)
    ops.append_kv(mine, k, v, slots)
    reference.append_kv(want, k, v, slots)
    assert same_bytes(mine, want)


def test_no_tokens_may_have_any_strides() -> None:
    source = Source(SPECS["c8d"])
    pages = source.pages(4)
    before = twin(pages)
    empty = torch.empty(0, *pages.k.params.shape[:0:-1]).transpose(1, 2)
    assert empty.shape[1:] == pages.k.params.shape[1:] and empty.stride(-1) != 1
    ops.append_kv(pages, empty, empty, torch.empty(0, dtype=torch.int64))
    assert same_bytes(pages, before)


def test_the_sign_of_a_zero_does_not_matter() -> None:
    """The least element of a row may be +0 and -0 at once: the stored zero point must not tell which came first."""
    k = rows(8, 2, 48).abs()
    k[:, :, ::3], k[:, :, 1::3] = 0.0, -0.0
    fmt = FORMATS["int4.token.asym"]
    mine = make(KVSpec(fmt, fmt), k, k, 16)
    flipped, want = twin(mine), twin(mine)
    slots = shuffled_slots(8, mine)
    ops.append_kv(mine, k, k, slots)
    ops.append_kv(flipped, torch.where(k == 0, -k, k), k.abs(), slots)
    reference.append_kv(want, k, k, slots)
    assert same_bytes(mine, flipped) and same_bytes(mine, want)
