"""Which part of a cache does the damage: K or V, which layer, which head; each alone quantised, and all but it.

K alone and V alone run through the swapped cache as any mode does. Layers and heads, which no swap can choose one by one,
are emulated (`emulate`), beside an emulated 16-bit base; the cross-check of the report tells how far the two agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from quant.spec import KVSpec, LayerSpecs

from .emulate import Codec, Codecs, EmulatedSource, pick_heads, spec_codecs
from .evaluate import Way, evaluate
from .mode_source import ModeSource
from .sources import CacheSource
from .summary import block_mean, finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Entries = list[dict[str, Any]]
Advance = Callable[[int], object]


def _way(ids: Tensor) -> Way:
    return Way("prefill", ids.shape[0], ids.shape[1], ids.shape[1], ids.shape[1])


def parts(
    model: PreTrainedModel, base: ModeSource, source: ModeSource, ids: Tensor, advance: Advance
) -> dict[str, dict[str, Any]]:
    """{"k_only", "v_only"}: figures with the other tensor in 16 bits, through the swapped cache."""
    specs, plain = source.specs, base.specs

    def mixed(pick: Callable[[KVSpec, KVSpec], KVSpec]) -> ModeSource:
        layers = {i: pick(spec, plain.default) for i, spec in specs.layers.items()}
        return ModeSource("", LayerSpecs(pick(specs.default, plain.default), layers), source.scales)

    sources: list[CacheSource] = [
        mixed(lambda mode, full: KVSpec(mode.k, full.v)),
        mixed(lambda mode, full: KVSpec(full.k, mode.v)),
    ]
    for name, part in zip(("k_only", "v_only"), sources, strict=True):
        part.name = name
    return _figures(model, base, sources, ids, advance)


def layers(model: PreTrainedModel, base: ModeSource, source: ModeSource, ids: Tensor, advance: Advance) -> Entries:
    """One entry a layer: {"layer", "alone", "without"}: only it quantised; all but it."""
    mode, plain = (spec_codecs(x.specs, x.scales) for x in (source, base))
    own = _own_layers(model, source)
    sources = []
    for one in own:
        sources.append(_emulated(f"{one} alone", _chosen(mode, plain, lambda i, one=one: i == one)))  # type: ignore[misc]
        sources.append(_emulated(f"{one} without", _chosen(mode, plain, lambda i, one=one: i != one)))  # type: ignore[misc]
    figures = _figures(model, _emulated("base", plain), sources, ids, advance)
    return [{"layer": one, "alone": figures[f"{one} alone"], "without": figures[f"{one} without"]} for one in own]


def heads(
    model: PreTrainedModel, base: ModeSource, source: ModeSource, ids: Tensor, without: bool, advance: Advance
) -> Entries:
    """One entry a layer and kv head: {"layer", "head", "alone", and "without" where asked for}."""
    from foldkv.hf.models import kv_shapes

    shapes = kv_shapes(model.config.get_text_config(decoder=True))
    mode, plain = (spec_codecs(x.specs, x.scales) for x in (source, base))
    every = [(layer, head) for layer in _own_layers(model, source) for head in range(shapes[layer][0])]
    sources = []
    for layer, head in every:
        alone = _one_head(mode, plain, plain, layer, [head])
        sources.append(_emulated(f"{layer}.{head} alone", alone))
        if without:
            rest = [other for other in range(shapes[layer][0]) if other != head]
            sources.append(_emulated(f"{layer}.{head} without", _one_head(mode, plain, mode, layer, rest)))
    figures = _figures(model, _emulated("base", plain), sources, ids, advance)
    kinds = ("alone", "without") if without else ("alone",)
    return [
        {"layer": layer, "head": head, **{kind: figures[f"{layer}.{head} {kind}"] for kind in kinds}}
        for layer, head in every
    ]


def _own_layers(model: PreTrainedModel, source: ModeSource) -> list[int]:
    """Layers with a cache of their own."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    return [i for i in range(count) if source.scales is None or source.scales.layers[i] is not None]


def _emulated(name: str, codecs: Codecs) -> EmulatedSource:
    return EmulatedSource(name, codecs, 0.0)


def _chosen(mode: Codecs, plain: Codecs, pick: Callable[[int], bool]) -> Codecs:
    return lambda layer_idx: (mode if pick(layer_idx) else plain)(layer_idx)


def _one_head(mode: Codecs, plain: Codecs, others: Codecs, layer: int, quantised: Sequence[int]) -> Codecs:
    """`mode` for these heads of one layer, `plain` for its other heads, `others` for all other layers."""

    def of_layer(layer_idx: int) -> tuple[Codec, Codec]:
        if layer_idx != layer:
            return others(layer_idx)
        pairs = zip(mode(layer_idx), plain(layer_idx), strict=True)
        k, v = (pick_heads(chosen, other, quantised) for chosen, other in pairs)
        return k, v

    return of_layer


def _figures(
    model: PreTrainedModel, base: CacheSource, sources: Sequence[CacheSource], ids: Tensor, advance: Advance
) -> dict[str, dict[str, Any]]:
    runs = evaluate(model, ids, _way(ids), base, sources, noise=False, advance=advance)
    result = {}
    for name, scores in runs.items():
        kld, top, ratio = (block_mean(x) for x in (scores.kld, scores.same_top, scores.nll - scores.base_nll))
        figures = {"kld_mean": kld.value, "kld_se": kld.se, "top1_agreement": top.value, "ln_ppl_ratio": ratio.value}
        result[name] = {key: finite(value) for key, value in figures.items()}
    return result
