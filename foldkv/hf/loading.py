"""Load a checkpoint and its tokenizer, and say plainly what is wrong with one that cannot be loaded."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from quant.errors import ArgumentError, describe

_DTYPES = {
    "float32": torch.float32, "fp32": torch.float32,
    "float16": torch.float16, "fp16": torch.float16,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
}  # fmt: skip
_INDEX = "model.safetensors.index.json"
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.spm", "*.tiktoken", "tekken.json")
_AGAIN = "download or copy the checkpoint again"
_FAILURES = (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError)


def load_model(
    path: str | os.PathLike[str], dtype: str | torch.dtype | None = None, device: torch.device | str = "cpu"
) -> tuple[PreTrainedModel, Any]:
    """A decoder model in eval mode and its tokenizer.

    path: a checkpoint directory (`config.json`, one or several `.safetensors` files, tokenizer files), or a hub id.
    dtype: "float32", "float16", "bfloat16", a torch dtype, or "auto" (also None): that of the checkpoint.
    Errors: ArgumentError naming the file that is missing or damaged and what to do.
    """
    wanted = parse_dtype(dtype)
    directory = Path(path)
    if directory.is_dir():
        _check_directory(directory)
    elif directory.exists() or directory.is_absolute() or str(path).count("/") > 1:
        raise ArgumentError(describe("model", "a checkpoint directory or a hub id", f"{str(path)!r}, no directory"))
    tokenizer = load_tokenizer(path)
    options = {"dtype": wanted, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        with _quiet():
            model, info = AutoModelForCausalLM.from_pretrained(path, **options)
    except _FAILURES as error:
        fix = "check the path, the network, or the files"
        raise ArgumentError(
            describe(f"model {str(path)!r}", "a decoder checkpoint", _first_line(error), fix)
        ) from error
    # A key, or a tuple of a key and two shapes.
    absent = [*info["missing_keys"], *(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])]
    if absent:
        got = f"{len(absent)} missing or of another shape, {min(absent)}"
        raise ArgumentError(describe(f"weights of {str(path)!r}", "all tensors of the model", got, _AGAIN))
    try:
        return model.to(device).eval(), tokenizer
    except (RuntimeError, AssertionError) as error:
        raise ArgumentError(describe("device", "one that torch can use", f"{device}: {_first_line(error)}")) from error


def parse_dtype(dtype: str | torch.dtype | None) -> str | torch.dtype:
    """A torch dtype of its name, or "auto" (also for None). Errors: ArgumentError."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is None or dtype == "auto":
        return "auto"
    if dtype not in _DTYPES:
        raise ArgumentError(describe("dtype", f"auto, {', '.join(_DTYPES)}", repr(dtype)))
    return _DTYPES[dtype]


def _check_directory(directory: Path) -> None:
    """ArgumentError unless config and weights are there and the weight files are whole."""
    _read_json(directory / "config.json", "the folder is no transformers checkpoint")
    shards = _shards(directory)
    for name in shards:
        try:
            with safe_open(directory / name, framework="pt") as file:
                file.keys()
        except (SafetensorError, OSError) as error:
            path = str(directory / name)
            raise ArgumentError(describe(path, "a whole safetensors file", _first_line(error), _AGAIN)) from error
    if not shards and not any(directory.glob("pytorch_model*.bin")):
        raise ArgumentError(describe(str(directory), "model.safetensors or its shards", "no weights", _AGAIN))


def _shards(directory: Path) -> list[str]:
    """The safetensors files of a checkpoint, by its index if it has one."""
    if not (directory / _INDEX).exists():
        return sorted(path.name for path in directory.glob("model*.safetensors"))
    index = _read_json(directory / _INDEX, _AGAIN)
    weights = index.get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise ArgumentError(describe(str(directory / _INDEX), "a weight_map", "none", _AGAIN))
    shards = sorted(set(weights.values()))
    absent = [name for name in shards if not (directory / name).exists()]
    if absent:
        got = f"{len(absent)} missing, {absent[0]}"
        raise ArgumentError(describe(f"shards of {str(directory)!r}", f"{len(shards)} files", got, _AGAIN))
    return shards


def _read_json(path: Path, fix: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArgumentError(describe(str(path), "a JSON file", "none", fix)) from None
    except (OSError, ValueError) as error:
        raise ArgumentError(describe(str(path), "a JSON file", _first_line(error), _AGAIN)) from error
    if not isinstance(value, dict):
        raise ArgumentError(describe(str(path), "a JSON object", type(value).__name__, _AGAIN))
    return value


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """The tokenizer of a checkpoint. Errors: ArgumentError."""
    local = Path(path).is_dir()
    fix = (
        "put tokenizer.json and tokenizer_config.json beside the weights" if local else "check the name and the network"
    )
    # Some versions of transformers make an empty tokenizer where there are no files.
    if local and not any(match for pattern in _TOKENIZER_FILES for match in Path(path).glob(pattern)):
        raise ArgumentError(describe(f"tokenizer of {str(path)!r}", "tokenizer files", "none", fix))
    try:
        with _quiet():
            return AutoTokenizer.from_pretrained(path)
    except _FAILURES as error:
        raise ArgumentError(
            describe(f"tokenizer of {str(path)!r}", "tokenizer files", _first_line(error), fix)
        ) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(": ") if lines else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of transformers where nobody watches."""
    if sys.stderr.isatty() or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
