"""Every kernel on small shapes, for compute-sanitizer: see sanitize.sh. A program of its own, as pytest only adds time.

Workspaces and outputs are fresh memory, so that a read of what nobody wrote is seen. Plans are zeros: an attention block asks
for its worker's entry before it knows how many there are, and leaves it unused where it lies past the table.
"""

from __future__ import annotations

import torch
from ops_helpers import SPECS, Batch, Source, make_ragged
from torch import Tensor

from quant import ops

from .helpers import DEVICE, ON_GPU

MODES = ("c16", "c8d", "c4r", "k8v4")
# decode, speculative decode, and prefill over several tiles and pages; sequences that are empty or not asked for
BATCHES = (
    [(600, 1), (0, 1), (17, 1)],
    [(300, 5), (3, 5), (33, 16), (40, 0)],
    [(330, 130), (19, 19)],
)
# Several groups of chunks: by one worker, and by more than one for each chunk.
LONG = [(9000, 1), (2500, 2)], (1, 60)


def attend(batch: Batch, workers: int, window: int) -> tuple[Tensor, Tensor]:
    """The op on memory that holds nothing yet."""
    plan = batch.plan(window, num_workers=workers, max_seq_len=16384, total_tokens=32768)
    plan.buffer, plan.workspace = torch.zeros_like(plan.buffer), torch.empty_like(plan.workspace)
    plan.update(batch.seq_lens, batch.cu_seqlens_q)
    tensors = (batch.block_table, batch.seq_lens, batch.cu_seqlens_q)
    options = {"window_size": (window, 0), "softcap": 20.0 * (window >= 0)}
    out, lse = ops.append_attention(batch.pages, batch.q, *tensors, plan, return_lse=True, **options)
    want, _ = batch.truth(**options)
    error = float((out.double() - want).norm() / want.norm())
    if not error < 0.01:
        raise SystemExit(f"sanitize: expected an error below 0.01, got {error} for {batch.source.spec.name}")
    return out, lse


def append(source: Source) -> None:
    """Rows with RoPE and skipped slots, and a count of what is not finite."""
    pages, one = source.pages(4), source.sequence(21, 0)
    angle = torch.rand(64, source.d // 2, device=DEVICE)
    slots = torch.arange(21, device=DEVICE)
    slots[::4] = -1
    one.k[3, 0, 5] = float("nan")
    nonfinite, positions = torch.zeros(1, dtype=torch.int64, device=DEVICE), torch.arange(21, device=DEVICE)
    turn = {"cos": angle.cos(), "sin": angle.sin(), "positions": positions}
    ops.append_kv(pages, one.k, one.v, slots, nonfinite=nonfinite, **turn)


def main() -> None:
    torch.manual_seed(0)
    for i, mode in enumerate(MODES):
        for d in (64, 128):
            source = Source(SPECS[mode], 2, 4, d, (16, 64)[(i + d // 64) % 2], torch.float16, DEVICE)
            append(source)
            for j, lengths in enumerate(BATCHES):
                out, lse = attend(make_ragged(source, lengths, spare_rows=2), (3, 40)[j % 2], -1 if j else 100)
        lengths, workers = LONG
        attend(make_ragged(source, lengths), workers[i % 2], -1)
    ops.merge(torch.stack((out, -out, out)), torch.stack((lse, lse + 1, torch.full_like(lse, -torch.inf))))
    if ON_GPU:
        torch.cuda.synchronize()
    print("sanitize: all kernels ran")


if __name__ == "__main__":
    main()
