"""Other kernels on the same work: FlashInfer's where it is installed, and PyTorch's as a floor."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant.errors import FoldkvError

from .cuda_cases import Workload, copies_for

WORKSPACE_BYTES = 512 << 20
SDPA_MAX_BYTES = 3 << 30


class PeerUnavailableError(FoldkvError):
    """A peer that is not installed, or that does not do this work."""


@dataclass(frozen=True)
class PeerCase:
    """A peer ready to run: `call(i)` does one step on cache i of `copies`."""

    call: Callable[[int], object]
    copies: int


@dataclass(frozen=True)
class Peer:
    """A peer by name; `bits` of a cached element; `make` raises PeerUnavailableError where it cannot serve."""

    name: str
    bits: int
    make: Callable[[Workload, torch.device], PeerCase]


def peers() -> list[Peer]:
    """Every peer that the benchmark knows, installed or not."""
    return [
        Peer("FlashInfer fa2 fp16", 16, _flashinfer_fa2),
        Peer("FlashInfer XQA bf16", 16, lambda work, device: _xqa(work, device, torch.bfloat16)),
        Peer("FlashInfer XQA e4m3", 8, lambda work, device: _xqa(work, device, torch.float8_e4m3fn)),
        Peer("FlashInfer XQA int8", 8, lambda work, device: _xqa(work, device, torch.int8)),
        Peer("torch SDPA fp16", 16, _sdpa),
    ]


def _flashinfer(module: str, device: torch.device) -> Any:
    if device.type != "cuda":
        raise PeerUnavailableError("FlashInfer: needs a GPU")
    try:
        ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)  # its modules use the driver and do not name it
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise PeerUnavailableError(f"FlashInfer: not installed here ({error})") from error


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normal numbers of any dtype (int8: of standard deviation 40), in parts so that no large fp16 copy is needed."""
    out = torch.empty(shape, dtype=dtype, device=device)
    scale = 40.0 if dtype == torch.int8 else 1.0
    for part in out.view(-1).split(1 << 28):
        part.copy_(torch.randn(part.shape, dtype=torch.float16, device=device).mul_(scale))
    return out


def _paged_pools(work: Workload, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """K and V `[copies, pages, page_size, h_kv, d]`."""
    copies = copies_for(work.kv_bytes(8.0 * dtype.itemsize), device)
    shape = (copies, sum(work.page_counts), work.page_size, work.h_kv, work.head_dim)
    return _random(shape, dtype, device), _random(shape, dtype, device)


def _flashinfer_fa2(work: Workload, device: torch.device) -> PeerCase:
    """The tensor-core kernels of FlashInfer's fa2 backend: decode, or prefill where there are more new tokens."""
    flashinfer = _flashinfer("flashinfer", device)
    k, v = _paged_pools(work, torch.float16, device)
    q = torch.randn(work.q_tokens, work.h_q, work.head_dim, dtype=torch.float16, device=device)
    out = torch.empty_like(q)

    def int32(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    counts = work.page_counts
    indptr = int32([sum(counts[:b]) for b in range(work.batch + 1)])
    indices = torch.randperm(sum(counts), device=device).int()
    last = int32([length - (count - 1) * work.page_size for length, count in zip(work.lengths, counts, strict=True)])
    space = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    heads = (work.h_q, work.h_kv, work.head_dim, work.page_size)
    if work.q_len == 1:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            space, "NHD", use_cuda_graph=True, use_tensor_cores=True, paged_kv_indptr_buffer=torch.empty_like(indptr),
            paged_kv_indices_buffer=torch.empty_like(indices), paged_kv_last_page_len_buffer=torch.empty_like(last),
            backend="fa2",
        )  # fmt: skip
        wrapper.plan(indptr, indices, last, *heads, q_data_type=torch.float16, kv_data_type=torch.float16)
    else:
        rows = int32([work.q_len * b for b in range(work.batch + 1)])
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(space, "NHD", backend="fa2")
        dtypes = {"q_data_type": torch.float16, "kv_data_type": torch.float16}
        wrapper.plan(rows, indptr, indices, last, *heads, causal=True, **dtypes)
    return PeerCase(lambda i: wrapper.run(q, (k[i], v[i]), out=out), len(k))


def _xqa(work: Workload, device: torch.device, dtype: torch.dtype) -> PeerCase:
    if work.q_len != 1:
        raise PeerUnavailableError("FlashInfer XQA: timed for one new token only")
    xqa = _flashinfer("flashinfer.xqa", device).xqa
    k, v = _paged_pools(work, dtype, device)
    q = torch.randn(work.batch, 1, work.h_q, work.head_dim, dtype=torch.bfloat16, device=device)
    out = torch.empty_like(q)
    counts = torch.tensor(work.page_counts)
    column = torch.arange(int(counts.max()))
    local = (counts.cumsum(0) - counts)[:, None] + column
    local = local.masked_fill(column >= counts[:, None], 0).to(device)
    table = torch.randperm(int(counts.sum()), device=device).int()[local].contiguous()
    seq_lens = torch.tensor(work.lengths, dtype=torch.int32, device=device).view(torch.uint32)[:, None]
    space = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    semaphores = torch.zeros(1 << 20, dtype=torch.int32, device=device).view(torch.uint32)
    sizes = {"num_kv_heads": work.h_kv, "page_size": work.page_size}
    scale = {"kv_scale": 1 / 40} if dtype == torch.int8 else {}
    return PeerCase(lambda i: xqa(q, k[i], v[i], table, seq_lens, out, space, semaphores, **sizes, **scale), len(k))


def _sdpa(work: Workload, device: torch.device) -> PeerCase:
    """What a model without a paged cache calls."""
    step_bytes = work.kv_bytes(16)
    if work.q_len != 1 or not work.is_uniform or step_bytes > SDPA_MAX_BYTES:
        raise PeerUnavailableError("torch SDPA: timed for one new token, equal lengths, and up to 3 GiB of K and V")
    copies = copies_for(step_bytes, device)
    shape = (copies, work.batch, work.h_kv, work.lengths[0], work.head_dim)
    k, v = _random(shape, torch.float16, device), _random(shape, torch.float16, device)
    q = torch.randn(work.batch, work.h_q, 1, work.head_dim, device=device).half()
    attention = torch.nn.functional.scaled_dot_product_attention
    return PeerCase(lambda i: attention(q, k[i], v[i], enable_gqa=True), copies)
