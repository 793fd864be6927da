"""What a calibration finds: statistics of K and V per layer, and the static scales derived from them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import gram as grams
from .errors import ArgumentError, FoldkvError, ScaleFileError, describe
from .scale_files import AGAIN, CONFIG_FILE, SCALES_FILE, json_sha256, read_pair, write_pair

FORMAT_VERSION = 1
BASIS = "post-rope"
# Per cent of the tokens below a value, per channel.
PERCENTILES = (0.1, 1.0, 5.0, 25.0, 50.0, 75.0, 95.0, 99.0, 99.9)

_STATISTICS = ("min", "max", "mean", "var", "percentiles", "weight")
# The facts of a model's config that its K and V depend on.
_MODEL_FACTS = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "rope_parameters", "sliding_window", "num_kv_shared_layers",
)  # fmt: skip
_OTHER_MODEL = "the scales are of another model; calibrate this one"


@dataclass
class StaticScale:
    """Scale and zero point of the static format `fmt` (its `str`): fp32 `[h_kv, 1, d]` or `[h_kv, 1, 1]` each."""

    fmt: str
    scale: Tensor
    zero_point: Tensor

    def check(self, where: str, shape: tuple[int, int], error: type[FoldkvError] = ScaleFileError) -> None:
        """Raise `error`, naming `where` and the head, unless both fit heads and channels `shape` and are usable."""
        wanted = ((shape[0], 1, shape[1]), (shape[0], 1, 1))
        for name, tensor in (("scale", self.scale), ("zero_point", self.zero_point)):
            if tuple(tensor.shape) not in wanted or tensor.shape != self.scale.shape:
                expected = f"shape {wanted[0]} or {wanted[1]}, the same for both"
                raise error(describe(f"{where} {name}", expected, str(tuple(tensor.shape)), AGAIN))
        usable = torch.isfinite(self.scale) & (self.scale > 0)
        _check_heads(usable, f"{where} scale", "finite values > 0", "zero, negative, NaN or inf", error)
        _check_heads(torch.isfinite(self.zero_point), f"{where} zero_point", "finite values", "NaN or inf", error)


@dataclass
class TensorStats:
    """Statistics of K (after RoPE) or V of one layer over `tokens` tokens; fp32.

    min, max, mean, var: `[h_kv, d]`, per channel (population variance).
    percentiles:         `[len(PERCENTILES), h_kv, d]`.
    weight:              `[h_kv, d]`, what an error in the channel costs. K: E[q_c^2], averaged over the group's query
                         heads. V: the squared norm of o_proj's column, summed over them; 1 where unknown.
    query:               `[h_kv, d]`, K: the mean query of the head's group, after RoPE. None where unknown, and for V.
    gram:                `[h_kv, d, d]`, symmetric, of any scale: an error e of a row costs e' G e. K: the mean of q q' over
                         the group's queries. V: the sum of W' W over the group's parts W of o_proj, each times the sum of its
                         head's squared attention weights. None where unknown. Files hold it in fp16.
    static:              the scale of the static format that was calibrated for, or None.
    sample:              `[n, h_kv, d]`, some of the tokens; there after a calibration, never in a file.
    """

    min: Tensor
    max: Tensor
    mean: Tensor
    var: Tensor
    percentiles: Tensor
    weight: Tensor
    tokens: int
    static: StaticScale | None = None
    query: Tensor | None = None
    gram: Tensor | None = None
    sample: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def h_kv(self) -> int:
        return self.min.shape[0]

    @property
    def head_dim(self) -> int:
        return self.min.shape[1]

    @property
    def absmax(self) -> Tensor:
        """Largest magnitude per channel, `[h_kv, d]`."""
        return torch.maximum(self.min.abs(), self.max.abs())

    def check(self, where: str, error: type[FoldkvError] = ScaleFileError) -> None:
        """Raise `error`, naming `where` and the head, unless the statistics are whole, finite and of some use."""
        if self.tokens <= 0:
            raise error(describe(where, "observed tokens", str(self.tokens), AGAIN))
        shape = tuple(self.min.shape)
        if len(shape) != 2:
            raise error(describe(f"{where} min", "shape [h_kv, d]", str(shape), AGAIN))
        for name in _STATISTICS:
            got = tuple(getattr(self, name).shape)
            wanted = (len(PERCENTILES), *shape) if name == "percentiles" else shape
            if got != wanted:
                raise error(describe(f"{where} {name}", f"shape {wanted}", str(got), AGAIN))
            finite = torch.isfinite(getattr(self, name)).view(-1, *shape).all(0)
            _check_heads(finite, f"{where} {name}", "finite values", "NaN or inf", error)
        if self.query is not None:
            if tuple(self.query.shape) != shape:
                raise error(describe(f"{where} query", f"shape {shape}", str(tuple(self.query.shape)), AGAIN))
            _check_heads(torch.isfinite(self.query), f"{where} query", "finite values", "NaN or inf", error)
        if self.gram is not None:
            _check_gram(self.gram, shape, f"{where} gram", error)
        ordered = (self.min <= self.max) & (self.var >= 0) & (self.weight >= 0)
        _check_heads(ordered, where, "min <= max, var >= 0 and weight >= 0", "others", error)
        alive = (self.absmax > 0).any(-1, keepdim=True)
        _check_heads(alive, where, "a value other than 0", f"only zeros in {self.tokens} tokens", error)
        if self.static is not None:
            self.static.check(where, (shape[0], shape[1]), error)


@dataclass
class LayerStats:
    """K and V of one layer."""

    k: TensorStats
    v: TensorStats

    def check(self, layer_idx: int, error: type[FoldkvError] = ScaleFileError) -> None:
        """Raise `error`, naming layer, tensor and head, unless K and V are sound and of one shape."""
        self.k.check(f"layer {layer_idx} K", error)
        self.v.check(f"layer {layer_idx} V", error)
        if self.k.min.shape != self.v.min.shape:
            wanted, got = tuple(self.k.min.shape), tuple(self.v.min.shape)
            raise error(describe(f"layer {layer_idx} V", f"the shape of K {wanted}", str(got), AGAIN))


@dataclass
class KVScales:
    """What a calibration found.

    layers: one entry a layer; None for a layer that has no cache of its own (it shares another's, or is no attention).
    config: what `kv_cache_config.json` says of mode, model, data and versions.
    """

    layers: list[LayerStats | None]
    config: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, layer_idx: int) -> LayerStats:
        """The statistics of one layer; ScaleFileError where there are none."""
        if not 0 <= layer_idx < len(self.layers):
            raise ScaleFileError(describe("layer", f"0 .. {len(self.layers) - 1}", str(layer_idx), _OTHER_MODEL))
        layer = self.layers[layer_idx]
        if layer is None:
            raise ScaleFileError(describe(f"layer {layer_idx}", "statistics", "none: it has no cache of its own"))
        return layer

    @property
    def calibrated_len(self) -> int | None:
        """Positions that the calibration covered: static K ranges are known up to there. None where unknown."""
        return self.config.get("data", {}).get("max_position")

    @property
    def grams(self) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """`TensorStats.gram` of K and of V of each layer; None, too, for a layer without statistics."""
        k = [None if layer is None else layer.k.gram for layer in self.layers]
        return k, [None if layer is None else layer.v.gram for layer in self.layers]

    @property
    def plan(self) -> str | None:
        """The mode of every layer that the calibration chose, as `parse_modes` reads it; None where it chose none."""
        return (self.config.get("plan") or {}).get("mode")

    def check(self, error: type[FoldkvError] = ScaleFileError) -> None:
        """Raise `error` unless there is a layer with statistics and all of them are sound."""
        present = [(idx, layer) for idx, layer in enumerate(self.layers) if layer is not None]
        if not present:
            raise error(describe("layers", "at least one with statistics", "none", AGAIN))
        for idx, layer in present:
            layer.check(idx, error)

    def check_model(self, model_config: Any) -> None:
        """ScaleFileError, naming what differs, unless the calibrated model had this config.

        model_config: a transformers config or its dict. Facts that only one side knows are passed over.
        """
        wanted, got = model_facts(model_config), self.config.get("model", {}).get("config", {})
        got = {**got, "num_hidden_layers": len(self.layers)}
        for name in sorted(wanted.keys() & got.keys(), key=_MODEL_FACTS.index):
            if wanted[name] != got[name]:
                expected, found = json.dumps(wanted[name]), json.dumps(got[name])
                raise ScaleFileError(describe(f"model {name}", expected, found, _OTHER_MODEL))

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write both files into `directory` (made if missing), atomically (see `scale_files.write_pair`)."""
        self.check()
        tensors: dict[str, Tensor] = {}
        entries: list[dict[str, Any] | None] = []
        for idx, layer in enumerate(self.layers):
            entry: dict[str, Any] | None = None
            if layer is not None:
                entry = {"h_kv": layer.k.h_kv, "head_dim": layer.k.head_dim}
                for tensor, stats in (("k", layer.k), ("v", layer.v)):
                    entry[f"{tensor}_format"] = stats.static and stats.static.fmt
                    tensors |= {_tensor_name(idx, tensor, part): value for part, value in stats_parts(stats).items()}
            entries.append(entry)
        write_pair(Path(directory), tensors, {**_FIXED, **self.config, **_FIXED, "layers": entries})

    @classmethod
    def load(
        cls, directory: str | os.PathLike[str], model_config: Any = None, *, allow_other_model: bool = False
    ) -> KVScales:
        """Read and check the two files of `directory`.

        model_config: the config of the model they are meant for (transformers config or dict); without it, or with
        `allow_other_model`, the scales of any model pass. Errors: ScaleFileError, naming file, layer and head.
        """
        tensors, config = read_pair(Path(directory), _FIXED)
        entries = config.get("layers")
        if not isinstance(entries, list):
            raise ScaleFileError(describe(f"{CONFIG_FILE} layers", "a list", repr(entries), AGAIN))
        scales = cls([_take_layer(idx, entry, tensors) for idx, entry in enumerate(entries)], config)
        if tensors:
            raise ScaleFileError(describe(SCALES_FILE, f"{len(entries)} layers only", min(tensors), AGAIN))
        scales.check()
        if model_config is not None and not allow_other_model:
            scales.check_model(model_config)
        return scales


_FIXED = {"format_version": FORMAT_VERSION, "basis": BASIS, "percentiles": list(PERCENTILES)}


def model_facts(model_config: Any) -> dict[str, Any]:
    """The facts of a model's (text) config that its K and V depend on, as plain json values; unset ones left out."""
    if hasattr(model_config, "get_text_config"):
        model_config = model_config.get_text_config(decoder=True)
    values = model_config.to_dict() if hasattr(model_config, "to_dict") else model_config
    if not isinstance(values, Mapping):
        raise ArgumentError(describe("model_config", "a transformers config or a dict", type(values).__name__))
    facts = {name: values[name] for name in _MODEL_FACTS if values.get(name) is not None}
    return json.loads(json.dumps(facts, default=str))


def model_hash(model_config: Any) -> str:
    """sha256 of `model_facts`."""
    return json_sha256(model_facts(model_config))


def _check_heads(good: Tensor, where: str, expected: str, got: str, error: type[FoldkvError]) -> None:
    """Raise `error` naming the first head of `good` `[h_kv, ...]` that has a False."""
    bad = (~good.flatten(1).all(-1)).nonzero().flatten().tolist()
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise error(describe(f"{where}, head {bad[0]}{more}", expected, got, AGAIN))


def _check_gram(gram: Tensor, shape: tuple[int, ...], where: str, error: type[FoldkvError]) -> None:
    wanted = (*shape, shape[-1])
    if tuple(gram.shape) != wanted:
        raise error(describe(where, f"shape {wanted}", str(tuple(gram.shape)), AGAIN))
    _check_heads(torch.isfinite(gram), where, "finite values", "NaN or inf", error)
    sound = (gram == gram.transpose(1, 2)) & (gram.diagonal(dim1=1, dim2=2) >= 0)[..., None]
    _check_heads(sound, where, "a symmetric matrix with a diagonal >= 0", "another", error)


def _tensor_name(layer_idx: int, tensor: str, part: str) -> str:
    return f"model.layers.{layer_idx}.self_attn.{tensor}_{part}"


def stats_parts(stats: TensorStats) -> dict[str, Tensor]:
    """The tensors of a file that hold `stats`, by the last part of their names."""
    parts = {name: getattr(stats, name) for name in _STATISTICS}
    if stats.query is not None:
        parts["query"] = stats.query
    if stats.static is not None:
        parts |= {"scale": stats.static.scale, "zero_point": stats.static.zero_point}
    parts = {name: value.detach().float().cpu().contiguous().clone() for name, value in parts.items()}
    if stats.gram is not None:
        parts["gram"] = grams.pack(stats.gram.detach().cpu())
    return {**parts, "tokens": torch.tensor([stats.tokens])}


def _take_layer(idx: int, entry: Any, tensors: dict[str, Tensor]) -> LayerStats | None:
    """The statistics of layer `idx`, taken out of `tensors` and held against its `entry` in the config."""
    if entry is None:
        return None
    if not isinstance(entry, Mapping) or not {"h_kv", "head_dim"} <= entry.keys():
        raise ScaleFileError(describe(f"{CONFIG_FILE} layer {idx}", "h_kv and head_dim", repr(entry), AGAIN))
    return LayerStats(*(_take_stats(idx, tensor, entry, tensors) for tensor in ("k", "v")))


_FILE_DTYPES = {"tokens": torch.int64, "gram": torch.float16}


def _take_stats(idx: int, tensor: str, entry: Mapping[str, Any], tensors: dict[str, Tensor]) -> TensorStats:
    where = f"layer {idx} {tensor.upper()}"

    def take(part: str) -> Tensor:
        name, wanted = _tensor_name(idx, tensor, part), _FILE_DTYPES.get(part, torch.float32)
        if name not in tensors:
            raise ScaleFileError(describe(where, f"a tensor {name}", "none", AGAIN))
        value = tensors.pop(name)
        if value.dtype != wanted:
            raise ScaleFileError(describe(name, str(wanted), str(value.dtype), AGAIN))
        return value

    fmt = entry.get(f"{tensor}_format")
    static = None if fmt is None else StaticScale(fmt, take("scale"), take("zero_point"))
    statistics = {name: take(name) for name in _STATISTICS}
    shape = (entry["h_kv"], entry["head_dim"])
    # Older files have none.
    query, gram = (take(part) if _tensor_name(idx, tensor, part) in tensors else None for part in ("query", "gram"))
    if gram is not None:
        wanted = (shape[0], grams.packed_size(shape[1]))
        if tuple(gram.shape) != wanted:
            raise ScaleFileError(describe(f"{where} gram", f"shape {wanted}", str(tuple(gram.shape)), AGAIN))
        gram = grams.unpack(gram, shape[1])
    stats = TensorStats(**statistics, tokens=int(take("tokens").sum()), static=static, query=query, gram=gram)
    if tuple(stats.min.shape) != shape:
        raise ScaleFileError(describe(where, f"shape {shape}", str(tuple(stats.min.shape)), AGAIN))
    return stats
