"""Tiny random models of every supported family, and a plain cache that quantises by the reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from foldkv.hf.state import LayerParams
from quant import reference
from quant.pages import identity_params
from quant.spec import Format, LayerSpecs

VOCAB = 99
WINDOW = 6
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_LAYER_TYPES = ["sliding_attention", "full_attention"]
_EXPERTS = {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}
# model_type -> config class and what differs from the common settings: those that run every strategy ...
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "mistral": ("MistralConfig", {"sliding_window": WINDOW}),
    "phi3": ("Phi3Config", {"sliding_window": WINDOW, "partial_rotary_factor": 0.5}),
    "gemma2": ("Gemma2Config", {"sliding_window": WINDOW, "layer_types": _LAYER_TYPES, "attn_logit_softcapping": 4.0}),
    "gemma3_text": ("Gemma3TextConfig", {"sliding_window": WINDOW, "layer_types": _LAYER_TYPES}),
    "gemma3n_text": (
        "Gemma3nTextConfig",
        {
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": _LAYER_TYPES * 2,
            "intermediate_size": [96] * 4,
            "activation_sparsity_pattern": [0.0] * 4,
            "sliding_window": WINDOW,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 16,
            "laurel_rank": 8,
            "altup_num_inputs": 2,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        {"sliding_window": WINDOW, "layer_types": _LAYER_TYPES, **_EXPERTS},
    ),
    "gemma4_text": (
        "Gemma4TextConfig",
        {
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "layer_types": _LAYER_TYPES * 2,
            "sliding_window": WINDOW,
            "global_head_dim": 32,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 16,
        },
    ),
    "granite": ("GraniteConfig", {}),
    "olmo": ("OlmoConfig", {}),
    "olmo2": ("Olmo2Config", {}),
    "olmo3": ("Olmo3Config", {"sliding_window": WINDOW, "layer_types": _LAYER_TYPES}),
    "qwen3_moe": ("Qwen3MoeConfig", _EXPERTS),
}
# ... and those that run one greedy batch.
MORE_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "apertus": ("ApertusConfig", {}),
    "arcee": ("ArceeConfig", {}),
    "biogpt": ("BioGptConfig", {}),
    "cohere": ("CohereConfig", {}),
    "cohere2": ("Cohere2Config", {"sliding_window": WINDOW, "layer_types": _LAYER_TYPES}),
    "ernie4_5": ("Ernie4_5Config", {}),
    "exaone4": ("Exaone4Config", {"sliding_window": WINDOW, "layer_types": _LAYER_TYPES}),
    "gemma": ("GemmaConfig", {}),
    "glm": ("GlmConfig", {}),
    "glm4": ("Glm4Config", {}),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4}),
    "gpt_bigcode": ("GPTBigCodeConfig", {"n_embd": 64, "n_layer": 2, "n_head": 4}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "granitemoe": ("GraniteMoeConfig", _EXPERTS),
    "helium": ("HeliumConfig", {}),
    "hunyuan_v1_dense": ("HunYuanDenseV1Config", {}),
    "ministral": ("MinistralConfig", {"sliding_window": WINDOW, "layer_types": _LAYER_TYPES}),
    "ministral3": ("Ministral3Config", {}),
    "mixtral": ("MixtralConfig", {"sliding_window": WINDOW, **_EXPERTS}),
    "nemotron": ("NemotronConfig", {}),
    "opt": ("OPTConfig", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "persimmon": ("PersimmonConfig", {}),
    "phi": ("PhiConfig", {}),
    "qwen2_moe": ("Qwen2MoeConfig", {"shared_expert_intermediate_size": 32, **_EXPERTS}),
    "seed_oss": ("SeedOssConfig", {}),
    "smollm3": ("SmolLM3Config", {"layer_types": ["full_attention"] * 2}),
    "stablelm": ("StableLmConfig", {}),
    "starcoder2": ("Starcoder2Config", {"sliding_window": WINDOW}),
    "vaultgemma": ("VaultGemmaConfig", {"sliding_window": WINDOW, "layer_types": _LAYER_TYPES}),
}
# Their softcap and sinks exist in eager attention only.
_EAGER = {"gemma2", "vaultgemma", "gpt_oss"}


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Tiny models run faster on one thread, most of all when the tests run in parallel."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_model(
    family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> PreTrainedModel:
    """A random model of `family` in eval mode, made from its config."""
    name, special = (FAMILIES | MORE_FAMILIES)[family]
    config = getattr(transformers, name)(**{**_COMMON, **special, **changes})
    torch.manual_seed(seed)
    attention = "eager" if family in _EAGER else "sdpa"
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("sinks", "k_proj.bias", "q_proj.bias")):
            torch.nn.init.normal_(parameter)
    model.generation_config.pad_token_id = 0
    return model


def tokens(batch: int = 1, length: int = 11, seed: int = 1) -> Tensor:
    """Random token ids int64 `[batch, length]`, no special ones."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(batch: int = 3, length: int = 11) -> tuple[Tensor, Tensor]:
    """Token ids and a mask whose row `i` starts with `2 i` padding tokens."""
    ids = tokens(batch, length)
    mask = torch.ones_like(ids)
    for row in range(batch):
        mask[row, : 2 * row] = 0
    return ids.masked_fill(mask == 0, 0), mask


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, **options: Any) -> Tensor:
    """Logits `[b, s, vocab]` of one forward pass."""
    return model(ids, **options).logits


def generate(model: PreTrainedModel, ids: Tensor, **options: Any) -> Any:
    """Greedy tokens, 8 new ones unless `options` say otherwise."""
    return model.generate(
        ids, **{"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(ids), **options}
    )


def save_checkpoint(model: PreTrainedModel, path: Path, **options: Any) -> Path:
    """Write `model` and a tokenizer whose token `i` is the word `w<i>`; options are those of `save_pretrained`."""
    words = Tokenizer(WordLevel({f"w{idx}": idx for idx in range(VOCAB)}, unk_token="w2"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w2", pad_token="w0").save_pretrained(path)
    model.save_pretrained(path, **options)
    return path


class ReferenceCache(DynamicCache):
    """A stock cache that keeps what the reference makes of K and V: quantised, then dequantised."""

    def __init__(self, specs: LayerSpecs, params: Sequence[LayerParams], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.specs, self.params, self.dtype = specs, params, dtype

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        spec = self.specs[layer_idx]
        none = [identity_params(fmt, k.shape[1], k.shape[3]) for fmt in (spec.k, spec.v)], (None, None)
        params = self.params[layer_idx]
        parts = ((k, v), (spec.k, spec.v), *(none if params is None else (params[:2], params[2:])))
        stored = [self._through(*part) for part in zip(*parts, strict=True)]
        return super().update(*stored, layer_idx, *args, **kwargs)

    def _through(self, x: Tensor, fmt: Format, params: Tensor, shaping: Tensor | None) -> Tensor:
        rows = x.transpose(1, 2)
        params = params.to(x.device)
        codes, meta = reference.encode(rows.flatten(0, 1), fmt, params, shaping)
        values = reference.decode(codes, meta, fmt, params)
        return values.view(rows.shape).transpose(1, 2).to(self.dtype)
