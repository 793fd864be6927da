"""What a mode does to K, V and attention inside a layer, head by head, on queries, keys and values of the real model.

Nothing here runs through a cache of ours: the model runs once with its own, and each mode's formats are applied to what
its attention calls were given. So these figures say where the error comes from; the logits say what it does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from calib.derive import layer_params
from quant.pages import SCALE, ZERO
from quant.spec import Format, LayerSpecs

from .emulate import emulated_attention, rows_of, spec_codecs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from quant.scales import KVScales

QUERIES = 64
"""Query positions of a window at which the weights of attention are compared."""

FIGURES = ("k_error", "v_error", "k_clip", "v_clip", "softmax_kl", "out_error")
"""Of each layer and kv head.

k_error, v_error: RMS error over the RMS of the tensor about its channel means. k_clip, v_clip: share of elements outside a
static range. softmax_kl: KL divergence, nats, of the weights over quantised keys from the exact ones, mean over queries and
the heads of the group. out_error: RMS error of the head's output over its RMS.
"""


@torch.inference_mode()
def damage(
    model: PreTrainedModel, modes: Mapping[str, LayerSpecs], scales: KVScales | None, ids: Tensor
) -> dict[str, list[dict[str, Any]]]:
    """Mode -> one entry a layer that caches: {"layer", and a list over kv heads for each of `FIGURES`}.

    ids: int64 `[windows, length]`, run through the model in one piece.
    """
    result: dict[str, list[dict[str, Any]]] = {name: [] for name in modes}
    codecs = {name: spec_codecs(specs, scales) for name, specs in modes.items()}
    seen: set[int] = set()

    def tap(layer_idx: int, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> None:
        shares = scales is not None and scales.layers[layer_idx] is None
        if shares or layer_idx in seen:
            return
        seen.add(layer_idx)
        places = torch.linspace(k.shape[2] // 4, k.shape[2] - 1, min(QUERIES, k.shape[2])).long().unique()
        look = _Look(q.float()[:, :, places], places, options)
        k, v = k.float(), v.float()
        weights = look.weights(k)
        for name, of_layer in codecs.items():
            k_codec, v_codec = of_layer(layer_idx)
            k_got, v_got = k_codec(k), v_codec(v)
            got = look.weights(k_got)
            figures = {
                "k_error": _relative(k_got, k),
                "v_error": _relative(v_got, v),
                **_clips(modes[name], scales, layer_idx, k, v),
                "softmax_kl": _kl(weights, got, k.shape[1]),
                "out_error": _out_error(weights, v, got, v_got),
            }
            result[name].append({"layer": layer_idx, **{key: x.tolist() for key, x in figures.items()}})

    with emulated_attention(model, tap):
        for row in ids:
            seen.clear()
            model(row[None].to(model.device), use_cache=False)
    return {name: _mean_of_windows(entries) for name, entries in result.items()}


class _Look:
    """Attention weights of chosen queries `[b, h_q, n, d]` at `places` over any keys `[b, h_kv, s, d]`."""

    def __init__(self, q: Tensor, places: Tensor, options: Mapping[str, Any]) -> None:
        self.q, self.places = q, places.to(q.device)
        self.scale = options.get("scaling") or 1 / math.sqrt(q.shape[-1])
        self.softcap = options.get("softcap") or 0.0
        self.window = options.get("sliding_window") or 0

    def weights(self, k: Tensor) -> Tensor:
        """`[b, h_kv, group, n, s]`; sinks, where a model has them, are left out."""
        grouped = self.q.unflatten(1, (k.shape[1], -1))
        logits = torch.einsum("bhgnd,bhsd->bhgns", grouped, k) * self.scale
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        key = torch.arange(k.shape[2], device=k.device)
        hidden = key > self.places[:, None]
        if self.window:
            hidden = hidden | (self.places[:, None] - key >= self.window)
        return logits.masked_fill(hidden, -math.inf).softmax(-1)


def _heads(x: Tensor) -> Tensor:
    """Mean over all but the heads of `[b, h, ...]`."""
    return x.double().transpose(0, 1).flatten(1).mean(1)


def _relative(got: Tensor, x: Tensor) -> Tensor:
    spread = _heads((x - x.mean(2, keepdim=True)).square())
    return (_heads((got - x).square()) / spread.clamp_min(1e-30)).sqrt()


def _kl(weights: Tensor, got: Tensor, h_kv: int) -> Tensor:
    terms = weights.double() * (weights.double().clamp_min(1e-30).log() - got.double().clamp_min(1e-30).log())
    return _heads(terms.sum(-1)).view(h_kv).clamp_min(0)


def _out_error(weights: Tensor, v: Tensor, got: Tensor, v_got: Tensor) -> Tensor:
    out, changed = (torch.einsum("bhgns,bhsd->bhgnd", w, x) for w, x in ((weights, v), (got, v_got)))
    return (_heads((changed - out).square()) / _heads(out.square()).clamp_min(1e-30)).sqrt()


def _clips(specs: LayerSpecs, scales: KVScales | None, layer_idx: int, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    spec = specs[layer_idx]
    params = (None, None) if scales is None else layer_params(scales, layer_idx, spec)
    pairs = zip(("k_clip", "v_clip"), (spec.k, spec.v), params, (k, v), strict=True)
    return {key: clip_rate(fmt, given, x) for key, fmt, given, x in pairs}


def clip_rate(fmt: Format, params: Tensor | None, x: Tensor) -> Tensor:
    """Share of elements of `x` `[b, h, s, d]`, by head `[h]`, more than half a step outside a static range."""
    if not fmt.is_static or params is None:
        return torch.zeros(x.shape[1])
    params = params.to(x.device)
    code = rows_of(x) / params[SCALE] + params[ZERO]
    outside = (code < -0.5) | (code > fmt.element.max_code + 0.5)
    return outside.double().mean(dim=(0, 2))


def _mean_of_windows(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    by_layer: dict[int, list[dict[str, Any]]] = {}
    for entry in entries:
        by_layer.setdefault(entry["layer"], []).append(entry)
    mean: Callable[[list[list[float]]], list[float]] = lambda rows: torch.tensor(rows).mean(0).tolist()  # noqa: E731
    return [
        {"layer": layer, **{key: mean([entry[key] for entry in found]) for key in FIGURES}}
        for layer, found in sorted(by_layer.items())
    ]
