"""Everything that a report runs, in order, each piece kept as it is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from quant.spec import CONTROL_MODE

from . import ablation
from .crosscheck import CrossCheck, cross_check
from .damage import damage
from .effort import Effort
from .evaluate import Way, evaluate
from .generation import Texts, marks
from .metrics import TokenScores
from .mode_source import ModeSource
from .partial import Partial
from .probe import Probe, probe
from .sources import CacheSource
from .summary import summarise
from .windows import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from quant.scales import KVScales

DECODE_COST = 8
"""A token of a decode takes about so many times as long as one of a prefill: for the time left."""

OnResult = Callable[[str, str, dict[str, Any]], None]


@dataclass
class Found:
    """What was measured. runs: way -> run -> scores. speed: way -> run -> tokens a second.

    probes: source -> way -> what its ops were seen to do. crosschecks: source -> way -> `CrossCheck`. details: source ->
    its parts, layers, heads, damage and generation, as JSON. texts: base and band of the continuations.
    """

    runs: dict[str, dict[str, TokenScores]] = field(default_factory=dict)
    speed: dict[str, dict[str, float | None]] = field(default_factory=dict)
    store_floor: float = 0.0
    probes: dict[str, dict[str, Probe]] = field(default_factory=dict)
    crosschecks: dict[str, dict[str, CrossCheck]] = field(default_factory=dict)
    details: dict[str, dict[str, Any]] = field(default_factory=dict)
    texts: dict[str, Any] | None = None


def extra_paths(sizes: Effort) -> list[str]:
    """Figures of a mode, beyond those of the ways, that a report of these sizes has for gates to name."""
    paths = []
    if sizes.ablation_windows:
        paths += [f"parts.{part}.{key}" for part in ("k_only", "v_only") for key in ("kld_mean", "top1_agreement")]
        paths += [f"worst.{key}" for key in ("layer_kld", "k_clip", "v_clip", "softmax_kl", "out_error")]
    if sizes.prompts and sizes.new_tokens:
        keys = [f"{kind}_{mark}" for mark in marks(sizes.new_tokens) for kind in ("match", "same")]
        paths += [f"generation.{key}" for key in ("first_median", "repeated", "base_nll", *keys)]
    return paths


def measure(
    model: PreTrainedModel,
    ids: Tensor,
    base: CacheSource,
    sources: Sequence[CacheSource],
    baselines: Sequence[CacheSource],
    ways: Sequence[Way],
    sizes: Effort,
    scales: KVScales | None,
    partial: Partial,
    *,
    engine: bool,
    progress: Progress | None,
    on_result: OnResult,
) -> Found:
    """Run it all. ids: int64 `[windows, length]`, as long as the longest way. engine: texts go through `foldkv.Engine`."""
    found = Found(details={source.name: {} for source in sources})
    ours = [source for source in sources if isinstance(source, ModeSource) and source.name != CONTROL_MODE]
    done, total = 0, _total(model, ways, sources, baselines, ours, sizes)

    def advance(tokens: int, cost: int = 1) -> None:
        nonlocal done
        done += tokens * cost
        if progress is not None:
            progress("measuring", min(done, total), total)

    for source in (base, *sources):
        found.probes[source.name] = {way.name: _probe(model, source, way, ids) for way in ways if source.kernels}
    _cross_check(model, base, sources, ways, ids, partial, found)
    for way in ways:
        _run_way(model, ids, way, base, [*sources, *_fed(baselines, way, ways)], partial, found, advance, on_result)
    if sizes.ablation_windows and isinstance(base, ModeSource):
        text = ids[: sizes.ablation_windows, : sizes.ablation_len]
        for source in ours:
            found.details[source.name] |= _look_inside(model, base, source, text, sizes, scales, partial, advance)
    if sizes.prompts and sizes.new_tokens:
        prompts = ids[: sizes.prompts, : sizes.prompt_len]
        texts = Texts(model, base, prompts, sizes.new_tokens, engine, lambda tokens: advance(tokens, DECODE_COST))
        key = "texts-engine" if engine else "texts"
        found.texts = partial.value(key, texts.base_and_band)
        for source in sources:
            figures = partial.value(f"{key}-{source.name}", lambda source=source: texts.compare(source))  # type: ignore[misc]
            found.details[source.name]["generation"] = figures
    return found


def _run_way(
    model: PreTrainedModel,
    ids: Tensor,
    way: Way,
    base: CacheSource,
    sources: Sequence[CacheSource],
    partial: Partial,
    found: Found,
    advance: Callable[..., None],
    on_result: OnResult,
) -> None:
    clock: dict[str, float] = {}
    known = partial.scores(way.name, [*(source.name for source in sources), "noise.split", "noise.stock"])

    def keep(way_name: str, run: str, scores: TokenScores) -> None:
        partial.keep_scores(way_name, run, scores)
        partial.value(f"speed-{way_name}-{run}", lambda: clock.get(run))
        on_result(way_name, run, summarise(scores))

    cost = DECODE_COST if way.chunk == 1 else 1
    found.runs[way.name] = evaluate(
        model, ids, way, base, sources, known=known, clock=clock, on_result=keep, advance=lambda n: advance(n, cost)
    )
    names = ("base", *found.runs[way.name])
    found.speed[way.name] = {
        name: partial.value(f"speed-{way.name}-{name}", lambda name=name: clock.get(name))  # type: ignore[misc]
        for name in names
    }
    found.store_floor = max(found.store_floor, clock.get("store.floor", 0.0))


def _fed(baselines: Sequence[CacheSource], way: Way, ways: Sequence[Way]) -> list[CacheSource]:
    """The baselines that this way feeds: each one way, the prefill but for those that a prefill passes by."""
    names = [one.name for one in ways]

    def place(source: CacheSource) -> str:
        return source.fed if source.fed in names else names[0]

    return [source for source in baselines if place(source) == way.name]


def _cross_check(
    model: PreTrainedModel,
    base: CacheSource,
    sources: Sequence[CacheSource],
    ways: Sequence[Way],
    ids: Tensor,
    partial: Partial,
    found: Found,
) -> None:
    def run() -> dict[str, Any]:
        checked = cross_check(model, base, sources, ways, ids)
        return {name: {way: one.to_json() for way, one in by.items()} for name, by in checked.items()}

    kept = partial.value("crosscheck-" + "-".join(source.name for source in sources), run)
    found.crosschecks = {name: {way: CrossCheck(**one) for way, one in by.items()} for name, by in kept.items()}


def _look_inside(
    model: PreTrainedModel,
    base: ModeSource,
    source: ModeSource,
    text: Tensor,
    sizes: Effort,
    scales: KVScales | None,
    partial: Partial,
    advance: Callable[..., None],
) -> dict[str, Any]:
    name = source.name
    args = (model, base, source, text)
    details = {
        "damage": partial.value(f"damage-{name}", lambda: damage(model, {name: source.specs}, scales, text)[name]),
        "parts": partial.value(f"parts-{name}", lambda: ablation.parts(*args, advance)),
        "layers": partial.value(f"layers-{name}", lambda: ablation.layers(*args, advance)),
    }
    if sizes.heads and num_heads(model) <= sizes.max_heads:
        details["heads"] = partial.value(f"heads-{name}", lambda: ablation.heads(*args, sizes.without, advance))
    return details


def num_heads(model: PreTrainedModel) -> int:
    """kv heads of all layers."""
    from foldkv.hf.models import kv_shapes

    return sum(heads for heads, _ in kv_shapes(model.config.get_text_config(decoder=True)))


def _probe(model: PreTrainedModel, source: CacheSource, way: Way, ids: Tensor) -> Probe:
    """Three passes the way's way over the beginning of the first window: 3 tokens, or 3 whole beginnings."""
    length = min(way.length, 3 if way.chunk == 1 else 48)
    return probe(model, source, ids[:1, :length], min(way.chunk, length))


def _total(
    model: PreTrainedModel,
    ways: Sequence[Way],
    sources: Sequence[CacheSource],
    baselines: Sequence[CacheSource],
    ours: Sequence[CacheSource],
    sizes: Effort,
) -> int:
    """Tokens in all, those of a decode with their cost."""
    total = 0
    for way in ways:
        runs = len(sources) + 3 + len(_fed(baselines, way, ways))
        total += way.tokens * runs * (DECODE_COST if way.chunk == 1 else 1)
    if sizes.ablation_windows:
        layers = model.config.get_text_config(decoder=True).num_hidden_layers
        heads = num_heads(model) if sizes.heads and num_heads(model) <= sizes.max_heads else 0
        runs = 3 + (1 + 2 * layers) + (1 + heads * (2 if sizes.without else 1) if heads else 0)
        total += len(ours) * runs * sizes.ablation_windows * sizes.ablation_len
    texts = len(sources) + 3 if sizes.prompts else 0
    return total + texts * sizes.prompts * sizes.new_tokens * DECODE_COST
