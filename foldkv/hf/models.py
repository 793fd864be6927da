"""Which models can have their KV cache swapped. Importing this needs neither torch nor transformers."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quant.errors import ArgumentError, UnsupportedModelError, describe
from quant.spec import check_head_dim

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ModelFamily:
    """A model family: `model_type` as in its config.json, the name people use, a note, and how much the tests run.

    core: every decoding strategy (greedy, beams, left padding, assisted, prompt lookup, chunked prefill), the engine, and
    quantised modes against the reference cache; others: a greedy batch and the engine.
    """

    model_type: str
    name: str
    note: str = ""
    core: bool = False

    @property
    def tested(self) -> str:
        """What the tests run, in words."""
        return "every strategy, modes, engine" if self.core else "greedy, engine"


# The families that the tests run, token for token against the stock cache.
SUPPORTED = (
    ModelFamily("llama", "Llama 2, 3, SmolLM, TinyLlama", core=True),
    ModelFamily("qwen2", "Qwen2, Qwen2.5", "K bias: prefer modes that centre K", core=True),
    ModelFamily("qwen3", "Qwen3", "normalised queries and keys", core=True),
    ModelFamily("qwen3_moe", "Qwen3 MoE", core=True),
    ModelFamily("mistral", "Mistral", "sliding window", core=True),
    ModelFamily("phi3", "Phi-3, Phi-3.5, Phi-4", "partial rotary, sliding window", core=True),
    ModelFamily("gemma2", "Gemma 2", "softcap, every other layer with a sliding window", core=True),
    ModelFamily("gemma3_text", "Gemma 3, text", "sliding windows", core=True),
    ModelFamily("gemma3n_text", "Gemma 3n, text", "layers that share K and V", core=True),
    ModelFamily("gemma4_text", "Gemma 4, text", "layers that share K and V, two head sizes", core=True),
    ModelFamily("gpt_oss", "GPT-OSS", "attention sinks, sliding windows", core=True),
    ModelFamily("olmo", "OLMo", core=True),
    ModelFamily("olmo2", "OLMo 2", core=True),
    ModelFamily("olmo3", "OLMo 3", "sliding windows", core=True),
    ModelFamily("granite", "Granite 3", core=True),
    ModelFamily("apertus", "Apertus"),
    ModelFamily("arcee", "Arcee AFM"),
    ModelFamily("biogpt", "BioGPT"),
    ModelFamily("cohere", "Command R"),
    ModelFamily("cohere2", "Command R7B, A", "sliding windows"),
    ModelFamily("ernie4_5", "Ernie 4.5"),
    ModelFamily("exaone4", "EXAONE 4", "sliding windows"),
    ModelFamily("gemma", "Gemma"),
    ModelFamily("glm", "GLM-4-9B"),
    ModelFamily("glm4", "GLM-4-0414"),
    ModelFamily("gpt2", "GPT-2"),
    ModelFamily("gpt_bigcode", "StarCoder", "one K/V head"),
    ModelFamily("gpt_neox", "GPT-NeoX, Pythia"),
    ModelFamily("granitemoe", "Granite 3 MoE"),
    ModelFamily("helium", "Helium"),
    ModelFamily("hunyuan_v1_dense", "Hunyuan, dense"),
    ModelFamily("ministral", "Ministral 8B", "sliding windows"),
    ModelFamily("ministral3", "Ministral 3"),
    ModelFamily("mixtral", "Mixtral", "sliding window"),
    ModelFamily("nemotron", "Nemotron"),
    ModelFamily("opt", "OPT"),
    ModelFamily("persimmon", "Persimmon"),
    ModelFamily("phi", "Phi-1, Phi-2", "partial rotary"),
    ModelFamily("qwen2_moe", "Qwen1.5, Qwen2 MoE"),
    ModelFamily("seed_oss", "Seed-OSS"),
    ModelFamily("smollm3", "SmolLM3"),
    ModelFamily("stablelm", "StableLM"),
    ModelFamily("starcoder2", "StarCoder2", "sliding window"),
    ModelFamily("vaultgemma", "VaultGemma", "softcap, sliding windows"),
)

_OWN_ATTENTION = "its attention does not go through transformers' AttentionInterface, so it cannot be switched"
_LATENT = "multi-head latent attention caches latents, which the model expands itself"

REFUSED = (
    ModelFamily("mpt", "MPT", _OWN_ATTENTION),
    ModelFamily("bloom", "Bloom", _OWN_ATTENTION),
    ModelFamily("falcon", "Falcon", _OWN_ATTENTION),
    ModelFamily("gptj", "GPT-J", _OWN_ATTENTION),
    ModelFamily("codegen", "CodeGen", _OWN_ATTENTION),
    ModelFamily("gpt_neo", "GPT-Neo", _OWN_ATTENTION),
    ModelFamily("xglm", "XGLM", _OWN_ATTENTION),
    ModelFamily("deepseek_v2", "DeepSeek-V2", _LATENT),
    ModelFamily("deepseek_v3", "DeepSeek-V3, R1", _LATENT),
    ModelFamily("diffllama", "DiffLlama", "it changes K and V after the cache returned them"),
    ModelFamily("llama4_text", "Llama 4", "chunked attention is neither full nor a sliding window"),
    ModelFamily("mamba", "Mamba", "it keeps a recurrent state, no keys and values"),
    ModelFamily("qwen3_next", "Qwen3-Next", "linear attention layers keep a recurrent state"),
)

_LAYER_TYPES = {"full_attention", "sliding_attention"}


def check_model(model: Any) -> PreTrainedModel:
    """`model`, if its KV cache can be swapped; nothing is changed.

    Errors: ArgumentError for what is no transformers model, UnsupportedModelError with the reason for the others.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        raise ArgumentError(describe("model", "a transformers PreTrainedModel", type(model).__name__))
    reason = refusal(model)
    if reason:
        raise UnsupportedModelError(
            describe("model", "one whose KV cache can be swapped", type(model).__name__, reason)
        )
    return model


