"""`foldkv bench`: the data behind it, the cases of the CUDA benchmark built on the CPU, its files and tables, its errors."""

from __future__ import annotations

import importlib.util
import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from foldkv.bench import targets
from foldkv.bench.cuda_cases import PagedCase, Workload
from foldkv.bench.cuda_run import CudaBench, CudaRow, Note, Rates, Recorder
from foldkv.bench.cuda_suites import FEW_MODES, SUITES, Item, shape_items, suite_items
from foldkv.bench.cuda_timing import Call, Timing
from foldkv.bench.result import stamp
from foldkv.cli.main import app
from foldkv.commit import running_commit
from quant import reference
from quant.errors import ArgumentError
from quant.spec import MODES, resolve_mode

CPU = torch.device("cpu")
SMALL = Workload("3 mixed", (70, 16, 33), q_len=2, h_q=8, h_kv=2, head_dim=64, page_size=16)
BENCHED = ("c16", "c8", "c8d", "k8v4", "c4s", "c4", "c4r")


@pytest.fixture(autouse=True)
def _short_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foldkv.bench.cuda_cases.ROTATION_BYTES", 1 << 17)
    monkeypatch.setattr("foldkv.bench.run.ROTATION_BYTES", 1 << 17)


def host_time(call: Call, copies: int, seconds: float) -> Timing:
    """In the place of the CUDA graph's timer: every copy once, by the clock."""
    begun = time.perf_counter()
    for i in range(copies):
        call(i)
    return Timing(max((time.perf_counter() - begun) / copies * 1e6, 0.01), 1, copies)


def bench_table() -> Any:
    path = Path(__file__).resolve().parents[1] / "tools/bench_table.py"
    spec = importlib.util.spec_from_file_location("bench_table", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "shares"),
    [
        ("1 x 4096", (0.40, 0.20, 0.08)),
        ("8 x 8192", (0.86, 0.61, 0.35)),
        ("256 x 1024", (0.95, 0.85, 0.23)),
        ("64 ragged", (0.96, 0.68, 0.32)),
        ("32 skewed", (0.94, 0.73, 0.29)),
    ],
)
def test_lengths_fit_the_shares_that_peers_were_measured_with(name: str, shares: tuple[float, ...]) -> None:
    row = next(row for row in targets.DECODE if row.name == name)
    work = Workload(row.name, row.lengths)
    for width, share in zip(targets.CLASSES, shares, strict=True):
        rate = work.kv_bytes(width) / row.peer_us[width] / 1e3
        assert rate / targets.READ_CEILING_GB_PER_S == pytest.approx(share, abs=0.035)


def test_goals_are_possible_and_beat_the_peers() -> None:
    for row in targets.DECODE:
        for width in targets.CLASSES:
            rate = Workload(row.name, row.lengths).kv_bytes(width) / row.goal_us[width] / 1e3
            assert rate < 1.04 * targets.READ_CEILING_GB_PER_S, row.name
            assert row.goal_us[width] <= 1.01 * row.peer_us[width], row.name


def test_goal_of_a_mode_follows_its_width_and_its_scales() -> None:
    goals = {16: 100.0, 8: 50.0, 4: 25.0}
    got = {name: targets.goal_for(resolve_mode(name), goals) for name in BENCHED}
    assert got["k8v4"] is None
    assert got == {"c16": 100, "c8": 50, "c8d": 51.5, "k8v4": None, "c4s": 25, "c4": 27, "c4r": 27}
    assert targets.goal_for(resolve_mode("c8"), {}) is None


def test_bytes_and_operations_of_a_workload() -> None:
    work = Workload("2", (128, 64), q_len=2, h_q=8, h_kv=2, head_dim=64)
    assert work.kv_bytes(16) == 2 * 192 * 2 * 64 * 2
    assert work.append_bytes(8) == 2 * 4 * 2 * 64 * 3
    pairs = sum(length - 1 + length for length in work.lengths)  # of two queries, the first sees one key less
    assert work.flops == 4 * 8 * 64 * pairs
    assert work.page_counts == [2, 1]
    with pytest.raises(ArgumentError, match="cached tokens"):
        Workload("short", (1,), q_len=2)
    with pytest.raises(ArgumentError, match="max_seq_len"):
        Workload("long", (100,), max_seq_len=50)


