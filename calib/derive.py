"""From statistics to the parameters of a format: static scale and zero point, mean, balance, what rows are shaped by."""

from __future__ import annotations

import torch
from torch import Tensor

from quant.errors import ArgumentError, describe
from quant.pages import BALANCE, MEAN, QUERY, SCALE, ZERO, identity_params
from quant.reference import hadamard
from quant.scales import KVScales, StaticScale, TensorStats
from quant.spec import MAX_SHAPED_DIM, Format, KVSpec
from quant.steering import MAX_DIRECTION

# A channel's balance stays within this factor of its head's median: a channel that hardly moved or hardly mattered
# during calibration may do either later.
MAX_BALANCE = 16.0
# A channel's variance to this power and its weight to that of what is left of a half make the balance: a quarter each, where
# codes are rounded alone; where K's are chosen together, an error goes to where queries do not look, whatever the balance,
# and the range of a row counts for more.
_POWER, _SHAPED_POWER = 0.25, 0.33
# Part of the identity in what rows are shaped by: text may look where the calibration's did not.
_DAMPING = 0.1
_MOST_SHAPING = 127
# Static ranges are widened by this factor where codes are plenty: 5 % coarser steps cost less than the rare values past
# the calibrated range. At 4 bits they cost more; there `Format.clip` decides.
HEAD_ROOM_8BIT = 1.05
# A static step is at least this part of the largest magnitude: finer codes would drown in the rounding of fp32.
_FINEST_STEP = 2.0**-16
# Smaller magnitudes count as zero: their steps would be denormal.
_TINY = 2.0**-100


def layer_params(
    scales: KVScales, layer_idx: int, spec: KVSpec, head_room: float | None = None
) -> tuple[Tensor, Tensor]:
    """Parameters fp32 `[5, h_kv, d]` (rows of `quant.pages`) of K and of V of one layer.

    head_room: widens static ranges by this factor, for text longer or stranger than what was calibrated on; default
        `HEAD_ROOM_8BIT` from 8 bits on, 1 below.
    Errors: ScaleFileError for a layer without statistics, ArgumentError for a head_room that is not positive.
    """
    layer = scales[layer_idx]
    return tensor_params(layer.k, spec.k, head_room), tensor_params(layer.v, spec.v, head_room)


def layer_shaping(scales: KVScales, layer_idx: int, spec: KVSpec) -> tuple[Tensor | None, Tensor | None]:
    """What rows of K and of V of one layer are shaped by (`quant.shaping`), int8 `[h_kv, d, d]`; None where they round plainly.

    They go with `layer_params` of the same scales and spec. Errors: ScaleFileError for a layer without statistics.
    """
    layer = scales[layer_idx]
    return tensor_shaping(layer.k, spec.k), tensor_shaping(layer.v, spec.v)


def tensor_shaping(stats: TensorStats, fmt: Format) -> Tensor | None:
    """The Gram matrix of `stats` in the basis of rows of `fmt`, int8 `[h_kv, d, d]`, its largest magnitude 127 a head.

    An error e of a balanced and rotated row is B R e of the value, R its own inverse: e costs e' R B G B R e. Of that, scaled
    to a mean diagonal of 1, a tenth of the identity is made part (GPTQ's damping, Frantar et al., 2022). A head whose Gram
    matrix is zero gets zeros. None for formats that do not shape, and where there is no Gram matrix.
    """
    if stats.gram is None or not _is_shaped(stats, fmt):
        return None
    cost = stats.gram.double()
    if fmt.balance:
        factor = channel_balance(stats, fmt).double()
        cost = cost * factor[:, :, None] * factor[:, None, :]
    if fmt.rotate:
        cost = hadamard(hadamard(cost).transpose(1, 2))
    cost = (cost + cost.transpose(1, 2)) / 2
    power = cost.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
    cost = cost / power.clamp(min=_TINY) + _DAMPING * torch.eye(stats.head_dim, dtype=torch.float64)
    shaping = (cost * (_MOST_SHAPING / cost.abs().amax((1, 2), keepdim=True))).round()
    diagonal = shaping.diagonal(dim1=1, dim2=2)
    diagonal.clamp_(min=1)  # of a head that is shaped it is positive
    return torch.where(power > 0, shaping, 0.0).to(torch.int8)


def _is_shaped(stats: TensorStats, fmt: Format) -> bool:
    return fmt.shapes_rounding and stats.gram is not None and stats.head_dim <= MAX_SHAPED_DIM


