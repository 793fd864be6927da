"""report.json against its schema, two reports against each other, an interrupted report against a whole one."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from report_helpers import token_windows
from transformers import PreTrainedModel
from typer.testing import CliRunner

from foldkv.accuracy import AccuracyReport, accuracy_report
from foldkv.accuracy.assemble import schema
from foldkv.accuracy.compare import compare_reports, differences, load_report
from foldkv.accuracy.partial import FOLDER
from foldkv.cli.main import app
from quant.errors import ArgumentError
from quant.scales import KVScales

SIZES = {"num_windows": 4, "window_len": 160, "decode_windows": 4, "decode_len": 12, "new_tokens": 8}


def make(model: PreTrainedModel, scales: KVScales, **options: Any) -> AccuracyReport:
    windows = options.pop("windows", token_windows(4, 160, seed=2))
    return accuracy_report(model, ["c8", "c4"], windows, scales=scales, **{**SIZES, **options})


@pytest.fixture(scope="module")
def report(model: PreTrainedModel, scales: KVScales) -> AccuracyReport:
    return make(model, scales)


# --- schema -----------------------------------------------------------------------------------------------------------


def check(data: Any) -> None:
    validator = pytest.importorskip("jsonschema").Draft202012Validator
    validator.check_schema(schema())
    validator(schema()).validate(data)


def test_a_report_keeps_its_schema(report: AccuracyReport) -> None:
    check(json.loads(json.dumps(report.data)))


def test_a_small_report_keeps_it_too(model: PreTrainedModel, scales: KVScales) -> None:
    sizes = {"num_windows": 1, "window_len": 8, "decode_windows": 0}
    found = accuracy_report(model, ["c8d"], token_windows(1, 8, seed=2), scales=scales, level="quick", **sizes)
    check(json.loads(json.dumps(found.data)))


@pytest.mark.parametrize("path", ["schema_version", "modes.c8.level", "modes.c8.prefill.kld_mean", "setup.ways"])
def test_the_schema_refuses_what_is_not_so(report: AccuracyReport, path: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    data = json.loads(json.dumps(report.data))
    *way, last = path.split(".")
    node = data
    for key in way:
        node = node[key]
    node[last] = "something else"
    with pytest.raises(jsonschema.ValidationError, match="something else"):
        check(data)
    del node[last]
    with pytest.raises(jsonschema.ValidationError, match=last):
        check(data)


# --- what stands in it ------------------------------------------------------------------------------------------------


def test_parts_layers_and_heads_add_up(report: AccuracyReport) -> None:
    """Each part alone does less damage than the whole; all but one does less than all."""
    for mode in ("c8", "c4"):
        entry = report.data["modes"][mode]
        whole = entry["prefill"]["kld_mean"]
        assert 0 < entry["parts"]["k_only"]["kld_mean"] < 1.2 * whole
        assert 0 < entry["parts"]["v_only"]["kld_mean"] < 1.2 * whole
        assert [one["layer"] for one in entry["layers"]] == [0, 1]
        assert [(one["layer"], one["head"]) for one in entry["heads"]] == [(0, 0), (0, 1), (1, 0), (1, 1)]
        for one in entry["layers"]:
            assert 0 < one["alone"]["kld_mean"] < 1.2 * whole and 0 < one["without"]["kld_mean"] < 1.2 * whole
        # With two layers, all but one is the other alone.
        first, second = entry["layers"]
        assert first["without"]["kld_mean"] == pytest.approx(second["alone"]["kld_mean"], rel=1e-9)
        assert entry["worst"]["layer_kld"] == max(one["alone"]["kld_mean"] for one in entry["layers"])
        for one in entry["damage"]:
            assert all(0 < x < 1 for key in ("k_error", "v_error", "out_error") for x in one[key])
    c8, c4 = (report.data["modes"][mode]["damage"][0] for mode in ("c8", "c4"))
    assert max(c8["k_error"]) < min(c4["k_error"]) and max(c8["softmax_kl"]) < min(c4["softmax_kl"])
    assert "parts" not in report.data["modes"]["c4x"]


def test_texts_stand_beside_the_band(report: AccuracyReport) -> None:
    texts = report.data["generation"]
    assert texts["tokens"] == 8 and texts["texts"] == 4
    assert all(one["match_8"] == 1.0 for one in texts["band"].values())
    assert texts["band"]["split"]["base_nll"] == texts["base"]["base_nll"]
    c8, control = (report.data["modes"][mode]["generation"] for mode in ("c8", "c4x"))
    assert control["same_8"] < c8["same_8"] and control["base_nll"] > texts["base"]["base_nll"]


def test_intervals_hold_their_means(report: AccuracyReport) -> None:
    for entry in report.data["modes"].values():
        for way in ("prefill", "decode"):
            figures = entry[way]
            for key in ("kld_mean", "top1_agreement", "ln_ppl_ratio", "kld_p99"):
                low, high = figures["ci95"][key]
                assert low <= figures[key] <= high or (key == "kld_p99" and low <= high)
            assert sum(figures["histogram"]["counts"]) == figures["positions"]
            assert sum(figures["by_window"]["kld_mean"]) / 4 == pytest.approx(figures["kld_mean"])


# --- interrupted ------------------------------------------------------------------------------------------------------


def figures(report: AccuracyReport) -> Any:
    """All but dates, speeds and the note of how much was taken over."""
    data = json.loads(json.dumps(report.data))
    for key in ("date", "resumed"):
        del data["setup"][key]
    del data["notes"]
    for entry in [*data["modes"].values(), *data["baselines"].values(), data["base"]]:
        for way in entry.values():
            if isinstance(way, dict):
                way.pop("tokens_per_s", None)
    for way in ("prefill", "chunked", "decode"):
        for run in data["noise_floor"][way].values():
            run.pop("tokens_per_s", None)
    return data


def test_a_report_cut_short_goes_on(
    model: PreTrainedModel, scales: KVScales, report: AccuracyReport, tmp_path: Path
) -> None:
    """Interrupted in the middle of a way and again among the ablations, the third run ends with the same figures."""
    seen: list[str] = []

    def interrupt(way: str, mode: str, figures: dict[str, Any]) -> None:
        seen.append(f"{way} {mode}")
        if seen[-1] == "chunked c4":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(model, scales, work_dir=tmp_path, on_result=interrupt)
    first = len(list((tmp_path / FOLDER).rglob("*.npz")))
    assert first == len(seen) and not list(tmp_path.rglob(".*.npz"))

    def stop_late(what: str, done: int, total: int) -> None:
        if done > 0.75 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(model, scales, work_dir=tmp_path, progress=stop_late)
    whole = make(model, scales, work_dir=tmp_path)
    assert whole.data["setup"]["resumed"] > first
    assert any("cut short" in note for note in whole.data["notes"])
    assert figures(whole) == figures(report)


def test_other_text_starts_anew(model: PreTrainedModel, scales: KVScales, tmp_path: Path) -> None:
    sizes = {"level": "quick", "num_windows": 2, "window_len": 8, "decode_windows": 0, "work_dir": tmp_path}
    assert make(model, scales, **sizes).data["setup"]["resumed"] == 0
    assert make(model, scales, **sizes).data["setup"]["resumed"] > 0
    other = token_windows(2, 8, seed=9)
    assert make(model, scales, **sizes, windows=other).data["setup"]["resumed"] == 0


# --- two reports ------------------------------------------------------------------------------------------------------


def scaled(report: AccuracyReport, factor: float, shift: float = 0.0) -> dict[str, Any]:
    """A report in which c4 has `factor` times the KLD, and `shift` more in the first window."""
    data = copy.deepcopy(report.data)
    one = data["modes"]["c4"]["prefill"]
    rows = [factor * x for x in one["by_window"]["kld_mean"]]
    rows[0] += shift
    one["by_window"]["kld_mean"], one["kld_mean"] = rows, sum(rows) / len(rows)
    return data


def verdicts(a: Any, b: Any) -> dict[tuple[str, str, str], str]:
    return {(change.mode, change.way, change.figure): change.verdict for change in compare_reports(a, b)}


def test_a_report_does_not_differ_from_itself(report: AccuracyReport) -> None:
    changes = compare_reports(report.data, report.data)
    assert len(changes) == 3 * 3 * 3 and all(change.paired for change in changes)
    assert {change.verdict for change in changes} == {"no difference shown"}
    assert differences(report.data, report.data) == []


def test_a_steady_change_shows_and_a_stray_one_does_not(report: AccuracyReport) -> None:
    key = ("c4", "prefill", "kld_mean")
    assert verdicts(report.data, scaled(report, 1.3))[key] == "worse"
    assert verdicts(report.data, scaled(report, 0.7))[key] == "better"
    assert verdicts(report.data, scaled(report, 1.0, shift=1.0))[key] == "no difference shown"


def test_other_text_is_compared_unpaired(report: AccuracyReport) -> None:
    other = scaled(report, 1.01)
    assert verdicts(report.data, other)["c4", "prefill", "kld_mean"] == "worse"  # paired, 1 % shows
    other["setup"]["data"]["tokens_sha256"] = "other"
    changes = {(c.mode, c.way, c.figure): c for c in compare_reports(report.data, other)}
    one = changes["c4", "prefill", "kld_mean"]
    assert not one.paired and one.verdict == "no difference shown"
    assert any("other text" in text for text in differences(report.data, other))


def test_the_command(report: AccuracyReport, tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    report.save(a)
    AccuracyReport(scaled(report, 1.3)).save(b)
    result = CliRunner().invoke(app, ["compare", str(a), str(b / "report.json")])
    assert result.exit_code == 0 and "worse" in result.stdout, result.output
    result = CliRunner().invoke(app, ["compare", str(a), str(b), "--fail-if-worse", "--json"])
    assert result.exit_code == 3 and "c4 prefill kld_mean" in result.stderr
    assert {"mode", "verdict", "paired"} <= json.loads(result.stdout)["changes"][0].keys()
    same = CliRunner().invoke(app, ["compare", str(a), str(a), "--fail-if-worse"])
    assert same.exit_code == 0 and "No difference shown" in same.stdout


@pytest.mark.parametrize(
    ("text", "said"), [("{", "JSON"), ('{"schema_version": 7}', "version 7"), (None, "foldkv report")]
)
def test_other_files_are_refused(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    with pytest.raises(ArgumentError, match=said):
        load_report(tmp_path)


def test_figures_are_read_back(report: AccuracyReport, tmp_path: Path) -> None:
    report.save(tmp_path)
    assert load_report(tmp_path) == json.loads(json.dumps(report.data))
    assert torch.tensor(report.data["modes"]["c8"]["prefill"]["kld_mean"]) > 0
