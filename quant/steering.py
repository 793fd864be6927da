"""Steered rounding of static 4-bit rows: codes chosen together, so that a key's scores err less.

Fixed point: positions are whole 64ths of a code and sums are of whole numbers, so any device gives the same codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Entries of a direction are whole numbers up to this magnitude; all zero: rows round plainly.
MAX_DIRECTION = 511

_UNITS = 64.0
# Positions are kept this many codes around the grid, which bounds every sum.
_LEAST_PLACE, _MOST_PLACE = -8.0, 23.0
_MIDDLE = 7.5
# How much more than its share error along row and direction counts; 4 to 32 do as well (docs/log.md).
_WEIGHT = 8.0
_FLIPS = 4


def steered_codes(place: Tensor, direction: Tensor) -> Tensor:
    """Codes, fp32 `[tokens, h_kv, d]`, of 4-bit rows at `place` (fp32, in codes) under `direction` `[h_kv, d]`.

    A query's score with a stored key errs by query . error. Queries that look for a key lie along it, and all queries of a
    head share a mean; so, from the nearest codes on, up to four times the one code is moved to its other neighbour that
    lowers most

        |error|^2 + 8 (error . row)^2 / |row|^2 + 8 (error . direction)^2 / |direction|^2

    with the row taken about the grid's middle, in codes, and the direction the mean query times the scales. One code lower
    where the error is not negative, else one higher; the first channel of equals; none where nothing is lowered, counted in
    eighths. AdaRound (Nagel et al., 2020) chooses between the two neighbours of a weight by what a layer's inputs see; RaBitQ
    (Gao and Long, 2024) takes the error along a vector out by a factor, which a static row has no room for.
    """
    codes = torch.round(place).clamp(0.0, 15.0)
    aim = direction.round().clamp(-MAX_DIRECTION, MAX_DIRECTION).expand_as(codes)
    steered = (aim != 0).any(-1, keepdim=True)
    row = torch.round((place.clamp(_LEAST_PLACE, _MOST_PLACE) - _MIDDLE) * _UNITS)
    error = codes * _UNITS - _UNITS * _MIDDLE - row
    along_row, along_aim = _dot(error, row), _dot(error, aim)
    row_weight, aim_weight = _weight(row), _weight(aim)
    keep = row * row * row_weight + aim * aim * aim_weight
    channel = torch.arange(codes.shape[-1], device=codes.device)
    for _ in range(_FLIPS):
        step = torch.where(error < 0, 1.0, -1.0)
        row_pull = along_row.float() * row_weight * (2.0 / _UNITS)
        aim_pull = along_aim.float() * aim_weight * (2.0 / _UNITS)
        change = keep + (_UNITS - 2.0 * error.abs()) + step * (row * row_pull + aim * aim_pull)
        allowed = (codes + step >= 0) & (codes + step <= 15)
        rank = torch.where(allowed, torch.round(change * 8.0), torch.zeros_like(change)).to(torch.int64)
        key, first = (rank * 512 + channel).min(-1, keepdim=True)
        moved = torch.where((channel == first) & (key < 0) & steered, step, torch.zeros_like(step))
        codes, error = codes + moved, error + moved * _UNITS
        along_row, along_aim = along_row + _dot(moved * _UNITS, row), along_aim + _dot(moved * _UNITS, aim)
    return codes


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Exact sum of products of whole numbers over the last dimension, int64 `[..., 1]`."""
    return (a.to(torch.int64) * b.to(torch.int64)).sum(-1, keepdim=True)


def _weight(x: Tensor) -> Tensor:
    """What a flip's own part along `x` costs: 8 * 64 / |x|^2, fp32 `[..., 1]`."""
    square = _dot(x, x).clamp(min=1).float()
    return torch.full_like(square, _WEIGHT * _UNITS) / square


__all__ = ["MAX_DIRECTION", "steered_codes"]
