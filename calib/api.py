"""`calibrate`: from a model and text to `KVScales`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quant.errors import ArgumentError, CalibrationError, describe
from quant.scales import KVScales, LayerStats, model_facts, model_hash
from quant.spec import Format, KVSpec, LayerSpecs, parse_modes

from .collect import Snapshot, check_model, collect, eval_mode, text_config
from .data import Data, Windows, load_windows, write_windows
from .data_free import bias_stats
from .drift import drift, to_json
from .estimators import DEFAULT, ESTIMATORS, Estimator, Target, estimate, parse_estimators
from .provenance import now, versions, weight_index_hash
from .sequences import LayerSequences, SequenceSample

# Of given text; a model that writes its own text takes a step per token, so it writes less.
NUM_SAMPLES = 64
NUM_OWN_SAMPLES = 16
MAX_SEQ_LEN = 1024
# What the first so many samples say is held against what all of them say.
EARLY_SAMPLES = 16
# Fewer tokens than this cannot show a range.
MIN_TOKENS = 16

# The estimator that reads no text.
DATA_FREE = "bias"

Progress = Callable[[str, int, int], None]


def calibrate(
    model: PreTrainedModel,
    data: Data | None = None,
    *,
    tokenizer: Any = None,
    mode: str | KVSpec | LayerSpecs | Mapping[int | str, str | KVSpec] = "c8",
    estimator: str | None = None,
    num_samples: int | None = None,
    max_seq_len: int | None = None,
    max_position: int | None = None,
    batch_size: int = 4,
    seed: int = 0,
    text_column: str = "text",
    compare: Data | None = None,
    gather: Callable[..., list[LayerStats | None]] = collect,
    progress: Progress | None = None,
) -> KVScales:
    """Run text through `model` once and return the statistics and static scales of its K and V.

    data: a file or hub data set (see `calib.documents`), strings, token ids `[n]` or `[rows, len]`, or
        None: the model writes its own text.
    tokenizer: the model's; needed for text. mode: whose static scales are stored; the statistics serve any other too.
    estimator: how the ranges of static scales are chosen: a name of `calib.estimators.ESTIMATORS`, or `K/V` of two;
        "bias" reads no text: see `calib.data_free`. Default: see `default_estimator`.
    num_samples, max_seq_len: windows and their tokens; default 64 (16 where the model writes) of 1024, or of the
        model's maximum if that is less. batch_size: windows per forward.
    max_position: positions that the scales shall hold for; default max_seq_len. Windows are spread over them by
        shifting their position ids: RoPE attention sees differences alone, so this costs nothing, where K ranges that
        are known up to 1024 are wrong at 2048. The wider ranges cost some accuracy on short text.
    compare: another corpus, of which as much is read, to say how far its statistics lie from those of `data`.
    gather: what runs the text through the model: `collect`, or that of a `calib.stream.StreamedCheckpoint`.
    progress: called with (what is being done, steps done, steps in all).

    `config["data"]["drift"]` has the drift between the first 16 samples and all, and between the corpora.
    Errors: UnsupportedModelError, ArgumentError, CalibrationError (bad data; dead or non-finite heads, named).
    """
    check_model(model)
    samples = num_samples if num_samples is not None else NUM_OWN_SAMPLES if data is None else NUM_SAMPLES
    seq_len = default_seq_len(model, max_seq_len)
    positions = _max_position(model, seq_len, max_position)
    for name, value in (("num_samples", samples), ("max_seq_len", seq_len), ("batch_size", batch_size)):
        if value < 1:
            raise ArgumentError(describe(name, "at least 1", str(value)))
    if samples * seq_len < MIN_TOKENS:
        wanted = f"at least {MIN_TOKENS} tokens"
        raise CalibrationError(describe("calibration", wanted, f"{samples} x {seq_len}", "ask for more samples"))
    float_codec = "bf16" if model.dtype == torch.bfloat16 else "fp16"
    specs = parse_modes(mode, text_config(model).num_hidden_layers, float_codec)
    if estimator == DATA_FREE:
        layers = bias_stats(model, positions)
        for idx, layer in enumerate(layers):
            if layer is not None:
                attach_static(layer, specs[idx], parse_estimators(DEFAULT), None)
        facts = {"source": "none, the weights alone", "max_position": positions}
        return KVScales(layers, origin(model, specs, estimator, facts))
    chosen = _chosen(specs, text_config(model).num_hidden_layers, estimator)
    whole = any(found.needs == "sequences" for pair in chosen.values() for found in pair)
    sequences = SequenceSample.spread(samples) if whole else None

    windows = text_windows(
        model, data, tokenizer, samples, seq_len, seed=seed, text_column=text_column, progress=progress
    )
    batches = _batches(windows.tokens, batch_size, positions)
    snapshot = Snapshot(EARLY_SAMPLES)
    layers = gather(
        model, batches, seed=seed, sequences=sequences, snapshot=snapshot,
        on_batch=_report(progress, "calibrating", samples),
    )  # fmt: skip
    for idx, layer in enumerate(layers):
        if layer is not None:
            attach_static(layer, specs[idx], chosen[idx], sequences.layers.get(idx) if sequences else None)
    drifts: dict[str, Any] = {}
    if snapshot.layers and snapshot.sequences < samples:
        drifts["samples"] = {"first": snapshot.sequences, **to_json(drift(snapshot.layers, layers))}
    if compare is not None:
        others = text_windows(
            model, compare, tokenizer, samples, seq_len, seed=seed, text_column=text_column, progress=progress
        )
        batches = _batches(others.tokens, batch_size, positions)
        second = gather(model, batches, seed=seed, on_batch=_report(progress, "comparing corpora", samples))
        drifts["corpora"] = {"source": others.source, "sha256": others.sha256(), **to_json(drift(layers, second))}
    facts = {
        "source": windows.source,
        "sha256": windows.sha256(),
        "num_samples": samples,
        "max_seq_len": seq_len,
        "max_position": positions,
        "seed": seed,
    } | ({"drift": drifts} if drifts else {})
    return KVScales(layers, origin(model, specs, _name(chosen), facts))


def default_estimator(fmt: Format, tensor: str) -> str:
    """What serves a static format of K or V (`tensor`, "k" or "v") best: min .. max, but at 4 bits per channel, where
    range is dear, the percentiles for K and the attention's output for V (docs/accuracy.md has the figures)."""
    dear = fmt.scaling == "channel" and fmt.element.bits < 8
    return DEFAULT if not dear else "percentile" if tensor == "k" else "attention_output"


