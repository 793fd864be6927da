"""examples/harden_checkpoint.py: hard to quantise, the same function, and the modes and controls react as they should."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from calib import calibrate
from foldkv.auto.sensitivity import measure
from quant.spec import KVSpec, parse_modes, resolve_mode

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples" / "tiny_lm" / "model"
TEXT = ROOT / "examples" / "tiny_lm" / "README.md"


def harden(out: Path, *options: str) -> str:
    script = str(ROOT / "examples" / "harden_checkpoint.py")
    done = subprocess.run(
        [sys.executable, script, str(MODEL), str(out), "--check", str(TEXT), "--windows", "1", *options],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, str]]:
    folder = tmp_path_factory.mktemp("hard")
    made = {
        "spread": harden(folder / "spread", "--spread", "1.5"),
        "bias": harden(folder / "bias", "--qwen2", "--bias", "50", "--spread", "1.5"),
    }
    return {name: (_load(folder / name), said) for name, said in made.items()} | {"plain": (_load(MODEL), "")}


def _load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def text() -> Tensor:
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(MODEL)(TEXT.read_text(), verbose=False)["input_ids"]
    return torch.tensor(ids[:768]).view(3, 256)


def test_the_function_stays(checkpoints: dict[str, tuple[Any, str]], text: Tensor) -> None:
    """Scaling is exact to fp32 rounding, in bf16 weights too; the bias costs what slower pairs cost, and the tool says so."""
    plain = checkpoints["plain"][0]
    base, spread, biased = (checkpoints[name][0](text).logits.log_softmax(-1) for name in ("plain", "spread", "bias"))
    torch.testing.assert_close(spread, base, rtol=1e-3, atol=1e-3)
    kld = float((base.exp() * (base - biased)).sum(-1).mean())
    assert 0 < kld < 5e-3
    assert checkpoints["bias"][0].config.model_type == "qwen2" and plain.config.model_type == "llama"
    said = checkpoints["bias"][1]
    assert "slow pairs: KLD" in said and float(said.split("bias and scales: KLD ")[1].split(",")[0]) < 1e-6
    assert float(checkpoints["spread"][1].split("rewrite: KLD ")[1].split(",")[0]) < 1e-9


def test_modes_hold_and_controls_fail(checkpoints: dict[str, tuple[Any, str]], text: Tensor) -> None:
    """c8 and c8d stay near lossless, c4r usable; what lacks offset, mean or balance does not."""
    c4r = resolve_mode("c4r").k
    no_mean, no_balance = (
        KVSpec(replace(c4r, **{flag: False}), resolve_mode("c16").v) for flag in ("center", "balance")
    )
    good = {"c8": (0, 1e-3), "c8d": (0, 5e-4), "c4r": (0, 4e-2), "c8h": (1e-2, 99), "c4x": (1, 99)}
    limits = {"spread": {**good, "no balance": (3e-2, 99)}, "bias": {**good, "no mean": (5e-2, 99)}}
    for name, wanted in limits.items():
        model = checkpoints[name][0]
        generator = torch.Generator().manual_seed(0)
        scales = calibrate(
            model,
            torch.cat((text, torch.randint(2, 8000, (5, 256), generator=generator))),
            num_samples=8,
            max_seq_len=256,
        )
        custom = {"no mean": no_mean, "no balance": no_balance}
        maps = {mode: parse_modes(custom.get(mode, mode), len(scales.layers)) for mode in wanted}
        figures = measure(model, maps, scales, text[:, :192])
        for mode, (low, high) in wanted.items():
            assert low <= figures[mode]["kld_mean"] <= high, (name, mode, figures[mode]["kld_mean"])
