"""The text that a report scores: the same loaders as calibration, another seed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from calib.api import check_ids, own_text
from calib.data import load_windows
from quant.scales import KVScales

from .stamp import file_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[str, int, int], None]
"""Called with what is being done, steps done, steps in all."""


@dataclass(frozen=True)
class EvalText:
    """ids: int64 `[windows, length]` on the CPU. facts: where they come from, for the report. seed: of sampled text."""

    ids: Tensor
    facts: dict[str, Any]
    seed: int


def make_text(
    model: PreTrainedModel,
    tokenizer: Any,
    data: str | os.PathLike[str] | Iterable[str] | Tensor | None,
    num_windows: int,
    length: int,
    *,
    seed: int | None,
    scales: KVScales | None,
    text_column: str = "text",
    progress: Progress | None = None,
) -> EvalText:
    """Windows of `data`, see `calib.data.load_windows`; None: text that the model writes itself.

    seed: None takes one that the calibration did not use. Errors: CalibrationError for unusable data, ArgumentError for
    token ids outside the vocabulary.
    """
    calibrated = (scales.config.get("data") or {}).get("seed") if scales is not None else None
    seed = (calibrated or 0) + 1 if seed is None else seed
    if data is None:
        windows = own_text(model, tokenizer, num_windows, length, seed, progress)
    else:
        source = Path(data) if isinstance(data, os.PathLike) else data
        windows = load_windows(source, tokenizer, num_windows, length, text_column=text_column)
    check_ids(model, windows)
    facts = {"source": windows.source, "sampled": data is None, "tokens_sha256": windows.sha256(), "file_sha256": None}
    if isinstance(data, (str, os.PathLike)):
        facts["file_sha256"] = file_sha256(Path(data))
    return EvalText(windows.tokens, facts, seed)
