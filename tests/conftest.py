"""Shared set-up of all tests: which run here, and from which random state."""

from __future__ import annotations

import os

import pytest
import torch


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
