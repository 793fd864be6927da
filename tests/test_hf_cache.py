"""`FoldCache`: capacity, interruptions, crops, rows, copies."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hf_helpers import generate, logits, one_thread, tiny_model, tokens
from transformers import PreTrainedModel

from foldkv.hf import FoldCache, KVSwap, swap_kv_cache
from quant.errors import ArgumentError, PoolExhaustedError

pytestmark = pytest.mark.usefixtures(one_thread.__name__)
PAGE = 16
H_KV, D = 2, 16


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model()


@pytest.fixture
def swap(model: PreTrainedModel) -> Any:
    with swap_kv_cache(model, "c32", page_size=PAGE) as swap:
        yield swap


def test_capacity_passed_is_an_error_that_leaves_the_cache_valid(model: PreTrainedModel, swap: KVSwap) -> None:
    ids = tokens(1, 20)
    cache = swap.new_cache(max_batch=1, max_seq_len=12)
    assert cache.get_max_length() == cache.get_max_cache_shape() == 12
    first = logits(model, ids[:, :10], past_key_values=cache)
    with pytest.raises(PoolExhaustedError, match=r"at most 12, got 10 \+ 5 .*max_seq_len"):
        logits(model, ids[:, 10:15], past_key_values=cache)
    with pytest.raises(ArgumentError, match="rows: expected the 1 that the cache holds, got 2"):
        logits(model, tokens(2, 1), past_key_values=cache)
    assert cache.get_seq_length() == 10
    last = logits(model, ids[:, 10:12], past_key_values=cache)
    torch.testing.assert_close(torch.cat([first, last], 1), logits(model, ids[:, :12]), rtol=1e-5, atol=2e-5)
    with pytest.raises(PoolExhaustedError, match="rows: expected at most 1, got 2"):
        logits(model, tokens(2, 1), past_key_values=swap.new_cache(1, 8))


def test_a_bounded_pool_runs_out_cleanly(model: PreTrainedModel, swap: KVSwap) -> None:
    cache = swap.new_cache(2, 64, num_pages=2)
    logits(model, tokens(2, 16), past_key_values=cache)
    with pytest.raises(PoolExhaustedError, match="free pages: expected 2, got 0 of 2"):
        logits(model, tokens(2, 1), past_key_values=cache)
    assert (cache.get_seq_length(), cache.paged.num_used_pages) == (16, 2)
    cache.reset()
    assert (cache.get_seq_length(), cache.batch_size, cache.paged.num_used_pages) == (0, -1, 0)


class BrokenError(Exception):
    """What the hooks below raise."""


@pytest.mark.parametrize("error", [BrokenError, KeyboardInterrupt])
@pytest.mark.parametrize("layer_idx", [0, 1])
@pytest.mark.parametrize("cached", [0, 9])
def test_an_interrupted_forward_pass_is_taken_back(
    model: PreTrainedModel, swap: KVSwap, error: type[BaseException], layer_idx: int, cached: int
) -> None:
    ids = tokens(2, 18)
    cache = swap.new_cache(2, 32)
    if cached:
        logits(model, ids[:, :cached], past_key_values=cache)

    def interrupt(*args: Any) -> None:
        raise error

    handle = model.model.layers[layer_idx].mlp.register_forward_hook(interrupt)
    with pytest.raises(error):
        logits(model, ids[:, cached:], past_key_values=cache)
    handle.remove()
    assert (cache.get_seq_length(), cache.paged.num_used_pages) == (cached, 2 if cached else 0)
    got = logits(model, ids[:, cached:], past_key_values=cache)
    torch.testing.assert_close(got, logits(model, ids)[:, cached:], rtol=1e-5, atol=2e-5)


def test_an_interrupted_generate_leaves_the_model_usable(model: PreTrainedModel, swap: KVSwap) -> None:
    want, calls = generate(model, tokens()), []

    def interrupt(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt

    handle = model.model.layers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(model, tokens())
    handle.remove()
    assert torch.equal(generate(model, tokens()), want)


CROPS: list[Callable[[FoldCache], None]] = [
    lambda cache: cache.crop(-4),
    lambda cache: cache.crop(7),
    lambda cache: cache.crop(max_length=7),
    lambda cache: cache.crop(tokens_to_remove=-4),
    lambda cache: cache.crop(torch.tensor(-4)),
]


@pytest.mark.parametrize("crop", CROPS)
def test_crop_in_every_spelling(model: PreTrainedModel, swap: KVSwap, crop: Callable[[FoldCache], None]) -> None:
    ids = tokens(1, 11)
    cache = swap.new_cache(1, 32)
    logits(model, tokens(1, 11, seed=5), past_key_values=cache)
    cache.reset()
    logits(model, torch.cat([ids[:, :7], tokens(1, 4, seed=6)], 1), past_key_values=cache)
    crop(cache)
    assert cache.get_seq_length() == 7
    got = logits(model, ids[:, 7:], past_key_values=cache)
    torch.testing.assert_close(got, logits(model, ids)[:, 7:], rtol=1e-5, atol=2e-5)


def test_crop_that_asks_for_nothing_or_too_much(model: PreTrainedModel, swap: KVSwap) -> None:
    cache = swap.new_cache(1, 32)
    logits(model, tokens(1, 5), past_key_values=cache)
    for count, left in ((0, 5), (9, 5), (-9, 0)):
        cache.crop(count)
        assert cache.get_seq_length() == left


def test_rows_are_repeated_selected_and_reordered(model: PreTrainedModel, swap: KVSwap) -> None:
    ids, more = tokens(2, 9), tokens(4, 3, seed=8)
    cache = swap.new_cache(4, 32)
    logits(model, ids, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 4
    assert cache.paged.num_used_pages == 2
    cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
    cache.batch_select_indices(torch.tensor([0, 1, 3]))
    cache.batch_select_indices(torch.tensor([True, False, True]))
    rows = [1, 1]
    got = logits(model, more[:2], past_key_values=cache)
    want = logits(model, torch.cat([ids[rows], more[:2]], 1))[:, 9:]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)


def test_layers_that_were_never_used_survive_everything(swap: KVSwap) -> None:
    cache = swap.new_cache(2, 32)
    cache.crop(-1)
    cache.crop(3)
    cache.reset()
    cache.reorder_cache(torch.tensor([0, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0]))
    assert (cache.get_seq_length(), cache.get_mask_sizes(4, 1), cache.is_initialized) == (0, (4, 0), False)
    assert cache.is_sliding == [False, False] and not cache.is_compileable
    with pytest.raises(ArgumentError, match="whole FoldCache"):
        cache.layers[0].crop(-1)


def test_a_copy_of_a_cache_goes_its_own_way(model: PreTrainedModel, swap: KVSwap) -> None:
    ids = tokens(1, 12)
    cache = swap.new_cache(1, 32)
    logits(model, ids[:, :6], past_key_values=cache)
    twin = copy.deepcopy(cache)
    logits(model, tokens(1, 6, seed=5), past_key_values=cache)
    got = logits(model, ids[:, 6:], past_key_values=twin)
    torch.testing.assert_close(got, logits(model, ids)[:, 6:], rtol=1e-5, atol=2e-5)
    twin.crop(-1)
    assert torch.equal(generate(model, ids, past_key_values=copy.deepcopy(twin)), generate(model, ids))
    assert twin.get_seq_length() == 11


def test_inference_mode_and_no_grad_mix(model: PreTrainedModel, swap: KVSwap) -> None:
    ids = tokens(1, 12)
    cache = swap.new_cache(1, 32)
    with torch.inference_mode():
        first = model(ids[:, :6], past_key_values=cache).logits
    rest = model(ids[:, 6:], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat([first, rest], 1), logits(model, ids), rtol=1e-5, atol=2e-5)


def test_the_decoder_can_be_called_by_itself(model: PreTrainedModel, swap: KVSwap) -> None:
    with torch.no_grad():
        cache = swap.new_cache(1, 32)
        got = model.model(tokens(), past_key_values=cache).last_hidden_state
        assert cache.get_seq_length() == 11
        torch.testing.assert_close(got, model.model(tokens()).last_hidden_state, rtol=1e-5, atol=2e-5)


def test_a_cache_is_refused_by_a_model_that_is_not_swapped(model: PreTrainedModel) -> None:
    with swap_kv_cache(model, "c32") as swap:
        cache = swap.new_cache(1, 32)
    with pytest.raises(ArgumentError, match="a forward pass of a swapped model"):
        logits(model, tokens(), past_key_values=cache)
    with pytest.raises(ArgumentError, match="a restored one"):
        swap.new_cache(1, 32)


def test_non_finite_keys_and_values_are_counted_and_harm_no_other_row(swap: KVSwap, model: PreTrainedModel) -> None:
    ids = tokens(2, 6)
    cache = swap.new_cache(2, 32)
    want = logits(model, ids[1:])

    def spoil(module: Any, inputs: Any, values: torch.Tensor) -> None:
        values[0] = float("nan")

    handle = model.model.layers[0].self_attn.v_proj.register_forward_hook(spoil)
    try:
        got = logits(model, ids, past_key_values=cache)
    finally:
        handle.remove()
    assert cache.num_nonfinite == 6 * H_KV * D
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got[1:], want, rtol=1e-5, atol=2e-5)
