"""The accuracy report end to end on a tiny model: figures, control, honesty checks, files, command line."""

from __future__ import annotations

import json
import re
import shlex
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from report_helpers import (
    DishonestSource,
    coarse,
    save_checkpoint,
    tiny_model,
    token_windows,
)
from transformers import PreTrainedModel
from typer.testing import CliRunner

from foldkv.accuracy import AccuracyReport, accuracy_report, parse_gate
from foldkv.accuracy.effort import Effort, effort
from foldkv.accuracy.gates import check_gate, evaluate_gate, known_paths, parse_gates
from foldkv.accuracy.measure import extra_paths
from foldkv.cli.main import app
from quant.errors import ArgumentError
from quant.scales import KVScales
from quant.spec import MODES

SIZES = {"num_windows": 4, "window_len": 40, "decode_windows": 4, "decode_len": 16}


@pytest.fixture(scope="module")
def report(model: PreTrainedModel, scales: KVScales) -> AccuracyReport:
    gates = [parse_gate("c8.kld_mean > 1"), parse_gate("modes.c4.prefill.kld_mean > 1e-9")]
    return accuracy_report(
        model, ["c8", "c8d", "c4"], token_windows(4, 40, seed=2), scales=scales, gates=gates, **SIZES
    )


@pytest.fixture(scope="module")
def files(report: AccuracyReport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    assert [path.name for path in report.save(folder)] == ["report.json", "report.md", "report.html"]
    assert len(list(folder.iterdir())) == 3  # nothing temporary is left
    return folder


# --- figures ----------------------------------------------------------------------------------------------------------


def test_modes_are_measured_both_ways_and_agree(report: AccuracyReport) -> None:
    modes = report.data["modes"]
    assert list(modes) == ["c8", "c8d", "c4", "c4x"]
    for name, entry in modes.items():
        assert entry["prefill"]["positions"] == 4 * 39 and entry["decode"]["positions"] == 4 * 15
        assert 0 < entry["prefill"]["kld_mean"] < 10, name
    assert modes["c8"]["decode"]["kld_mean"] < modes["c4"]["decode"]["kld_mean"] < modes["c4x"]["decode"]["kld_mean"]
    assert report.trusted, [check["text"] for check in report.data["checks"] if not check["ok"]]


def test_sizes_are_those_of_the_cache_itself(report: AccuracyReport) -> None:
    for name, entry in report.data["modes"].items():
        bits = MODES[name].bits_per_element(32)
        assert entry["bits_per_element"] == pytest.approx(bits)
        assert entry["bytes_per_token"] == pytest.approx(bits / 8 * 2 * 2 * 2 * 32)  # K and V, layers, heads, channels
        assert entry["capacity_ratio"] == pytest.approx(16 / bits)


def test_noise_floor_is_far_below_the_modes(report: AccuracyReport) -> None:
    floor = report.data["noise_floor"]
    runs = [floor[way][run] for way in ("prefill", "decode") for run in ("split", "stock")]
    assert floor["kld_mean"] == max(run["kld_mean"] for run in runs)
    assert floor["top1_agreement"] == min(run["top1_agreement"] for run in runs)
    assert floor["kld_mean"] < 1e-5 < report.data["modes"]["c4"]["prefill"]["kld_mean"]


def test_base_perplexity_is_that_of_the_stock_model(report: AccuracyReport, model: PreTrainedModel) -> None:
    ids = token_windows(4, 40, seed=2)
    with torch.no_grad():
        log_p = model(ids, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    nll = -log_p.gather(-1, ids[:, 1:, None]).mean()
    assert report.data["base"]["prefill"]["ppl"] == pytest.approx(float(nll.exp()), rel=1e-3)


def test_the_control_fails_visibly(report: AccuracyReport) -> None:
    check = report.data["checks"][0]
    assert check["name"] == "control_fails" and check["ok"]
    assert "the control failed as it must" in check["text"]


def test_the_model_is_as_before(report: AccuracyReport, model: PreTrainedModel) -> None:
    assert model.config._attn_implementation == "sdpa" and "forward" not in model.__dict__


def test_one_way_alone_and_one_window(model: PreTrainedModel, scales: KVScales) -> None:
    data = token_windows(1, 12, seed=3)
    sizes = {"num_windows": 1, "window_len": 12, "decode_windows": 0}
    found = accuracy_report(model, ["c8"], data, scales=scales, **sizes).data
    assert "decode" not in found["modes"]["c8"] and found["modes"]["c8"]["prefill"]["kld_se"] is None
    assert any("standard errors" in note for note in found["notes"])


# --- honesty ----------------------------------------------------------------------------------------------------------


def failed_checks(found: AccuracyReport, mode: str) -> set[str]:
    return {check["name"] for check in found.data["checks"] if not check["ok"] and check["mode"] == mode}


@pytest.fixture(scope="module")
def dishonest(model: PreTrainedModel, scales: KVScales) -> AccuracyReport:
    sources = [
        DishonestSource("zeros", lambda kv, appended: torch.zeros_like(kv)),
        DishonestSource("exact", lambda kv, appended: kv),
        DishonestSource("exact_prefill", lambda kv, appended: coarse(kv) if appended == 1 else kv),
        DishonestSource("bypass", lambda kv, appended: coarse(kv), kernels=True),
        DishonestSource("nan", lambda kv, appended: kv / 0),
        DishonestSource("honest", lambda kv, appended: coarse(kv)),
    ]
    return accuracy_report(model, sources, token_windows(4, 40, seed=2), scales=scales, **SIZES)


def test_a_cache_of_zeros_is_not_recommended(dishonest: AccuracyReport) -> None:
    entry = dishonest.data["modes"]["zeros"]
    assert entry["prefill"]["kld_mean"] > 0.1
    assert entry["level"] in ("suspect", "not recommended")


@pytest.mark.parametrize(
    ("mode", "checks"),
    [
        ("exact", {"exercised_prefill", "exercised_decode"}),
        ("exact_prefill", {"exercised_prefill", "ways_agree"}),
        ("bypass", {"kernels_called"}),
        ("nan", {"better_than_control"}),
        ("honest", set()),
    ],
)
def test_dishonest_caches_are_flagged(dishonest: AccuracyReport, mode: str, checks: set[str]) -> None:
    assert failed_checks(dishonest, mode) == checks
    assert (dishonest.data["modes"][mode]["level"] == "suspect") == bool(checks)


def test_flags_are_in_every_output(dishonest: AccuracyReport, tmp_path: Path) -> None:
    assert not dishonest.trusted and "Suspect:" in dishonest.data["verdict"]["text"]
    dishonest.save(tmp_path)
    for name in ("report.json", "report.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert "the quantised cache was not used" in text and "attention did not go through the cache" in text
    json.loads((tmp_path / "report.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def test_a_control_that_looks_fine_is_a_loud_warning(
    model: PreTrainedModel, scales: KVScales, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A harness in which the control's mode means something harmless: all other figures look as good as ever."""
    monkeypatch.setitem(MODES, "c4x", MODES["c8d"])
    found = accuracy_report(
        model, ["c8"], token_windows(4, 40, seed=2), scales=scales, **{**SIZES, "decode_windows": 0}
    )
    assert not found.trusted and found.data["verdict"]["recommended"] is None
    found.save(tmp_path)
    for name in ("report.md", "report.html"):
        assert "Do not rely on these figures" in (tmp_path / name).read_text()


# --- files ------------------------------------------------------------------------------------------------------------


def test_json_has_its_keys(files: Path) -> None:
    found = json.loads((files / "report.json").read_text())
    assert found["schema_version"] == 2
    for mode in ("c8", "c8d", "c4", "c4x"):
        for way in ("prefill", "decode"):
            assert {"kld_mean", "kld_p99", "top1_agreement", "ppl"} <= found["modes"][mode][way].keys()
        assert isinstance(found["modes"][mode]["bits_per_element"], float)
    assert isinstance(found["noise_floor"]["kld_mean"], float)
    setup = {"command", "versions", "device", "dtype", "kernels", "model", "model_config_sha256", "scales", "data",
             "ways", "seed", "date"}  # fmt: skip
    assert setup <= found["setup"].keys()


def test_every_gate_path_leads_to_a_number(report: AccuracyReport) -> None:
    modes = [name for name in report.data["modes"] if name != "c4x"]
    extras = extra_paths(Effort(**report.data["setup"]["sizes"]))
    assert any(path.startswith("generation") for path in extras) and any(path.startswith("parts") for path in extras)
    for path in known_paths(modes, ("prefill", "decode"), extras):
        report_gate = parse_gate(f"{path} > 1e99")
        assert evaluate_gate(report_gate, report.data).value is not None, path


def test_gates_are_part_of_the_report(report: AccuracyReport, files: Path) -> None:
    assert [(result.gate.path, result.failed) for result in report.gates] == [
        ("c8.kld_mean", False),
        ("modes.c4.prefill.kld_mean", True),
    ]
    assert [gate["failed"] for gate in json.loads((files / "report.json").read_text())["gates"]] == [False, True]
    assert "**failed**: `modes.c4.prefill.kld_mean > 1e-9" in (files / "report.md").read_text()


class Page(HTMLParser):
    """Checks that tags nest, and collects what the page says and what it would load."""

    VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing, near {self.getpos()}"

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_html_is_one_well_formed_page_that_loads_nothing(files: Path) -> None:
    text = (files / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == [] and page.loads == [] and "script" not in page.tags and "link" not in page.tags
    assert page.tags.count("svg") == 5 + 3
    assert not re.search(r"url\(|@import|https?://", text)
    assert "prefers-color-scheme: dark" in text and "@media print" in text and "width=device-width" in text
    words = " ".join(page.words)
    assert "None" not in words and "nan" not in words.lower().split()
    order = [
        "through the quantised cache itself",
        "May I use it here?",
        "failed as it must",
        "Size against damage",
        "Set-up",
    ]
    places = [words.index(text) for text in order]
    assert places == sorted(places)


def test_svg_attributes_are_numbers(files: Path) -> None:
    text = (files / "report.html").read_text()
    values = re.findall(r' (?:x|y|x1|x2|y1|y2|cx|cy|r)="([^"]*)"', text)
    assert len(values) > 100
    assert all(-50 <= float(value) <= 1000 for value in values)


def test_markdown_says_first_how_the_cache_was_exercised(files: Path) -> None:
    lines = (files / "report.md").read_text().splitlines()
    assert lines[0].startswith("# KV-cache accuracy")
    assert lines[2] == "How the cache was exercised:" and "appended in one piece" in lines[3]
    assert "teacher-forced one token at a time, without CUDA graphs" in lines[4]
    tables = [line for line in lines if line.startswith("|")]
    assert any(line.startswith("| c8 |") for line in tables) and any("noise: stock cache" in line for line in tables)
    widths = {line.count("|") for line in tables[:5]}
    assert len(widths) == 1  # head, rule and rows of the first table


def test_an_interrupted_save_leaves_the_old_files(
    report: AccuracyReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report.save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        report.save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"modes": ["c9"]}, "c9"),
        ({"modes": ["c8", "c8"]}, "c8 twice"),
        ({"scales": None}, "foldkv calibrate"),
        ({"window_len": 600}, "the model's maximum"),
        ({"num_windows": 0, "decode_windows": 0}, "at least one"),
        ({"decode_len": 1}, "length of decode windows"),
        ({"data": torch.full((4, 40), 96)}, "token ids"),
        ({"gates": [parse_gate("k8v4.kld_mean > 1")]}, "k8v4.kld_mean"),
    ],
)
def test_bad_arguments(model: PreTrainedModel, scales: KVScales, change: dict[str, Any], said: str) -> None:
    arguments = {"modes": ["c8"], "data": token_windows(4, 40, seed=2), "scales": scales, **SIZES, **change}
    with pytest.raises(ArgumentError, match=said):
        accuracy_report(model, **arguments)


def test_a_model_in_training_mode_is_refused(scales: KVScales) -> None:
    with pytest.raises(ArgumentError, match=r"model\.eval\(\)"):
        accuracy_report(tiny_model().train(), ["c8"], token_windows(4, 40, seed=2), scales=scales, **SIZES)


# --- command line -----------------------------------------------------------------------------------------------------

SMALL = ["--windows", "2", "--window-len", "16", "--decode-windows", "2", "--decode-len", "6", "--no-progress"]


@pytest.fixture(scope="module")
def checkpoint(model: PreTrainedModel, scales: KVScales, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_checkpoint(model, folder)
    scales.save(folder / "kv_cache")
    (folder / "text.txt").write_text(" ".join(f"t{i % 90}" for i in torch.randint(90, (200,)).tolist()))
    return folder


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def test_command_with_text_and_json(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(checkpoint, "--kv", "c8,c4,0:c8", "--data", checkpoint / "text.txt", "--out", out, *SMALL, "--json",
                 "--fail-if", "c8.kld_mean > 5")  # fmt: skip
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert list(found["modes"]) == ["c8", "c4,0:c8", "c4x"]
    assert found["setup"]["model"] == str(checkpoint) and found["setup"]["dtype"] == "float32"
    assert found["setup"]["data"]["source"] == "text.txt" and len(found["setup"]["data"]["file_sha256"]) == 64
    assert len(found["setup"]["scales"]["sha256"]) == 64
    assert found == json.loads((out / "report.json").read_text())


def test_command_with_the_models_own_text_and_a_failing_gate(checkpoint: Path, tmp_path: Path) -> None:
    result = run(checkpoint, "--kv", "c8", "--out", tmp_path, *SMALL, "--fail-if", "c8.kld_mean > 0")
    assert result.exit_code == 3
    assert "gate failed: c8.kld_mean > 0: c8.kld_mean is" in result.stderr
    assert "the model's own text" in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "report.json").read_text())["gates"][0]["failed"]
    assert "appended in one piece" in result.stdout and "c4x" in result.stdout


def test_command_with_a_level_as_gate(checkpoint: Path, tmp_path: Path) -> None:
    result = run(checkpoint, "--kv", "c4", "--out", tmp_path, *SMALL, "--level", "quick", "--fail-if", "lossless")
    assert result.exit_code == 3
    assert "lossless: c4.level_rank > 0: c4.level_rank is" in result.stderr
    assert not (tmp_path / ".partial").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--level", "some"], 2, "quick, standard, full"),
        (["--fail-if", "c9:lossless"], 2, "gate"),
        (["--baselines", "fp4"], 1, "one of fp8"),
        (["--level", "quick", "--fail-if", "c8.parts.k_only.kld_mean > 1"], 2, "a figure of the modes"),
        (["--fail-if", "c8.kld_meen > 1"], 2, "did you mean"),
        (["--fail-if", "k8v4.kld_mean > 1"], 2, "a figure of the modes c8, c4x"),
        (["--fail-if", "c8.kld_mean ~ 1"], 2, "gate"),
        (["--kv", "c9"], 2, "c9"),
        (["--kv", ""], 2, "at least one mode"),
        (["--windows", "0", "--decode-windows", "0"], 2, "above 0"),
        (["--scales", "nowhere"], 1, "foldkv calibrate"),
        (["--data", "nowhere.txt"], 1, "nowhere.txt"),
    ],
)
def test_command_usage(checkpoint: Path, tmp_path: Path, arguments: list[str], code: int, said: str) -> None:
    result = run(checkpoint, "--kv", "c8", "--out", tmp_path / "out", *SMALL, *arguments)
    assert result.exit_code == code, result.stderr
    assert said in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_interrupted_command_says_how_to_go_on(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("foldkv.accuracy.report.measure", interrupted)
    result = run(checkpoint, "--kv", "c8", "--out", tmp_path, *SMALL)
    assert result.exit_code != 0 and "the same command goes on from there" in result.stderr


def test_the_workflow_names_commands_that_exist() -> None:
    """examples/ci: its options are the command's own, its gates can be read."""
    yaml = pytest.importorskip("yaml")
    steps = yaml.safe_load((Path(__file__).parents[1] / "examples/ci/kv-accuracy.yml").read_text())["jobs"]["report"][
        "steps"
    ]
    commands = [shlex.split(step["run"]) for step in steps if "foldkv " in step.get("run", "")]
    report_command = next(words for words in commands if words[:2] == ["foldkv", "report"])
    shown = CliRunner().invoke(app, ["report", "--help"], env={"COLUMNS": "200"}).stdout
    options = {word for word in report_command if word.startswith("--")}
    assert options and all(option in shown for option in options)
    texts = [word for before, word in pairwise(report_command) if before == "--fail-if"]
    gates = parse_gates(texts, ["c8", "k8v4"])
    assert len(texts) == 3 and len(gates) == 4
    for gate in gates:
        check_gate(gate, ["c8", "k8v4", "c4x"], extras=extra_paths(effort("standard")))
