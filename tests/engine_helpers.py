"""What tests of the engine share: prompts, what a sequence gives alone, and when two greedy runs may part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hf_helpers import VOCAB
from torch import Tensor
from transformers import PreTrainedModel

from foldkv import Engine


def make_prompts(lengths: Sequence[int], seed: int = 1) -> list[list[int]]:
    """Random prompts of these lengths, no special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def stock_tokens(model: PreTrainedModel, prompt: list[int], count: int) -> list[int]:
    """`count` greedy tokens of the model as it is, one prompt at a time."""
    ids = torch.tensor([prompt], device=model.device)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return out[0, len(prompt) :].tolist()


@torch.no_grad()
def stock_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits `[n, t, vocab]` of the model as it is."""
    return model(ids.to(model.device), use_cache=False).logits


def check_empty(engine: Engine) -> None:
    """Every page is free, every row inactive on the host and on the device, and reference counts agree."""
    table = engine.runner.paged.table
    assert engine.num_free_pages == engine.num_pages == len(set(table.free_pages))
    assert not any(table.active) and not any(table.refcounts) and not any(table.lengths)
    assert not engine.runner.rows.active.any()
    assert engine.scheduler.is_idle


@torch.no_grad()
def check_same_or_tied(engine: Engine, prompt: list[int], want: list[int], got: list[int], tolerance: float) -> bool:
    """Two greedy outputs are equal, or part where the engine, alone, finds their tokens within `tolerance` of logit.

    Returns whether they were equal.
    """
    if got == want:
        return True
    assert len(got) == len(want) or min(len(got), len(want)) > 0
    where = next(i for i, (a, b) in enumerate(zip(want, got, strict=False)) if a != b)
    tokens = torch.tensor([[*prompt, *want[: where + 1]]])
    *_, logits = engine.score(tokens, len(prompt))
    row = logits[0].float()
    gap = float(row.max() - row[[want[where], got[where]]].min())
    assert gap <= tolerance, f"token {where}: {want[where]} and {got[where]} are {gap:.3g} apart"
    return False
