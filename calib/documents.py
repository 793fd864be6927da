"""Documents of calibration text: .txt, .jsonl and .parquet files, data sets of the hub, conversations."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from quant.errors import CalibrationError, describe

# A record's conversation stands under one of these: a list of {"role", "content"}.
_CHAT_FIELDS = ("messages", "conversation", "conversations")
_PARQUET_ROWS = 1024

Record = tuple[str, Any]
"""Where a record stands, for errors, and what it is."""


def open_documents(data: str | Path, text_column: str, tokenizer: Any) -> tuple[Iterator[str], str]:
    """The documents of `data`, read as they are asked for, and its name.

    data: a `.txt` file (one document); a `.jsonl` or `.parquet` file or `hub:NAME[:CONFIG][:SPLIT]` (package `datasets`),
        a document a record: the text under `text_column`, or a conversation under "messages", which the tokenizer's
        chat template renders.
    Errors: CalibrationError naming file and line: unreadable, malformed or empty data, a package that is not installed.
    """
    if isinstance(data, str) and data.startswith("hub:"):
        return _checked(_records_text(_read_hub(data), text_column, tokenizer), data), data
    path = Path(data)
    readers: dict[str, Callable[[Path], Iterator[Record]]] = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix == ".txt":
        texts = _read_text(path)
    elif path.suffix in readers:
        texts = _records_text(readers[path.suffix](path), text_column, tokenizer)
    else:
        raise CalibrationError(
            describe(f"data {path}", "a .txt, .jsonl or .parquet file, or hub:NAME", repr(path.suffix))
        )
    return _checked(texts, str(path)), path.name


def _checked(texts: Iterator[str], name: str) -> Iterator[str]:
    """`texts` that are not blank; CalibrationError where none is, or where they cannot be read."""
    found = False
    try:
        for text in texts:
            if text.strip():
                found = True
                yield text
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(describe(f"data {name}", "a readable UTF-8 file", str(error))) from error
    if not found:
        raise CalibrationError(describe(f"data {name}", "text", "an empty file"))


def _read_text(path: Path) -> Iterator[str]:
    yield path.read_text(encoding="utf-8")


def _read_jsonl(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"data {path}, line {number}"
                try:
                    yield where, json.loads(line)
                except ValueError as error:
                    raise CalibrationError(describe(where, "a json object", str(error))) from error


def _read_parquet(path: Path) -> Iterator[Record]:
    parquet = _package("pyarrow.parquet", f"data {path}")
    arrow = import_module("pyarrow")
    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                for record in batch.to_pylist():
                    number += 1
                    yield f"data {path}, row {number}", record
    except arrow.ArrowInvalid as error:
        raise CalibrationError(describe(f"data {path}", "a parquet file", str(error).splitlines()[0])) from error


def _read_hub(data: str) -> Iterator[Record]:
    """Records of `hub:NAME[:CONFIG][:SPLIT]`, streamed; the split is "train" unless given."""
    datasets = _package("datasets", f"data {data}")
    _, name, *rest = data.split(":")
    if not name or len(rest) > 2:
        raise CalibrationError(describe("data", "hub:NAME, hub:NAME:SPLIT or hub:NAME:CONFIG:SPLIT", repr(data)))
    split = rest[-1] if rest else "train"
    config = rest[0] if len(rest) == 2 else None
    try:
        records = datasets.load_dataset(name, config, split=split, streaming=True)
        for number, record in enumerate(records, 1):
            yield f"data {data}, record {number}", record
    except CalibrationError:
        raise
    except Exception as error:  # The package raises errors of a dozen others.
        fix = "check name, config, split and network"
        got = str(error).strip().splitlines()[:1]
        raise CalibrationError(describe(f"data {data}", "a data set that loads", "".join(got), fix)) from error


def _package(name: str, where: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        fix = f"pip install {package}"
        raise CalibrationError(describe(where, f"the package {package} to read it", "none installed", fix)) from error


def _records_text(records: Iterator[Record], text_column: str, tokenizer: Any) -> Iterator[str]:
    for where, record in records:
        yield _text_of(where, record, text_column, tokenizer)


def _text_of(where: str, record: Any, text_column: str, tokenizer: Any) -> str:
    """The text of one record, or its conversation as the tokenizer's chat template writes it."""
    if isinstance(record, Mapping):
        text = record.get(text_column)
        if isinstance(text, str):
            return text
        fields = (text_column, *_CHAT_FIELDS)
        chat = next((record[name] for name in fields if isinstance(record.get(name), list)), None)
        if chat is not None:
            return _render(where, chat, tokenizer)
    keys = ", ".join(record) if isinstance(record, Mapping) else type(record).__name__
    fix = "--text-column names the field that holds the text"
    raise CalibrationError(describe(where, f"a string under {text_column!r}", keys or "nothing", fix))


def _render(where: str, chat: list[Any], tokenizer: Any) -> str:
    if not getattr(tokenizer, "chat_template", None):
        fix = "the tokenizer has none: give plain text"
        raise CalibrationError(describe(where, "a chat template to write the conversation with", "none", fix))
    turns = [
        {"role": turn.get("role", turn.get("from")), "content": turn.get("content", turn.get("value"))}
        if isinstance(turn, Mapping)
        else {"role": None, "content": None}
        for turn in chat
    ]
    if not all(isinstance(value, str) for turn in turns for value in turn.values()):
        raise CalibrationError(describe(where, "turns with role and content", repr(chat)[:60]))
    return tokenizer.apply_chat_template(turns, tokenize=False)