def refusal(model: PreTrainedModel) -> str:
    """Why the KV cache of `model` cannot be swapped; "" if it can."""
    config = model.config
    for family in REFUSED:
        if config.model_type == family.model_type:
            return family.note
    if config.is_encoder_decoder:
        return "it is an encoder-decoder; foldkv caches decoder-only models"
    if not model.can_generate() or not getattr(config, "is_causal", True):
        return "it has no decoder that generates text; load it with AutoModelForCausalLM"
    text = config.get_text_config(decoder=True)
    if getattr(text, "kv_lora_rank", None) is not None:
        return _LATENT
    other = sorted(set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES)
    if other or getattr(model, "_is_stateful", False):
        return f"it has layers other than full and sliding-window attention ({', '.join(other) or 'recurrent ones'})"
    if not model._can_set_attn_implementation():
        return _OWN_ATTENTION
    if any(getattr(module, "is_causal", True) is False for module in model.get_decoder().modules()):
        return "its attention looks both ways; foldkv caches causal decoders"
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return "it is spread over several devices; load it on one"
    try:
        for _, head_dim in kv_shapes(text):
            check_head_dim(head_dim)
    except ArgumentError as error:
        return str(error)
    return ""


def kv_shapes(text_config: Any) -> list[tuple[int, int]]:
    """(K/V heads, channels of a head) of each layer that has a cache of its own, by a text config."""
    count = text_config.num_hidden_layers
    layers = getattr(text_config, "per_layer_config", None) or [text_config] * count
    return [_kv_shape(layer) for layer in layers[: count - (getattr(text_config, "num_kv_shared_layers", None) or 0)]]


def _kv_shape(config: Any) -> tuple[int, int]:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return getattr(config, "num_key_value_heads", None) or heads, head_dim
