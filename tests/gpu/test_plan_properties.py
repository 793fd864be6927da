"""foldkv::plan on a GPU gives the definition's work list for any step."""

from __future__ import annotations

import pytest

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from plan_helpers import Step, bounds, planned
from plan_strategies import steps

from quant.plan import reference_plan

from .helpers import DEVICE

pytestmark = pytest.mark.gpu


@given(steps(DEVICE.type))
@settings(max_examples=300, deadline=None)
def test_the_op_gives_the_definition(step: Step) -> None:
    capacity, lengths, q_lens, starts, window = step
    header, items, merges = planned(step, DEVICE)
    want_items, want_merges, want_header = reference_plan(lengths, bounds(q_lens), starts, capacity.limits, window)
    assert header == want_header
    assert items == want_items
    assert merges == want_merges
