"""The end-to-end benchmark and `foldkv plan`, on shapes small enough for a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hf_helpers import one_thread
from typer.testing import CliRunner

from foldkv.bench import model_run
from foldkv.bench.model_cases import Case, bench_model, empty_model, model_config, parse_cases, random_scales
from foldkv.cli.main import app
from foldkv.engine import format_bytes, parse_bytes
from quant.errors import ArgumentError, PoolExhaustedError

pytestmark = pytest.mark.usefixtures(one_thread.__name__)


def run(*words: str) -> Any:
    return CliRunner().invoke(app, list(words))


def bench(path: Path, *words: str) -> dict[str, Any]:
    options = ("--model", "tiny-shape", "--dtype", "fp32", "--device", "cpu", "--steps", "20", "--out", str(path))
    result = run("bench", *options, *words)
    assert result.exit_code == 0, result.output
    data: dict[str, Any] = json.loads(path.read_text())
    return data


def test_rows_of_modes_cases_and_peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[dict[str, Any]] = []
    monkeypatch.setattr("transformers.cache_utils.is_hqq_available", lambda: False)
    monkeypatch.setattr("torch.compile", lambda call, **options: compiled.append(options) or call)
    data = bench(tmp_path / "x.json", "--kv", "c16,c8,c4r", "--cases", "3x100,1x1k", "--peers", "static,hqq8")
    assert data["kind"] == "model" and "--cases 3x100,1x1k" in data["command"]
    names = [(row["name"], row["case"]) for row in data["rows"]]
    assert names == [(name, case) for case in ("3 x 100", "1 x 1024") for name in ("c16", "c8", "c4r", "static")]
    assert [options["fullgraph"] for options in compiled] == [True, True], "once for each case"
    for row in data["rows"]:
        assert row["tokens_per_s"] > 0 and row["itl_ms"] > 0 and row["steps"] >= 14
        assert row["tokens_per_s"] == pytest.approx(row["batch"] / (row["itl_ms"] / 1e3), rel=0.9)
        assert row["name"] == "static" or (row["ttft_ms"] > 0 and row["ttft_tokens"] == row["seq_len"])
    pools = {row["name"]: row["pool_gb"] for row in data["rows"][:3]}
    assert pools["c8"] == pytest.approx(pools["c16"] / 2, rel=0.05)
    assert sum("hqq8" in note for note in data["notes"]) == 2 and any(
        "random weights" in note for note in data["notes"]
    )


def test_a_batch_that_does_not_fit_says_so_and_others_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = model_run.make_engine

    def with_little_memory(model: Any, case: Case, *rest: Any) -> Any:
        if case.batch > 2 and model.__dict__["_foldkv_swap"].mode == "c16":
            raise PoolExhaustedError("memory of the cache: expected 69 GB, got 60 GB free")
        return make(model, case, *rest)

    monkeypatch.setattr(model_run, "make_engine", with_little_memory)
    rows = bench(tmp_path / "x.json", "--kv", "c16,c8", "--cases", "3x100,2x100", "--no-ttft")["rows"]
    assert rows[0]["tokens_per_s"] is None and "does not fit: memory of the cache: expected 69 GB" in rows[0]["note"]
    assert all(row["tokens_per_s"] > 0 and row["ttft_ms"] is None for row in rows[1:])
    assert rows[1]["x_c16"] is None and rows[3]["x_c16"] > 0


def test_wrong_options_of_the_benchmark() -> None:
    for words, message in (
        (("--peers", "vllm"), "static, quanto4"),
        (("--dtype", "int3"), "fp16"),
        (("--cases", "4y8"), "64x8k"),
        (("--model", "no/such/model/at/all"), "llama3-8b-shape"),
    ):
        result = run("bench", "--model", "tiny-shape", "--device", "cpu", *words)
        assert result.exit_code in (1, 2) and message in result.output


def test_cases_and_models() -> None:
    assert parse_cases("1x32k, 64x1024") == [Case(1, 32768), Case(64, 1024)]
    for text in ("x5", "4x", "0x4", "4x0k", "4"):
        with pytest.raises(ArgumentError):
            parse_cases(text)
    config = model_config("llama3-8b-shape")
    parameters = sum(p.numel() for p in empty_model("llama3-8b-shape", "fp16").parameters())
    assert parameters == 8_030_261_248 and config.num_key_value_heads == 8, "Llama 3 8B"
    model, is_random = bench_model("examples/tiny_lm/model", "fp32", "cpu")  # type: ignore[arg-type]
    assert not is_random and len(random_scales(model.config).layers) == 4


def test_plan_of_a_shape() -> None:
    result = run("plan", "llama3-8b-shape", "--memory", "40GB", "--kv", "c16,c8,c4s,c4,c4,0:c8", "--json")
    found = json.loads(result.output)
    rows = {row["mode"]: row for row in found["modes"]}
    assert rows["c16"]["bytes_per_token"] == 2 * 32 * 8 * 128 * 2
    assert rows["c16"]["tokens"] == (40_000_000_000 - 32 * 2 * 16 * 8 * 128) // (64 * 131072) * 64
    assert rows["c4s"]["tokens"] >= 3.99 * rows["c16"]["tokens"]
    assert rows["c4,0:c8"]["tokens"] < rows["c4"]["tokens"] and rows["c8"]["sequences"] == rows["c8"]["tokens"] // 8192
    card = json.loads(run("plan", "llama3-8b-shape", "--card", "80GB", "--kv", "c16", "--json").output)
    assert card["cache_bytes"] == int(80e9 * 0.96) - card["weights_bytes"]
    assert "x c16" in run("plan", "tiny-shape", "--memory", "1GB").output


@pytest.mark.parametrize(
    ("words", "message"),
    [((), "neither"), (("--memory", "1GB", "--card", "2GB"), "both"), (("--card", "4GB"), "16.06 GB"),
     (("--memory", "lots"), "'lots'"), (("--memory", "1MB"), "one page"), (("--memory", "1GB", "--kv", "c9"), "c9")],
)  # fmt: skip
def test_plans_that_cannot_be(words: tuple[str, ...], message: str) -> None:
    result = run("plan", "llama3-8b-shape", *words)
    assert result.exit_code in (1, 2) and message in result.output


def test_sizes_for_people() -> None:
    assert [parse_bytes(text) for text in ("40GB", "1GiB", "1.5k", "7", 9)] == [40 * 10**9, 1 << 30, 1500, 7, 9]
    assert [format_bytes(n) for n in (12, 12_345, 1.5e9, 2e13)] == ["12 B", "12.35 kB", "1.5 GB", "2e+04 GB"]
    for wrong in ("GB", "-3GB", "3 apples", 0, -1):
        with pytest.raises(ArgumentError, match="40GB"):
            parse_bytes(wrong)
