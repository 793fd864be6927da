"""How a runner comes to be: look at the model once, size the pool, make pools, plans and workspace."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from foldkv.hf.swap import KVSwap
from quant.cache import PagedKVCache
from quant.errors import PoolExhaustedError, UnsupportedModelError, describe

from .graphs import GraphRunner
from .memory import MemoryPlan, PoolSize, format_bytes, pool_size
from .runner import Runner
from .sampling import SORTED
from .state import Geometry, packed_capacity

# Of the memory that is free, what an engine that sizes its pool by itself leaves alone.
RESERVE = 0.04


def build_runner(
    swap: KVSwap,
    max_batch: int,
    max_seq_len: int,
    num_pages: int | None,
    memory: int | None,
    buckets: Sequence[int],
    max_tokens: int,
    graphs: bool | None,
    compile: bool | Mapping[str, Any],
) -> tuple[Runner, MemoryPlan]:
    """A runner with its pools made, and the plan of its memory.

    A dry run over one page tells the layers' heads, windows and head sizes, that the model's attention reaches the cache,
    and how much memory a forward pass takes beside it. Errors: UnsupportedModelError, PoolExhaustedError.
    """
    device = swap.model.device
    forbidden = check_rope(swap.model, max_seq_len)
    weights = sum(t.nbytes for t in (*swap.model.parameters(), *swap.model.buffers()))
    shapes, geometries, activations = _look(swap, min(max_tokens, max_batch * max_seq_len), max_batch)
    per_seq = -(-max_seq_len // swap.page_size)

    def workspace(pages: int) -> int:
        """Bytes of workspace and plans over a pool of `pages`."""
        capacities = [
            packed_capacity(
                device, one_each, geometry, max_batch=max_batch, max_seq_len=max_seq_len, num_pages=pages,
                page_size=swap.page_size, max_tokens=max_tokens,
            )
            for one_each in (True, False)
            for geometry in geometries
        ]  # fmt: skip
        return 4 * (max(c.workspace_floats for c in capacities) + sum(c.plan_ints for c in capacities))

    def size_of(**limit: int) -> PoolSize:
        return pool_size(shapes, swap.specs, swap.page_size, **limit)

    if memory is not None:
        size = size_of(memory=memory)
        size = size_of(num_pages=min(size.num_pages, max_batch * per_seq))
    else:
        size = size_of(num_pages=max_batch * per_seq if num_pages is None else num_pages)
        if num_pages is None and device.type == "cuda":
            free = _free_bytes(device) - activations - workspace(size.num_pages)
            size = min(size, size_of(memory=max(free, 0)), key=lambda each: each.num_pages)
    if device.type == "cuda":
        _check_fits(device, size, activations + workspace(size.num_pages))
    paged = PagedKVCache(max_batch, max_seq_len, num_pages=size.num_pages, page_size=swap.page_size, device=device)
    runner = Runner(swap, paged, buckets, max_tokens, GraphRunner(device, graphs, forbidden), compile)
    runner.state.prepare(geometries)
    runner.dry_run(2)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    tables = runner.rows.nbytes + paged.block_table.nbytes + paged.seq_lens.nbytes
    return runner, MemoryPlan(weights, size.nbytes, runner.state.plan_bytes, tables, activations)


def _look(swap: KVSwap, num_tokens: int, max_batch: int) -> tuple[list[tuple[int, int]], list[Geometry], int]:
    """Run the model over a pool of one page: (heads, head_dim) by layer, geometries, bytes of a forward pass."""
    device = swap.model.device
    on_gpu = device.type == "cuda"
    count = num_tokens if on_gpu else min(num_tokens, 2)
    paged = PagedKVCache(max_batch, max(count, 2), num_pages=1, page_size=swap.page_size, device=device)
    runner = Runner(swap, paged, [max_batch], count, GraphRunner(device, False))
    runner.dry_run(min(count, 2))
    activations = 0
    if on_gpu:
        activations = max(
            _peak(device, lambda: runner.dry_run(count)), _peak(device, lambda: runner.decode(max_batch, SORTED))
        )
    shapes = [(layer.h_kv, layer.head_dim) for layer in paged.layers]
    return shapes, runner.state.geometries, activations


def _peak(device: torch.device, step: Callable[[], object]) -> int:
    """Bytes that `step` allocates at the most at a time, on a GPU; called twice, as a first call loads kernels."""
    for _ in range(2):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _free_bytes(device: torch.device) -> int:
    """Bytes that PyTorch could still allocate, less a reserve for what graphs and libraries hold."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return int(free - RESERVE * total)


def _check_fits(device: torch.device, size: PoolSize, rest: int) -> None:
    """PoolExhaustedError by arithmetic, in place of an out-of-memory error half way."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    if size.nbytes + rest > free:
        got = f"{format_bytes(free)} free"
        fix = "give less memory, fewer pages, a smaller max_batch or max_seq_len, or a mode of fewer bits"
        wanted = f"{format_bytes(size.nbytes)} and {format_bytes(rest)} for workspace and activations"
        raise PoolExhaustedError(describe("memory of the cache", wanted, got, fix))


def check_rope(model: PreTrainedModel, max_seq_len: int) -> str:
    """Why the model's positions keep a step from being captured; "" if they do not.

    Errors: UnsupportedModelError where a sequence's positions would depend on how long others in its batch are.
    """
    text = model.config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or {}
    every = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    for one in every:
        kind = one.get("rope_type", "default")
        if kind not in ("dynamic", "longrope"):
            continue
        limit = one.get("original_max_position_embeddings") or text.max_position_embeddings
        if max_seq_len > limit:
            fix = "make the engine with a smaller max_seq_len, or use model.generate()"
            got = f"{max_seq_len} with {kind} positions, whose frequencies change there for the whole batch"
            raise UnsupportedModelError(describe("max_seq_len", f"at most {limit}", got, fix))
        return f"{kind} positions are worked out on the host at each step"
    return ""
