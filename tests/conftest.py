"""Shared set-up of all tests: which run here, and from which random state."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from quant.scales import KVScales


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no GPU, unless FOLDKV_TEST_DEVICE=cpu puts the CPU in its place."""
    if torch.cuda.is_available() or os.environ.get("FOLDKV_TEST_DEVICE") == "cpu":
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    """Each test starts from the same random state, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """The tiny model of the report's tests; other files have models of their own."""
    from report_helpers import tiny_model

    return tiny_model()


@pytest.fixture(scope="module")
def scales(model: PreTrainedModel) -> KVScales:
    from report_helpers import tiny_scales

    return tiny_scales(model)
