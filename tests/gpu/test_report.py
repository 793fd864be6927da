"""The report on a GPU: decode by graph replay, every check of the harness, broken caches seen there too."""

from __future__ import annotations

import pytest
import torch
from report_helpers import tiny_scales, token_windows
from transformers import LlamaConfig, LlamaForCausalLM

from foldkv.accuracy import AccuracyReport, accuracy_report

from .helpers import DEVICE, HALF, ON_GPU

pytestmark = pytest.mark.gpu

SIZES = {"num_windows": 4, "window_len": 400, "decode_windows": 4, "decode_len": 288, "new_tokens": 16}


@pytest.fixture(scope="module")
def report() -> AccuracyReport:
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=96, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=512, initializer_range=0.1, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    scales = tiny_scales(model)
    model = model.to(DEVICE, HALF if ON_GPU else torch.float32)
    return accuracy_report(
        model, ["c8", "c8d", "k8v4", "c4", "c4r"], token_windows(4, 400, seed=2), scales=scales, **SIZES
    )


def test_every_check_holds_under_replay(report: AccuracyReport) -> None:
    assert report.trusted, [check["text"] for check in report.data["checks"] if not check["ok"]]
    ways = {way["name"]: way for way in report.data["setup"]["ways"]}
    assert ways["decode"]["graphs"] == ON_GPU and ways.keys() == {"prefill", "chunked", "decode"}
    modes = report.data["modes"]
    assert modes["c8"]["decode"]["kld_mean"] < modes["c4"]["decode"]["kld_mean"] < modes["c4x"]["decode"]["kld_mean"]
    for mode in ("c8", "c8d", "k8v4", "c4", "c4r"):
        assert all(entry["kld_mean"] is not None for entry in modes[mode]["parts"].values())
        assert modes[mode]["decode"]["tokens_per_s"] > 0


def test_the_noise_floor_is_that_of_16_bits(report: AccuracyReport) -> None:
    assert report.data["noise_floor"]["kld_mean"] < 1e-4
    assert report.data["noise_floor"]["stored_logits"] == 0


def test_greedy_texts_come_from_the_engine(report: AccuracyReport) -> None:
    texts = report.data["generation"]
    assert texts["engine"] and texts["graphs"] == ON_GPU and texts["texts"] == 4
    assert texts["band"]["split"]["match_16"] >= 0.5 and report.data["modes"]["c8"]["generation"]["tokens"] == 16
