"""What each tensor of each layer costs at each width, measured on the model's output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foldkv.accuracy.evaluate import evaluate, make_ways, total_tokens
from foldkv.accuracy.mode_source import ModeSource
from foldkv.accuracy.summary import summarise
from quant.scales import KVScales
from quant.spec import LayerSpecs, parse_modes

from .candidates import DYNAMIC, EXACT, Choice, TensorSize, choices

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[str, int, int], None]
Figures = dict[str, Any]


def measure(
    model: PreTrainedModel,
    maps: Mapping[str, LayerSpecs],
    scales: KVScales,
    tokens: Tensor,
    *,
    what: str = "measuring",
    progress: Progress | None = None,
) -> dict[str, Figures]:
    """The figures of `foldkv.accuracy.summary` of each map, against the 16-bit cache, in one prefill.

    tokens: int64 `[windows, len]`. progress: called with (`what`, tokens done, tokens in all).
    """
    ways = make_ways(len(tokens), tokens.shape[1], 0, 0)
    base = ModeSource(EXACT, parse_modes(EXACT, _num_layers(model), float_codec(model)), scales)
    sources = [ModeSource(name, specs, scales) for name, specs in maps.items()]
    done, total = 0, total_tokens(ways, len(sources))

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(what, done, total)

    scores = evaluate(model, tokens, ways[0], base, sources, advance=advance)
    return {name: summarise(scores[name]) for name in maps}


def sensitivities(
    model: PreTrainedModel,
    tensor_sizes: Sequence[TensorSize],
    scales: KVScales,
    tokens: Tensor,
    *,
    skip: Sequence[str] = (),
    dynamic: Mapping[TensorSize, Sequence[str]] | None = None,
    progress: Progress | None = None,
) -> list[tuple[TensorSize, dict[Choice, float]]]:
    """Mean KLD of each choice of each tensor with all else exact; a choice at 16 bits costs nothing.

    skip: modes not to measure and not to offer. dynamic: the dynamic 4-bit modes of each tensor, see `choices`.
    A KLD that is not finite counts as infinite.
    """
    modes = dynamic or {}
    options = {
        size: [choice for choice in choices(size, modes.get(size, DYNAMIC)) if choice.mode not in skip]
        for size in tensor_sizes
    }
    codec = float_codec(model)
    maps = {choice.name: choice.alone(codec) for found in options.values() for choice in found if choice.mode != EXACT}
    figures = measure(model, maps, scales, tokens, what="measuring layers", progress=progress)

    def cost(choice: Choice) -> float:
        if choice.mode == EXACT:
            return 0.0
        kld = figures[choice.name]["kld_mean"]
        return float("inf") if kld is None else max(kld, 0.0)

    return [(size, {choice: cost(choice) for choice in found}) for size, found in options.items()]


def float_codec(model: PreTrainedModel) -> str:
    """The codec that `c16` stands for in this model."""
    return "bf16" if model.dtype == torch.bfloat16 else "fp16"


def _num_layers(model: PreTrainedModel) -> int:
    return model.config.get_text_config(decoder=True).num_hidden_layers
