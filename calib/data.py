"""Calibration text as windows of tokens: documents, strings, token tensors, or text that the model writes itself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from quant.errors import ArgumentError, CalibrationError, describe

from .documents import open_documents

Data = str | Path | Iterable[str] | Tensor
# A long text goes to the tokenizer in pieces of about this many characters, cut at line ends.
_PIECE_CHARS = 200_000
# A model writes texts of this many tokens, so many side by side.
_TEXT_LEN = 256
_TEXTS_AT_ONCE = 64


@dataclass(frozen=True)
class Windows:
    """Token ids int64 `[num_samples, seq_len]` on the CPU, and where they came from."""

    tokens: Tensor
    source: str

    def sha256(self) -> str:
        """Hash of the shape and the ids."""
        digest = hashlib.sha256(repr(tuple(self.tokens.shape)).encode())
        digest.update(self.tokens.contiguous().numpy().astype("<i8").tobytes())
        return digest.hexdigest()


def load_windows(data: Data, tokenizer: Any, num_samples: int, seq_len: int, *, text_column: str = "text") -> Windows:
    """Pack `data` into `num_samples` windows of `seq_len` tokens.

    data: a file or a hub data set (see `calib.documents`), strings (a document each), token ids `[n]` (packed in order)
        or `[rows, len]` (the first `seq_len` of each of the first rows).
    tokenizer: a transformers tokenizer; needed for text. Documents are joined by its EOS. Where it has a BOS, every
        other window begins with it, as prompts do; the rest begin in mid-text, as chunks do.
    Errors: CalibrationError for missing, empty, malformed or too short data, ArgumentError for a missing tokenizer.
    """
    if isinstance(data, Tensor):
        return Windows(_token_windows(data, num_samples, seq_len), "tokens")
    if tokenizer is None:
        raise ArgumentError(describe("tokenizer", "the model's tokenizer, to read text", "None"))
    if isinstance(data, (str, Path)):
        documents, source = open_documents(data, text_column, tokenizer)
    else:
        documents, source = _documents(data), "strings"
    stream = _token_stream(documents, tokenizer)
    bos = tokenizer.bos_token_id
    rows: list[list[int]] = []
    for idx in range(num_samples):
        head = [bos] if bos is not None and idx % 2 == 0 else []
        row = head + list(islice(stream, seq_len - len(head)))
        if len(row) < seq_len:
            got = idx * seq_len + len(row)
            raise CalibrationError(_too_short(source, num_samples, seq_len, got))
        rows.append(row)
    return Windows(torch.tensor(rows), source)


def _documents(texts: Iterable[str]) -> Iterator[str]:
    """`texts`, each checked to be a string."""
    empty = True
    for idx, text in enumerate(texts):
        if not isinstance(text, str):
            raise ArgumentError(describe(f"data[{idx}]", "a string", type(text).__name__))
        empty = empty and not text.strip()
        yield text
    if empty:
        raise CalibrationError(describe("data", "text", "no strings, or empty ones"))


def _token_stream(documents: Iterable[str], tokenizer: Any) -> Iterator[int]:
    """The tokens of all documents, the tokenizer's EOS (where it has one) after each."""
    for document in documents:
        for piece in _pieces(document):
            yield from tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            yield tokenizer.eos_token_id


def _pieces(text: str) -> Iterator[str]:
    """`text` in pieces of at least `_PIECE_CHARS` characters, cut after line ends."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + _PIECE_CHARS) + 1 or len(text)
        yield text[start:end]
        start = end


def _token_windows(tokens: Tensor, num_samples: int, seq_len: int) -> Tensor:
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool or tokens.dim() not in (1, 2):
        got = f"{tokens.dtype} {tuple(tokens.shape)}"
        raise ArgumentError(describe("data", "integer token ids of shape [n] or [rows, len]", got))
    if tokens.dim() == 1:
        if len(tokens) < num_samples * seq_len:
            raise CalibrationError(_too_short("data", num_samples, seq_len, len(tokens)))
        tokens = tokens[: num_samples * seq_len].reshape(num_samples, seq_len)
    if tokens.shape[0] < num_samples or tokens.shape[1] < seq_len:
        wanted = f"at least {num_samples} rows of {seq_len} tokens"
        raise CalibrationError(describe("data", wanted, f"{tokens.shape[0]} of {tokens.shape[1]}", "ask for fewer"))
    return tokens[:num_samples, :seq_len].to("cpu", torch.int64)


def _too_short(source: str, num_samples: int, seq_len: int, got: int) -> str:
    wanted = f"at least {num_samples * seq_len} tokens ({num_samples} samples of {seq_len})"
    fix = f"give more text, or ask for {got // seq_len} samples" if got >= seq_len else "give more text"
    return describe(source, wanted, f"{got} tokens", fix)


@torch.no_grad()
def write_windows(
    model: PreTrainedModel,
    num_samples: int,
    seq_len: int,
    *,
    bos: int | None,
    seed: int = 0,
    on_token: Callable[[int], None] | None = None,
) -> Windows:
    """`num_samples` windows of `seq_len` tokens that the model writes itself, sampled at temperature 1.

    Texts of at most `_TEXT_LEN` tokens, each begun with `bos`, are written side by side and packed one behind another:
    far fewer steps than whole windows take, and still every position of the window is met. An end-of-text token does
    not end a text, the model goes on with the next. The same seed gives the same text on one device.
    on_token: called with the number of tokens written so far.
    Errors: CalibrationError without `bos`, or where the model's logits are not finite.
    """
    if bos is None:
        fix = "give calibration text"
        raise CalibrationError(describe("model", "a BOS or EOS token to start its own text from", "none", fix))
    generator = torch.Generator().manual_seed(seed)
    device: Any = model.get_input_embeddings().weight.device
    text_len = min(_TEXT_LEN, seq_len)
    texts: list[Tensor] = []
    missing = -(-num_samples * seq_len // text_len)
    while missing > 0:
        columns = [torch.full((min(missing, _TEXTS_AT_ONCE), 1), bos)]
        cache = None
        while len(columns) < text_len:
            step = model(columns[-1].to(device), past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            probabilities = step.logits[:, -1].float().softmax(-1).cpu()
            if not torch.isfinite(probabilities).all():
                fix = "load the model in bf16 or fp32, or look at its weights"
                raise CalibrationError(describe("the model's own text", "finite logits", "NaN or inf", fix))
            columns.append(torch.multinomial(probabilities, 1, generator=generator))
            if on_token is not None:
                on_token(len(texts) * text_len + len(columns) * len(columns[0]))
        texts += torch.cat(columns, dim=1)
        missing -= len(columns[0])
    tokens = torch.cat(texts)[: num_samples * seq_len].view(num_samples, seq_len)
    return Windows(tokens, "the model's own text")
