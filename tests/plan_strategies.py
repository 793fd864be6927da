"""Random steps of the planner, for hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st
from plan_helpers import Step

from quant.plan import CHUNK_SIZE, TILE_ROWS, Capacity

WORKERS = st.sampled_from([1, 2, 3, 8, 17, 132])


@st.composite
def steps(draw: st.DrawFn, device_type: str = "cpu") -> Step:
    """A capacity with the tiles of a device, and a batch within it."""
    batch = draw(st.integers(0, 6))
    lengths = draw(st.lists(st.integers(0, 20 * CHUNK_SIZE), min_size=batch, max_size=batch))
    q_lens = draw(st.lists(st.one_of(st.integers(0, 3), st.integers(0, 60)), min_size=batch, max_size=batch))
    q_lens = [min(q_len, length + 2) for q_len, length in zip(q_lens, lengths, strict=True)]
    starts = draw(st.one_of(st.none(), st.lists(st.integers(-3, 3000), min_size=batch, max_size=batch)))
    window = draw(st.one_of(st.just(-1), st.integers(0, 2000)))
    h_kv, group = draw(st.sampled_from([1, 2, 8])), draw(st.sampled_from([1, 2, 4, 7, 8, 16, 20]))
    total = draw(st.one_of(st.just(max(1, sum(lengths))), st.integers(1, 3000)))  # honest, or too small to split all
    capacity = Capacity(
        max(1, batch), max(1, sum(q_lens)), 20 * CHUNK_SIZE, total, h_kv * group, h_kv, 64, 16, draw(WORKERS),
        tile_rows=TILE_ROWS[device_type], chunk_groups=draw(st.booleans()),
    )  # fmt: skip
    return Step(capacity, lengths, q_lens, starts, window)
