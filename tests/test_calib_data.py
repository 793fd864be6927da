"""Calibration text: what is read, how it is packed, and what is said of unusable data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_helpers import VOCAB, tiny_model, tokens
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from calib import calibrate
from calib import data as calib_data
from calib.data import Windows, load_windows, write_windows
from calib.documents import open_documents
from quant.errors import ArgumentError, CalibrationError

BOS, EOS = 1, 2


def make_tokenizer(**special: str) -> Any:
    """A tokenizer whose token `i` is the word `w<i>`, 0, 1 and 2 apart."""
    names = {"<unk>": 0, "<bos>": 1, "<eos>": 2, **{f"w{idx}": idx for idx in range(3, VOCAB)}}
    words = Tokenizer(WordLevel(names, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", **special)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer(bos_token="<bos>", eos_token="<eos>")


def text(first: int, last: int) -> str:
    """The words of tokens `first` .. `last - 1`."""
    return " ".join(f"w{idx}" for idx in range(first, last))


# --- packing ----------------------------------------------------------------------------------------------------------


def test_documents_are_joined_by_eos_and_every_other_window_starts_with_bos(tokenizer: Any) -> None:
    windows = load_windows([text(10, 14), text(20, 30)], tokenizer, 3, 4)
    assert windows.tokens.tolist() == [[BOS, 10, 11, 12], [13, EOS, 20, 21], [BOS, 22, 23, 24]]
    assert windows.tokens.dtype == torch.int64 and windows.source == "strings"


def test_a_tokenizer_without_special_tokens_adds_none() -> None:
    windows = load_windows([text(10, 14), text(20, 30)], make_tokenizer(), 3, 4)
    assert windows.tokens.tolist() == [[10, 11, 12, 13], [20, 21, 22, 23], [24, 25, 26, 27]]


def test_text_files_are_one_document(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "some.txt"
    path.write_text(text(10, 16) + "\n\n" + text(20, 26))
    windows = load_windows(path, tokenizer, 2, 5)
    assert windows.tokens.tolist() == [[BOS, 10, 11, 12, 13], [14, 15, 20, 21, 22]]
    assert windows.source == "some.txt"
    assert load_windows(str(path), tokenizer, 2, 5).sha256() == windows.sha256()


def test_long_texts_are_tokenised_in_pieces(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "some.txt"
    path.write_text("\n".join(text(10 + idx % 7, 20 + idx % 7) for idx in range(40)))
    whole = load_windows(path, tokenizer, 8, 40)
    monkeypatch.setattr(calib_data, "_PIECE_CHARS", 33)
    assert torch.equal(load_windows(path, tokenizer, 8, 40).tokens, whole.tokens)


def test_jsonl_records(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "some.jsonl"
    records = [{"text": text(10, 14), "body": text(40, 44)}, {"text": text(20, 30), "body": text(50, 60)}]
    path.write_text("\n\n".join(map(json.dumps, records)) + "\n")
    assert load_windows(path, tokenizer, 2, 4).tokens.tolist() == [[BOS, 10, 11, 12], [13, EOS, 20, 21]]
    other = load_windows(path, tokenizer, 2, 4, text_column="body")
    assert other.tokens.tolist() == [[BOS, 40, 41, 42], [43, EOS, 50, 51]]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_token_tensors(dtype: torch.dtype) -> None:
    ids = torch.arange(24, dtype=dtype)
    assert load_windows(ids, None, 2, 5).tokens.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    rows = load_windows(ids.view(4, 6), None, 2, 5)
    assert rows.tokens.tolist() == [[0, 1, 2, 3, 4], [6, 7, 8, 9, 10]] and rows.tokens.dtype == torch.int64


def test_the_hash_is_of_shape_and_ids() -> None:
    ids = torch.arange(12).view(3, 4)
    base = Windows(ids, "a").sha256()
    assert Windows(ids.clone(), "b").sha256() == base == Windows(ids.t().contiguous().t(), "a").sha256()
    assert Windows(ids.view(4, 3), "a").sha256() != base
    assert Windows(ids + 1, "a").sha256() != base


# --- unusable data ----------------------------------------------------------------------------------------------------


def test_too_few_tokens_says_how_many_there_are(tokenizer: Any) -> None:
    with pytest.raises(CalibrationError, match=r"at least 20 tokens \(4 samples of 5\), got 13 tokens; .* 2 samples"):
        load_windows([text(10, 20)], tokenizer, 4, 5)
    with pytest.raises(CalibrationError, match="got 13 tokens; give more text$"):
        load_windows([text(10, 21)], tokenizer, 1, 50)
    with pytest.raises(CalibrationError, match="at least 20 tokens .* got 19 tokens"):
        load_windows(torch.arange(19), None, 4, 5)


@pytest.mark.parametrize(("rows", "length"), [(3, 6), (4, 4)])
def test_too_few_rows_of_tokens(rows: int, length: int) -> None:
    with pytest.raises(CalibrationError, match=f"at least 4 rows of 5 tokens, got {rows} of {length}"):
        load_windows(torch.zeros(rows, length, dtype=torch.int64), None, 4, 5)


@pytest.mark.parametrize("ids", [torch.zeros(20), torch.zeros(2, 2, 5, dtype=torch.int64), torch.ones(20) > 0])
def test_tensors_that_are_no_token_ids(ids: torch.Tensor) -> None:
    with pytest.raises(ArgumentError, match="data: expected integer token ids"):
        load_windows(ids, None, 4, 5)


def test_text_without_a_tokenizer() -> None:
    with pytest.raises(ArgumentError, match="tokenizer: expected the model's tokenizer"):
        load_windows(["w5"], None, 1, 1)


@pytest.mark.parametrize("data", [[], [""], [" \n"], iter([])])
def test_no_strings(data: Any, tokenizer: Any) -> None:
    with pytest.raises(CalibrationError, match="no strings, or empty ones|got 1 tokens|got 0 tokens"):
        load_windows(data, tokenizer, 1, 50)


def read(path: Path) -> list[str]:
    return list(open_documents(path, "text", None)[0])


def test_strings_that_are_none(tokenizer: Any) -> None:
    with pytest.raises(ArgumentError, match=r"data\[1\]: expected a string, got int"):
        load_windows(["w5", 5], tokenizer, 1, 50)  # type: ignore[list-item]


@pytest.mark.parametrize(("name", "content"), [("a.txt", ""), ("a.txt", " \n\t"), ("a.jsonl", ""), ("a.jsonl", "\n\n")])
def test_empty_files(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CalibrationError, match=f"{name}: expected text, got an empty file"):
        read(tmp_path / name)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"no.txt: expected a readable UTF-8 file, got .*No such file"):
        read(tmp_path / "no.txt")
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(CalibrationError, match=r"folder.jsonl: expected a readable UTF-8 file"):
        read(tmp_path / "folder.jsonl")


def test_unknown_kinds_of_file(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"expected a .txt, .jsonl or .parquet file, or hub:NAME, got '.csv'"):
        read(tmp_path / "a.csv")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_files_that_are_no_utf8(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\xff\xfe\x00w5")
    with pytest.raises(CalibrationError, match="expected a readable UTF-8 file"):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "line 3: expected a json object, got Expecting"),
        ('{"body": "w5"}', "line 3: expected a string under 'text', got body; --text-column"),
        ('{"text": 5}', "line 3: expected a string under 'text', got text"),
        ("{}", "line 3: expected a string under 'text', got nothing"),
        ("[1]", "line 3: expected a string under 'text', got list"),
    ],
)
def test_malformed_jsonl_names_the_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "w5"}\n\n' + line + "\n")
    with pytest.raises(CalibrationError, match=message):
        read(path)


# --- text of the model's own ------------------------------------------------------------------------------------------


def test_own_text_is_sampled_from_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over many texts, the second token is distributed as the model says, and each text starts with BOS."""
    monkeypatch.setattr(calib_data, "_TEXT_LEN", 2)
    model = tiny_model()
    with torch.no_grad():
        expected = model(torch.tensor([[BOS]])).logits[0, -1].softmax(-1).double()
    windows = write_windows(model, 500, 4, bos=BOS, seed=3)
    assert windows.tokens.shape == (500, 4)
    assert (windows.tokens[:, 0::2] == BOS).all()
    counts = torch.bincount(windows.tokens[:, 1::2].flatten(), minlength=VOCAB).double()
    chi2 = float(((counts - 1000 * expected).square() / (1000 * expected)).sum())
    # 98 degrees of freedom: mean 98, deviation 14.
    assert 98 - 5 * 14 < chi2 < 98 + 5 * 14


