"""Drift between calibrations, and the kinds of text they read."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hf_helpers import save_checkpoint, tiny_model, tokens
from typer.testing import CliRunner

from calib import calibrate
from calib.collect import Snapshot, collect
from calib.documents import open_documents
from calib.drift import drift
from foldkv.cli.main import app
from foldkv.hf import load_model
from quant.errors import CalibrationError
from quant.scales import KVScales

# --- drift ------------------------------------------------------------------------------------------------------------


def test_no_drift_between_equal_calibrations_and_a_lot_between_others() -> None:
    model = tiny_model()
    same = [collect(model, [tokens(4, 32)]) for _ in range(2)]
    for found in drift(*same):
        assert (found.range_median, found.range_max, found.outside, found.mean_sigmas) == (0, 0, 0, 0)
        assert found.balance_max == pytest.approx(0, abs=1e-6)
    other = collect(tiny_model(seed=7), [tokens(4, 32)])
    for found in drift(same[0], other):
        assert found.range_median > 0.1 and found.outside > 0.1 and found.mean_sigmas > 0.3 and found.balance_max > 0.05


def test_drift_figures_are_what_they_say() -> None:
    """One channel of layer 1 widened, one mean moved by half a deviation."""
    first, second = (collect(tiny_model(), [tokens(4, 32)]) for _ in range(2))
    stats = second[1].k  # type: ignore[union-attr]
    width = float(stats.max[0, 3] - stats.min[0, 3])
    stats.max[0, 3] += width
    stats.mean[1, 2] += 0.5 * float(stats.var[1, 2].sqrt())
    k, v = drift(first, second)
    assert k.range_max == pytest.approx(0.5) and k.range_layer == 1 and k.range_median == 0
    assert k.outside == pytest.approx(1 / (2 * 2 * 16)) and k.mean_sigmas == pytest.approx(0.5, rel=1e-4)
    assert v.range_max == 0 and "K ranges 0.0% (at most 50%, layer 1), 1.6% of channels outside" in str(k)


def test_the_snapshot_is_the_calibration_of_the_first_samples() -> None:
    model, ids = tiny_model(), tokens(12, 32)
    snapshot = Snapshot(5)
    collect(model, ids.split(4), snapshot=snapshot)
    assert snapshot.sequences == 8
    early = collect(model, ids[:8].split(4))
    for a, b in zip(snapshot.layers, early, strict=True):
        assert a is not None and b is not None
        assert torch.equal(a.k.min, b.k.min) and torch.equal(a.v.percentiles, b.v.percentiles)


def test_drift_is_recorded_and_printed(tmp_path: Path) -> None:
    checkpoint = save_checkpoint(tiny_model(), tmp_path / "model")
    for name, low, high in (("a", 30, 60), ("b", 60, 98)):
        words = torch.randint(low, high, (40, 40), generator=torch.Generator().manual_seed(1)).tolist()
        text = "\n".join(json.dumps({"text": " ".join(f"w{idx}" for idx in row)}) for row in words)
        (tmp_path / f"{name}.jsonl").write_text(text)
    done = CliRunner().invoke(
        app,
        [
            "calibrate", str(checkpoint), "--data", str(tmp_path / "a.jsonl"), "--compare", str(tmp_path / "b.jsonl"),
            "--num-samples", "20", "--max-seq-len", "32", "--out", str(tmp_path / "kv"),
        ],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    for line in ("drift from 16 samples to all: K ranges", "drift from this corpus to b.jsonl: V ranges"):
        assert line in done.stderr
    found = KVScales.load(tmp_path / "kv").config["data"]["drift"]
    assert found["samples"]["first"] == 16 and len(found["corpora"]["sha256"]) == 64
    # Other words move the means more than more samples of the same do.
    assert found["corpora"]["k"]["mean_sigmas"] > 2 * found["samples"]["k"]["mean_sigmas"]
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "kv")])
    assert "drift from this corpus to b.jsonl: V ranges" in shown.stdout


def test_no_drift_where_there_are_only_a_few_samples() -> None:
    assert "drift" not in calibrate(tiny_model(), tokens(8, 32), num_samples=8, max_seq_len=32).config["data"]


# --- documents --------------------------------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "w5 w6"}, {"role": "assistant", "content": "w7"}]
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
RENDERED = "<user> w5 w6 <assistant> w7 "


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    found = load_model(save_checkpoint(tiny_model(), tmp_path_factory.mktemp("model")))[1]
    found.chat_template = TEMPLATE
    return found


def jsonl(path: Path, *records: Any) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def test_conversations_are_written_by_the_chat_template(tmp_path: Path, tokenizer: Any) -> None:
    turns = [{"from": turn["role"], "value": turn["content"]} for turn in CHAT]
    path = jsonl(tmp_path / "a.jsonl", {"messages": CHAT}, {"text": "plain"}, {"conversations": turns}, {"talk": CHAT})
    documents, name = open_documents(path, "text", tokenizer)
    assert name == "a.jsonl"
    assert [next(documents) for _ in range(3)] == [RENDERED, "plain", RENDERED]
    with pytest.raises(CalibrationError, match="line 4: expected a string under 'text', got talk; --text-column"):
        next(documents)
    assert list(open_documents(jsonl(tmp_path / "b.jsonl", {"talk": CHAT}), "talk", tokenizer)[0]) == [RENDERED]


def test_conversations_that_cannot_be_written(tmp_path: Path, tokenizer: Any) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"messages": CHAT})
    with pytest.raises(CalibrationError, match="line 1: expected a chat template"):
        list(open_documents(path, "text", None)[0])
    for turns in ([{"role": "user"}], ["hello"], [{"content": "x"}]):
        path = jsonl(tmp_path / "a.jsonl", {"messages": turns})
        with pytest.raises(CalibrationError, match="expected turns with role and content"):
            list(open_documents(path, "text", tokenizer)[0])


def test_parquet(tmp_path: Path, tokenizer: Any) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": [f"w{idx % 90}" for idx in range(3000)]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=500)
    documents = list(open_documents(tmp_path / "a.parquet", "text", tokenizer)[0])
    assert len(documents) == 3000 and documents[2999] == "w29"
    with pytest.raises(CalibrationError, match="row 1: expected a string under 'body', got text"):
        list(open_documents(tmp_path / "a.parquet", "body", tokenizer)[0])
    parquet.write_table(pyarrow.table({"messages": [CHAT]}), tmp_path / "b.parquet")
    assert list(open_documents(tmp_path / "b.parquet", "text", tokenizer)[0]) == [RENDERED]
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(CalibrationError, match=r"c.parquet: expected a parquet file"):
        list(open_documents(tmp_path / "c.parquet", "text", tokenizer)[0])


def fake_datasets(monkeypatch: pytest.MonkeyPatch, load: Any) -> None:
    module = ModuleType("datasets")
    module.load_dataset = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_hub_data_sets_are_streamed(monkeypatch: pytest.MonkeyPatch, tokenizer: Any) -> None:
    """The package is called as it wants to be; a stand-in, as the tests have no network."""
    calls: list[Any] = []

    def load(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        calls.append((name, config, split, streaming))
        return iter([{"text": "w5"}, {"text": "w6"}])

    fake_datasets(monkeypatch, load)
    for data in ("hub:org/set", "hub:org/set:test", "hub:org/set:en:validation"):
        assert list(open_documents(data, "text", tokenizer)[0]) == ["w5", "w6"]
    assert calls == [
        ("org/set", None, "train", True), ("org/set", None, "test", True), ("org/set", "en", "validation", True)
    ]  # fmt: skip
    scales = calibrate(tiny_model(), "hub:org/set", tokenizer=_many(tokenizer), num_samples=1, max_seq_len=16)
    assert scales.config["data"]["source"] == "hub:org/set"


def _many(tokenizer: Any) -> Any:
    """A tokenizer that makes ten tokens of a word, as two documents are all there is."""

    class Many:
        bos_token_id = eos_token_id = None

        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            return {"input_ids": tokenizer(text, **options)["input_ids"] * 10}

    return Many()


def test_hub_data_sets_that_do_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **kwargs: Any) -> Any:
        raise FileNotFoundError("Dataset 'org/set' doesn't exist on the Hub\nmore")

    fake_datasets(monkeypatch, load)
    with pytest.raises(
        CalibrationError, match="hub:org/set: expected a data set that loads, got Dataset 'org/set'.*network"
    ):
        list(open_documents("hub:org/set", "text", None)[0])
    for wrong in ("hub:", "hub:a:b:c:d"):
        with pytest.raises(CalibrationError, match="expected hub:NAME"):
            list(open_documents(wrong, "text", None)[0])
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match="expected the package datasets to read it, got none installed; pip"):
        list(open_documents("hub:org/set", "text", None)[0])
