"""Formats, modes and byte layout: sizes, regions, names, codes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ops_helpers import FORMATS, SPECS, params_for, pools, twin
from torch import Tensor

from quant import fallback, ops, reference
from quant.codecs import codecs
from quant.errors import ArgumentError
from quant.layout import meta_page_bytes, page_bytes, row_bytes
from quant.pages import LayerPages
from quant.spec import (
    CONTROL_MODE,
    MODES,
    PAGE_SIZES,
    Format,
    KVSpec,
    LayerSpecs,
    parse_format,
    parse_modes,
    resolve_mode,
)

Append = Callable[[LayerPages, Tensor, Tensor, Tensor], None]
BITS_AT_128 = {
    "c32": 32, "c16": 16, "c8": 8, "c8h": 8, "c8d": 8.125, "k8v4": 6.125, "c4s": 4, "c4": 4.125, "c4r": 4.25,
    "c4d": 4.25, "c4x": 4,
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
def test_bits_per_element_are_what_the_pools_take(mode: str) -> None:
    spec = MODES[mode]
    assert spec.bits_per_element(128) == BITS_AT_128[mode]
    for d, page_size in ((128, 64), (48, 16)):
        pages = LayerPages.empty(spec, 5, page_size, 3, d)
        pool_bytes = sum(pool.nbytes for pool in pools(pages))
        assert pool_bytes * 8 == pytest.approx(2 * 5 * page_size * 3 * d * spec.bits_per_element(d), rel=1e-12)
        shaped = sum(fmt.shapes_rounding for fmt in (spec.k, spec.v))
        assert shaped == {"c8d": 2, "k8v4": 1, "c4": 1, "c4r": 2, "c4d": 2}.get(mode, 0)
        assert pages.nbytes == pool_bytes + 2 * 5 * 3 * d * 4 + shaped * 3 * d * d


def test_ids_of_codecs_never_change() -> None:
    """They are stored in files and passed to kernels."""
    found = {name: (one.id, one.bits, one.is_integer) for name, one in codecs().items()}
    assert found == {
        "fp32": (0, 32, False), "fp16": (1, 16, False), "bf16": (2, 16, False), "int8": (3, 8, True), "int4": (4, 4, True),
    }  # fmt: skip
    assert (codecs()["int4"].max_code, codecs()["int4"].mid_code) == (15, 8)


@pytest.mark.parametrize("name", FORMATS)
def test_codes_of_formats_say_what_a_kernel_must_know(name: str) -> None:
    fmt = FORMATS[name]
    back = fallback._format(fmt.code)
    assert (back.codec, back.is_dynamic, back.rotate, back.meta_bytes) == (
        fmt.codec, fmt.is_dynamic, fmt.rotate, fmt.meta_bytes,
    )  # fmt: skip
    assert back.code == fmt.code < 1 << 11


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("name", FORMATS)
def test_sizes_of_a_page(name: str, page_size: int) -> None:
    fmt = FORMATS[name]
    for d in (16, 96, 512):
        assert row_bytes(fmt, d) * 8 == d * fmt.element.bits
        assert page_bytes(fmt, d, page_size) == page_size * row_bytes(fmt, d)
        assert page_bytes(fmt, d, page_size) % 16 == 0  # tiles stay 16-byte aligned
    assert meta_page_bytes(fmt, page_size) == page_size * (0 if not fmt.is_dynamic else 2 if fmt.symmetric else 4)


@pytest.mark.parametrize("append", [reference.append_kv, ops.append_kv], ids=["reference", "op"])
@pytest.mark.parametrize("name", FORMATS)
def test_regions_of_tokens_are_disjoint(name: str, append: Append) -> None:
    """Whichever slot is written, the bytes that change lie in its own row of each head."""
    fmt = FORMATS[name]
    d, h_kv = 48, 2
    x = torch.randn(2, h_kv, d) * torch.tensor([1.0, 50.0])[:, None, None]
    pages = LayerPages.empty(KVSpec(fmt, fmt), 2, 16, h_kv, d)
    for part in (pages.k, pages.v):
        part.set_params(params_for(fmt, torch.randn(50, h_kv, d)))
        part.codes.random_(0, 256)
        part.meta.random_(0, 256)
    before = twin(pages)
    for slot in range(32):
        touched = [torch.zeros_like(pool, dtype=torch.bool) for pool in pools(pages)]
        for row in x[:, None]:
            append(pages, row, row, torch.tensor([slot]))
            for mask, pool, old in zip(touched, pools(pages), pools(before), strict=True):
                mask |= pool != old
        for mask, pool, old in zip(touched, pools(pages), pools(before), strict=True):
            pool.copy_(old)
            mine = mask.view(2, h_kv, 16, pool.shape[2] // 16)[slot // 16, :, slot % 16]
            assert mask.sum() == mine.sum()  # nobody else's byte
            assert not pool.numel() or mine.any(-1).all()


# --- modes ------------------------------------------------------------------------------------------------------------


def test_modes_are_what_the_design_says() -> None:
    assert str(MODES["c4"].k) == "int4.channel.asym.clip=0.8"
    assert str(MODES["c4"].v) == str(MODES["c4r"].k) == "int4.token.asym.center.balance.rotate"
    assert str(MODES["k8v4"].k) == str(MODES["c8"].v) == "int8.channel.asym"
    assert str(MODES["c8d"].k) == "int8.token.sym.center.balance.rotate"
    assert str(MODES[CONTROL_MODE].k) == "int4.head.sym"
    assert {name for name, spec in MODES.items() if spec.needs_scales} == {"c8", "c8h", "k8v4", "c4s", "c4", "c4x"}
    assert all(spec.name == name for name, spec in MODES.items())


def test_resolve_mode() -> None:
    assert resolve_mode("c16", "bf16") == KVSpec(Format("bf16"), Format("bf16"), "c16")
    assert resolve_mode("c8/c16", "bf16") == KVSpec(MODES["c8"].k, Format("bf16"), "c8/c16")
    assert resolve_mode(SPECS["c16b"]) is SPECS["c16b"]
    for wrong in ("c8/c4/c4", "", "c8/", "C8", "c8,c4"):
        with pytest.raises(ArgumentError, match=r"^mode: expected one of c32, c16, .* or 'K/V' of two of them, got "):
            resolve_mode(wrong)


def test_a_format_is_named_by_its_own_text() -> None:
    """Every format of the modes, and each combination of transforms, is read back; alone, as K or V, and per layer."""
    dynamic = [
        Format("int4", "token", symmetric=False, center=bool(n & 1), balance=bool(n & 2), rotate=bool(n & 4))
        for n in range(8)
    ]
    formats = [part for spec in MODES.values() for part in (spec.k, spec.v)] + dynamic
    assert all(parse_format(str(fmt)) == fmt for fmt in formats)
    assert resolve_mode("int4.token.asym.rotate/c8") == KVSpec(dynamic[4], MODES["c8"].v, "int4.token.asym.rotate/c8")
    specs = parse_modes("int4.token.asym.center,1-2:c4/int4.channel.asym.clip=0.8", 4)
    assert specs[0].k == specs[0].v == dynamic[1] and specs[2].v == MODES["c4"].k
    assert parse_modes(specs.name, 4) == specs
    for wrong, said in (
        ("int4.token.asym.rotate.center", "int4.token.asym.center.rotate"),  # another order
        ("int4.token.asym.spin", "form CODEC"),
        ("int4.channel.asym.rotate", "only with scaling='token'"),
        ("int5.token.sym", "codec"),
        ("int4.token.asym.clip=x", "could not convert"),
        ("int4.", "Format.scaling"),
    ):
        with pytest.raises(ArgumentError, match="format") as caught:
            resolve_mode(wrong)
        assert said in str(caught.value)


def test_parse_modes() -> None:
    specs = parse_modes("c4, 0:c8, 2-3:c16", 5)
    assert [specs[i].name for i in range(5)] == ["c8", "c4", "c16", "c16", "c4"]
    assert specs.name == "c4,0:c8,2:c16,3:c16" and specs.needs_scales
    assert parse_modes(specs.name, 5) == specs
    assert parse_modes({"default": "c16", "1": "c8", 2: MODES["c4"]}, 5)[1] == MODES["c8"]
    assert parse_modes(MODES["c8"], 2) == LayerSpecs(MODES["c8"])
    assert not parse_modes("c8d", 1).needs_scales
    with pytest.raises(ArgumentError, match=r"layer of a per-layer mode: expected 0 \.\. 4, got 5"):
        parse_modes("c4,5:c8", 5)
    for wrong in ("c4,c8", "c4,a:c8", "c4,:c8", "c4,1-b:c8"):
        with pytest.raises(ArgumentError, match="per-layer mode: expected 'LAYER:MODE' or 'FIRST-LAST:MODE', got "):
            parse_modes(wrong, 5)
