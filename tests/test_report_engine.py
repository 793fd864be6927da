"""Decode of the report through `foldkv.Engine`: on a CPU the engine's own steps, without graphs, must give the same figures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from report_helpers import token_windows
from transformers import PreTrainedModel

from foldkv.accuracy import AccuracyReport, accuracy_report, evaluate
from foldkv.accuracy.effort import EFFORTS
from foldkv.accuracy.generation import Texts, greedy, margins
from foldkv.accuracy.report import make_sources
from foldkv.engine import Engine
from quant.errors import ArgumentError, UnsupportedModelError
from quant.scales import KVScales

SIZES = {"num_windows": 0, "decode_windows": 4, "decode_len": 24}


def report(model: PreTrainedModel, scales: KVScales, graphs: bool | None, **more: Any) -> AccuracyReport:
    windows = token_windows(4, 288, seed=2)
    return accuracy_report(model, ["c8", "c4"], windows, scales=scales, level="quick", graphs=graphs, **SIZES | more)


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
    assert any("foldkv.Engine, which refuses the model" in note for note in found["notes"])


@pytest.mark.parametrize("mode", ["c16", "c8", "c4", "c4x"])
def test_greedy_texts_of_the_engine_are_those_of_the_loop(model: PreTrainedModel, scales: KVScales, mode: str) -> None:
    """Prompts whole in one batch and, for the band, in pieces and half of them at a time."""
    prompts = token_windows(5, 20, seed=4)
    base, sources = make_sources(model, [mode] if mode != "c16" else [], scales)
    source = base if mode == "c16" else next(one for one in sources if one.name == mode)
    counted: list[int] = []
    want, _ = greedy(model, source, prompts, 12, engine=False)
    for split in (False, True):
        got, graphs = greedy(model, source, prompts, 12, engine=True, split=split, advance=counted.append)
        assert torch.equal(got, want) and not graphs
    assert sum(counted) == 2 * 5 * 12
    margin = margins(model, base, prompts, greedy(model, base, prompts, 12, engine=True)[0])
    assert margin.shape == (5, 12) and 0 <= float(margin.min()) <= float(margin.max()) <= 1


def test_the_band_takes_prompts_in_pieces_and_half_the_batch(
    model: PreTrainedModel, scales: KVScales, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[dict[str, Any]] = []
    own = Engine.__init__
    monkeypatch.setattr(
        Engine, "__init__", lambda self, *args, **options: made.append(options) or own(self, *args, **options)
    )
    base, _ = make_sources(model, [], scales)
    texts = Texts(model, base, token_windows(5, 20, seed=4), 6, engine=True)
    found = texts.base_and_band()
    assert [(one["max_batch"], one["prefill_tokens"]) for one in made] == [(5, 100), (3, 13)]
    assert found["engine"] and not found["graphs"] and found["band"]["split"]["match_6"] == 1.0


def test_the_report_says_which_way_texts_were_written(model: PreTrainedModel, scales: KVScales) -> None:
    from foldkv.accuracy.render import to_html, to_markdown

    sizes = replace(EFFORTS["quick"], prompts=3, prompt_len=16, new_tokens=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EFFORTS, "quick", sizes)
        for graphs, route in ((None, "foldkv's engine in one batch, without CUDA graphs"), (False, "forward pass")):
            data = report(model, scales, graphs, new_tokens=8).data
            assert data["generation"]["engine"] is (graphs is None)
            assert "3 prompts of 16 tokens, continued by 8 through" in to_markdown(data) and route in to_markdown(data)
            assert route in to_html(data).replace("&#39;", "'")
        data["generation"] |= {"engine": True, "graphs": True}
        assert "each step one replay of a captured CUDA graph" in to_markdown(data)


def test_a_model_is_left_as_it_was(model: PreTrainedModel, scales: KVScales) -> None:
    report(model, scales, True)
    assert model.config._attn_implementation == "sdpa" and "forward" not in model.__dict__
