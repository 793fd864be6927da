"""The op-level report: what it measures on the CPU's kernels, and that it sees kernels, bytes and scales that are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from report_helpers import save_checkpoint, tiny_model, tiny_scales, token_windows
from torch import Tensor
from typer.testing import CliRunner

from foldkv.accuracy import ops_bands
from foldkv.accuracy import ops_report as module
from foldkv.accuracy.assemble import schema
from foldkv.accuracy.ops_cases import SYNTHETIC, Shape
from foldkv.accuracy.ops_harness import MAX_NEW, borders, schedule
from foldkv.accuracy.ops_report import OpsReport, ops_report
from foldkv.cli.main import app
from quant import ops

MODES = ["c8", "c8d", "c4"]


@pytest.fixture(scope="module")
def report() -> OpsReport:
    model = tiny_model()
    return ops_report(MODES, level="quick", model=model, ids=token_windows(3, 300, seed=4), scales=tiny_scales(model))


def one(report: OpsReport, mode: str, data: str) -> dict[str, Any]:
    return next(case for case in report.data["cases"] if (case["mode"], case["data"]) == (mode, data))


def test_every_case_is_within_its_bands(report: OpsReport) -> None:
    cases = report.data["cases"]
    assert report.ok, report.data["outside"]
    names = [*SYNTHETIC, "model, layer 0", "model, layer 1"]
    assert [(case["data"], case["mode"]) for case in cases] == [(n, m) for n in names for m in ("c16", *MODES)]
    assert all(case["wrong_bytes"] == 0 and case["nonfinite"] == 0 and case["longest"] == 300 for case in cases)


def test_the_parts_of_the_error(report: OpsReport) -> None:
    c16, c8, c4 = (one(report, mode, "gaussian") for mode in ("c16", "c8", "c4"))
    assert c16["total"]["rms"] < 1e-3 and 5e-3 < c8["total"]["rms"] < 3e-2 and 0.1 < c4["total"]["rms"] < 0.3
    for case in (c8, c4):
        assert case["kernel"]["rms"] < case["quantised"]["rms"] / 50
        assert case["total"]["rms"] == pytest.approx(case["quantised"]["rms"], rel=0.02)
        assert case["vs_fp16"]["rms"] == pytest.approx(case["total"]["rms"], rel=0.02)
    assert c16["vs_fp16"]["rms"] == 0
    assert c8["steps"]["k"] == pytest.approx(12**-0.5, abs=0.005)  # a uniform quantiser's
    assert [row["begin"] for row in c8["by_length"]] == [1, 2, 17, 65, 257]


def test_a_schedule_goes_from_border_to_border() -> None:
    assert {1, 15, 16, 17, 255, 256, 257, 299, 300} <= set(borders(300, 16))
    lengths = [0, 0, 0]
    measured = [set(), set(), set()]
    for now, new, stops in schedule(3, 300, 16):
        lengths = [length + count for length, count in zip(lengths, new, strict=True)]
        assert now == lengths and 0 < sum(new) <= MAX_NEW
        for b in range(3 if stops else 0):
            measured[b].add(now[b])
    assert lengths == [300] * 3
    assert all(seen == set(borders(300, 16)) for seen in measured)


def tampered(monkeypatch: pytest.MonkeyPatch, mode: str, name: str, change: Any) -> list[str]:
    """What is outside the bands for one mode on Gaussian rows when an op is changed; the 16-bit cache runs untouched."""
    own = getattr(ops, name)

    def op(pages: Any, *args: Any, **options: Any) -> Any:
        return change(own, pages, *args, **options) if pages.k.fmt.element.is_integer else own(pages, *args, **options)

    monkeypatch.setattr(ops, name, op)
    monkeypatch.setattr(module.ops_cases, "SYNTHETIC", {"gaussian": SYNTHETIC["gaussian"]})
    monkeypatch.setattr(module.ops_cases, "SHAPES", (Shape(2, 2, 32, 16),))
    return ops_report([mode], level="quick").data["outside"]


def noisy(own: Any, pages: Any, *args: Any, out: Tensor, **options: Any) -> None:
    own(pages, *args, out=out, **options)
    out += 3e-3 * out.abs().amax() * torch.randn(out.shape, generator=torch.Generator().manual_seed(0))


def biased_lse(own: Any, pages: Any, *args: Any, lse: Tensor, **options: Any) -> None:
    own(pages, *args, lse=lse, **options)
    lse += 0.05


def forgets_slots(own: Any, pages: Any, k: Tensor, v: Tensor, slots: Tensor) -> None:
    own(pages, k, v, torch.where(slots % 16 == 15, -1, slots))


def swaps_heads(own: Any, pages: Any, k: Tensor, v: Tensor, slots: Tensor) -> None:
    own(pages, k.flip(1), v.flip(1), slots)


def nothing(own: Any, pages: Any, *args: Any, **options: Any) -> None: ...


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("append_attention", noisy, "kernel error"),
        ("append_attention", biased_lse, "LSE error"),
        ("append_attention", nothing, "kernel error"),
        ("append_kv", forgets_slots, "bytes of the cache"),
        ("append_kv", swaps_heads, "bytes of the cache"),
        ("append_kv", nothing, "bytes of the cache"),
    ],
)
def test_a_wrong_op_is_seen(monkeypatch: pytest.MonkeyPatch, name: str, change: Any, said: str) -> None:
    found = tampered(monkeypatch, "c8", name, change)
    assert any(text.startswith("c8, gaussian") and said in text for text in found), found
    assert not any(text.startswith("c16") for text in found)


# --- files and command ------------------------------------------------------------------------------------------------


def test_files_say_what_was_found(report: OpsReport, tmp_path: Path) -> None:
    assert [path.name for path in report.save(tmp_path)] == ["ops.json", "ops.md", "ops.html"]
    data = json.loads((tmp_path / "ops.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert data == json.loads(json.dumps(report.data))
    page = (tmp_path / "ops.html").read_text()
    assert "every error within its band" in page and page.count("<svg") == 3
    assert "https://" not in page and "<script" not in page
    assert "| c4 | gaussian |" in (tmp_path / "ops.md").read_text()


def test_the_json_keeps_its_schema(report: OpsReport) -> None:
    validator = pytest.importorskip("jsonschema").Draft202012Validator
    validator.check_schema(schema("ops"))
    data = json.loads(json.dumps(report.data))
    validator(schema("ops")).validate(data)
    for break_it in (
        lambda broken: broken.pop("bands"),
        lambda broken: broken.update(schema_version=2),
        lambda broken: broken["cases"][0].pop("kernel"),
        lambda broken: broken["cases"][0]["kernel"].update(rms="small"),
        lambda broken: broken["cases"][0].update(unknown=1),
        lambda broken: broken.update(cases=[]),
        lambda broken: broken["setup"].pop("graph"),
    ):
        broken = json.loads(json.dumps(data))
        break_it(broken)
        assert not validator(schema("ops")).is_valid(broken)


def run(*arguments: object, kind: str = "--ops") -> Any:
    return CliRunner().invoke(app, ["report", *map(str, arguments), kind, "--level", "quick", "--no-progress"])


@pytest.fixture
def checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A calibrated model, and ops measured on what its attention is given alone."""
    monkeypatch.setattr(module.ops_cases, "SYNTHETIC", {})
    monkeypatch.setattr(module, "TOKENS", {"quick": 40})
    model = tiny_model()
    save_checkpoint(model, tmp_path / "model")
    tiny_scales(model).save(tmp_path / "model" / "kv_cache")
    return tmp_path / "model"


