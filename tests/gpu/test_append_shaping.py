"""Shaped rounding on a GPU: the bytes that the CPU writes, whatever the matrix."""

from __future__ import annotations

import itertools

import pytest
import torch
from ops_helpers import DTYPES, SPECS, params_for, poisoned, same_bytes, strided, twin
from torch import Tensor

from quant import ops, reference
from quant.pages import LayerPages
from quant.spec import Format, KVSpec

from .helpers import DEVICE, capture

pytestmark = pytest.mark.gpu

MODES = ("c4r", "k8v4", "c4", "c8d")
HEAD_DIMS = (64, 96, 128, 256)


def symmetric(x: Tensor) -> Tensor:
    return x.triu() + x.triu(1).transpose(-1, -2)


def gram(h_kv: int, d: int) -> Tensor:
    """As calibrations give them: of vectors with few strong directions."""
    x = torch.randn(h_kv, d, d) * torch.linspace(0.1, 2, d)
    cost = x.transpose(1, 2) @ x / d + 0.2 * torch.eye(d)
    return (cost / cost.abs().amax((1, 2), keepdim=True) * 127).round()


def noise(h_kv: int, d: int) -> Tensor:
    """Any numbers at all."""
    x = symmetric(torch.randint(-127, 128, (h_kv, d, d)).float())
    x.diagonal(dim1=1, dim2=2).copy_(torch.randint(1, 128, (h_kv, d)))
    return x


def ties(h_kv: int, d: int) -> Tensor:
    x = symmetric(torch.randint(-1, 2, (h_kv, d, d)).float())
    x.diagonal(dim1=1, dim2=2).fill_(1.0)
    return x


