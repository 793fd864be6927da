"""Scales and modes that change on a live model: in place where formats stay, and never over pages written before."""

from __future__ import annotations

import pytest
import torch
from engine_helpers import check_empty, make_prompts
from hf_helpers import one_thread, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from calib import calibrate
from foldkv import Engine, SamplingParams, swap_kv_cache
from quant.errors import ArgumentError, ScaleFileError
from quant.scales import KVScales

pytestmark = pytest.mark.usefixtures(one_thread.__name__)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def both(llama: PreTrainedModel) -> tuple[KVScales, KVScales]:
    """Scales of two texts."""
    first, second = (
        calibrate(
            llama,
            torch.tensor(make_prompts([48] * 4, seed)),
            mode="c8",
            num_samples=4,
            max_seq_len=48,
        )
        for seed in (1, 2)
    )
    return first, second


def scores(engine: Engine) -> Tensor:
    return torch.stack(list(engine.score(torch.tensor(make_prompts([30] * 3)), 11)))


def make_engine(model: PreTrainedModel, **options: int) -> Engine:
    return Engine(model, max_batch=4, max_seq_len=64, prefill_tokens=32, **options)


@pytest.mark.parametrize("mode", ["c8", "c4", "c4r"])
def test_a_then_b_then_a_has_the_bits_of_a(llama: PreTrainedModel, both: tuple[KVScales, KVScales], mode: str) -> None:
    a, b = both
    with swap_kv_cache(llama, mode, a, page_size=16) as swap, make_engine(llama) as engine:

        def addresses() -> list[int]:
            return [part.data_ptr() for layer in engine.runner.paged.layers for part in layer.k.constants]

        before = addresses()
        assert len(before) == 2 * (1 + (mode == "c4r"))
        first = scores(engine)
        engine.load(scales=b)
        other = scores(engine)
        swap.load(scales=a)
        assert torch.equal(scores(engine), first) and not torch.equal(other, first)
        assert addresses() == before
        check_empty(engine)


def test_modes_there_and_back(llama: PreTrainedModel, both: tuple[KVScales, KVScales]) -> None:
    with swap_kv_cache(llama, "c8", both[0], page_size=16), make_engine(llama, num_pages=None) as engine:
        first, planned = scores(engine), engine.memory.pool
        engine.load("c4")
        assert engine.swap.mode == "c4" and engine.memory.pool < 0.7 * planned
        other = scores(engine)
        engine.load("c8")
        assert torch.equal(scores(engine), first) and not torch.equal(other, first)
        assert engine.memory.pool == planned


def test_memory_in_bytes_holds_more_tokens_at_fewer_bits(
    llama: PreTrainedModel, both: tuple[KVScales, KVScales]
) -> None:
    with (
        swap_kv_cache(llama, "c16", both[0], page_size=16),
        Engine(llama, max_batch=64, max_seq_len=512, memory="1MB") as engine,
    ):
        before = engine.num_pages
        engine.load("c4s")
        assert engine.num_pages > 3.9 * before


def test_a_dynamic_mode_forgets_the_scales_it_had(llama: PreTrainedModel, both: tuple[KVScales, KVScales]) -> None:
    with swap_kv_cache(llama, "c8d", page_size=16), make_engine(llama) as engine:
        plain = scores(engine)
        engine.load(scales=both[0])
        assert not torch.equal(scores(engine), plain), "mean and balance are taken out now"
        engine.runner.set_params([None] * 2)
        assert torch.equal(scores(engine), plain)


def test_sequences_in_the_cache_are_refused_or_computed_again(
    llama: PreTrainedModel, both: tuple[KVScales, KVScales]
) -> None:
    prompts = make_prompts((20, 33, 9))
    with swap_kv_cache(llama, "c8", both[1], page_size=16), make_engine(llama) as engine:
        want = engine.generate(prompts, max_new_tokens=12)
        engine.load(scales=both[0])
        sequences = [engine.submit(prompt, SamplingParams(12)) for prompt in prompts]
        for _ in range(4):
            engine.step()
        before = [list(sequence.output) for sequence in sequences]
        with pytest.raises(ArgumentError, match="3 under other scales.*recompute"):
            engine.load(scales=both[1])
        assert engine.swap.scales is both[0]
        with pytest.warns(UserWarning, match="3 sequences mean nothing"):
            engine.load(scales=both[1], recompute=True)
        for _ in engine.run():
            pass
        assert [sequence.output[: len(known)] for sequence, known in zip(sequences, before, strict=True)] == before
        assert all(len(sequence.output) == 12 and sequence.num_preemptions == 1 for sequence in sequences)
        assert engine.generate(prompts, max_new_tokens=12) == want
        sequence = engine.submit(prompts[0], SamplingParams(12))
        engine.step()
        with pytest.warns(UserWarning, match="1 sequences"):
            engine.load("c4", recompute=True)
        for _ in engine.run():
            pass
        assert len(sequence.output) == 12
        check_empty(engine)


def test_older_caches_raise_and_failed_loads_change_nothing(
    llama: PreTrainedModel, both: tuple[KVScales, KVScales]
) -> None:
    ids = torch.tensor(make_prompts([12]))
    swap = swap_kv_cache(llama, "c8", both[0], page_size=16)
    cache = swap.new_cache(1, 64)
    llama(ids, past_key_values=cache)
    other = calibrate(
        tiny_model("llama", num_hidden_layers=3), ids.repeat(1, 4), mode="c8", num_samples=1, max_seq_len=48
    )
    for mode, scales, error in (("c9", None, ArgumentError), (None, other, ScaleFileError)):
        with pytest.raises(error):
            swap.load(mode, scales)
    llama(ids, past_key_values=cache)
    swap.load(scales=both[1])
    with pytest.raises(ArgumentError, match="written under others; make a new one"):
        llama(ids, past_key_values=cache)
    llama(ids, past_key_values=swap.new_cache(1, 64))
    swap.restore()
    with pytest.raises(ArgumentError, match="restored"):
        swap.load("c4")