def test_suites_name_shapes_once_and_take_their_goals() -> None:
    for name in SUITES:
        items = suite_items([name])
        assert len({(item.work.name, item.op) for item in items}) == len(items) > 0
        assert all(item.suite == name for item in items)
    assert [item.suite for item in suite_items(["all"])] == [i.suite for i in suite_items(SUITES)]
    groups = suite_items(["groups"])
    assert len({item.work.kv_bytes(16) for item in groups}) == 1
    first = suite_items(["prefill"])[0]
    assert first.work.flops / first.goals[16] / 1e6 == pytest.approx(288)
    with pytest.raises(ArgumentError, match="suite: expected all"):
        suite_items(["decoding"])


@pytest.mark.parametrize("mode", BENCHED)
def test_a_case_reads_disjoint_pages_and_computes_attention(mode: str) -> None:
    case = PagedCase(MODES[mode], SMALL, CPU, dtype=torch.float16, copies=3)
    counts = SMALL.page_counts
    used = [table[b, : counts[b]] for table in case.tables for b in range(SMALL.batch)]
    assert sorted(torch.cat(used).tolist()) == list(range(3 * sum(counts)))
    for i in range(case.copies):
        case.step(i)
        want, _ = reference.append_attention(
            case.pages, case.q, case.tables[i], case.seq_lens, case.cu_seqlens_q, dtype=torch.float64
        )
        assert torch.isfinite(case.out).all()
        torch.testing.assert_close(case.out.double(), want, rtol=0, atol=0.02 * float(want.abs().max()))


