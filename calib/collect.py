"""One pass of text through a model, its attention observed: post-RoPE K and V, and the queries that meet them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quant.errors import ArgumentError, CalibrationError, UnsupportedModelError, describe
from quant.scales import LayerStats
from quant.spec import MAX_SHAPED_DIM

from .observers import LayerObserver, TokenSample
from .sequences import NUM_SEQUENCES, SEQUENCE_LEN, SequenceSample

OBSERVE = "foldkv_observe"
SAMPLE_TOKENS = 4096
_OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense", "wo")

Batch = Tensor | Mapping[str, Tensor]


@dataclass
class Snapshot:
    """Statistics after the first `sequences` sequences (afterwards: as many as there were at the end of their batch)."""

    sequences: int
    layers: list[LayerStats | None] = field(default_factory=list)


def collect(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    *,
    seed: int = 0,
    sample_tokens: int = SAMPLE_TOKENS,
    sequences: SequenceSample | None = None,
    snapshot: Snapshot | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> list[LayerStats | None]:
    """Statistics of every layer's K and V over `batches`; None for layers without a cache of their own.

    model: any transformers decoder whose attention goes through `AttentionInterface`. It attends as it always does
        and is left as it was, errors included.
    batches: token ids int64 `[batch, seq]`, or a mapping with `input_ids` and perhaps `attention_mask` and
        `position_ids`, all `[batch, seq]`; tokens whose mask is 0, left or right, are not counted.
    seed, sample_tokens: percentiles come from a uniform sample of that many tokens, drawn with that seed.
    sequences: takes the q, k and v of the whole sequences that it wants, those without padding.
    snapshot: gets the statistics of the first sequences.
    on_batch: called with the number of sequences done, after each batch.
    Errors: UnsupportedModelError; CalibrationError naming layer and head for non-finite or dead heads, and for layers
    that saw no token.
    """
    expected = check_model(model)
    collector = Collector(model, TokenSample(sample_tokens, seed), sequences)
    done = 0
    with collector.attached(), torch.no_grad():
        for batch in batches:
            if sequences is not None:
                sequences.advance(done, len(batch if isinstance(batch, Tensor) else batch["input_ids"]))
            done += collector.forward(batch)
            if snapshot is not None and not snapshot.layers and done >= snapshot.sequences:
                snapshot.layers, snapshot.sequences = collector.finish(), done
            if on_batch is not None:
                on_batch(done)
    if not collector.layers:
        fix = "give text" if done == 0 else "none of its attention went through AttentionInterface"
        raise CalibrationError(describe("calibration", "at least one observed token", "none", fix))
    unseen = sorted(expected - collector.layers.keys())
    if unseen:
        fix = "its attention did not go through AttentionInterface"
        raise CalibrationError(describe(f"layer {unseen[0]}", "observed tokens", "none", fix))
    return collector.finish()


def check_model(model: Any) -> set[int]:
    """The layers that should be seen attending; UnsupportedModelError for a model that cannot be observed."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(describe("model", "a transformers PreTrainedModel", name))
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(describe("model", "a decoder-only model", f"{name}, an encoder-decoder"))
    text = text_config(model)
    if getattr(text, "kv_lora_rank", None) is not None:
        fix = "its cache holds latents, not K and V"
        raise UnsupportedModelError(describe("model", "K and V per head", f"{name}, multi-head latent attention", fix))
    if not model._can_set_attn_implementation():
        fix = "its attention code does not use transformers' AttentionInterface, so foldkv cannot reach its K and V"
        raise UnsupportedModelError(describe("model", "attention that can be switched", name, fix))
    types = _layer_types(model)
    owners = len(types) - (getattr(text, "num_kv_shared_layers", None) or 0)
    return {idx for idx, kind in enumerate(types[:owners]) if "attention" in kind and "linear" not in kind}


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """`model.eval()` for a while; every module's own flag is put back on leaving."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def text_config(model: PreTrainedModel) -> Any:
    """The config of the model's decoder: its own, or the text part of a multimodal one."""
    return model.config.get_text_config(decoder=True)


def _layer_types(model: PreTrainedModel) -> list[str]:
    text = text_config(model)
    return list(getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers)


