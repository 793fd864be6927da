"""foldkv::copy_pages on a GPU: the op that proves the way from nvcc to a captured graph."""

from __future__ import annotations

import pytest
import torch

from quant import backend, ops

from .helpers import cuda_only

pytestmark = [pytest.mark.gpu, cuda_only]

copy_pages = torch.ops.foldkv.copy_pages


def make_pool(num_pages: int, h_kv: int, page_bytes: int, device: str = "cuda") -> torch.Tensor:
    return torch.randint(0, 256, (num_pages, h_kv, page_bytes), dtype=torch.uint8, device=device)


def make_ids(num_pages: int, n: int, device: str = "cuda") -> tuple[torch.Tensor, torch.Tensor]:
    """n source pages, repeats allowed, and n other pages to write."""
    order = torch.randperm(num_pages)
    dst, rest = order[:n], order[n:]
    return rest[torch.randint(0, len(rest), (n,))].to(device), dst.to(device)


def test_the_kernel_is_compiled() -> None:
    assert "copy_pages" in ops.SCHEMAS
    assert backend.has_kernels("cuda", "copy_pages"), backend.EXTENSION_ERROR


@pytest.mark.parametrize(
    ("num_pages", "h_kv", "page_bytes", "n"),
    [(2, 1, 16, 1), (9, 3, 48, 4), (64, 8, 8192, 31), (40, 2, 16 * 1025, 20), (5000, 1, 512, 2000), (4, 2, 64, 0)],
)
def test_same_bytes_as_pytorch(num_pages: int, h_kv: int, page_bytes: int, n: int) -> None:
    pool = make_pool(num_pages, h_kv, page_bytes)
    src, dst = make_ids(num_pages, n)
    want = pool.clone()
    want[dst] = want[src]
    copy_pages(pool, src, dst)
    assert torch.equal(pool, want)


def test_pages_past_4_gib() -> None:
    """Offsets are 64-bit: page 4500 of 1 MiB lies past 2**32 bytes."""
    pool = torch.zeros(4600, 1, 1 << 20, dtype=torch.uint8, device="cuda")
    pool[4500] = 7
    copy_pages(pool, torch.tensor([4500], device="cuda"), torch.tensor([4599], device="cuda"))
    assert bool((pool[4599] == 7).all())
    assert not pool[:4500].any()


def test_ids_out_of_range_are_skipped() -> None:
    pool = make_pool(6, 2, 64)
    want = pool.clone()
    want[5] = want[0]
    src = torch.tensor([-1, 0, 6, 1, 2**40], device="cuda")
    dst = torch.tensor([3, 5, 4, -7, 2], device="cuda")
    copy_pages(pool, src, dst)
    assert torch.equal(pool, want)


def test_follows_the_current_stream() -> None:
    """On a side stream the copy waits for what was queued there; on another stream it would be overwritten."""
    pool = make_pool(64, 8, 4096)
    contents = make_pool(64, 8, 4096)
    src, dst = make_ids(64, 16)
    want = contents.clone()
    want[dst] = want[src]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        pool.copy_(contents)
        copy_pages(pool, src, dst)
    side.synchronize()
    assert torch.equal(pool, want)


def test_does_not_wait_for_the_device() -> None:
    pool = make_pool(64, 8, 4096)
    src, dst = make_ids(64, 16)
    copy_pages(pool, src, dst)
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)
    done = torch.cuda.Event()
    copy_pages(pool, src, dst)
    done.record()
    assert not done.query(), "the op returned only after the device was idle"
    with torch.cuda.device(0):
        torch.cuda.set_sync_debug_mode("error")
        try:
            copy_pages(pool, src, dst)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


def test_a_captured_graph_replays_with_other_ids_and_contents() -> None:
    num_pages, n = 128, 40
    pool = make_pool(num_pages, 4, 2048)
    src = torch.full((n,), -1, device="cuda")
    dst = torch.full((n,), -1, device="cuda")
    copy_pages(pool, src, dst)  # loads the kernel before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    before = pool.clone()
    with torch.cuda.graph(graph):
        copy_pages(pool, src, dst)
    torch.cuda.synchronize()
    assert torch.equal(pool, before), "captured, not run"
    for used in (0, 1, 7, n):
        new_src, new_dst = make_ids(num_pages, used)
        src.fill_(-1)
        dst.fill_(-1)
        src[:used].copy_(new_src)
        dst[:used].copy_(new_dst)
        pool.copy_(make_pool(num_pages, 4, 2048))
        want = pool.clone()
        want[new_dst] = want[new_src]
        graph.replay()
        assert torch.equal(pool, want), f"{used} pairs"


def test_under_torch_compile() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def copy_then_read(pool: torch.Tensor, src: torch.Tensor, dst: torch.Tensor) -> torch.Tensor:
        copy_pages(pool, src, dst)
        return pool.index_select(0, dst[:1])[0] + 0

    pool = make_pool(16, 2, 64)
    src, dst = make_ids(16, 4)
    want = pool[src[0]].clone()
    assert torch.equal(copy_then_read(pool, src, dst), want)


def test_works_from_a_new_thread() -> None:
    """A thread without a CUDA context of its own launches on the tensor's device."""
    from concurrent.futures import ThreadPoolExecutor

    device = f"cuda:{torch.cuda.device_count() - 1}"
    pool = make_pool(8, 2, 64, device)
    src, dst = make_ids(8, 3, device)
    want = pool.clone()
    want[dst] = want[src]
    with ThreadPoolExecutor(1) as threads:
        threads.submit(copy_pages, pool, src, dst).result()
    torch.cuda.synchronize(device)
    assert torch.equal(pool, want)


def test_bad_arguments_are_named() -> None:
    pool = make_pool(4, 2, 64)
    ids = torch.tensor([0], device="cuda")
    other = torch.tensor([1], device="cuda")
    odd = torch.zeros(4, 2, 17, dtype=torch.uint8, device="cuda")
    with pytest.raises(RuntimeError, match="src: expected cuda:0 as pool, got cpu"):
        copy_pages(pool, ids.cpu(), other)
    with pytest.raises(RuntimeError, match="multiple of 16 bytes, got 34"):
        copy_pages(odd, ids, other)
    shifted = torch.zeros(4 * 2 * 64 + 1, dtype=torch.uint8, device="cuda")[1:].view(4, 2, 64)
    with pytest.raises(RuntimeError, match="16-byte aligned"):
        copy_pages(shifted, ids, other)
