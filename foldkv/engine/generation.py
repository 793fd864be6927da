"""`model.generate()` of a swapped model on the engine, where the engine can give what was asked for; and why not elsewhere."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from foldkv.hf.swap import KVSwap, current_swap, serve_generate
from quant.errors import FoldkvError, UnsupportedModelError

from .build import check_rope
from .engine import Engine
from .runner import check_signature
from .sampling import MAX_STOP_IDS, SamplingParams

MAX_ROWS = 256
# Options of `generate` that the engine serves, or that say nothing about the tokens.
_SERVED = {
    "max_length", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "num_return_sequences", "use_cache",
    "eos_token_id", "pad_token_id", "bos_token_id", "transformers_version", "prefill_chunk_size", "compile_config",
    "disable_compile", "_from_model_config", "max_cache_len", "cache_implementation",
}  # fmt: skip
_ARGUMENTS = ("inputs", "input_ids", "attention_mask", "generation_config", "streamer")


@dataclass(frozen=True)
class Explanation:
    """Whether `generate` of a model runs on the engine; reasons: why not, one for each thing in the way."""

    on_engine: bool
    reasons: tuple[str, ...]
    graphs: str = ""

    def __str__(self) -> str:
        if self.on_engine:
            return f"generate() runs on the engine, {self.graphs or 'each decoding step one CUDA graph'}"
        return "generate() runs transformers' own loop: " + "; ".join(self.reasons)


@dataclass(frozen=True)
class _Job:
    """A call of `generate` as the engine takes it. prompts: token ids without padding; width: of the padded input."""

    prompts: list[list[int]]
    params: SamplingParams
    copies: int
    pad: int
    inputs: Tensor
    streamer: Any


def explain(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Explanation:
    """Whether `model.generate(*args, **kwargs)` runs on the engine, and if not, why; nothing is run.

    Without arguments: for a plain greedy call.
    """
    swap = current_swap(model)
    if swap is None:
        return Explanation(False, ("the model is not swapped (foldkv.swap_kv_cache)",))
    if not args and not {"inputs", "input_ids"} & kwargs.keys():
        kwargs = {"max_new_tokens": 1, **kwargs, "inputs": torch.ones(1, 1, dtype=torch.int64, device=model.device)}
    found = _job(swap, args, kwargs)
    if not isinstance(found, _Job):
        return Explanation(False, tuple(found))
    on_gpu = swap.model.device.type == "cuda"
    why_not = check_rope(swap.model, 1) if on_gpu else "they need a GPU"
    return Explanation(True, (), f"without CUDA graphs, as {why_not}" if why_not else "")


def generate(swap: KVSwap, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """What `generate` returns, int64 `[rows, prompt + new tokens]`, or None where the engine cannot serve the call."""
    job = _job(swap, args, kwargs)
    if not isinstance(job, _Job):
        return None
    rows = len(job.prompts) * job.copies
    longest = max(len(prompt) for prompt in job.prompts) + job.params.max_new_tokens
    engine = _engine_for(swap, rows, longest)
    prompts = [prompt for prompt in job.prompts for _ in range(job.copies)]
    if job.streamer is None:
        new = engine.generate(prompts, job.params)
    else:
        new = [[]]
        job.streamer.put(job.inputs.cpu())
        for _, token in engine.stream(prompts, job.params):
            new[0].append(token)
            job.streamer.put(torch.tensor([token]))
        job.streamer.end()
    width = max(len(tokens) for tokens in new)
    padded = torch.tensor([[*tokens, *[job.pad] * (width - len(tokens))] for tokens in new])
    inputs = job.inputs.repeat_interleave(job.copies, 0)
    return torch.cat((inputs, padded.to(inputs.device)), dim=1)


serve_generate(generate)


def _engine_for(swap: KVSwap, rows: int, longest: int) -> Engine:
    """The engine of the swap, made anew where it is too small. It holds its pool until the swap ends or is changed."""
    engine: Engine | None = swap.engine
    batch = min(1 << (rows - 1).bit_length(), MAX_ROWS)
    if engine is None or engine.max_batch < batch or engine.max_seq_len < longest:
        if engine is not None:
            batch, longest = max(batch, engine.max_batch), max(longest, engine.max_seq_len)
            swap.release_engine()
        # A little longer than asked for, so that the next call finds it large enough.
        longest = 1 << max(8, (longest - 1).bit_length())
        try:
            check_rope(swap.model, longest)
        except UnsupportedModelError:
            longest = _rope_limit(swap, longest)
        engine = swap.engine = Engine(swap.model, max_batch=batch, max_seq_len=longest)
    return engine


def _rope_limit(swap: KVSwap, longest: int) -> int:
    """The greatest length below `longest` that `check_rope` allows."""
    low, high = 1, longest
    while high - low > 1:
        middle = (low + high) // 2
        try:
            check_rope(swap.model, middle)
            low = middle
        except UnsupportedModelError:
            high = middle
    return low


def _job(swap: KVSwap, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> _Job | list[str]:
    """The call for the engine, or the reasons against it."""
    model = swap.model
    reasons = _standing_reasons(swap)
    if len(args) > 1:
        names = list(inspect.signature(type(model).generate).parameters)[1:]
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    elif args:
        kwargs = {"inputs": args[0], **kwargs}
    call = {name: kwargs.get(name) for name in _ARGUMENTS}
    named = set(inspect.signature(type(model).generate).parameters) - {"self", "kwargs", *_ARGUMENTS}
    reasons += [f"the argument {name}" for name in sorted(named) if kwargs.get(name) is not None]
    rest = {name: value for name, value in kwargs.items() if name not in {*named, *_ARGUMENTS}}
    try:
        config, model_kwargs = model._prepare_generation_config(call["generation_config"], **rest)
    except (ValueError, TypeError):
        return [*reasons, "transformers refuses the options"]
    reasons += [f"the argument {name}" for name, value in sorted(model_kwargs.items()) if value is not None]
    neutral = config._get_default_generation_params()
    for name, value in config.to_dict().items():
        if not (name in _SERVED or value is None or value is False or value == neutral.get(name)):
            reasons.append(f"{name}={value!r}")
    if config.use_cache is False:
        reasons.append("use_cache=False")
    if (config.cache_implementation or "dynamic") != "dynamic":
        reasons.append(f"cache_implementation={config.cache_implementation!r}")
    ids = call["inputs"] if call["inputs"] is not None else call["input_ids"]
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or not ids.numel():
        return [*reasons, "no input ids [rows, tokens]"]
    prompts = _prompts(ids, call["attention_mask"], config.pad_token_id)
    if isinstance(prompts, str):
        return [*reasons, prompts]
    given = (rest.get("max_length"), getattr(call["generation_config"], "max_length", None))
    if config.max_new_tokens is None and all(value is None for value in (*given, model.generation_config.max_length)):
        reasons.append("neither max_new_tokens nor max_length")
    copies = config.num_return_sequences or 1
    if call["streamer"] is not None and len(prompts) * copies != 1:
        reasons.append("a streamer for more than one row")
    params = _params(config, ids.shape[1])
    if isinstance(params, str):
        return [*reasons, params]
    if reasons:
        return reasons
    pad = config.pad_token_id if config.pad_token_id is not None else next(iter(params.stop_token_ids or (0,)))
    return _Job(prompts, params, copies, pad, ids, call["streamer"])


def _standing_reasons(swap: KVSwap) -> list[str]:
    """What keeps every call from the engine."""
    reasons = []
    if swap.use_engine is False:
        reasons.append("the swap was made with engine=False")
    elif swap.use_engine is None and swap.model.device.type != "cuda":
        reasons.append("the model is on a CPU, where the engine gains nothing (engine=True uses it all the same)")
    try:
        check_signature(swap.model)
        check_rope(swap.model, 1)
    except FoldkvError as error:
        reasons.append(str(error))
    if swap.model.training:
        reasons.append("the model is in training mode")
    return reasons


def _prompts(ids: Tensor, mask: Any, pad: int | None) -> list[list[int]] | str:
    """Token ids of each row without its padding, or what is wrong."""
    if mask is None and pad is not None and len(ids) > 1 and bool((ids == pad).any()):
        return "padding without an attention_mask"
    if mask is None:
        return ids.tolist()
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        return "an attention_mask of another shape"
    keep = mask.bool().cpu()
    if not bool((keep.int().diff(dim=1) >= 0).all()) or not bool(keep[:, -1].all()):
        return "padding that is not on the left"
    return [row[kept].tolist() for row, kept in zip(ids.cpu(), keep, strict=True)]


def _params(config: Any, width: int) -> SamplingParams | str:
    """How the engine samples for a generation config, or what is wrong."""
    count = config.max_new_tokens if config.max_new_tokens is not None else config.max_length - width
    eos = config.eos_token_id
    stops = tuple(eos if isinstance(eos, list) else [] if eos is None else [eos])
    if count < 1 or len(stops) > MAX_STOP_IDS:
        return f"{count} new tokens" if count < 1 else f"more than {MAX_STOP_IDS} eos tokens"
    if not config.do_sample:
        return SamplingParams(count, stop_token_ids=stops)
    temperature = 1.0 if config.temperature is None else config.temperature
    top_p = 1.0 if config.top_p is None else config.top_p
    if temperature <= 0 or not 0 < top_p <= 1:
        return f"sampling with temperature {temperature} and top_p {top_p}"
    return SamplingParams(count, temperature, config.top_k or 0, top_p, stop_token_ids=stops)