def tensor_params(stats: TensorStats, fmt: Format, head_room: float | None = None) -> Tensor:
    """Parameters fp32 `[5, h_kv, d]` of one tensor stored as `fmt`."""
    params = identity_params(fmt, stats.h_kv, stats.head_dim)
    if fmt.is_static:
        static = stats.static
        if static is None or static.fmt != str(fmt) or head_room is not None:
            static = static_scale(stats, fmt, head_room)
        params[SCALE], params[ZERO] = static.scale[:, 0], static.zero_point[:, 0]
    if fmt.steers_rounding and fmt.scaling == "channel" and stats.query is not None:
        params[QUERY] = query_direction(stats.query, params[SCALE])
    if fmt.center:
        params[MEAN] = stats.mean
    if fmt.balance:
        params[BALANCE] = channel_balance(stats, fmt)
    return params


def query_direction(query: Tensor, scale: Tensor) -> Tensor:
    """The direction `[h_kv, d]` that `quant.steering` takes: mean query times scale, in whole numbers up to `MAX_DIRECTION`."""
    per_code = query.double() * scale.double()
    largest = per_code.abs().amax(-1, keepdim=True)
    return torch.where(largest > 0, per_code / largest * MAX_DIRECTION, 0.0).round().float()


def static_scale(stats: TensorStats, fmt: Format, head_room: float | None = None) -> StaticScale:
    """Scale and zero point of a static integer format, `[h_kv, 1, d]` per channel or `[h_kv, 1, 1]` per head.

    The calibrated min .. max, its half-range times `fmt.clip * head_room`; see `grid`.
    """
    if head_room is None:
        head_room = default_head_room(fmt)
    if not 0 < head_room < float("inf"):
        raise ArgumentError(describe("head_room", "a finite factor > 0", str(head_room)))
    return grid(stats.min, stats.max, fmt, fmt.clip * head_room)


def default_head_room(fmt: Format) -> float:
    """What min .. max is widened by before `Format.clip`."""
    return HEAD_ROOM_8BIT if fmt.element.bits >= 8 else 1.0


def grid(low: Tensor, high: Tensor, fmt: Format, widen: float = 1.0) -> StaticScale:
    """Scale and zero point of a static integer format over the ranges `low` .. `high`, `[h_kv, d]` each.

    Asymmetric: the grid spans low .. high, its half-range times `widen` about the middle. Symmetric: it spans +- the
    larger magnitude times the same. Per head: the ranges of all channels joined. A range of zero width decodes to
    exactly its constant.
    """
    low, high = low.double(), high.double()
    if fmt.scaling == "head":
        low, high = low.amin(-1, keepdim=True), high.amax(-1, keepdim=True)
    element = fmt.element
    absmax = torch.maximum(low.abs(), high.abs())
    if fmt.symmetric:
        scale = absmax * widen / (element.mid_code - 1)
        constant = absmax / (element.mid_code // 2)
    else:
        scale = torch.maximum((high - low) * widen / element.max_code, absmax * _FINEST_STEP)
        constant = absmax / (element.mid_code * 8)
    # A constant divided by a power of two is a whole number of steps away from zero, exactly.
    scale = torch.where(low == high, constant, scale)
    # A channel of zeros takes the coarsest step of its head, in case it wakes up.
    dead = absmax < _TINY
    scale = torch.where(dead, scale.amax(-1, keepdim=True).clamp(min=_TINY), scale).float()
    zero = torch.full_like(scale, float(element.mid_code))
    if not fmt.symmetric:
        middle = torch.where(low == high, float(element.mid_code), element.max_code / 2)
        zero = torch.where(dead, zero, (middle - (low + high) / 2 / scale.double()).float())
    return StaticScale(str(fmt), scale.unsqueeze(1), zero.unsqueeze(1))


def channel_balance(stats: TensorStats, fmt: Format) -> Tensor:
    """The `balance` that rows of `fmt` are divided by: of K (whose queries are known) with more of the variance where its
    rounding is shaped."""
    shaped_k = _is_shaped(stats, fmt) and stats.query is not None
    return balance(stats, _SHAPED_POWER if shaped_k else _POWER)


def balance(stats: TensorStats, power: float = _POWER) -> Tensor:
    """Per-channel divisor fp32 `[h_kv, d]`, geometric mean 1 per head, that moves noise to where it weighs least.

    With one step for all channels, noise costs sum_c weight_c balance_c^2 times the step squared, which grows as
    sum_c var_c / balance_c^2: the product is least at (var / weight)^(1/4) (Cauchy-Schwarz). Clamped to `MAX_BALANCE`.
    power: of var; weight has what is left of a half.
    """
    var, weight = stats.var.double(), stats.weight.double()
    log = power * var.log() - (0.5 - power) * weight.log()
    known = (var > 0) & (weight > 0)
    median = torch.where(known, log, torch.nan).nanmedian(-1, keepdim=True).values.nan_to_num(0.0)
    limit = torch.tensor(MAX_BALANCE, dtype=torch.float64).log()
    # Neither moved nor mattered: -inf - -inf.
    log = (log - median).nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf).clamp(-limit, limit)
    return (log - log.mean(-1, keepdim=True)).exp().float()
