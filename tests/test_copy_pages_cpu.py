"""foldkv::copy_pages on the CPU; tests/gpu has the same for the GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quant import backend, fallback, ops

copy_pages = torch.ops.foldkv.copy_pages
compiled = pytest.mark.skipif(not backend.has_kernels("cpu", "copy_pages"), reason="the extension is not built")


def make_pool(num_pages: int = 6, h_kv: int = 2, page_bytes: int = 48) -> Tensor:
    return torch.randint(0, 256, (num_pages, h_kv, page_bytes), dtype=torch.uint8)


@pytest.mark.parametrize(("src", "dst"), [([0, 3], [5, 1]), ([2, 2, 2], [0, 1, 5]), ([], []), ([0], [5])])
@pytest.mark.parametrize("page_bytes", [1, 17, 48, 4096])
def test_same_bytes_as_the_fallback(src: list[int], dst: list[int], page_bytes: int) -> None:
    pool = make_pool(page_bytes=page_bytes)
    want = pool.clone()
    ids = torch.tensor(src, dtype=torch.int64), torch.tensor(dst, dtype=torch.int64)
    fallback.OPS["copy_pages"](want, *ids)
    copy_pages(pool, *ids)
    assert torch.equal(pool, want)


def test_passes_opcheck() -> None:
    assert "copy_pages" in ops.SCHEMAS
    torch.library.opcheck(copy_pages, (make_pool(), torch.tensor([0, 3]), torch.tensor([5, 1])))


@compiled
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pool, src, dst: (pool.float(), src, dst), "pool: expected torch.uint8, got torch.float32"),
        (lambda pool, src, dst: (pool[0], src, dst), r"pool: expected shape \[\*, \*, \*\] \(num_pages, h_kv, page_bytes\)"),
        (lambda pool, src, dst: (pool[:, :1], src, dst), r"pool: expected a contiguous tensor, .* \[96, 48, 1\]"),
        (lambda pool, src, dst: (pool, src.int(), dst), "src: expected torch.int64, got torch.int32"),
        (lambda pool, src, dst: (pool, src[None], dst), r"src: expected shape \[\*\] \(n\), got \[1, 2\]"),
        (lambda pool, src, dst: (pool, src, dst[:1]), r"dst: expected shape \[2\] \(as src\), got \[1\]"),
        (lambda pool, src, dst: (pool, src + 4, dst), r"src: expected page ids in 0 \.\. 5, got 7 at index 1"),
        (lambda pool, src, dst: (pool, src, dst - 2), r"dst: expected page ids in 0 \.\. 5, got -1 at index 1"),
        (lambda pool, src, dst: (pool, src, src), "src: expected pages that dst does not name, got page 0 in both"),
        (lambda pool, src, dst: (pool, src, dst * 0 + 4), "dst: expected each page once, got page 4 twice"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named_and_nothing_is_written(
    change: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]], message: str
) -> None:
    pool = make_pool()
    before = pool.clone()
    arguments = change(pool, torch.tensor([0, 3]), torch.tensor([5, 1]))
    with pytest.raises(RuntimeError, match=f"^foldkv: copy_pages {message}"):
        copy_pages(*arguments)
    assert torch.equal(pool, before)
