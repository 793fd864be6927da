"""`model.generate()` on the engine gives what transformers' own loop gives, and `explain` says when it does not run there."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hf_helpers import left_padded, one_thread, tiny_model, tokens
from transformers import GenerationConfig, LogitsProcessorList, MinLengthLogitsProcessor, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from foldkv import Engine, explain, swap_kv_cache
from foldkv.hf import KVSwap

pytestmark = pytest.mark.usefixtures(one_thread.__name__)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture
def swap(llama: PreTrainedModel) -> Iterator[KVSwap]:
    with swap_kv_cache(llama, "c32", page_size=16, engine=True) as made:
        yield made
    assert made.engine is None and "generate" not in llama.__dict__


class Collector(BaseStreamer):
    def __init__(self) -> None:
        self.pieces: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.pieces.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def both(model: PreTrainedModel, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What the stock model gives, and what it gives on the engine."""
    current = model.__dict__["_foldkv_swap"]
    assert explain(model, *args, **kwargs).on_engine
    got = model.generate(*args, **kwargs)
    assert isinstance(current.engine, Engine)
    stock = tiny_model("llama")
    return stock.generate(*args, **kwargs), got


@pytest.mark.parametrize("rows", [1, 3, 6])
def test_greedy_batches_with_left_padding(swap: KVSwap, rows: int) -> None:
    ids, mask = left_padded(rows, 15)
    want, got = both(swap.model, ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert torch.equal(got, want)


def test_rows_that_end_early_are_padded(swap: KVSwap) -> None:
    ids, mask = left_padded(4, 15)
    free = tiny_model("llama").generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    eos = [int(free[1, 15 + 3]), int(free[2, 15 + 6])]
    options = {"attention_mask": mask, "max_length": 30, "do_sample": False, "eos_token_id": eos, "pad_token_id": 7}
    want, got = both(swap.model, input_ids=ids, **options)
    assert torch.equal(got, want) and bool((got[:, 15:] == 7).any())


def test_a_generation_config_and_several_sequences_a_prompt(swap: KVSwap) -> None:
    config = GenerationConfig(max_new_tokens=9, do_sample=True, temperature=0.9, num_return_sequences=3, pad_token_id=0)
    torch.manual_seed(3)
    first = swap.model.generate(tokens(2), generation_config=config)
    torch.manual_seed(3)
    again = swap.model.generate(tokens(2), generation_config=config)
    assert torch.equal(first, again) and first.shape == (6, 20)
    assert len({tuple(row) for row in first.tolist()}) > 2
    assert torch.equal(first[:, :11], tokens(2).repeat_interleave(3, 0))


def test_a_streamer_gets_prompt_and_tokens(swap: KVSwap) -> None:
    collector = Collector()
    got = swap.model.generate(tokens(), max_new_tokens=6, do_sample=False, streamer=collector)
    assert collector.ended and collector.pieces == [got[0, :11].tolist(), *([token] for token in got[0, 11:].tolist())]


def test_the_engine_is_kept_and_grows(swap: KVSwap) -> None:
    swap.model.generate(tokens(), max_new_tokens=4, do_sample=False)
    first = swap.engine
    swap.model.generate(tokens(), max_new_tokens=40, do_sample=False)
    assert swap.engine is first
    swap.model.generate(tokens(3), max_new_tokens=300, do_sample=False)
    assert swap.engine is not first and swap.engine.max_batch == 4 and swap.engine.max_seq_len == 512
    swap.release_engine()
    assert swap.engine is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_beams": 2}, "num_beams=2"),
        ({"repetition_penalty": 1.3}, "repetition_penalty=1.3"),
        ({"prompt_lookup_num_tokens": 3, "eos_token_id": 98}, "prompt_lookup_num_tokens=3"),
        ({"min_new_tokens": 3}, "min_new_tokens=3"),
        ({"do_sample": True, "min_p": 0.1}, "min_p=0.1"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate=True"),
        ({"use_cache": False}, "use_cache=False"),
        ({"max_new_tokens": None}, "neither max_new_tokens nor max_length"),
        ({"logits_processor": LogitsProcessorList([MinLengthLogitsProcessor(3, 2)])}, "logits_processor"),
    ],
)
def test_other_calls_run_as_ever_and_are_explained(swap: KVSwap, options: dict[str, Any], reason: str) -> None:
    call = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(tokens()), **options}
    explanation, stock = explain(swap.model, tokens(), **call), tiny_model("llama")
    assert not explanation.on_engine and reason in str(explanation)
    torch.manual_seed(0)
    got = swap.model.generate(tokens(), **call)
    torch.manual_seed(0)
    want = stock.generate(tokens(), **call)
    if "return_dict_in_generate" in options:
        got, want = got.sequences, want.sequences
    assert torch.equal(got, want) and swap.engine is None


def test_what_stands_in_the_way_of_every_call(llama: PreTrainedModel) -> None:
    assert "not swapped" in str(explain(llama))
    with swap_kv_cache(llama, "c32"):
        assert "CPU" in str(explain(llama))
    with swap_kv_cache(llama, "c32", engine=False):
        assert "engine=False" in str(explain(llama))
    with swap_kv_cache(llama, "c32", engine=True):
        assert str(explain(llama)) == "generate() runs on the engine, without CUDA graphs, as they need a GPU"
        llama.train()
        assert "training" in str(explain(llama))
        llama.eval()
    phi = tiny_model("phi3", rope_parameters={
        "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4, "original_max_position_embeddings": 64,
    })  # fmt: skip
    with swap_kv_cache(phi, "c32", engine=True):
        assert explain(phi).on_engine


def test_padding_on_the_right_and_padding_without_a_mask(swap: KVSwap) -> None:
    ids, mask = left_padded(3)
    call = {"max_new_tokens": 5, "do_sample": False}
    assert "not on the left" in str(explain(swap.model, ids, attention_mask=mask.flip(1), **call))
    assert "without an attention_mask" in str(explain(swap.model, ids, **call))
