"""A short soak of the engine; `tests/soak.py --minutes` runs a long one."""

from __future__ import annotations

import pytest
from hf_helpers import one_thread
from soak import make_soak


@pytest.mark.usefixtures(one_thread.__name__)
@pytest.mark.parametrize("seed", range(2))
def test_soak(seed: int) -> None:
    soak, restore = make_soak(seed=seed)
    counts = soak.run(lambda number: number >= 8)
    restore()
    for action in ("join", "cancel", "rollback", "fork", "preempted"):
        assert counts[action] > 0, action
    assert not counts["parted"]