def test_appended_rows_are_the_last_of_each_sequence() -> None:
    case = PagedCase(MODES["c16"], SMALL, CPU, dtype=torch.float16, copies=2)
    before = case.pages.v.codes.clone()
    case.append(1)
    size, row = SMALL.page_size, SMALL.head_dim * 2
    changed = (case.pages.v.codes != before).view(-1, SMALL.h_kv, size, row).any(-1).any(1).nonzero().tolist()
    ends = [(b, length - back) for b, length in enumerate(SMALL.lengths) for back in (1, 2)]
    assert sorted(changed) == sorted([int(case.tables[1][b, p // size]), p % size] for b, p in ends)


def measured(items: list[Item], modes: tuple[str, ...] = BENCHED) -> list[Rates | Note | CudaRow]:
    return list(CudaBench(modes, seconds=0.0, device="cpu", timer=host_time).results(items))


def test_every_op_gives_a_row_with_its_own_rate() -> None:
    items = [replace(item, work=SMALL, modes=None) for item in shape_items(SMALL)]
    items.append(Item("prefill", SMALL, goals={16: 1.0}))
    rates, *results = measured(items, ("c16", "c4"))
    assert isinstance(rates, Rates) and rates.read > 0 and rates.copy > 0
    rows = {(row.suite, row.op, row.name): row for row in results if isinstance(row, CudaRow)}
    assert len(rows) == 10
    attend, append = rows["shape", "attend", "c4"], rows["shape", "append", "c4"]
    assert attend.gb_per_s == pytest.approx(SMALL.kv_bytes(attend.bits) / attend.us / 1e3)
    assert attend.share == pytest.approx((attend.gb_per_s or 0) / rates.read)
    assert append.share == pytest.approx(SMALL.append_bytes(append.bits) / append.us / 1e3 / rates.copy)
    assert attend.x_c16 == pytest.approx(rows["shape", "attend", "c16"].us / attend.us)
    assert rows["shape", "plan", "c16"].gb_per_s is None
    assert rows["prefill", "attend", "c16"].tflops is not None
    notes = [row.text for row in results if isinstance(row, Note)]
    assert any("FlashInfer: needs a GPU" in text for text in notes)


def test_a_floor_of_pytorch_is_timed_beside_ours() -> None:
    work = Workload("2 x 256", (256, 256), h_q=4, h_kv=2, head_dim=64, page_size=16)
    rows = {
        row.name: row for row in measured([Item("decode", work, peers=True)], FEW_MODES) if isinstance(row, CudaRow)
    }
    assert rows["c8"].peer == "torch SDPA fp16"
    assert rows["c8"].x_peer == pytest.approx(rows["torch SDPA fp16"].us / rows["c8"].us)


def test_a_row_that_fails_leaves_a_note_and_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: PagedCase, i: int) -> None:
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(PagedCase, "plan_step", fail)
    results = measured([Item("shape", SMALL, "plan"), Item("shape", SMALL)], ("c16",))
    assert [type(result) for result in results] == [Rates, Note, CudaRow]
    assert isinstance(results[1], Note) and results[1].text == "c16, 3 mixed, plan: no such kernel"


def sample_result(tmp_path: Path) -> dict[str, Any]:
    path = tmp_path / "made/result.json"
    recorder = Recorder("foldkv bench --device cuda --suite decode", "a GPU", path)
    recorder.add(Rates(4000.0, 3000.0))
    row = CudaRow(
        "decode", "attend", "c8", 8.0, "1 x 4096", 7.25, 1157.0, 0.29, None, 1.5, 1.2, "a peer", 7.0, 0.28, 9.7, 12, 64
    )
    recorder.add(row)
    assert len(json.loads(path.read_text())["rows"]) == 1
    recorder.add(replace(row, name="c16", us=120.0, share=0.5))
    recorder.add(replace(row, suite="prefill", shape="1 x 2048 at 8192", tflops=300.0))
    recorder.add(replace(row, suite="append", op="plan", shape="256 x 1024", share=None))
    recorder.add(Note("a row is missing"))
    assert not list(path.parent.glob("*.part"))
    return json.loads(path.read_text())


def test_a_result_file_is_whole_after_every_row(tmp_path: Path) -> None:
    result = sample_result(tmp_path)
    assert result["schema_version"] == 1 and result["kind"] == "cuda" and result["notes"] == ["a row is missing"]
    assert {"device", "versions", "commit", "date", "command", "rates_gb_per_s"} <= set(result)


def test_tables_of_a_result(tmp_path: Path) -> None:
    result = sample_result(tmp_path)
    tool = bench_table()
    text = tool.tables(result)
    assert "read ceiling 4000 GB/s" in text
    assert "| 1 x 4096 | 7.2 (0.29) | 120 (0.50) | 9.8 / 9.7 / 12.7 | 8.5 / 7 / 6.5 |" in text
    assert "| 1 x 2048 at 8192 | 7.2 (300 T) |" in text
    assert "| 256 x 1024 | 7.2 |" in text
    assert "prefill" not in tool.tables(result, ["decode"])


def run_cli(*words: str) -> Any:
    return CliRunner().invoke(app, ["bench", *words])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_a_usage_error() -> None:
    result = run_cli("--device", "cuda")
    assert result.exit_code == 2
    assert "--device cuda: expected a GPU, got none" in result.output


def test_command_line_of_the_cuda_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foldkv.cli.bench._device", lambda name: "cuda")
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "a GPU")
    monkeypatch.setattr("foldkv.bench.cuda_run.CudaBench", partial(CudaBench, device="cpu", timer=host_time))
    out = tmp_path / "cuda.json"
    words = "--kv c16,c8 --batch 2 --seq 40 --heads 4 --kv-heads 2 --head-dim 64 --seconds 0"
    result = run_cli(*words.split(), "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "a GPU: reads" in result.output and "shape: step" in result.output
    kept = json.loads(out.read_text())
    assert [row["op"] for row in kept["rows"] if row["name"] == "c16"] == ["attend", "plan", "append", "step"]
    assert kept["device"] == "a GPU" and "--batch 2 --seq 40" in kept["command"]
    assert run_cli("--suite", "decoding").exit_code == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="times CUDA graphs")
def test_rows_on_a_gpu() -> None:
    work = Workload("2 x 512", (512, 512))
    results = list(CudaBench(("c16", "c4"), seconds=0.01).results(shape_items(work)))
    rows = {(row.op, row.name): row for row in results if isinstance(row, CudaRow)}
    wanted = {(op, mode) for op in ("attend", "append", "step") for mode in ("c16", "c4")} | {("plan", "c16")}
    assert wanted <= set(rows), [row.text for row in results if isinstance(row, Note)]
    assert all(0.5 < rows[key].us < 1000 and rows[key].runs >= 12 for key in wanted)


def test_wrong_options_are_usage_errors() -> None:
    assert run_cli("--device", "tpu").exit_code == 2
    result = run_cli("--device", "cpu", "--suite", "decode")
    assert result.exit_code == 2 and "--suite: expected a GPU" in result.output


def test_bench_of_the_cpu_still_works(tmp_path: Path) -> None:
    out = tmp_path / "cpu.json"
    words = "--device cpu --kv c16,c8 --seq 64 --heads 4 --kv-heads 2 --head-dim 64 --threads 1 --seconds 0".split()
    result = run_cli(*words, "--out", str(out))
    assert result.exit_code == 0, result.output
    kept = json.loads(out.read_text())
    assert kept["rows"][-1]["name"] == "c8" and kept["schema_version"] == 1


def test_the_stamp_names_the_commit_of_a_copy_without_history(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks and reports take it from one place."""
    monkeypatch.setenv("FOLDKV_COMMIT", "0123abc")
    assert stamp("CPU", "foldkv bench")["commit"] == "0123abc" == running_commit()
