"""Caches that cheat or are broken, inside the real swap: the report must flag each one and leave the honest ones alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from report_helpers import tiny_model, tiny_scales, token_windows
from torch import Tensor
from transformers import PreTrainedModel

from foldkv.accuracy import AccuracyReport, accuracy_report
from foldkv.accuracy.emulate import Codec, EmulatedCache, emulated_attention, spec_codecs
from foldkv.accuracy.mode_source import ModeSource
from foldkv.accuracy.sources import NewCache
from foldkv.hf.cache import FoldLayer
from quant import ops
from quant.pages import SCALE
from quant.plan import Plan
from quant.scales import KVScales
from quant.spec import parse_modes

SIZES = {"num_windows": 4, "window_len": 288, "decode_windows": 4, "decode_len": 24}


class Tampered(ModeSource):
    """A mode whose cache is broken by patches that hold while it is open."""

    def __init__(self, name: str, mode: str, scales: KVScales, patches: Any) -> None:
        super().__init__(name, parse_modes(mode, 2), scales)
        self.patches = patches

    @contextmanager
    def open(self, model: PreTrainedModel) -> Iterator[NewCache]:
        with pytest.MonkeyPatch.context() as patch, super().open(model) as new_cache:
            self.patches(patch)
            yield new_cache


def append_changed(change: Any) -> Any:
    """The append gets other rows than the model gave: change(k, v) `[tokens, h_kv, d]`."""
    own = ops.append_kv

    def append(pages: Any, k: Tensor, v: Tensor, slots: Tensor, **options: Any) -> None:
        own(pages, *change(k, v), slots, **options)

    return lambda patch: patch.setattr(ops, "append_kv", append)


def frozen_plan(patch: pytest.MonkeyPatch) -> None:
    """Every plan serves the first lengths that it met for good."""
    own, met = Plan.update, set()

    def update(self: Plan, *args: Any) -> None:
        if id(self) not in met:
            met.add(id(self))
            own(self, *args)

    patch.setattr(Plan, "update", update)


def stale_plan(patch: pytest.MonkeyPatch) -> None:
    """Decode steps go by the lengths and the plan of some steps before, as a graph with lengths baked in would."""
    update, attend, step = Plan.update, ops.append_attention, {"lens": None, "age": 0}

    def at(lens: Tensor, decodes: bool) -> Tensor:
        if not decodes or step["lens"] is None or step["lens"].shape != lens.shape or step["age"] >= 5:
            step["lens"], step["age"] = lens.clone(), 0
        return step["lens"]

    def stale_update(self: Plan, lens: Tensor, cu: Tensor, starts: Tensor | None = None) -> None:
        step["age"] += 1
        update(self, at(lens, int(cu[1]) == 1), cu, starts)

    def stale_attend(pages: Any, q: Tensor, table: Tensor, lens: Tensor, *args: Any, **options: Any) -> Any:
        return attend(pages, q, table, step["lens"], *args, **options)

    patch.setattr(Plan, "update", stale_update)
    patch.setattr(ops, "append_attention", stale_attend)


def without_v_scale(patch: pytest.MonkeyPatch) -> None:
    own = FoldLayer.lazy_initialization

    def initialise(self: FoldLayer, *args: Any) -> None:
        own(self, *args)
        self.pages.v.params[SCALE] = 1.0

    patch.setattr(FoldLayer, "lazy_initialization", initialise)


def zeros(patch: pytest.MonkeyPatch) -> None:
    own = FoldLayer.attend
    patch.setattr(FoldLayer, "attend", lambda self, *args, **options: own(self, *args, **options).zero_())


def forgets_newest(patch: pytest.MonkeyPatch) -> None:
    """Attention does not see the token that was just appended where there is only one, as a late append would have it."""
    own = ops.append_attention

    def attend(pages: Any, q: Tensor, table: Tensor, lens: Tensor, cu: Tensor, plan: Plan, **options: Any) -> Any:
        if q.shape[0] == lens.shape[0] and int(lens[0]) > 1:
            lens = lens - 1
            plan.update(lens, cu, options.get("seq_starts"))
        return own(pages, q, table, lens, cu, plan, **options)

    patch.setattr(ops, "append_attention", attend)


class ExactPrefill(ModeSource):
    """What transformers' own QuantizedCache does: a prompt is attended to unquantised, later tokens are not."""

    kernels = False

    @contextmanager
    def open(self, model: PreTrainedModel) -> Iterator[NewCache]:
        def lazy(codec: Codec) -> Codec:
            return lambda x: codec(x) if x.shape[2] == 1 else x.float()

        def codecs(layer_idx: int) -> tuple[Codec, Codec]:
            k, v = spec_codecs(self.specs, self.scales)(layer_idx)
            return lazy(k), lazy(v)

        with emulated_attention(model):
            yield lambda batch, max_seq_len: EmulatedCache(model.config, codecs, on_read=False)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "bits_per_element": 4.5, "bytes_per_token": 144.0}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model()