class Collector:
    """The observers of one pass, fed by the registered attention function."""

    def __init__(self, model: PreTrainedModel, sample: TokenSample, sequences: SequenceSample | None) -> None:
        self.layers: dict[int, LayerObserver] = {}
        self._model = model
        self._sample = sample
        self._sequences = sequences
        self._stock = text_config(model)._attn_implementation or "eager"
        self._seq_len = 0
        self._done = 0  # sequences
        self._weighed = 0  # sequences at the head of the batch whose attention weights are looked at
        self._counted: Tensor | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The model in eval mode with its attention observed; everything is put back on leaving."""
        AttentionInterface.register(OBSERVE, _observe)
        AttentionMaskInterface.register(OBSERVE, _mask)
        with ExitStack() as undo:
            undo.enter_context(eval_mode(self._model))
            for config in _configs(self._model):
                previous = config._attn_implementation_internal
                undo.callback(setattr, config, "_attn_implementation_internal", previous)
            undo.callback(_active.reset, _active.set(self))
            self._model.set_attn_implementation(_implementation(self._model, OBSERVE))
            yield

    def forward(self, batch: Batch) -> int:
        """Run one batch through the model; returns its number of sequences."""
        inputs = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        if ids.dim() != 2:
            raise ArgumentError(describe("input_ids", "shape [batch, seq]", str(tuple(ids.shape))))
        for name, value in inputs.items():
            if value.shape != ids.shape:
                raise ArgumentError(describe(name, f"shape {tuple(ids.shape)}", str(tuple(value.shape))))
        # Places of the counted tokens in the flattened batch; None: all of them.
        self._counted = None if mask is None or bool(mask.all()) else mask.flatten().nonzero().flatten()
        self._seq_len = ids.shape[1]
        self._weighed = max(0, min(len(ids), NUM_SEQUENCES - self._done))
        self._done += len(ids)
        count = ids.numel() if self._counted is None else len(self._counted)
        if count == 0:
            return len(ids)
        self._sample.advance(count)
        device: Any = self._model.get_input_embeddings().weight.device
        # The decoder alone: K and V do not need the vocabulary projection.
        self._model.base_model(**{name: value.to(device) for name, value in inputs.items()}, use_cache=False)
        for layer in self.layers.values():
            layer.check_finite()
        return len(ids)

    def finish(self) -> list[LayerStats | None]:
        """The statistics so far, one entry a layer; CalibrationError naming layer and head for a dead head."""
        num_layers = max(len(_layer_types(self._model)), max(self.layers) + 1)
        found = (self.layers.get(idx) for idx in range(num_layers))
        return [None if layer is None else layer.finish() for layer in found]

    def observe(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, options: Mapping[str, Any]) -> None:
        """Take in post-RoPE q `[batch, h_q, seq, d]`, k and v `[batch, h_kv, seq, d]` of one layer.

        options: what the attention function was called with beside them.
        """
        idx = getattr(module, "layer_idx", None)
        if idx is None:
            raise UnsupportedModelError(describe(type(module).__name__, "an attribute layer_idx", "none"))
        if getattr(module, "is_kv_shared_layer", False):
            return
        if k.shape != v.shape or q.shape[-1] != k.shape[-1] or k.shape[2] != self._seq_len:
            shapes = ", ".join(str(tuple(part.shape)) for part in (q, k, v))
            raise UnsupportedModelError(describe(f"layer {idx} q, k, v", "one head_dim and every token", shapes))
        if self._sequences is not None and self._counted is None:
            self._sequences.update(idx, q, k, v, options.get("scaling"), options.get("sliding_window"))
        weighed = [
            tuple(part[row, :, :SEQUENCE_LEN].transpose(0, 1) for part in (q, k))
            for row in range(self._weighed if self._counted is None else 0)
        ]
        q, k, v = (part.transpose(1, 2).flatten(0, 1) for part in (q, k, v))
        if self._counted is not None:
            counted = self._counted.to(k.device)
            q, k, v = q[counted], k[counted], v[counted]
        if idx not in self.layers:
            self.layers[idx] = layer = LayerObserver(idx, k, v, self._sample.size)
            _observe_output(layer, module, q.shape[1], v)
        self.layers[idx].update(q, k, v, self._sample)
        for queries, keys in weighed:
            self.layers[idx].weigh_heads(queries, keys, options.get("scaling"), options.get("sliding_window"))

    @property
    def mask_function(self) -> Callable[..., Any]:
        return ALL_MASK_ATTENTION_FUNCTIONS[self._stock]

    def attention_function(self, module: nn.Module) -> Callable[..., Any]:
        """The attention that the model had: a registered one, or its own file's eager one."""
        if self._stock == "eager":
            return sys.modules[type(module).__module__].eager_attention_forward
        return ALL_ATTENTION_FUNCTIONS[self._stock]


_active: ContextVar[Collector] = ContextVar("foldkv_collector")


def _observe(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The registered attention function: look at q, k and v, then attend as the model would have."""
    collector = _active.get()
    collector.observe(module, query, key, value, kwargs)
    return collector.attention_function(module)(module, query, key, value, *args, **kwargs)


def _mask(*args: Any, **kwargs: Any) -> Any:
    """The registered mask function: the mask that the model's own attention wants."""
    return _active.get().mask_function(*args, **kwargs)


def _configs(model: PreTrainedModel) -> list[Any]:
    """Every config object in the model that holds an attention implementation, sub-configs included."""
    found = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    queue = list(found.values())
    while queue:
        config = queue.pop()
        for name in config.sub_configs:
            part = getattr(config, name, None)
            if part is not None and id(part) not in found:
                found[id(part)] = part
                queue.append(part)
    return list(found.values())


def _implementation(model: PreTrainedModel, name: str) -> str | dict[str, str]:
    """What `set_attn_implementation` needs to switch the text part alone (vision and audio towers keep theirs)."""
    text = text_config(model)
    keys = [key for key in model.config.sub_configs if getattr(model.config, key, None) is text]
    return {keys[0]: name} if keys else name


def _observe_output(layer: LayerObserver, module: nn.Module, h_q: int, v: Tensor) -> None:
    """Give `layer` what the output projection of its attention makes of V `[tokens, h_kv, d]`.

    Where there is no plain one to read, it keeps weights of one and no Gram matrix.
    """
    _, h_kv, d = v.shape
    for name in _OUTPUT_PROJECTIONS:
        weight = getattr(getattr(module, name, None), "weight", None)
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.is_meta:
            continue
        if weight.dim() == 2 and weight.shape[1] == h_q * d:
            columns = weight.detach().float()
            layer.output_weight = columns.square().sum(0).view(h_kv, h_q // h_kv, d).sum(1)
            if d <= MAX_SHAPED_DIM:
                heads = columns.view(-1, h_q, d).transpose(0, 1)
                layer.output_gram = heads.transpose(1, 2) @ heads
            return
