"""Decode of the report through `foldkv.Engine`: on a CPU the engine's own steps, without graphs, must give the same figures."""

from __future__ import annotations

import pytest
from report_helpers import token_windows
from transformers import PreTrainedModel

from foldkv.accuracy import AccuracyReport, accuracy_report, evaluate
from quant.errors import ArgumentError, UnsupportedModelError
from quant.scales import KVScales

SIZES = {"num_windows": 0, "decode_windows": 4, "decode_len": 24}


def report(model: PreTrainedModel, scales: KVScales, graphs: bool | None) -> AccuracyReport:
    windows = token_windows(4, 288, seed=2)
    return accuracy_report(model, ["c8", "c4"], windows, scales=scales, level="quick", graphs=graphs, **SIZES)


def test_the_engine_gives_the_figures_of_the_loop(model: PreTrainedModel, scales: KVScales) -> None:
    loop, engine = (report(model, scales, graphs).data for graphs in (False, True))
    for mode in ("c8", "c4", "c4x"):
        a, b = (found["modes"][mode]["decode"] for found in (loop, engine))
        assert a["positions"] == b["positions"] == 4 * 23
        assert b["kld_mean"] == pytest.approx(a["kld_mean"], rel=1e-3)
        assert b["ppl"] == pytest.approx(a["ppl"], rel=1e-5)
    assert engine["verdict"]["trusted"], [check for check in engine["checks"] if not check["ok"]]
    assert engine["setup"]["ways"][0]["graphs"] and not loop["setup"]["ways"][0]["graphs"]


def test_the_page_says_that_graphs_were_replayed(model: PreTrainedModel, scales: KVScales) -> None:
    from foldkv.accuracy.render import to_html, to_markdown

    data = report(model, scales, True).data
    assert "without CUDA graphs" in to_markdown(data)  # the engine's own steps, on a CPU
    data["setup"]["device"] = "cuda"
    assert "decoded one by one by graph replay" in to_html(data)
    assert "every step one replay of a captured CUDA graph" in to_markdown(data)


def test_a_model_that_the_engine_refuses_decodes_without_it(
    model: PreTrainedModel, scales: KVScales, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for by name it is an error; as a GPU's default it is a note of the report."""

    def refuse(*args: object, **options: object) -> None:
        raise UnsupportedModelError("engine: expected a model that takes position_ids, got none")

    monkeypatch.setattr("foldkv.engine.Engine.__init__", refuse)
    with pytest.raises(ArgumentError, match="takes position_ids"):
        report(model, scales, True)
    own = evaluate.make_ways
    monkeypatch.setattr(
        "foldkv.accuracy.report.make_ways", lambda *sizes: own(*sizes[:-1], True)
    )  # what a GPU would choose
    found = report(model, scales, None).data
    assert not found["setup"]["ways"][0]["graphs"] and found["verdict"]["trusted"]
    assert any("Engine refuses the model" in note for note in found["notes"])


def test_a_model_is_left_as_it_was(model: PreTrainedModel, scales: KVScales) -> None:
    report(model, scales, True)
    assert model.config._attn_implementation == "sdpa" and "forward" not in model.__dict__