def test_own_text_depends_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    first, second = (write_windows(model, 3, 20, bos=BOS, seed=seed).tokens for seed in (0, 1))
    torch.manual_seed(123)
    assert torch.equal(write_windows(model, 3, 20, bos=BOS, seed=0).tokens, first)
    assert not torch.equal(first, second)


def test_own_text_fills_windows_that_its_texts_do_not_divide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calib_data, "_TEXT_LEN", 7)
    monkeypatch.setattr(calib_data, "_TEXTS_AT_ONCE", 2)
    steps: list[int] = []
    windows = write_windows(tiny_model(), 3, 10, bos=BOS, on_token=steps.append)
    flat = windows.tokens.flatten()
    assert (flat[::7] == BOS).all() and len(flat) == 30
    assert steps == sorted(steps) and steps[-1] == 35


def test_own_text_needs_a_first_token_and_finite_logits() -> None:
    model = tiny_model()
    with pytest.raises(CalibrationError, match="a BOS or EOS token to start its own text from, got none"):
        write_windows(model, 1, 20, bos=None)
    model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(CalibrationError, match="expected finite logits"):
        write_windows(model, 1, 20, bos=BOS)


def test_calibrate_takes_the_first_token_from_config_tokenizer_or_eos(tokenizer: Any) -> None:
    for config, helper in (
        ({}, None),
        ({"bos_token_id": None}, tokenizer),
        ({"bos_token_id": None, "eos_token_id": [2, 3]}, None),
    ):
        scales = calibrate(tiny_model(**config), tokenizer=helper, num_samples=1, max_seq_len=16)
        assert scales.config["data"]["source"] == "the model's own text"
    with pytest.raises(CalibrationError, match="give calibration text"):
        calibrate(tiny_model(bos_token_id=None), num_samples=1, max_seq_len=16)


def test_calibrate_reads_text(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "some.txt"
    path.write_text(text(10, 60))
    scales = calibrate(tiny_model(), path, tokenizer=tokenizer, num_samples=2, max_seq_len=16)
    assert scales.config["data"]["source"] == "some.txt"
    assert scales.config["data"]["sha256"] == load_windows(path, tokenizer, 2, 16).sha256()


def test_numpy_is_not_mistaken_for_strings(tokenizer: Any) -> None:
    with pytest.raises(ArgumentError, match=r"data\[0\]: expected a string, got int64"):
        load_windows(np.arange(40), tokenizer, 2, 5)  # type: ignore[arg-type]


def test_own_text_of_the_wrong_vocabulary_is_refused() -> None:
    with pytest.raises(ArgumentError, match="token ids: expected 0 .. 98"):
        calibrate(tiny_model(), tokens(2, 16) + 90, num_samples=2, max_seq_len=16)
