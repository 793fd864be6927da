"""Models and batches of the end-to-end benchmark: shapes with random weights, and scales for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from foldkv.hf.loading import load_model
from foldkv.hf.models import kv_shapes
from quant.errors import ArgumentError, describe
from quant.scales import PERCENTILES, KVScales, LayerStats, TensorStats

_LLAMA3 = {"rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
# Shapes of well-known models, run with random weights; `tiny-shape` is for tests.
SHAPES: dict[str, dict[str, Any]] = {
    "llama3-8b-shape": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072, **_LLAMA3,
    },
    "llama3-1b-shape": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072,
        "tie_word_embeddings": True, **_LLAMA3,
    },
    "tiny-shape": {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096, **_LLAMA3,
    },
}  # fmt: skip
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """`batch` sequences with `seq_len` cached tokens each."""

    batch: int
    seq_len: int

    def __str__(self) -> str:
        return f"{self.batch} x {self.seq_len}"


def parse_cases(text: str) -> list[Case]:
    """Cases of a list like "1x32k,64x8k,256x1024" (k is 1024). ArgumentError for another."""
    cases = []
    for part in text.split(","):
        batch, by, length = part.strip().lower().partition("x")
        factor = 1024 if length.endswith("k") else 1
        digits = length.removesuffix("k")
        if not by or not batch.isdecimal() or not digits.isdecimal() or not int(batch) or not int(digits):
            raise ArgumentError(describe("case", "batch x tokens, like 64x8k", repr(part)))
        cases.append(Case(int(batch), int(digits) * factor))
    return cases


def model_config(name: str) -> Any:
    """The config of a shape of `SHAPES`, of a checkpoint directory, of a config.json or of a hub id; no weights needed.

    Errors: ArgumentError naming the shapes there are.
    """
    if name in SHAPES:
        return LlamaConfig(**SHAPES[name])
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        shapes = ", ".join(SHAPES)
        got = f"{name!r}: {(str(error).splitlines() or [''])[0]}"
        raise ArgumentError(
            describe("model", f"a checkpoint, a config.json, a hub id, or one of {shapes}", got)
        ) from error


def bench_model(name: str, dtype: str, device: torch.device) -> tuple[PreTrainedModel, bool]:
    """The model to time, and whether its weights are random: those of a checkpoint where there are any."""
    path = Path(name)
    if path.is_dir() and (any(path.glob("*.safetensors")) or any(path.glob("*.bin"))):
        return load_model(name, DTYPES[dtype], device)[0], False
    torch.manual_seed(0)
    config = model_config(name)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype], attn_implementation="sdpa")
    model.generation_config.eos_token_id = None
    return model.eval(), True


def empty_model(name: str, dtype: str) -> PreTrainedModel:
    """The model without memory for its weights: what its modules and their sizes are."""
    if dtype not in DTYPES:
        raise ArgumentError(describe("dtype", ", ".join(DTYPES), repr(dtype)))
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(model_config(name), dtype=DTYPES[dtype])
    return model


def random_scales(config: Any) -> KVScales:
    """Scales as of unit-normal K and V, for models with random weights: right in shape, of no other worth."""
    text = config.get_text_config(decoder=True)

    def stats(h_kv: int, head_dim: int) -> TensorStats:
        def full(value: float) -> torch.Tensor:
            return torch.full((h_kv, head_dim), value)

        percentiles = torch.linspace(-3, 3, len(PERCENTILES))[:, None, None].expand(-1, h_kv, head_dim).clone()
        return TensorStats(full(-4), full(4), full(0), full(1), percentiles, full(1), tokens=1)

    layers: list[LayerStats | None] = [LayerStats(stats(*shape), stats(*shape)) for shape in kv_shapes(text)]
    layers += [None] * (text.num_hidden_layers - len(layers))
    return KVScales(layers)
