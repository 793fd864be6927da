"""A tiny model, its scales, and dishonest caches for the tests of the report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from calib import calibrate
from foldkv.accuracy import CacheSource
from foldkv.accuracy.sources import NewCache
from quant.scales import KVScales

VOCAB = 96

# The tensors here are small, and a team of threads would mostly wait for itself.
torch.set_num_threads(1)


def tiny_model(head_dim: int = 32) -> LlamaForCausalLM:
    """Two layers, two kv heads of 32 channels or others, weights large enough for K, V and logits to matter."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=head_dim, max_position_embeddings=512, initializer_range=0.12, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def token_windows(windows: int, length: int, seed: int) -> Tensor:
    return torch.randint(VOCAB, (windows, length), generator=torch.Generator().manual_seed(seed))


def tiny_scales(model: PreTrainedModel) -> KVScales:
    return calibrate(model, token_windows(8, 48, seed=1), num_samples=8, max_seq_len=48)


def save_checkpoint(model: PreTrainedModel, folder: Path) -> None:
    """The model with a tokenizer of words t0, t1, ..., as `from_pretrained` reads them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="t1", eos_token="t2").save_pretrained(folder)
    model.save_pretrained(folder)


class DishonestCache(DynamicCache):
    """The stock cache with something done to the K and V that attention sees: `change(kv, appended)`."""

    def __init__(self, config: Any, change: Any) -> None:
        super().__init__(config=config)
        self.change = change

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        k, v = super().update(key_states, value_states, *args, **kwargs)
        return self.change(k, key_states.shape[2]), self.change(v, key_states.shape[2])


class DishonestSource(CacheSource):
    """A cache that claims 4 bits."""

    def __init__(self, name: str, change: Any, kernels: bool = False) -> None:
        super().__init__(name)
        self.change = change
        self.kernels = kernels

    @contextmanager
    def open(self, model: PreTrainedModel) -> Iterator[NewCache]:
        before = model.config._attn_implementation
        model.set_attn_implementation("sdpa")
        yield lambda batch, max_seq_len: DishonestCache(model.config, self.change)
        model.set_attn_implementation(before)

    def describe(self) -> dict[str, Any]:
        return {"bits_per_element": 4.0, "bytes_per_token": 128.0}


def coarse(kv: Tensor) -> Tensor:
    """4-bit symmetric quantisation per token and head, dequantised."""
    step = kv.abs().amax(-1, keepdim=True) / 7
    return (kv / step).round() * step