def _chosen(specs: LayerSpecs, num_layers: int, asked: str | None) -> dict[int, tuple[Estimator, Estimator]]:
    """The estimators of K and of V of every layer."""
    if asked is not None:
        return dict.fromkeys(range(num_layers), parse_estimators(asked))
    return {
        idx: (
            ESTIMATORS[default_estimator(specs[idx].k, "k")],
            ESTIMATORS[default_estimator(specs[idx].v, "v")],
        )
        for idx in range(num_layers)
    }


def _name(chosen: dict[int, tuple[Estimator, Estimator]]) -> str:
    """The estimators in a word: NAME, K/V, or where layers differ all of them."""
    names = {k.name if k is v else f"{k.name}/{v.name}" for k, v in chosen.values()}
    return ", ".join(sorted(names))


def origin(model: PreTrainedModel, specs: LayerSpecs, estimator: str, data: dict[str, Any]) -> dict[str, Any]:
    """What `kv_cache_config.json` says of mode, model, data and versions."""
    return {
        "mode": specs.name,
        "estimator": estimator,
        "model": {
            "name": str(model.config.name_or_path).rstrip("/").rpartition("/")[2],
            "dtype": str(model.dtype).removeprefix("torch."),
            "config": model_facts(model.config),
            "config_hash": model_hash(model.config),
            "weight_index_hash": weight_index_hash(model.config.name_or_path or ""),
        },
        "data": data,
        "versions": versions(),
        "date": now(),
    }


