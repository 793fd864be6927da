"""Calibrate a checkpoint that does not fit into memory: one layer at a time, and on from where a killed run stopped."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from quant import gram as grams
from quant.errors import ArgumentError, UnsupportedModelError, describe
from quant.scale_files import json_sha256
from quant.scales import LayerStats, TensorStats, model_hash, stats_parts

from .checkpoint import Checkpoint
from .collect import SAMPLE_TOKENS, Batch, Collector, Snapshot, check_model
from .observers import TokenSample
from .sequences import SequenceSample

_RUN = "run-"
_CONTENTS = "statistics with Gram matrices"  # of a layer's file; what was done with others is done again


class StreamedCheckpoint:
    """A checkpoint folder whose layers are loaded one after another.

    model: its decoder with embeddings and a single layer's room, to be given to `calibrate`, with `gather=self.collect`.
    work: a folder for what is done so far: the statistics of each finished layer and the hidden states behind the last.
        Killed at any point, a run on the same folder goes on behind the last finished layer. `clear` it once the scales
        are saved.
    Errors: ArgumentError for what is no checkpoint; UnsupportedModelError where layers share K and V, or lie in no list.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        work: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.checkpoint = Checkpoint(Path(folder))
        self.work = Path(work)
        self._device = torch.device(device)
        config = AutoConfig.from_pretrained(folder)
        self._dtype = dtype or config.dtype or torch.float32
        text = config.get_text_config(decoder=True)
        if getattr(text, "num_kv_shared_layers", None):
            fix = "load the whole model"
            raise UnsupportedModelError(describe("streaming", "layers with a cache of their own", "shared ones", fix))
        self._num_layers = text.num_hidden_layers
        self.model = _skeleton(text, self._dtype)
        self._list_name = _layer_list(self.model)
        self._layer_type = type(self.model.get_submodule(self._list_name)[0])
        self._prefix = self._find_prefix()
        outside = [name for name, _ in self.model.named_parameters() if not name.startswith(f"{self._list_name}.")]
        self._fill(self.model, {name: self._prefix + name for name in outside})
        self.model.to(self._device).eval()

    def collect(
        self,
        model: PreTrainedModel,
        batches: Iterable[Batch],
        *,
        seed: int = 0,
        sample_tokens: int = SAMPLE_TOKENS,
        sequences: SequenceSample | None = None,
        snapshot: Snapshot | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> list[LayerStats | None]:
        """As `calib.collect.collect`, bit for bit, with the memory of one layer. model: must be `self.model`."""
        check_model(model)
        todo = [batch if isinstance(batch, Mapping) else {"input_ids": batch} for batch in batches]
        count = sum(len(batch["input_ids"]) for batch in todo)
        run = self._open_run(todo, seed, sample_tokens)
        found: list[LayerStats | None] = []
        early: list[LayerStats | None] = []
        first, hidden = self._resume(run, found)
        for idx in range(first, self._num_layers):
            layer = self._load_layer(idx)
            look = Snapshot(snapshot.sequences) if snapshot is not None else None
            collector = Collector(model, TokenSample(sample_tokens, seed), sequences)
            after = self._run_layer(idx, layer, collector, todo, hidden, sequences, look)
            stats = collector.finish()[idx]
            found.append(stats)
            early.append(look.layers[idx] if look is not None and look.layers else None)
            if look is not None and snapshot is not None and look.layers:
                done_first = look.sequences
            hidden = after
            self._save(run, idx, stats, hidden)
            if on_batch is not None:
                on_batch(count * (idx + 1) // self._num_layers)
        # A resumed run did not see the first layers early: then there is no drift to tell.
        if snapshot is not None and first == 0 and all(entry is not None for entry in early):
            snapshot.layers, snapshot.sequences = early, done_first
        return found

    # --- one layer ----------------------------------------------------------------------------------------------------

    def _load_layer(self, idx: int) -> nn.Module:
        layer = self._layer_type(self.model.config, layer_idx=idx).to(self._dtype)
        stem = f"{self._prefix}{self._list_name}.{idx}."
        self._fill(layer, {name: stem + name for name, _ in layer.named_parameters()})
        return layer.to(self._device).eval()

    def _fill(self, module: nn.Module, names: Mapping[str, str]) -> None:
        """Load the parameters called `names` (module's name -> checkpoint's name)."""
        tensors = self.checkpoint.load(names.values())
        parameters = dict(module.named_parameters())
        for own, theirs in names.items():
            value = tensors[theirs]
            if value.shape != parameters[own].shape:
                got = str(tuple(value.shape))
                raise ArgumentError(describe(f"tensor {theirs}", f"shape {tuple(parameters[own].shape)}", got))
            parameters[own].data = value.to(self._dtype)

    def _find_prefix(self) -> str:
        """What the checkpoint puts before the decoder's own names, "model." most often."""
        ending = f"{self._list_name}.0."
        names = {name.partition(ending)[0] for name in self.checkpoint.shards if ending in name}
        if len(names) != 1:
            got = ", ".join(sorted(names)) or "none"
            raise ArgumentError(describe("checkpoint", f"tensors named ...{ending}...", got))
        return names.pop()

    @torch.no_grad()
    def _run_layer(
        self,
        idx: int,
        layer: nn.Module,
        collector: Collector,
        batches: list[Mapping[str, Tensor]],
        hidden: list[Tensor] | None,
        sequences: SequenceSample | None,
        look: Snapshot | None,
    ) -> list[Tensor]:
        """Run layer `idx` on every batch. hidden: what the layer before gave; None: the embeddings are its input.

        The decoder's own forward makes masks, positions and what else a layer wants; its layers stand in: those before
        `idx` do nothing, layer `idx` works on the stored hidden states, and there the pass ends.
        """
        proxies = [_Proxy(number, idx, layer) for number in range(self._num_layers)]
        _set_submodule(self.model, self._list_name, nn.ModuleList(proxies))
        after: list[Tensor] = []
        done = 0
        with collector.attached():
            for number, batch in enumerate(batches):
                size = len(batch["input_ids"])
                if sequences is not None:
                    sequences.advance(done, size)
                proxies[idx].hidden = None if hidden is None else hidden[number].to(self._device)
                try:
                    collector.forward(batch)
                except _LayerDoneError as result:
                    after.append(result.hidden.cpu())
                collector.layers[idx].check_finite()
                done += size
                if look is not None and not look.layers and done >= look.sequences:
                    look.layers, look.sequences = collector.finish(), done
        return after

    # --- what is done so far ------------------------------------------------------------------------------------------

    def _open_run(self, batches: list[Mapping[str, Tensor]], seed: int, sample_tokens: int) -> Path:
        """The folder of this very calibration: its name is the hash of everything that its figures depend on."""
        inputs = [{name: value.tolist() for name, value in batch.items()} for batch in batches]
        sizes = {name: (self.checkpoint.folder / name).stat().st_size for name in set(self.checkpoint.shards.values())}
        facts = [
            _CONTENTS,
            model_hash(self.model.config),
            self.checkpoint.shards,
            sizes,
            inputs,
            seed,
            sample_tokens,
            str(self._dtype),
        ]
        run = self.work / f"{_RUN}{json_sha256(facts)[:16]}"
        run.mkdir(parents=True, exist_ok=True)
        return run

    def _resume(self, run: Path, found: list[LayerStats | None]) -> tuple[int, list[Tensor] | None]:
        """The first layer to do and its input; `found` gets the statistics of those before."""
        # Hidden states are written before the statistics of their layer: a layer with statistics is done.
        done = 0
        while _stats_path(run, done).is_file():
            done += 1
        while done and not _hidden_path(run, done - 1).is_file() and done < self._num_layers:
            done -= 1
        for idx in range(done):
            tensors = load_file(_stats_path(run, idx))
            found.append(LayerStats(*(_unpack(tensors, tensor) for tensor in ("k", "v"))))
        if not done or done == self._num_layers:
            return done, None
        saved = load_file(_hidden_path(run, done - 1))
        return done, [saved[str(number)] for number in range(len(saved))]

    def _save(self, run: Path, idx: int, stats: LayerStats | None, hidden: list[Tensor]) -> None:
        """Hidden states first, then the statistics that say the layer is done, then the old hidden states go."""
        assert stats is not None
        _write(_hidden_path(run, idx), {str(number): part for number, part in enumerate(hidden)})
        _write(_stats_path(run, idx), {**_pack(stats.k, "k"), **_pack(stats.v, "v")})
        _hidden_path(run, idx - 1).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove what is done so far, once the scales are safe elsewhere."""
        for run in self.work.glob(f"{_RUN}*"):
            shutil.rmtree(run)
        if self.work.is_dir() and not any(self.work.iterdir()):
            self.work.rmdir()


def _stats_path(run: Path, idx: int) -> Path:
    return run / f"layer-{idx:05}.safetensors"


def _hidden_path(run: Path, idx: int) -> Path:
    return run / f"hidden-{idx:05}.safetensors"


class _LayerDoneError(Exception):
    """Ends a forward pass behind the layer that was asked for."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__("layer done")
        self.hidden = hidden


class _Proxy(nn.Module):
    """Stands in for layer `number` while layer `wanted` is at work."""

    def __init__(self, number: int, wanted: int, layer: nn.Module) -> None:
        super().__init__()
        self.number, self.wanted = number, wanted
        self.hidden: Tensor | None = None
        if number == wanted:
            self.layer = layer
        else:
            # Not registered: the module would be found as many times as there are layers.
            self.__dict__["layer"] = layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__.get("layer") or self._modules["layer"], name)

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.number < self.wanted:
            return hidden
        result = self.layer(hidden if self.hidden is None else self.hidden, *args, **kwargs)
        raise _LayerDoneError(result[0] if isinstance(result, tuple) else result)


def _skeleton(text_config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The decoder with as few layers as show every layer type; its config says all."""
    config = copy.deepcopy(text_config)
    count, types = config.num_hidden_layers, list(getattr(config, "layer_types", None) or ())
    config.num_hidden_layers = max((types.index(kind) + 1 for kind in types), default=1)
    if types:
        config.layer_types = types[: config.num_hidden_layers]
    model = AutoModel.from_config(config, dtype=dtype)
    model.config.num_hidden_layers = count
    if types:
        model.config.layer_types = types
    return model


def _layer_list(model: nn.Module) -> str:
    """The name of the list of decoder layers, those that hold attention with a layer_idx."""
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(hasattr(part, "layer_idx") for part in module.modules())
    ]
    tops = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if len(tops) != 1:
        got = ", ".join(tops) or "none"
        raise UnsupportedModelError(describe("streaming", "one list of layers", got, "load the whole model"))
    return tops[0]


def _set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _pack(stats: TensorStats, tensor: str) -> dict[str, Tensor]:
    parts = stats_parts(stats)
    if stats.sample is not None:
        parts["sample"] = stats.sample
    return {f"{tensor}_{name}": value for name, value in parts.items()}


def _unpack(tensors: Mapping[str, Tensor], tensor: str) -> TensorStats:
    parts = {name.removeprefix(f"{tensor}_"): value for name, value in tensors.items() if name.startswith(f"{tensor}_")}
    if "gram" in parts:
        parts["gram"] = grams.unpack(parts["gram"], parts["min"].shape[1])
    return TensorStats(**{**parts, "tokens": int(parts["tokens"].sum())})  # type: ignore[arg-type]


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    """The file appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
