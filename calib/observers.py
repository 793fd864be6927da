"""Streaming statistics of K, V and Q: fixed memory, one pass, the same result however the tokens are batched."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quant.errors import CalibrationError, describe
from quant.gram import normalised
from quant.scales import PERCENTILES, LayerStats, TensorStats
from quant.spec import MAX_SHAPED_DIM

from .sequences import log_weights


class TokenSample:
    """Which tokens make up a uniform sample of a stream, drawn without replacement in fixed memory.

    Every token gets a random key and the `size` smallest keys stay (Efraimidis & Spirakis 2006, unit weights). Keys are
    drawn token by token, so the sample depends on the seed and the stream alone, not on its batches. Every observer
    follows the same sample: `slots[i]` of its buffer takes row `rows[i]` of the batch.
    """

    def __init__(self, size: int, seed: int) -> None:
        self._keys = torch.full((size,), torch.inf, dtype=torch.float64)
        self._generator = torch.Generator().manual_seed(seed)
        self.slots = self.rows = torch.empty(0, dtype=torch.int64)

    @property
    def size(self) -> int:
        return len(self._keys)

    def advance(self, num_tokens: int) -> None:
        """Choose among the next `num_tokens` tokens: sets `slots` and `rows`, int64 `[n]`."""
        new = torch.rand(num_tokens, dtype=torch.float64, generator=self._generator)
        kept = torch.cat((self._keys, new)).topk(self.size, largest=False).indices
        stays = torch.zeros(self.size, dtype=torch.bool)
        stays[kept[kept < self.size]] = True
        stays &= torch.isfinite(self._keys)
        self.rows = (kept[kept >= self.size] - self.size).sort().values
        # Free slots (an infinite key: never filled) are taken in order: a short stream fills the first ones.
        self.slots = (~stays).nonzero().flatten()[: len(self.rows)]
        self._keys[self.slots] = new[self.rows]


class TensorObserver:
    """Per-channel statistics of one tensor, K or V of one layer, rows of `[h_kv, d]`.

    Mean and variance are merged pairwise (Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm for
    computing sample variances"), which stays sound where the mean is many deviations away, as under a K bias.
    """

    def __init__(self, like: Tensor, sample_size: int) -> None:
        """like: the first rows `[tokens, h_kv, d]`; gives shape, dtype and device."""
        shape = like.shape[1:]
        exact = torch.float32 if like.device.type == "mps" else torch.float64
        self.tokens = 0
        self.min = torch.full(shape, torch.inf, device=like.device)
        self.max = torch.full(shape, -torch.inf, device=like.device)
        self._mean = torch.zeros(shape, dtype=exact, device=like.device)
        self._squares = torch.zeros(shape, dtype=exact, device=like.device)
        self._sample = torch.empty(sample_size, *shape, dtype=like.dtype, device=like.device)

    def update(self, rows: Tensor, sample: TokenSample) -> None:
        """Take in `rows` `[tokens, h_kv, d]`, the same tokens that `sample` was advanced by."""
        count = len(rows)
        values = rows.float()
        self.min = torch.minimum(self.min, values.amin(0))
        self.max = torch.maximum(self.max, values.amax(0))
        var, mean = (part.to(self._mean.dtype) for part in torch.var_mean(values, dim=0, correction=0))
        total, delta = self.tokens + count, mean - self._mean
        self._mean += delta * (count / total)
        self._squares += var * count + delta.square() * (self.tokens * count / total)
        self.tokens = total
        self._sample[sample.slots.to(rows.device)] = rows[sample.rows.to(rows.device)]

    def finish(self, weight: Tensor, query: Tensor | None = None, gram: Tensor | None = None) -> TensorStats:
        """The statistics, on the CPU. weight, query: `[h_kv, d]`, gram: `[h_kv, d, d]`; see `TensorStats`."""
        rows = self._sample[: self.tokens].float()
        sample = rows.sort(0).values
        return TensorStats(
            min=self.min.cpu(),
            max=self.max.cpu(),
            mean=self._mean.float().cpu(),
            var=(self._squares / max(self.tokens, 1)).float().cpu(),
            percentiles=_percentiles(sample, PERCENTILES).cpu(),
            weight=weight.float().cpu(),
            tokens=self.tokens,
            query=None if query is None else query.float().cpu(),
            gram=None if gram is None else normalised(gram),
            sample=rows.cpu(),
        )


class LayerObserver:
    """K, V and the first two moments of Q of one layer, and what its output projection makes of V.

    output_weight: `[h_kv, d]`, see `TensorStats.weight`. output_gram: `[h_q, d, d]`, W' W of each query head's part of the
    projection; None where it is unknown.
    """

    def __init__(self, layer_idx: int, k: Tensor, v: Tensor, sample_size: int) -> None:
        self.layer_idx = layer_idx
        self.k = TensorObserver(k, sample_size)
        self.v = TensorObserver(v, sample_size)
        self.output_weight = torch.ones(v.shape[1:])
        self.output_gram: Tensor | None = None
        self._query_squares = torch.zeros_like(self.k._mean)
        self._query_sum = torch.zeros_like(self.k._mean)
        h_kv, d = k.shape[1:]
        self._query_gram = self._query_squares.new_zeros(h_kv, d, d) if d <= MAX_SHAPED_DIM else None
        self._weight_squares: Tensor | None = None

    def update(self, q: Tensor, k: Tensor, v: Tensor, sample: TokenSample) -> None:
        """Take in rows of the same tokens: q `[tokens, h_q, d]`, k and v `[tokens, h_kv, d]`."""
        self.k.update(k, sample)
        self.v.update(v, sample)
        grouped = q.float().view(len(q), k.shape[1], -1, k.shape[2])
        self._query_squares += grouped.square().mean(2).sum(0)
        self._query_sum += grouped.mean(2).sum(0)
        if self._query_gram is not None:
            queries = grouped.transpose(0, 1).flatten(1, 2)
            self._query_gram += queries.transpose(1, 2) @ queries

    def weigh_heads(self, q: Tensor, k: Tensor, softmax_scale: float | None, window: int | None) -> None:
        """Add the squared attention weights of a sequence q `[seq, h_q, d]`, k `[seq, h_kv, d]` to those of each query head.

        An error in one token's V reaches the output by its weight, so errors of all of them by the sum of squares.
        """
        if self.output_gram is None:
            return
        weights = log_weights(q.float(), k.float(), softmax_scale, window).exp()
        squares = weights.square().sum((-2, -1)).flatten().to(self.k._mean.dtype)
        self._weight_squares = squares if self._weight_squares is None else self._weight_squares + squares

    def check_finite(self) -> None:
        """CalibrationError naming layer, tensor and head if a NaN or an infinity came by."""
        for name, observer in (("K", self.k), ("V", self.v)):
            # A NaN or an infinity shows in the smallest or the largest value.
            bad = ~(torch.isfinite(observer.min) & torch.isfinite(observer.max)).all(-1)
            if bad.any():
                head = int(bad.nonzero()[0])
                where = f"layer {self.layer_idx} {name}, head {head}"
                fix = "the model overflows on this text: load it in bf16 or fp32, or look at its weights"
                raise CalibrationError(describe(where, "finite values", "NaN or inf", fix))

    def finish(self) -> LayerStats:
        """The statistics of the layer, checked."""
        tokens = max(self.k.tokens, 1)
        k = self.k.finish(self._query_squares / tokens, self._query_sum / tokens, self._query_gram)
        stats = LayerStats(k, self.v.finish(self.output_weight, gram=self._value_gram()))
        stats.check(self.layer_idx, CalibrationError)
        return stats

    def _value_gram(self) -> Tensor | None:
        """What errors of V cost, `[h_kv, d, d]`: `output_gram` over each group, heads by their squared weights where known."""
        if self.output_gram is None:
            return None
        gram = self.output_gram
        if self._weight_squares is not None:
            gram = gram * self._weight_squares[:, None, None].to(gram.device)
        return gram.unflatten(0, (self.v.min.shape[0], -1)).sum(1)


def _percentiles(ordered: Tensor, percents: Sequence[float]) -> Tensor:
    """Percentiles `[len(percents), ...]` of values `[n, ...]` sorted over dimension 0, interpolated linearly."""
    place = torch.tensor(percents, dtype=torch.float64, device=ordered.device) / 100 * (len(ordered) - 1)
    low = place.floor().long()
    high = (low + 1).clamp(max=len(ordered) - 1)
    part = (place - low).to(ordered.dtype).view(-1, *[1] * (ordered.dim() - 1))
    return torch.lerp(ordered[low], ordered[high], part)
