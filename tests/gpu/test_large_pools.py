"""Offsets past 2**31 and 2**32 bytes, in pools that only a GPU has room for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ops_helpers import make_batch, pools

from quant import ops

from .helpers import cuda_only, make_source, same_bits

pytestmark = [pytest.mark.gpu, cuda_only]


@pytest.mark.parametrize(("mode", "num_pages"), [("c16", 9300), ("c8d", 18500), ("c4r", 37000)])
def test_pools_past_4_gib(mode: str, num_pages: int) -> None:
    """The same sequences in the first pages and in the last ones: same bytes, same bits, and nothing between them."""
    source = make_source(mode, 16, 2, 128, 128)
    sequences = [source.sequence(1000, 3), source.sequence(300, 1)]
    near = make_batch(source, sequences, spare_pages=0)
    used = near.pages.num_pages
    page_bytes = sum(pool[0].numel() for pool in pools(near.pages))
    if torch.cuda.mem_get_info()[0] < 1.5 * page_bytes * num_pages:
        pytest.skip("expected room for a large pool, got too little free memory")
    pages = source.pages(num_pages)
    assert pages.k.codes.numel() > 4.5 * 2**30
    shift = num_pages - used
    table = torch.where(near.block_table < used, near.block_table + shift, near.block_table)
    far = replace(near, pages=pages, block_table=table)
    for b, one in enumerate(sequences):
        ops.append_kv(pages, one.k, one.v, far.slots(b))
    for pool, small in zip(pools(pages), pools(near.pages), strict=True):
        if pool.numel():
            assert torch.equal(pool[shift:], small)
            assert bool((pool[:shift].view(-1).view(torch.int64) == -1).all())
    assert same_bits(far.attend(), near.attend())
