"""The report on every family: its reference and the swap agree through windows, soft caps, sinks, shared caches, experts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hf_helpers import FAMILIES, VOCAB, tiny_model
from torch import Tensor

from calib import calibrate
from foldkv.accuracy import accuracy_report
from foldkv.accuracy.crosscheck import cross_check
from foldkv.accuracy.evaluate import make_ways
from foldkv.accuracy.render import to_html
from foldkv.accuracy.report import make_sources


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def windows(length: int) -> Tensor:
    return torch.randint(3, VOCAB, (3, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_swapped_model_gives_what_its_reference_gives(family: str) -> None:
    """Two implementations that share formats and scales alone, in each way of feeding, windows shorter than the text."""
    model = tiny_model(family)
    ids = windows(48)
    scales = calibrate(model, ids, num_samples=3, max_seq_len=48)
    base, sources = make_sources(model, ["c8", "c4r"], scales)
    ways = make_ways(3, 48, 3, 16)
    for name, found in cross_check(model, base, sources, ways, ids).items():
        for way, one in found.items():
            assert one.own_kld > 1e-6 and one.noise < 1e-6, (name, way)
            assert one.kld < 0.03 * one.own_kld, (name, way)


@pytest.mark.parametrize("family", ["gpt_oss", "gemma4_text"])
def test_a_whole_report(family: str) -> None:
    """With sinks, and with heads of two sizes and layers that share a cache."""
    model = tiny_model(family)
    ids = windows(40)
    scales = calibrate(model, ids, num_samples=3, max_seq_len=40)
    sizes = {"num_windows": 3, "window_len": 40, "decode_windows": 3, "decode_len": 10, "new_tokens": 6}
    report = accuracy_report(model, ["c8"], ids, scales=scales, **sizes)  # type: ignore[arg-type]
    assert [check["text"] for check in report.data["checks"] if not check["ok"]] == []
    own = [i for i, layer in enumerate(scales.layers) if layer is not None]
    assert [one["layer"] for one in report.data["modes"]["c8"]["damage"]] == own
    assert [one["layer"] for one in report.data["modes"]["c8"]["layers"]] == own
    assert "May I use it here?" in to_html(report.data)