def text_windows(
    model: PreTrainedModel,
    data: Data | None,
    tokenizer: Any,
    num_samples: int,
    seq_len: int,
    *,
    seed: int = 0,
    text_column: str = "text",
    progress: Progress | None = None,
) -> Windows:
    """Windows of `data` (see `load_windows`), or, where it is None, of text that the model writes itself."""
    if data is None:
        windows = own_text(model, tokenizer, num_samples, seq_len, seed, progress)
    else:
        windows = load_windows(data, tokenizer, num_samples, seq_len, text_column=text_column)
    check_ids(model, windows)
    return windows


def _batches(tokens: Tensor, batch_size: int, max_position: int) -> Iterator[dict[str, Tensor]]:
    """The rows of `tokens`, `batch_size` at a time, their positions spread evenly over 0 .. max_position - 1."""
    num_samples, seq_len = tokens.shape
    room = max_position - seq_len
    starts = torch.linspace(0, room, num_samples).round().long() if num_samples > 1 else torch.tensor([room])
    positions = starts[:, None] + torch.arange(seq_len)
    for ids, places in zip(tokens.split(batch_size), positions.split(batch_size), strict=True):
        # Not every model takes position ids; none needs those that it would choose itself.
        yield {"input_ids": ids, "position_ids": places} if room else {"input_ids": ids}


def attach_static(
    layer: LayerStats, spec: KVSpec, estimators: tuple[Estimator, Estimator], sequences: LayerSequences | None
) -> None:
    """Store the scales of `spec`'s static formats with the statistics they follow from. estimators: of K and of V."""
    for stats, fmt, found in ((layer.k, spec.k, estimators[0]), (layer.v, spec.v, estimators[1])):
        if fmt.is_static:
            stats.static = estimate(found, Target(stats, fmt, sequences))


def default_seq_len(model: PreTrainedModel, asked: int | None) -> int:
    limit = getattr(text_config(model), "max_position_embeddings", None)
    if asked is None:
        return min(MAX_SEQ_LEN, limit or MAX_SEQ_LEN)
    if limit is not None and asked > limit:
        raise ArgumentError(describe("max_seq_len", f"at most {limit}, the model's maximum", str(asked)))
    return asked


def _max_position(model: PreTrainedModel, seq_len: int, asked: int | None) -> int:
    if asked is None:
        return seq_len
    limit = getattr(text_config(model), "max_position_embeddings", None) or asked
    if not seq_len <= asked <= limit:
        raise ArgumentError(
            describe("max_position", f"max_seq_len .. the model's maximum, {seq_len} .. {limit}", str(asked))
        )
    return asked


def own_text(
    model: PreTrainedModel, tokenizer: Any, samples: int, seq_len: int, seed: int, progress: Progress | None
) -> Windows:
    config = text_config(model)
    eos = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    starts = (config.bos_token_id, getattr(tokenizer, "bos_token_id", None), eos)
    bos = next((token for token in starts if token is not None), None)
    on_token = _report(progress, "writing text", samples * seq_len)
    with eval_mode(model):
        return write_windows(model, samples, seq_len, bos=bos, seed=seed, on_token=on_token)


def check_ids(model: PreTrainedModel, windows: Windows) -> None:
    """ArgumentError for token ids that the model has no embedding for."""
    embeddings: Any = model.get_input_embeddings()
    vocab = embeddings.weight.shape[0]
    low, high = int(windows.tokens.min()), int(windows.tokens.max())
    if low < 0 or high >= vocab:
        fix = "use the tokenizer of this model"
        raise ArgumentError(describe("token ids", f"0 .. {vocab - 1}", f"{low} .. {high}", fix))


def _report(progress: Progress | None, what: str, total: int) -> Callable[[int], None] | None:
    return None if progress is None else lambda done: progress(what, min(done, total), total)
