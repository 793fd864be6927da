"""`--fail-if` conditions: what they may say, what they look up, when they fail."""

from __future__ import annotations

from typing import Any

import pytest

from foldkv.accuracy.gates import check_gate, evaluate_gate, known_paths, parse_gate
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
