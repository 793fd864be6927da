"""`--fail-if` conditions: what they may say, what they look up, when they fail."""

from __future__ import annotations

from typing import Any

import pytest

from foldkv.accuracy.gates import PRESETS, check_gate, evaluate_gate, known_paths, parse_gate, parse_gates
from foldkv.accuracy.verdict import LEVELS, SUSPECT, rank
from foldkv.cli.report import split_modes
from quant.errors import ArgumentError

MODES = ["c8", "c4,0:c8", "c4x"]


def figures(**values: float | None) -> dict[str, Any]:
    return {"kld_mean": 0.01, "kld_p99": 0.1, "top1_agreement": 0.95, "ppl": 12.0, **values}


REPORT = {
    "modes": {
        "c8": {"bits_per_element": 8.0, "prefill": figures(kld_mean=1e-4), "decode": figures(kld_mean=3e-4)},
        "c4,0:c8": {"bits_per_element": 4.5, "prefill": figures(), "decode": figures(top1_agreement=0.9)},
        "c4x": {"bits_per_element": 4.0, "prefill": figures(kld_mean=None), "decode": figures()},
    },
    "noise_floor": {"kld_mean": 1e-6, "kld_p99": 1e-5, "top1_agreement": 1.0},
}


@pytest.mark.parametrize(
    ("text", "value", "failed"),
    [
        ("c8.kld_mean > 0.001", 3e-4, False),  # the worst of the ways: the larger KLD
        ("c8.kld_mean>0.0002", 3e-4, True),
        ("modes.c8.prefill.kld_mean > 0.0002", 1e-4, False),
        ("modes.c8.decode.kld_mean > 2e-4", 3e-4, True),
        ("c4,0:c8.top1_agreement < 0.93", 0.9, True),  # ... the smaller agreement
        ("modes.c4,0:c8.prefill.top1_agreement < 0.93", 0.95, False),
        ("modes.c8.prefill.kld_p99 >= 0.1", 0.1, True),
        ("modes.c8.prefill.kld_p99 <= 0.1", 0.1, True),
        ("modes.c8.bits_per_element == 8", 8.0, True),
        ("c8.bits_per_element != 8", 8.0, False),
        ("noise_floor.kld_mean > 1e-5", 1e-6, False),
    ],
)
def test_gates(text: str, value: float, failed: bool) -> None:
    gate = parse_gate(text)
    check_gate(gate, MODES)
    result = evaluate_gate(gate, REPORT)
    assert (result.value, result.failed) == (value, failed)
    assert gate.path in str(result) and f"{value:.6g}" in str(result)


@pytest.mark.parametrize("text", ["c4x.kld_mean < 0.5", "c4x.kld_mean > 0.5", "modes.c4x.prefill.kld_mean == 0"])
def test_a_figure_that_is_not_finite_fails_every_gate(text: str) -> None:
    result = evaluate_gate(parse_gate(text), REPORT)
    assert result.failed and "not finite" in str(result)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("c8.kld_mean", "PATH OPERATOR NUMBER"),
        ("", "PATH OPERATOR NUMBER"),
        ("c8.kld_mean > 0.1 and 1", "PATH OPERATOR NUMBER"),
        ("c8.kld_mean => 0.1", "operator"),
        ("c8.kld_mean = 0.1", "operator"),
        ("c8.kld_mean > high", "a number"),
        ("__import__('os').system('true') > 1", "a figure of the modes"),
        ("c9.kld_mean > 1", "a figure of the modes c8"),
        ("c8.kld_meen > 1", "did you mean c8.kld_mean"),
        ("modes.c8.prefil.kld_p99 > 1", "modes.c8.prefill.kld_p99"),
    ],
)
def test_bad_gates_are_named_before_anything_runs(text: str, said: str) -> None:
    with pytest.raises(ArgumentError, match=said.replace("(", r"\(")):
        check_gate(parse_gate(text), MODES)


def test_ways_that_are_not_measured_have_no_figures() -> None:
    check_gate(parse_gate("modes.c8.decode.kld_mean > 1"), MODES)
    with pytest.raises(ArgumentError, match=r"modes\.c8\.prefill\.kld_mean"):
        check_gate(parse_gate("modes.c8.decode.kld_mean > 1"), MODES, ["prefill"])
    assert not any(".decode." in path for path in known_paths(MODES, ["prefill"]))


def test_mode_lists() -> None:
    assert split_modes("c8, k8v4,c4") == ["c8", "k8v4", "c4"]
    assert split_modes("c8,c4,0:c8,4-6:c16,c8/c4r") == ["c8", "c4,0:c8,4-6:c16", "c8/c4r"]
    assert split_modes("") == []


# --- presets, deeper paths, errors ------------------------------------------------------------------------------------


def test_presets_are_the_levels_and_stand_for_conditions() -> None:
    assert tuple(level.name for level in LEVELS) == PRESETS and rank(SUSPECT) == 4
    gates = parse_gates(["near-lossless", "c8:lossless", "c8.kld_mean > 1"], ["c8", "c4,0:c8"])
    assert [(gate.path, gate.op, gate.limit) for gate in gates] == [
        ("c8.level_rank", ">", 1), ("c4,0:c8.level_rank", ">", 1), ("c8.level_rank", ">", 0), ("c8.kld_mean", ">", 1.0),
    ]  # fmt: skip
    with pytest.raises(ArgumentError, match="gate"):
        parse_gates(["c9:lossless"], ["c8"])


def test_a_preset_fails_for_a_mode_of_a_weaker_level() -> None:
    report = {"modes": {"c8": {"level_rank": 1}, "c4": {"level_rank": 2}, "bad": {"level_rank": rank(SUSPECT)}}}
    results = [evaluate_gate(gate, report) for gate in parse_gates(["near-lossless"], ["c8", "c4", "bad"])]
    assert [result.failed for result in results] == [False, True, True]


def test_a_figure_inside_a_mode() -> None:
    report = {"modes": {"c4,0:c8": {"generation": {"match_128": 0.25}, "parts": {"k_only": {"kld_mean": 0.02}}}}}
    extras = ["generation.match_128", "parts.k_only.kld_mean"]
    for text, failed in (
        ("c4,0:c8.generation.match_128 < 0.5", True),
        ("modes.c4,0:c8.parts.k_only.kld_mean > 1", False),
    ):
        gate = parse_gate(text)
        check_gate(gate, ["c4,0:c8"], extras=extras)
        assert evaluate_gate(gate, report).failed is failed
        with pytest.raises(ArgumentError, match="a figure of the modes"):
            check_gate(gate, ["c4,0:c8"])


def test_a_figure_near_its_limit_is_said_to_be() -> None:
    report = {"modes": {"c8": {"bits_per_element": 8.0, "prefill": figures(kld_mean=0.010, kld_se=0.001)}}}
    near, far = (evaluate_gate(parse_gate(f"c8.kld_mean > {limit}"), report) for limit in (0.0115, 0.02))
    assert near.close and "within its error" in str(near) and not near.failed
    assert not far.close and "within" not in str(far)
