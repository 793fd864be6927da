"""Calibration on the device: the statistics of the CPU, streamed or not, and a plan that a swap takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hf_helpers import tiny_model, tokens
from transformers import AutoModelForCausalLM

from calib import calibrate
from calib.stream import StreamedCheckpoint
from foldkv.auto import Budget, choose_plan
from foldkv.hf import swap_kv_cache
from quant.scales import KVScales

from .helpers import DEVICE

pytestmark = pytest.mark.gpu


def assert_close(a: KVScales, b: KVScales, rtol: float) -> None:
    for x, y in zip(a.layers, b.layers, strict=True):
        assert x is not None and y is not None
        for one, other in ((x.k, y.k), (x.v, y.v)):
            for part in ("min", "max", "mean", "var", "weight"):
                torch.testing.assert_close(getattr(one, part), getattr(other, part), rtol=rtol, atol=rtol)
            assert one.min.device.type == "cpu" and one.tokens == other.tokens


def test_the_device_finds_what_the_cpu_finds() -> None:
    ids = tokens(8, 48)
    options = {"num_samples": 8, "max_seq_len": 48, "mode": "c4s", "estimator": "softmax_kl/attention_output"}
    cpu, device = tiny_model("qwen2"), tiny_model("qwen2").to(DEVICE)
    assert_close(calibrate(cpu, ids, **options), calibrate(device, ids, **options), rtol=2e-3)


def test_streaming_on_the_device(tmp_path: Path) -> None:
    """Layer by layer as at once, to the bit: the same kernels on the same device."""
    tiny_model("mistral").save_pretrained(tmp_path / "model")
    ids, options = tokens(4, 48), {"num_samples": 4, "max_seq_len": 48}
    whole = calibrate(AutoModelForCausalLM.from_pretrained(tmp_path / "model").to(DEVICE).eval(), ids, **options)
    source = StreamedCheckpoint(tmp_path / "model", tmp_path / "work", device=DEVICE)
    assert_close(whole, calibrate(source.model, ids, gather=source.collect, **options), rtol=0)


def test_a_plan_on_the_device() -> None:
    model, dtype = tiny_model("llama"), torch.float32 if DEVICE.type == "cpu" else torch.float16
    model = model.to(DEVICE, dtype)
    scales = calibrate(model, tokens(8, 64), num_samples=8, max_seq_len=64)
    plan = choose_plan(model, scales, tokens(2, 48, seed=5), tokens(2, 48, seed=6), Budget(bits=7.0))
    assert plan.bits <= 7 and plan.kld <= min(row["kld"] for row in plan.table if row["bits"] <= 7)
    scales.config["plan"] = plan.to_json()
    with swap_kv_cache(model, "auto", scales) as swap:
        assert swap.bits_per_element == pytest.approx(plan.bits)
        out = model.generate(tokens(1, 9).to(DEVICE), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert out.shape == (1, 13)