def slides(h_kv: int, d: int) -> Tensor:
    """The first channels cost nothing themselves and pull at others: their codes go many steps, to the ends."""
    x, first = noise(h_kv, d), d // 4
    x[:, :first], x[:, :, :first] = 0.0, 0.0
    pairs = torch.arange(first)
    x[:, pairs, pairs + d // 2] = x[:, pairs + d // 2, pairs] = 127.0
    x[:, pairs, pairs] = 1.0
    return x


KINDS = {"gram": gram, "noise": noise, "ties": ties, "slides": slides}


def rows(tokens: int, h_kv: int, d: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(tokens, h_kv, d) * (torch.rand(h_kv, d) + 0.1) + 0.5 * torch.randn(h_kv, d)).to(dtype)


def make(spec: KVSpec, h_kv: int, d: int, kind: str, num_pages: int = 25) -> tuple[LayerPages, LayerPages]:
    """A poisoned cache on the device, K and V with matrices of their own, the last head's zero, and its twin on the CPU."""
    want = poisoned(LayerPages.empty(spec, num_pages, 16, h_kv, d))
    for part in (want.k, want.v):
        part.set_params(params_for(part.fmt, rows(50, h_kv, d)))
        if part.shaping is not None:
            shaping = KINDS[kind](h_kv, d).to(torch.int8)
            shaping[max(1, h_kv - 1) :] = 0
            part.set_shaping(shaping)
    return twin(want, DEVICE), want


def append_both(mine: LayerPages, want: LayerPages, k: Tensor, v: Tensor, slots: Tensor) -> None:
    ops.append_kv(mine, *(strided(x.to(DEVICE)) for x in (k, v)), slots.to(DEVICE))
    ops.append_kv(want, k, v, slots)


def shuffled_slots(tokens: int) -> Tensor:
    slots = torch.randperm(400)[:tokens]
    slots[5::10] = -1
    return slots


@pytest.mark.parametrize("tokens", [1, 7, 300])
@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("mode", MODES)
def test_same_bytes_as_on_the_cpu(mode: str, d: int, tokens: int) -> None:
    kind, dtype = list(KINDS)[(tokens + d // 32) % 4], DTYPES[(tokens + d // 16) % 3]
    mine, want = make(SPECS[mode], 3, d, kind)
    append_both(mine, want, rows(tokens, 3, d, dtype), rows(tokens, 3, d, dtype), shuffled_slots(tokens))
    assert same_bytes(mine, want)


@pytest.mark.parametrize(("kind", "d"), list(itertools.product(KINDS, (16, 80, 128, 144, 192, 256))))
def test_every_kind_of_matrix_and_odd_head_dims(kind: str, d: int) -> None:
    for fmt in (Format("int4", "token", symmetric=False), Format("int8", "token", symmetric=False, rotate=True)):
        mine, want = make(KVSpec(fmt, SPECS["c4r"].v), 2, d, kind)
        append_both(mine, want, rows(60, 2, d), rows(60, 2, d), shuffled_slots(60))
        assert same_bytes(mine, want)


@pytest.mark.parametrize("d", [64, 128, 256])
def test_the_reference_agrees_and_codes_do_move(d: int) -> None:
    mine, want = make(SPECS["c4r"], 2, d, "gram")
    plain = twin(mine)
    for part in (plain.k, plain.v):
        part.set_shaping(None)
    k, v, slots = rows(40, 2, d), rows(40, 2, d), torch.arange(40)
    for pages in (mine, plain):
        ops.append_kv(pages, k.to(DEVICE), v.to(DEVICE), slots.to(DEVICE))
    reference.append_kv(want, k, v, slots)
    assert same_bytes(mine, want)
    for part, other in ((mine.k, plain.k), (mine.v, plain.v)):
        moved = (part.codes != other.codes).view(25, 2, 16, -1).any(-1).permute(1, 0, 2).reshape(2, -1)[:, :40]
        assert moved[0].float().mean() > 0.9 and not moved[1].any()


@pytest.mark.parametrize("mode", MODES)
def test_without_a_matrix_rows_round_as_ever(mode: str) -> None:
    mine, _ = make(SPECS[mode], 2, 128, "gram")
    k, v, slots = (x.to(DEVICE) for x in (rows(90, 2, 128), rows(90, 2, 128), torch.arange(90)))
    zeros, none = twin(mine), twin(mine)
    for part in (zeros.k, zeros.v):
        part.set_shaping(None)
    for part in (none.k, none.v):
        part.shaping = None
    for pages in (zeros, none):
        ops.append_kv(pages, k, v, slots)
    assert same_bytes(zeros, none)


@pytest.mark.parametrize("d", [64, 128, 256])
def test_many_tokens(d: int) -> None:
    """More than a block takes at once."""
    mine, want = make(SPECS["c4r"], 2, d, "gram", num_pages=600)
    tokens = 9000
    append_both(mine, want, rows(tokens, 2, d), rows(tokens, 2, d), torch.randperm(9600)[:tokens])
    assert same_bytes(mine, want)


@pytest.mark.parametrize("name", ["int4", "fp16", "int8"])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_beside_a_side_that_is_not_shaped(name: str, d: int) -> None:
    """A static K: of 4 bits it is steered, by a direction of its own."""
    fmt = Format("fp16") if name == "fp16" else Format(name, "channel", symmetric=False)
    mine, want = make(KVSpec(fmt, SPECS["c4r"].v), 3, d, "gram")
    assert (mine.k.shaping is None) and mine.v.shaping is not None
    append_both(mine, want, rows(70, 3, d), rows(70, 3, d), shuffled_slots(70))
    assert same_bytes(mine, want)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_leave_the_ends_and_come_back(kind: str) -> None:
    """Few channels, all of them near the least or the greatest: in many rows some code goes to and fro."""
    fmt = Format("int4", "token", symmetric=False)
    mine, want = make(KVSpec(fmt, fmt), 3, 16, kind)
    k, v = (x.sign() * (1 + 0.08 * torch.rand_like(x)) for x in (rows(390, 3, 16), rows(390, 3, 16)))
    append_both(mine, want, k, v, torch.randperm(400)[:390])
    assert same_bytes(mine, want)


@pytest.mark.parametrize("mode", ["c4r", "c8d"])
def test_odd_rows_are_shaped_or_not_as_on_the_cpu(mode: str) -> None:
    """One sign, one value, tiny, huge, not finite."""
    mine, want = make(SPECS[mode], 2, 64, "noise")
    x = rows(12, 2, 64)
    x[0], x[1], x[2], x[3] = 0.0, 3.0, x[2].abs() + 1, -x[3].abs() - 1
    x[4] *= 1e-40
    x[5] *= 1e37
    x[6, :, 3], x[7, 0], x[8, :, ::2] = float("inf"), float("nan"), -float("inf")
    append_both(mine, want, x, x.flip(0), torch.arange(12))
    assert same_bytes(mine, want)


def test_a_captured_graph_sees_another_matrix() -> None:
    mine, want = make(SPECS["c4r"], 2, 128, "gram")
    k, v, slots = rows(16, 2, 128), rows(16, 2, 128), torch.arange(16)
    slots[9:] = -1
    buffers = [x.to(DEVICE) for x in (k, v, slots)]
    replay = capture(lambda: ops.append_kv(mine, *buffers))
    for kind in ("noise", "gram", "slides"):
        for part, other in ((mine.k, want.k), (mine.v, want.v)):
            shaping = KINDS[kind](2, 128).to(torch.int8)
            part.set_shaping(shaping.to(DEVICE))
            other.set_shaping(shaping)
        replay()
        ops.append_kv(want, k, v, slots)
        assert same_bytes(mine, want)
