"""`generate()` on the paged cache gives the tokens of the stock cache, with every decoding strategy."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import transformers
from hf_helpers import FAMILIES, MORE_FAMILIES, left_padded, one_thread, tiny_model, tokens
from transformers import PreTrainedModel

from foldkv.hf import swap_kv_cache
from foldkv.hf.models import SUPPORTED
from quant.plan import CHUNK_SIZE

pytestmark = pytest.mark.usefixtures(one_thread.__name__)
NEW_TOKENS = 12
PAGE = 16
CORE = ("llama", "qwen2", "qwen3", "mistral")


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def any_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(request.param)


@pytest.fixture(scope="module", params=CORE)
def core_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(request.param)


def check_same_tokens(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any
) -> None:
    """The tokens of the stock cache, and of a paged one with the same elements."""
    arguments = {
        "attention_mask": torch.ones_like(ids) if mask is None else mask,
        "max_new_tokens": NEW_TOKENS,
        **options,
    }

    def run() -> torch.Tensor:
        torch.manual_seed(7)
        return model.generate(ids, **arguments)

    want = run()
    with swap_kv_cache(model, "c32", page_size=PAGE):
        got = run()
    assert got.shape[1] > ids.shape[1]
    assert torch.equal(got, want)


def test_left_padded_greedy_batch(any_model: PreTrainedModel) -> None:
    check_same_tokens(any_model, *left_padded(), do_sample=False)


def test_left_padded_beams(any_model: PreTrainedModel) -> None:
    check_same_tokens(any_model, *left_padded(), do_sample=False, num_beams=3)


def test_chunked_prefill(any_model: PreTrainedModel) -> None:
    check_same_tokens(any_model, *left_padded(), do_sample=False, prefill_chunk_size=4)


def test_logits_of_one_forward_pass(any_model: PreTrainedModel) -> None:
    ids, mask = left_padded()
    with torch.no_grad():
        want = any_model(ids, attention_mask=mask).logits[mask.bool()]
        with swap_kv_cache(any_model, "c32", page_size=PAGE) as swap:
            cache = swap.new_cache(max_batch=3, max_seq_len=32)
            got = any_model(ids, attention_mask=mask, past_key_values=cache).logits[mask.bool()]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_c16_in_16_bits_gives_the_stock_tokens_but_for_ties(family: str) -> None:
    """In fp16 two ways to add differ in the last bit; greedy tokens may part only where the stock logits are that near."""
    model = tiny_model(family, dtype=torch.float16)
    ids, mask = left_padded()
    options = {
        "attention_mask": mask,
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "return_dict_in_generate": True,
    }
    want = model.generate(ids, **options, output_logits=True)
    with swap_kv_cache(model, "c16", page_size=PAGE):
        got = model.generate(ids, **options).sequences
    for row, stock in enumerate(want.sequences):
        apart = (stock != got[row]).nonzero()
        if len(apart):
            where = int(apart[0])
            step = want.logits[where - ids.shape[1]][row].float()
            assert float(step.max() - step[got[row, where]]) < 0.02 * float(step.std())


def test_single_prompt(core_model: PreTrainedModel) -> None:
    check_same_tokens(core_model, tokens(), do_sample=False)


def test_sampling_with_the_same_seed(core_model: PreTrainedModel) -> None:
    check_same_tokens(core_model, *left_padded(), do_sample=True, temperature=0.9, top_p=0.9, top_k=20)


def test_several_samples_of_a_prompt(core_model: PreTrainedModel) -> None:
    check_same_tokens(core_model, tokens(2), do_sample=True, num_return_sequences=3)


def test_beam_sampling(core_model: PreTrainedModel) -> None:
    check_same_tokens(core_model, tokens(2), do_sample=True, num_beams=2, num_return_sequences=2)


def test_beams_past_a_page(core_model: PreTrainedModel) -> None:
    check_same_tokens(core_model, tokens(1, 15), do_sample=False, num_beams=4, length_penalty=2.0, max_new_tokens=20)


def test_past_a_chunk_of_the_kernels(core_model: PreTrainedModel) -> None:
    """The work list changes where a sequence passes a multiple of `CHUNK_SIZE` tokens, and where padding does."""
    ids = tokens(2, CHUNK_SIZE + CHUNK_SIZE // 2 - 4)
    mask = torch.ones_like(ids)
    mask[1, : CHUNK_SIZE + 3] = 0
    check_same_tokens(core_model, ids, mask, do_sample=False)
    check_same_tokens(core_model, ids[:, : CHUNK_SIZE - 4], do_sample=False)


def test_prompt_lookup(any_model: PreTrainedModel) -> None:
    ids = tokens(1, 6).repeat(1, 3)
    check_same_tokens(any_model, ids, do_sample=False, prompt_lookup_num_tokens=4, eos_token_id=98)


def test_assistant_model_with_its_own_cache(any_model: PreTrainedModel) -> None:
    assistant = tiny_model("llama", seed=3, num_hidden_layers=1)
    check_same_tokens(any_model, tokens(), do_sample=False, assistant_model=assistant)


def test_assistant_model_swapped_too(core_model: PreTrainedModel) -> None:
    assistant = tiny_model("llama", seed=3, num_hidden_layers=1)
    want = core_model.generate(tokens(), max_new_tokens=NEW_TOKENS, do_sample=False, assistant_model=assistant)
    with swap_kv_cache(core_model, "c32", page_size=PAGE), swap_kv_cache(assistant, "c8d", page_size=PAGE):
        got = core_model.generate(tokens(), max_new_tokens=NEW_TOKENS, do_sample=False, assistant_model=assistant)
    assert torch.equal(got, want)


def test_a_model_that_assists_itself_accepts_every_draft(core_model: PreTrainedModel) -> None:
    with swap_kv_cache(core_model, "c4r", page_size=PAGE):
        want = core_model.generate(tokens(), max_new_tokens=NEW_TOKENS, do_sample=False)
        lookup = core_model.generate(
            tokens(), max_new_tokens=NEW_TOKENS, do_sample=False, prompt_lookup_num_tokens=3, eos_token_id=98
        )
    assert torch.equal(lookup, want)


@pytest.mark.parametrize("family", sorted(MORE_FAMILIES))
def test_further_families(family: str) -> None:
    if not hasattr(transformers, MORE_FAMILIES[family][0]):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    check_same_tokens(tiny_model(family), *left_padded(), do_sample=False, max_new_tokens=8)


def test_supported_families_are_those_tested_here() -> None:
    assert {family.model_type for family in SUPPORTED if family.core} == FAMILIES.keys()
    assert {family.model_type for family in SUPPORTED if not family.core} == MORE_FAMILIES.keys()


@pytest.mark.skipif("FOLDKV_TEST_MODEL" not in os.environ, reason="FOLDKV_TEST_MODEL names no checkpoint")
@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_c16_gives_the_stock_tokens_of_a_trained_checkpoint(dtype: str) -> None:
    from foldkv.hf import load_model

    model, tokenizer = load_model(os.environ["FOLDKV_TEST_MODEL"], dtype)
    batch = tokenizer("The history of the city began when", return_tensors="pt")
    check_same_tokens(model, batch["input_ids"], do_sample=False, max_new_tokens=24)
