"""Pass keys in filler text, by length and depth: a smoke test. A cache that fails it is broken; one that passes proves little.

The grid of passkey retrieval (Mohtashami & Jaggi 2023, arXiv 2305.16300). It is blind to most damage that the divergence shows,
and a model that cannot do it in 16 bits says nothing either way.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .sources import CacheSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LENGTHS = (256, 1024, 4096, 16384)
DEPTHS = (0.1, 0.5, 0.9)
KEYS = 2

_HEAD = "There is an important pass key in this text. Find it and remember it."
_FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_NEEDLE = " The pass key is {key}. Remember it. {key} is the pass key."
_QUESTION = " What is the pass key? The pass key is"


def lengths(max_len: float) -> list[int]:
    """Those of `LENGTHS` that a model can hold."""
    return [length for length in LENGTHS if length <= max_len]


def prompt(tokenizer: Any, length: int, depth: float, key: str) -> tuple[list[int], list[int]]:
    """Token ids of a prompt of at most `length` tokens with its key, and of the answer."""

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    head, needle, question, filler = ids(_HEAD), ids(_NEEDLE.format(key=key)), ids(_QUESTION), ids(_FILLER)
    answer = ids(f" {key}")
    room = max(0, length - len(head) - len(needle) - len(question) - len(answer))
    around = [filler[i % len(filler)] for i in range(room)]
    at = int(depth * room)
    return [*head, *around[:at], *needle, *around[at:], *question], answer


@torch.inference_mode()
def needle_grid(
    model: PreTrainedModel,
    tokenizer: Any,
    source: CacheSource,
    max_len: float,
    advance: Callable[[int], object] = lambda tokens: None,
) -> dict[str, Any]:
    """{"lengths", "depths", "right"}: share of keys given back whole, a row a length; the answer is teacher-forced."""
    rng = random.Random(0)
    rows = []
    for length in lengths(max_len):
        row = []
        for depth in DEPTHS:
            keys = [str(rng.randrange(10000, 100000)) for _ in range(KEYS)]
            row.append(sum(_right(model, tokenizer, source, length, depth, key) for key in keys) / KEYS)
            advance(KEYS * length)
        rows.append(row)
    return {"lengths": lengths(max_len), "depths": list(DEPTHS), "right": rows}


def _right(model: PreTrainedModel, tokenizer: Any, source: CacheSource, length: int, depth: float, key: str) -> bool:
    ids, answer = prompt(tokenizer, length, depth, key)
    with source.open(model) as new_cache:
        cache: Any = new_cache(1, len(ids) + len(answer))
        pieces: list[Tensor] = [torch.tensor([part], device=model.device) for part in (ids, answer[:-1]) if part]
        logits = [model(piece, past_key_values=cache, use_cache=True).logits[0] for piece in pieces]
    best = torch.cat([logits[0][-1:], *logits[1:]]).argmax(-1)
    return best.tolist() == answer
