"""`foldkv calibrate` and `foldkv inspect`, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from calib_helpers import random_scales
from hf_helpers import save_checkpoint, tiny_model
from typer.testing import CliRunner

from calib.summary import bits_per_mode, summarise
from foldkv.cli.calibrate import calibrate
from foldkv.cli.inspect import inspect
from quant.scales import KVScales, model_facts
from quant.spec import MODES

app = typer.Typer()
app.command()(calibrate)
app.command()(inspect)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tiny_model("qwen3"), tmp_path_factory.mktemp("model"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    words = torch.randint(30, 90, (20, 30)).tolist()
    path.write_text("\n".join(json.dumps({"text": " ".join(f"w{idx}" for idx in row)}) for row in words))
    return path


def test_calibrate_and_inspect(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "scales"
    done = run("calibrate", checkpoint, "--data", text, "--out", out, "--num-samples", 6, "--max-seq-len", 32)
    assert done.exit_code == 0, done.output
    assert done.stdout == ""
    assert "calibrated 2 layers for c8 on 6 x 32 tokens of text.jsonl" in done.stderr
    scales = KVScales.load(out, tiny_model("qwen3").config)
    assert scales[0].k.tokens == 192
    assert scales.config["model"]["name"] == checkpoint.name and scales.config["model"]["weight_index_hash"]

    shown = run("inspect", out)
    assert shown.exit_code == 0, shown.output
    for word in (
        "text.jsonl, 6 x 32 tokens",
        "2 of 2, 2 kv heads of 16",
        "c8",
        "k8v4 7",
        "outlier",
        "balance",
        "of K in 2 layers, of V in 2",
    ):
        assert word in shown.stdout, word
    rows = [line.split()[:2] for line in shown.stdout.splitlines()]
    assert [row for row in rows if row[1:] in (["K"], ["V"])] == [["0", "K"], ["0", "V"], ["1", "K"], ["1", "V"]]

    one = run("inspect", out, "--layer", 1)
    rows = [line.split()[:3] for line in one.stdout.splitlines()]
    assert [row for row in rows if row[1:2] in (["K"], ["V"])] == [
        ["1", "K", "0"], ["1", "K", "1"], ["1", "V", "0"], ["1", "V", "1"],
    ]  # fmt: skip


def test_json(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "scales"
    done = run(
        "calibrate", checkpoint, "--data", text, "--out", out, "--num-samples", 4, "--max-seq-len", 32,
        "--max-position", 64, "--mode", "c4", "--json",
    )  # fmt: skip
    written = json.loads(done.stdout)
    assert (written["out"], written["mode"], written["data"]["max_position"]) == (str(out), "c4", 64)
    found = json.loads(run("inspect", out, "--json").stdout)
    assert found["shaped"] == {"k": [True, True], "v": [True, True]}
    assert len(found["heads"]) == 2 * 2 * 2
    assert found["bits_per_element"]["c4"] == MODES["c4"].bits_per_element(16)
    assert found["config"]["data"] == written["data"]
    assert {head["layer"] for head in json.loads(run("inspect", out, "--json", "--layer", 1).stdout)["heads"]} == {1}


def test_the_default_folder_is_the_models_and_inspect_finds_it(tmp_path: Path) -> None:
    model = save_checkpoint(tiny_model(), tmp_path / "model")
    arguments = ("calibrate", model, "--num-samples", 2, "--max-seq-len", 16)
    assert run(*arguments).exit_code == 0
    first = (model / "kv_cache" / "kv_cache_config.json").read_text()
    assert "the model's own text" in run("inspect", model).stdout

    refused = run(*arguments)
    assert refused.exit_code == 2 and "--overwrite" in refused.stderr
    assert (model / "kv_cache" / "kv_cache_config.json").read_text() == first
    assert run(*arguments, "--seed", 1, "--overwrite").exit_code == 0
    assert (model / "kv_cache" / "kv_cache_config.json").read_text() != first


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--mode", "c3"), 1, "mode: expected one of"),
        (("--data", "nowhere.txt"), 2, "nowhere.txt"),
        (("--max-seq-len", "100000"), 1, "the model's maximum, got 100000"),
        (("--dtype", "int8"), 1, "dtype: expected"),
        (("--num-samples", "x"), 2, "--num-samples"),
    ],
)
def test_bad_options(checkpoint: Path, tmp_path: Path, options: tuple[str, ...], code: int, message: str) -> None:
    done = run("calibrate", checkpoint, "--out", tmp_path / "scales", *options)
    assert done.exit_code == code and message in done.stderr
    assert not (tmp_path / "scales").exists()


def test_a_hub_id_needs_a_folder() -> None:
    done = run("calibrate", "someone/some-model")
    assert done.exit_code == 2 and "--out: expected a folder, as MODEL is no local one" in done.stderr


def test_out_that_is_a_file(checkpoint: Path, text: Path) -> None:
    done = run("calibrate", checkpoint, "--out", text)
    assert done.exit_code == 2 and "--out: expected a folder" in done.stderr


def test_inspect_says_what_is_wrong(tmp_path: Path) -> None:
    assert "expected a readable file" in run("inspect", tmp_path).stderr
    random_scales(model={"config": model_facts({"head_dim": 16})}).save(tmp_path)
    (tmp_path / "kv_cache_scales.safetensors").write_bytes(b"")
    done = run("inspect", tmp_path)
    assert done.exit_code == 1 and "damaged" in done.stderr
    random_scales().save(tmp_path)
    done = run("inspect", tmp_path, "--layer", 2)
    assert done.exit_code == 2 and "--layer: expected one of 0, 1, got 2" in done.stderr


def test_summary_finds_outliers_offsets_and_spread() -> None:
    scales = random_scales()
    k = scales[1].k
    k.max[1, 7] = 40.0
    k.mean[1, 3], k.var[1, 3] = 9.0, 0.25
    k.weight[1, 5] = 1e-6
    head = next(head for head in summarise(scales) if (head.layer, head.tensor, head.head) == (1, "k", 1))
    assert head.max == 40 and head.outlier_channel == 7 and head.num_outliers == 1
    assert head.outlier_ratio == pytest.approx(40 / float(k.absmax[1].median()))
    assert head.offset_channel == 3 and head.offset_sigmas == pytest.approx(18)
    assert head.balance_spread > 10
    assert len(summarise(scales)) == 2 * 2 * 2


def test_bits_per_mode_weigh_layers_of_unlike_heads() -> None:
    scales = random_scales()
    scales.layers = [random_scales(1, 1, 16).layers[0], None, random_scales(1, 3, 32).layers[0]]
    assert bits_per_mode(scales)["c8"] == 8
    spec = MODES["c4r"]
    wanted = (16 * spec.bits_per_element(16) + 96 * spec.bits_per_element(32)) / 112
    assert bits_per_mode(scales)["c4r"] == pytest.approx(wanted)
