"""Byte sizes and offsets of a page, mirror of `csrc/core/layout.h` (see `docs/format.md`).

A pool is `[num_pages, h_kv, page_bytes]` uint8: inside a page the heads lie one after another, inside a (page, head) tile
the tokens, inside a token row the channels in order, little end first: with 4 bits the even channel takes the low nibble.
Dynamic scale data has a pool of its own, `[num_pages, h_kv, page_size * meta_bytes]`: per token a bf16 scale, then, where
the format is asymmetric, an fp16 zero.
"""

from __future__ import annotations

from .spec import MAX_SHAPED_DIM, Format


def row_bytes(fmt: Format, head_dim: int) -> int:
    """Bytes of the codes of one token of one head."""
    return head_dim * fmt.element.bits // 8


def page_bytes(fmt: Format, head_dim: int, page_size: int) -> int:
    """Bytes of the codes of one (page, head) tile."""
    return page_size * row_bytes(fmt, head_dim)


def meta_page_bytes(fmt: Format, page_size: int) -> int:
    """Bytes of the dynamic scale data of one (page, head) tile; 0 for static and float formats."""
    return page_size * fmt.meta_bytes


def shaping_bytes(fmt: Format, h_kv: int, head_dim: int) -> int:
    """Bytes of what a tensor's rows are shaped by (`quant.shaping`); 0 where they are not."""
    return h_kv * head_dim * head_dim if fmt.shapes_rounding and head_dim <= MAX_SHAPED_DIM else 0
