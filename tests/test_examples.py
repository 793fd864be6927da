"""The examples run, and the harness adapter really scores through the cache."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import runpy
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hf_helpers import one_thread

from foldkv import load_model

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
MODEL = EXAMPLES / "tiny_lm" / "model"
pytestmark = pytest.mark.usefixtures(one_thread.__name__)


def load_example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_swap_in_ten_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(EXAMPLES / "swap.py"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["c16", "c8", "c4"]
    assert all("The history of the city began when" in line and len(line) > 80 for line in lines)


def test_a_chat_that_changes_its_cache(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    says = "The history of the city\n/stats\n/kv c4r\nIn the year 1850\n/kv c99\n/stats\n/new\n/stats\n/what\n/quit\n"
    monkeypatch.setattr(sys, "argv", ["chat.py", "--kv", "c8d", "--max-new-tokens", "6"])
    monkeypatch.setattr(sys, "stdin", io.StringIO(says))
    chat = load_example("chat")
    monkeypatch.setattr(chat.foldkv, "calibrate", lambda *args, **kwargs: None, raising=False)  # both modes do without
    chat.main()
    lines = capsys.readouterr().out.splitlines()
    stats = [line for line in lines if "bits/element" in line]
    assert ["c8d" in stats[0], "c4r" in stats[1], stats[0].endswith("2 turns"), stats[1].endswith("4 turns")] == [
        True
    ] * 4
    assert stats[2].endswith("0 turns") and any("'c99'" in line for line in lines) and "expected /kv" in lines[-1]


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a multiple-choice and a perplexity task over local files."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setitem(os.environ, name, "1")
    text = (EXAMPLES / "tiny_lm" / "sample.txt").read_text(encoding="utf-8")
    words = text.split()
    rows = [
        {"text": " ".join(words[i : i + 40]), "right": " " + words[i + 40], "wrong": " zebra"}
        for i in range(0, 200, 40)
    ]
    data = tmp_path / "data.json"
    data.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    common = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
    (tmp_path / "choice.yaml").write_text(
        "task: local_choice\noutput_type: multiple_choice\n" + common + "doc_to_text: text\n"
        "doc_to_choice: '{{[right, wrong]}}'\ndoc_to_target: 0\ntarget_delimiter: ''\n"
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n",
        encoding="utf-8",
    )
    (tmp_path / "rolling.yaml").write_text(
        "task: local_rolling\noutput_type: loglikelihood_rolling\n"
        + common
        + "doc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list:\n  - metric: word_perplexity\n",
        encoding="utf-8",
    )
    return tmp_path


def test_the_harness_scores_through_the_cache(tasks: Path) -> None:
    """The exact cache gives the harness's own figures by both routes; a bad one does not."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")
    example = load_example("lm_eval_harness")
    model, tokenizer = load_model(MODEL, "float32")
    names = ["local_choice", "local_rolling"]

    def perplexity(result: dict[str, Any]) -> float:
        return float(result["results"]["local_rolling"]["word_perplexity,none"])

    lm = import_module("lm_eval.models.huggingface").HFLM(
        pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=8, max_length=256
    )
    manager = import_module("lm_eval.tasks").TaskManager(include_path=str(tasks), include_defaults=False)
    stock = import_module("lm_eval").simple_evaluate(
        model=lm, tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=False
    )
    options = {"include_path": str(tasks), "max_length": 256}
    for route in ("prefill", "decode"):
        exact = example.evaluate(model, tokenizer, names, "c32", route=route, **options)
        assert perplexity(exact) == pytest.approx(perplexity(stock), rel=1e-4)
        assert exact["results"]["local_choice"] == stock["results"]["local_choice"]
        assert exact["foldkv"]["tokens_through_the_cache"] > 500
        coarse = example.evaluate(model, tokenizer, names, "c4r", route=route, **options)
        assert perplexity(coarse) != pytest.approx(perplexity(stock), rel=1e-3)


def test_tables_of_several_checkpoints_are_joined(tmp_path: Path) -> None:
    table = load_example("accuracy_table")
    mode = {
        "bits_per_element": 4.125,
        "prefill": {
            "windows": 64, "kld_mean": 0.00732, "kld_se": 0.0003, "kld_p99": 0.048, "top1_agreement": 0.9431, "top1_se": 0.0038,
            "ppl_change": 0.0046, "ln_ppl_ratio_se": 0.0016,
        },
    }  # fmt: skip
    entry = table.entry_of(mode, "c4")
    (tmp_path / "llama.json").write_text(json.dumps({"c4": entry, "plan, 5 bits": {**entry, "map": "c4r,0:c8"}}))
    (tmp_path / "qwen2.json").write_text(json.dumps({"c4": {**entry, "kld_se": None}}))
    tables = table.read([tmp_path / "llama.json", tmp_path / "qwen2.json"])
    assert table.joined(tables).splitlines() == [
        "| mode | bits | llama | qwen2 |",
        "|---|---|---|---|",
        "| c4 | 4.125 | 7.32e-03 +- 3e-04 / 4.8e-02 / 94.31 +- 0.38 / +0.46 +- 0.16 "
        "| 7.32e-03 +- nan / 4.8e-02 / 94.31 +- 0.38 / +0.46 +- 0.16 |",
        "| plan, 5 bits | 4.125 | 7.32e-03 +- 3e-04 / 4.8e-02 / 94.31 +- 0.38 / +0.46 +- 0.16 |  |",
        "plan, 5 bits, llama: `c4r,0:c8`",
    ]


def test_the_table_of_the_docs_is_the_record() -> None:
    table = load_example("accuracy_table")
    tables = table.read([ROOT / "bench/results/accuracy-h200.json"])
    page = (ROOT / "docs/accuracy.md").read_text(encoding="utf-8")
    assert list(tables) == ["llama", "llama_hard", "qwen2", "qwen2_hard"]
    for name in tables["llama"]:
        assert " | ".join(table.cell(figures[name]) for figures in tables.values()) in page, name