SMALL = ("--windows", 2, "--window-len", 40, "--decode-windows", 0)


def linked(out: Path) -> list[bool]:
    """Whether the page of the model links to that of the ops, and the other way."""
    return [
        f'href="{b}"' in (out / a).read_text() for a, b in (("report.html", "ops.html"), ("ops.html", "report.html"))
    ]


def test_model_and_ops_in_one_command(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(checkpoint, "--kv", "c8", "--out", out, *SMALL, kind="--with-ops")
    assert result.exit_code == 0, result.output
    assert linked(out) == [True, True] and "every error within its band" in result.stdout
    assert {path.name for path in out.iterdir()} == {
        f"{x}.{y}" for x in ("report", "ops") for y in ("json", "md", "html")
    }
    result = run(checkpoint, "--kv", "c8", "--out", out, "--json", *SMALL, kind="--with-ops")
    assert set(json.loads(result.stdout)["modes"]) == {"c8", "c4x"}, "the report alone on stdout"


def test_pages_of_two_runs_in_one_folder_are_linked_once(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for kind in ("--fresh", "--ops", "--fresh", "--ops"):
        small = SMALL if kind == "--fresh" else ()
        assert run(checkpoint, "--kv", "c8", "--out", out, *small, kind=kind).exit_code == 0
        if not (out / "ops.html").exists():
            assert "ops.html" not in (out / "report.html").read_text()
    assert linked(out) == [True, True]
    assert [(out / name).read_text().count("<a href") for name in ("report.html", "ops.html")] == [1, 1]


def test_ops_outside_their_bands_fail_the_whole(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops_bands, "KERNEL_BAND", 0.0)
    result = run(checkpoint, "--kv", "c8", "--out", tmp_path / "out", *SMALL, kind="--with-ops")
    assert result.exit_code == 3 and "kernel error" in result.stderr
    result = run(checkpoint, "--kv", "c8,0:c16", "--out", tmp_path / "no", *SMALL, kind="--with-ops")
    assert result.exit_code == 2 and not (tmp_path / "no").exists(), "told before anything is run"


def test_command_with_a_model(checkpoint: Path, tmp_path: Path) -> None:
    result = run(checkpoint, "--kv", "c8", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    cases = json.loads((tmp_path / "out" / "ops.json").read_text())["cases"]
    assert {case["data"] for case in cases} == {"model, layer 0", "model, layer 1"}


def test_command_fails_outside_the_bands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module.ops_cases, "SYNTHETIC", {"gaussian": SYNTHETIC["gaussian"]})
    monkeypatch.setattr(ops_bands, "KERNEL_BAND", 0.0)
    result = run("--kv", "c8", "--out", tmp_path)
    assert result.exit_code == 3 and "kernel error" in result.stderr
    assert "outside their bands" in (tmp_path / "ops.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--kv", "c9"], "c9"), (["--fail-if", "c8.kld_mean > 1"], "its own bands"), (["--dtype", "int3"], "float16")],
)
def test_command_usage(arguments: list[str], said: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and said in result.stderr
