"""Layer by layer: the same scales to the bit, with the memory of a layer, and on after a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import save_checkpoint, tiny_model, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from calib import calibrate
from calib.checkpoint import Checkpoint
from calib.stream import StreamedCheckpoint
from foldkv.hf import load_model
from quant.errors import ArgumentError, UnsupportedModelError
from quant.scales import KVScales

PARTS = ("min", "max", "mean", "var", "percentiles", "weight", "tokens")


def assert_same(a: KVScales, b: KVScales) -> None:
    assert len(a.layers) == len(b.layers)
    for x, y in zip(a.layers, b.layers, strict=True):
        assert x is not None and y is not None
        for tensor in ("k", "v"):
            one, other = getattr(x, tensor), getattr(y, tensor)
            for part in PARTS:
                assert torch.equal(torch.as_tensor(getattr(one, part)), torch.as_tensor(getattr(other, part))), part
            for part in ("query", "gram"):
                assert (getattr(one, part) is None) == (getattr(other, part) is None), part
                assert getattr(one, part) is None or torch.equal(getattr(one, part), getattr(other, part)), part
            assert (one.static is None) == (other.static is None)
            if one.static is not None:
                assert torch.equal(one.static.scale, other.static.scale)


def streamed(folder: Path, work: Path, ids: Any, **options: Any) -> KVScales:
    source = StreamedCheckpoint(folder, work)
    scales = calibrate(source.model, ids, gather=source.collect, **options)
    source.clear()
    return scales


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gemma3_text", "gpt_oss", "gpt_neox"]
)
def test_streaming_gives_the_same_bits(tmp_path: Path, family: str) -> None:
    """Masks, windows, sinks, two kinds of layers: the decoder's own forward makes what each layer is given."""
    tiny_model(family).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    model, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval(), tokens(20, 24)
    options = {"num_samples": 20, "max_seq_len": 24, "mode": "c4"}
    whole = calibrate(model, ids, **options)
    parts = streamed(tmp_path / "model", tmp_path / "work", ids, **options)
    assert_same(whole, parts)
    for name in ("mode", "model", "data", "estimator"):
        assert whole.config[name] == parts.config[name], name
    assert not (tmp_path / "work").exists()