@pytest.fixture(scope="module")
def report(model: PreTrainedModel) -> AccuracyReport:
    scales = tiny_scales(model)
    sources = [
        "c8",
        "c4",
        "c4r",
        Tampered("zeros", "c8", scales, zeros),
        Tampered("empty", "c8", scales, append_changed(lambda k, v: (torch.zeros_like(k), torch.zeros_like(v)))),
        Tampered("no_v_scale", "c8", scales, without_v_scale),
        Tampered("swapped_heads", "c8", scales, append_changed(lambda k, v: (k.flip(1), v.flip(1)))),
        Tampered("k_for_v", "c4", scales, append_changed(lambda k, v: (v, k))),
        Tampered("k_for_v_searched", "c4r", scales, append_changed(lambda k, v: (v, k))),
        Tampered("stale_plan", "c8", scales, stale_plan),
        Tampered("late_append", "c8", scales, forgets_newest),
        Tampered("shifted_shaped", "c8d", scales, append_changed(lambda k, v: (k.roll(1, -1), v))),
        ExactPrefill("exact_prefill_shaped", parse_modes("c4r", 2), scales),
        ExactPrefill("exact_prefill", parse_modes("c4", 2), scales),
    ]
    windows = token_windows(4, 288, seed=2)
    return accuracy_report(model, sources, windows, scales=scales, level="quick", **SIZES)  # type: ignore[arg-type]


def failed(report: AccuracyReport, mode: str) -> set[str]:
    return {check["name"] for check in report.data["checks"] if not check["ok"] and check["mode"] == mode}


@pytest.mark.parametrize("mode", ["c8", "c4", "c4r"])
def test_honest_modes_pass_every_check(report: AccuracyReport, mode: str) -> None:
    assert failed(report, mode) == set()
    assert report.data["modes"][mode]["level"] != "suspect"


@pytest.mark.parametrize(
    ("mode", "checks"),
    [
        ("zeros", {"reference_prefill", "reference_decode"}),
        ("empty", {"reference_prefill", "reference_decode"}),
        ("no_v_scale", {"reference_prefill", "reference_decode"}),
        ("swapped_heads", {"reference_prefill", "reference_decode"}),
        ("k_for_v", {"reference_prefill", "reference_decode"}),
        ("k_for_v_searched", {"reference_prefill", "reference_decode"}),
        ("stale_plan", {"reference_decode"}),
        ("late_append", {"reference_decode"}),
        ("shifted_shaped", {"reference_prefill", "reference_decode"}),
        ("exact_prefill_shaped", {"reference_prefill", "ways_agree"}),
        ("exact_prefill", {"reference_prefill", "ways_agree"}),
    ],
)
def test_a_broken_cache_is_flagged(report: AccuracyReport, mode: str, checks: set[str]) -> None:
    """By the check that is meant for it, and nowhere does it pass for a mode that may be used."""
    assert checks <= failed(report, mode)
    entry = report.data["modes"][mode]
    assert entry["level"] == "suspect" and entry["answer"]["answer"] == "no"
    assert not report.trusted and mode in report.data["verdict"]["text"]
    assert report.data["verdict"]["recommended"] not in (mode,)


def test_a_plan_that_is_not_for_these_lengths_ends_the_report(model: PreTrainedModel) -> None:
    scales = tiny_scales(model)
    source = Tampered("frozen_plan", "c8", scales, frozen_plan)
    with pytest.raises(RuntimeError, match=r"call Plan\.update once a step"):
        accuracy_report(model, [source], token_windows(4, 288, seed=2), scales=scales, level="quick", **SIZES)  # type: ignore[arg-type]


def test_what_is_broken_is_told_apart_from_rounding(report: AccuracyReport) -> None:
    """The honest modes stay far below the bar, the broken ones far above it."""
    for name, entry in report.data["modes"].items():
        for way, one in entry["reference"].items():
            share = one["kld"] / one["own_kld"]
            if name in ("c8", "c4", "c4r"):
                assert share < 0.1, (name, way)
            elif f"reference_{way}" in failed(report, name):
                assert share > 0.5, (name, way)


def test_the_model_is_whole_again(model: PreTrainedModel, report: AccuracyReport) -> None:
    assert model.config._attn_implementation == "sdpa" and "forward" not in model.__dict__
