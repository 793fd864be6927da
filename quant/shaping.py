"""Shaped rounding of dynamic rows: codes chosen together, so that what is done with a row errs less.

All of it is whole numbers, sums of fewer than 2^24, so any device gives the same codes in any order of addition.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNITS = 32.0
"""Units of a code's step on a grid that was not searched; searched grids have 30 or 32 of their own."""

# Errors are cut to so many units: what a searched row reaches by itself.
_MOST_ERROR = 23.0
_FLIPS = 8
# Keys and channels are compared as one number.
_CHANNELS = 512


def shape_codes(codes: Tensor, error: Tensor, step: Tensor, shaping: Tensor, max_code: int) -> Tensor:
    """Codes, fp32 `[tokens, h_kv, d]`, that err less under `shaping` than the nearest ones `codes` (fp32, whole numbers).

    error: fp32 whole numbers, what each code stands for minus the true value, in units; at most 23 of them are counted. step:
    units of a code, fp32 `[tokens, h_kv, 1]` or `[1]`, 30 or 32. shaping: int8 `[h_kv, d, d]`, symmetric (`calib.derive` makes
    it); a head whose first element is 0 keeps its codes. d: at most 256.

    An error e of a stored key costs a query q (q . e)^2, so over many queries e' G e with G their Gram matrix; an error of a
    value costs that much behind the output projection, whose Gram matrix G then is. From the nearest codes on, up to eight
    times, the one code is moved by one that lowers e' G e most: greedy coordinate descent. The change of a move s = +-1 of
    code c is step (step G_cc + 2 s g_c) with g = G e, so only g is kept. The first channel of equals; none where nothing is
    lowered.

    GPTQ (Frantar et al., 2022), QuIP's LDLQ (Chee et al., 2023), AdaRound (Nagel et al., 2020) and CDQuant (Nair and Suggala,
    2024) choose the codes of weights by such a matrix, offline. Here a row of the cache is, as it is appended.
    """
    weigh = shaping.float()
    error = error.clamp(-_MOST_ERROR, _MOST_ERROR)
    slope = torch.einsum("thd,hde->the", error, weigh)
    own = step * weigh.diagonal(dim1=1, dim2=2)
    shaped = (shaping[:, :1, 0] != 0).expand(codes.shape)
    channel = torch.arange(codes.shape[-1], device=codes.device)
    heads = torch.arange(codes.shape[1], device=codes.device)
    for _ in range(_FLIPS):
        up = slope < 0
        allowed = torch.where(up, codes < max_code, codes > 0) & shaped
        change = torch.where(allowed, own - 2.0 * slope.abs(), torch.zeros_like(slope)).to(torch.int64)
        _, first = (change * _CHANNELS + channel).min(-1, keepdim=True)
        sign = torch.where(up.gather(-1, first), 1.0, -1.0)
        sign = torch.where(change.gather(-1, first) < 0, sign, torch.zeros_like(sign))
        codes = codes.scatter_add(-1, first, sign)
        slope = slope + sign * step * weigh[heads, first.squeeze(-1)]
    return codes


__all__ = ["UNITS", "shape_codes"]