def test_estimators_and_longer_positions_stream_too(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    model, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval(), tokens(4, 24)
    options = {"num_samples": 4, "max_seq_len": 24, "mode": "c4s", "estimator": "softmax_kl/mse", "max_position": 100}
    assert_same(calibrate(model, ids, **options), streamed(tmp_path / "model", tmp_path / "work", ids, **options))


def test_only_one_layer_is_loaded_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("llama", num_hidden_layers=4).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    loads: list[set[str]] = []
    stock = Checkpoint.load

    def load(self: Checkpoint, names: Any) -> Any:
        names = list(names)
        loads.append({name.split("layers.")[1].split(".")[0] for name in names if "layers." in name})
        return stock(self, names)

    monkeypatch.setattr(Checkpoint, "load", load)
    source = StreamedCheckpoint(tmp_path / "model", tmp_path / "work")
    calibrate(source.model, tokens(4, 24), num_samples=4, max_seq_len=24, gather=source.collect)
    assert [sorted(layers) for layers in loads] == [[], ["0"], ["1"], ["2"], ["3"]]


# --- killed and resumed -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("big")
    save_checkpoint(tiny_model("llama", num_hidden_layers=8), folder / "model", max_shard_size="50KB")
    lines = (" ".join(f"w{idx}" for idx in row) for row in torch.randint(30, 90, (80, 60)).tolist())
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return folder


def command(folder: Path, out: Path) -> list[str]:
    return [
        sys.executable, "-m", "foldkv", "calibrate", str(folder / "model"), "--data", str(folder / "text.jsonl"),
        "--num-samples", "32", "--max-seq-len", "128", "--out", str(out), "--no-progress", "--stream",
    ]  # fmt: skip


def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path, big: Path) -> None:
    """SIGKILL as soon as some layers are done: the next run goes on and gives the scales of an undisturbed one."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    out, work = tmp_path / "kv", tmp_path / "kv.partial"
    process = subprocess.Popen(command(big, out), env=env, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while len(list(work.rglob("layer-*"))) < 2 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not out.exists(), "it was not killed in the middle"
    kept = {path: path.stat().st_mtime_ns for path in work.rglob("layer-*")}
    assert 2 <= len(kept) < 8
    stamps: dict[Path, int] = {}
    process = subprocess.Popen(command(big, out), env=env, stderr=subprocess.PIPE)
    while process.poll() is None:
        for path in kept:
            try:
                stamps[path] = path.stat().st_mtime_ns
            except FileNotFoundError:
                continue
        time.sleep(0.001)
    assert process.communicate() and process.returncode == 0
    assert stamps == kept, "layers that were done were done again"
    assert not work.exists()
    model, tokenizer = load_model(big / "model")
    text = str(big / "text.jsonl")
    assert_same(KVScales.load(out), calibrate(model, text, tokenizer=tokenizer, num_samples=32, max_seq_len=128))


def test_every_half_written_state_is_sound(tmp_path: Path) -> None:
    """Between any two writes: hidden states without statistics, statistics without the old hidden states gone, leftovers."""
    tiny_model("llama", num_hidden_layers=3).save_pretrained(tmp_path / "model")
    ids, options = tokens(4, 24), {"num_samples": 4, "max_seq_len": 24}
    whole = calibrate(AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval(), ids, **options)
    states: list[dict[str, bytes]] = []
    work = tmp_path / "work"

    from calib import stream

    stock, unlink = stream._write, Path.unlink

    def snapshot() -> None:
        states.append({str(path.relative_to(work)): path.read_bytes() for path in work.rglob("*") if path.is_file()})

    def write(path: Path, tensors: Any) -> None:
        stock(path, tensors)
        snapshot()

    def removed(self: Path, missing_ok: bool = False) -> None:
        unlink(self, missing_ok=missing_ok)
        if self.name.startswith("hidden"):
            snapshot()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "_write", write)
        patch.setattr(Path, "unlink", removed)
        streamed(tmp_path / "model", work, ids, **options)
    assert len(states) >= 9
    for number, state in enumerate(states):
        again = tmp_path / f"again{number}"
        for name, data in state.items():
            (again / name).parent.mkdir(parents=True, exist_ok=True)
            (again / name).write_bytes(data)
        (again / next(iter(state))).with_name(".layer-00001.safetensors.1.tmp").write_bytes(b"half")
        assert_same(whole, streamed(tmp_path / "model", again, ids, **options))


def test_another_calibration_does_not_take_up_this_ones_work(tmp_path: Path) -> None:
    tiny_model("llama", num_hidden_layers=3).save_pretrained(tmp_path / "model")
    model, work = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval(), tmp_path / "work"
    for seed in (0, 1):
        source = StreamedCheckpoint(tmp_path / "model", work)
        ids, options = tokens(4, 24, seed=seed), {"num_samples": 4, "max_seq_len": 24}
        assert_same(calibrate(model, ids, **options), calibrate(source.model, ids, gather=source.collect, **options))
    assert len(list(work.iterdir())) == 2


# --- what is refused --------------------------------------------------------------------------------------------------


def test_bad_checkpoints_are_named(tmp_path: Path) -> None:
    folder, work = tmp_path / "model", tmp_path / "work"
    tiny_model().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"

    def run() -> None:
        source = StreamedCheckpoint(folder, work)
        calibrate(source.model, tokens(4, 24), num_samples=4, max_seq_len=24, gather=source.collect)

    save_file({key: value for key, value in tensors.items() if key != name}, folder / "model.safetensors")
    with pytest.raises(ArgumentError, match=f"expected a tensor {name}, got none"):
        run()
    save_file({**tensors, name: torch.zeros(3, 3)}, folder / "model.safetensors")
    with pytest.raises(ArgumentError, match=rf"tensor {name}: expected shape \(32, 64\), got \(3, 3\)"):
        run()
    (folder / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ArgumentError, match=r"model.safetensors.index.json or model.safetensors"):
        StreamedCheckpoint(folder, work)
    tiny_model("gemma3n_text").save_pretrained(tmp_path / "shared")
    with pytest.raises(UnsupportedModelError, match="layers with a cache of their own, got shared ones"):
        StreamedCheckpoint(tmp_path / "shared", work)
