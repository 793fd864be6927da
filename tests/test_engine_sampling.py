"""Sampling on the device: the distribution of the stock filters, and draws that depend on seed and position alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from engine_helpers import make_prompts
from hf_helpers import one_thread, tiny_model
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from foldkv import Engine, SamplingParams
from foldkv.engine.sampling import GREEDY, PLAIN, SORTED, TOPK, common_kind, sample, uniform
from quant.errors import ArgumentError

DRAWS, VOCAB = 20_000, 100


def draw(logits: Tensor, kind: str, temperature: float, top_k: int, top_p: float) -> Tensor:
    """DRAWS tokens from logits `[vocab]`."""
    return sample(
        logits.expand(DRAWS, -1), kind, torch.full((DRAWS,), temperature), torch.full((DRAWS,), top_k),
        torch.full((DRAWS,), top_p), torch.arange(DRAWS), torch.full((DRAWS,), 7),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "temperature", "top_k", "top_p"),
    [(PLAIN, 1.0, 0, 1.0), (PLAIN, 0.5, 0, 1.0), (TOPK, 0.8, 10, 1.0), (TOPK, 1.3, 50, 0.7), (SORTED, 1.0, 0, 0.6),
     (SORTED, 0.7, 80, 0.95), (SORTED, 2.0, 0, 1.0), (SORTED, 1.0, 0, 1e-9)],
)  # fmt: skip
def test_the_distribution_is_that_of_the_stock_filters(kind: str, temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.randn(VOCAB) * 2
    scores = TemperatureLogitsWarper(temperature)(None, logits[None])
    scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    scores = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
    want = scores[0].softmax(-1)
    got = draw(logits, kind, temperature, top_k, top_p).bincount(minlength=VOCAB) / DRAWS
    assert not got[want == 0].any(), "a token that the filters forbid"
    bound = 5 * (want * (1 - want) / DRAWS).sqrt() + 2 / DRAWS
    assert ((got - want).abs() <= bound).all()


def test_greedy_rows_are_greedy_in_every_kind() -> None:
    logits = torch.randn(8, VOCAB)
    temperature = torch.tensor([0.0, 1.0] * 4)
    rest = (torch.full((8,), 5), torch.full((8,), 0.9), torch.arange(8), torch.full((8,), 3))
    for kind in (GREEDY, PLAIN, TOPK, SORTED):
        got = sample(logits, kind, temperature, *rest)
        assert torch.equal(got[::2], logits.argmax(-1)[::2])


def test_the_uniform_numbers_are_uniform_and_do_not_repeat() -> None:
    seeds, positions = torch.arange(200).repeat_interleave(200), torch.arange(200).repeat(200)
    numbers = uniform(seeds, positions)
    assert (numbers >= 0).all() and (numbers < 1).all()
    assert abs(float(numbers.mean()) - 0.5) < 0.005 and abs(float(numbers.var()) - 1 / 12) < 0.002
    counts = (numbers * 64).long().bincount(minlength=64).float()
    chi = float(((counts - 625) ** 2 / 625).sum())
    assert chi < 120, "63 degrees of freedom"
    assert len(numbers.unique()) > 0.99 * len(numbers)


def test_kinds() -> None:
    def kinds(*each: SamplingParams) -> str:
        return common_kind({params.kind for params in each})

    hot, few, nucleus = SamplingParams(temperature=1.0), SamplingParams(temperature=1.0, top_k=9), SamplingParams(
        temperature=1.0, top_p=0.9
    )  # fmt: skip
    assert kinds(SamplingParams()) == GREEDY and kinds(SamplingParams(), hot) == PLAIN
    assert kinds(few) == TOPK and kinds(few, hot) == SORTED and kinds(nucleus) == SORTED


@pytest.mark.usefixtures(one_thread.__name__)
def test_a_seed_gives_the_same_tokens_in_any_company() -> None:
    prompts = make_prompts((5, 11, 3, 17, 9))
    params = [SamplingParams(10, 0.9, top_k=k, top_p=p, seed=s) for k, p, s in ((0, 1, 1), (9, 1, 2), (0, 0.8, 3))]
    params += [SamplingParams(10), SamplingParams(10, temperature=1.2, top_k=90, top_p=0.9, seed=4)]
    with Engine(tiny_model(), "c32", max_batch=4, max_seq_len=64, page_size=16) as engine:
        alone = [engine.generate([prompt], own)[0] for prompt, own in zip(prompts, params, strict=True)]
        together = engine.generate(prompts, params)
        assert together == alone
        torch.manual_seed(5)
        first = engine.generate(prompts[:2], max_new_tokens=10, temperature=1.0)
        torch.manual_seed(5)
        assert engine.generate(prompts[:2], max_new_tokens=10, temperature=1.0) == first != alone[:2]


@pytest.mark.parametrize(
    "options",
    [{"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0},
     {"top_p": 1.5}, {"stop_token_ids": range(9)}],
)  # fmt: skip
def test_wrong_parameters(options: dict[str, float | Sequence[int]]) -> None:
    with pytest.raises(ArgumentError, match=next(iter(options))):
        SamplingParams(**options)  # type: ignore[arg-type]
