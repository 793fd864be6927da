"""Gram matrices of a calibration: what an error in a row of K or V meets, channel by channel. Kept and written in fp16."""

from __future__ import annotations

import torch
from torch import Tensor


def normalised(gram: Tensor) -> Tensor:
    """fp32 `[h_kv, d, d]` on the CPU of Gram matrices of any scale: symmetric, mean diagonal 1 a head, values that fp16 holds.

    A head of zeros stays one.
    """
    gram = gram.cpu().double()
    power = gram.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
    gram = gram / torch.where(power > 0, power, torch.ones_like(power))
    return ((gram + gram.transpose(1, 2)) / 2).half().float()


def pack(gram: Tensor) -> Tensor:
    """The upper triangles, row by row, fp16 `[h_kv, d (d + 1) / 2]`."""
    rows, columns = torch.triu_indices(gram.shape[1], gram.shape[1])
    return gram[:, rows, columns].half()


def unpack(packed: Tensor, head_dim: int) -> Tensor:
    """fp32 `[h_kv, d, d]` of upper triangles; inverse of `pack`."""
    rows, columns = torch.triu_indices(head_dim, head_dim)
    gram = torch.empty(len(packed), head_dim, head_dim)
    gram[:, rows, columns] = gram[:, columns, rows] = packed.float()
    return gram


def packed_size(head_dim: int) -> int:
    """Numbers of a packed triangle."""
    return head_dim * (head_dim + 1) // 2
