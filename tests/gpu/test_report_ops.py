"""The op-level report on a GPU: every step but the first a replay of the graph that was captured at one token."""

from __future__ import annotations

import pytest
import torch

from foldkv.accuracy.ops_report import ops_report

from .helpers import DEVICE, ON_GPU

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16] if ON_GPU else [torch.float32])
def test_every_mode_stays_within_its_bands(dtype: torch.dtype) -> None:
    modes = ["c8", "c8h", "c8d", "k8v4", "c4s", "c4", "c4r"]
    report = ops_report(modes, device=DEVICE, dtype=dtype, level="standard" if ON_GPU else "quick")
    assert report.ok, report.data["outside"]
    assert report.data["setup"]["graph"] == ON_GPU
