"""The bytes of every format, pinned: `tests/golden/format_v1.json`. The reference and the compiled ops must both give them.

The input is made of integers by a formula, so nothing here depends on a random generator. A change of a format needs a new
version and a new file; `python tests/test_golden.py` writes one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ops_helpers import FORMATS
from torch import Tensor

from quant import ops, reference
from quant.pages import BALANCE, MEAN, QUERY, SCALE, ZERO, LayerPages, identity_params
from quant.spec import Format, KVSpec

GOLDEN = Path(__file__).parent / "golden" / "format_v1.json"
NUM_PAGES, PAGE, H_KV, D, TOKENS = 3, 16, 2, 48, 20
# Every format, and what one that steers gives under a direction of queries.
STEERED = "int4.channel.asym, steered"
SHAPED = {f"{name}, shaped": FORMATS[name] for name in FORMATS if FORMATS[name].shapes_rounding}
CASES = {**FORMATS, STEERED: FORMATS["int4.channel.asym"], **SHAPED}

Append = Callable[[LayerPages, Tensor, Tensor, Tensor], None]


def golden_rows() -> Tensor:
    """fp32 `[tokens, h_kv, d]`: multiples of 1/16 in [-8, 8], one row of zeros, one constant row."""
    t, h, c = torch.meshgrid(torch.arange(TOKENS), torch.arange(H_KV), torch.arange(D), indexing="ij")
    x = ((t * 7919 + h * 104729 + c * c * 31 + t * c * 17) % 257 - 128).float() / 16
    x[3], x[4] = 0.0, -2.5
    return x


def golden_params(fmt: Format, steered: bool) -> Tensor:
    params = identity_params(fmt, H_KV, D)
    c = torch.arange(D).float().expand(H_KV, D)
    if fmt.is_static:
        params[SCALE] = (c % 5 + 3) * (0.25 if fmt.element.bits == 4 else 0.015625)
        if not fmt.symmetric:
            params[ZERO] = fmt.element.mid_code + (c % 7 - 3) / 4
    if steered:
        params[QUERY] = (c * 37 % 101 - 50) * 10
    if fmt.center:
        params[MEAN] = (c % 9 - 4) / 8
    if fmt.balance:
        params[BALANCE] = (c % 3 + 2) / 4
    return params


def golden_shaping() -> Tensor:
    """int8 `[h_kv, d, d]`: of head 0 a matrix of rank 4 and a diagonal, of head 1 zeros."""
    c, r = torch.meshgrid(torch.arange(D), torch.arange(4), indexing="ij")
    part = (c * c * 3 + c * r * 5 + r) % 7 - 3
    shaping = torch.zeros(H_KV, D, D, dtype=torch.int8)
    shaping[0] = (part @ part.T + torch.diag(20 + torch.arange(D) % 5)).to(torch.int8)
    return shaping


def stored(name: str, append: Append) -> dict[str, str]:
    """What the pools of a cache of one case hold after the golden rows went in, backwards, into pages 0 and 2."""
    fmt = CASES[name]
    pages = LayerPages.empty(KVSpec(fmt, fmt), NUM_PAGES, PAGE, H_KV, D)
    for part in (pages.k, pages.v):
        part.set_params(golden_params(fmt, name == STEERED))
        part.set_shaping(golden_shaping() if name in SHAPED else None)
    x = golden_rows()
    slots = torch.tensor([t if t < PAGE else PAGE + t for t in range(TOKENS)])
    append(pages, x, x.flip(0).contiguous(), slots.flip(0))
    assert torch.equal(pages.k.codes[1], torch.zeros_like(pages.k.codes[1]))
    tiles = pages.k.codes.view(NUM_PAGES, H_KV, PAGE, -1), pages.k.meta.view(NUM_PAGES, H_KV, PAGE, fmt.meta_bytes)
    return {
        "token19_head0": tiles[0][0, 0, 0].numpy().tobytes().hex(),
        "meta_head0": tiles[1][0, 0].numpy().tobytes().hex(),
        "k_codes_sha256": hashlib.sha256(pages.k.codes.numpy().tobytes()).hexdigest(),
        "k_meta_sha256": hashlib.sha256(pages.k.meta.numpy().tobytes()).hexdigest(),
        "v_codes_sha256": hashlib.sha256(pages.v.codes.numpy().tobytes()).hexdigest(),
    }


@pytest.mark.parametrize("append", [reference.append_kv, ops.append_kv], ids=["reference", "op"])
@pytest.mark.parametrize("name", CASES)
def test_golden_bytes(name: str, append: Append) -> None:
    assert stored(name, append) == json.loads(GOLDEN.read_text())[name]


def test_golden_covers_every_format() -> None:
    assert list(json.loads(GOLDEN.read_text())) == list(CASES)


@pytest.mark.parametrize("append", [reference.append_kv, ops.append_kv], ids=["reference", "op"])
def test_worked_example(append: Append) -> None:
    """The row that docs/format.md works through by hand: int4, dynamic, asymmetric, d = 16."""
    fmt = Format("int4", "token", symmetric=False)
    x = torch.tensor([-1.0, 2.75, 0.0, 0.5, 1.0, -0.25, 2.0, 0.125, 0.3, 1.6, -0.9, 2.6, 0.875, -0.625, 1.25, 0.2])
    pages = LayerPages.empty(KVSpec(fmt, fmt), 1, 16, 1, 16)
    append(pages, x.view(1, 1, 16), x.view(1, 1, 16), torch.tensor([5]))
    # Units of 3.75 / 480; the finer grid from 15: step 3.75 / 16 times 440387 / 435765 = bf16 3e73, zero = (128 - 15) / 30
    assert pages.k.codes[0, 0, 5 * 8 : 6 * 8].tolist() == list(bytes.fromhex("f064384cb5f01859"))
    assert pages.k.meta[0, 0, 5 * 4 : 6 * 4].tolist() == list(bytes.fromhex("733e8943"))
    table = torch.tensor([0, 0])
    values = reference.read(pages.k, 16, table, 6)[5, 0]
    codes = torch.tensor([0, 15, 4, 6, 8, 3, 12, 4, 5, 11, 0, 15, 8, 1, 9, 5])
    assert torch.equal(values, (codes - 3.767578125) * 0.2373046875)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({name: stored(name, reference.append_kv) for name in CASES}, indent=1) + "\n")
