"""What foldkv is to reach on an H200, beside the best that other kernels reached there: data only.

Decode attention with 32 query heads, 8 KV heads, head_dim 128 and pages of 64 tokens; microseconds of one layer under CUDA
graph replay, caches out of L2. Classes are the bits of a cached element. Peers: the fastest of FlashInfer 0.6.18 (fa2,
XQA), FlashAttention-3, LMDeploy's Triton kernels, and PaddlePaddle's append attention and its successor.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass

from quant.spec import KVSpec

DEVICE = "NVIDIA H200"
READ_CEILING_GB_PER_S = 4240.0
H_Q, H_KV, HEAD_DIM, PAGE_SIZE = 32, 8, 128, 64
CLASSES = (16, 8, 4)


@dataclass(frozen=True)
class Target:
    """Lengths of a batch with the best peer and the goal, each as microseconds by class; empty where none is known."""

    name: str
    lengths: tuple[int, ...]
    peer_us: Mapping[int, float]
    goal_us: Mapping[int, float]


def _by_class(*figures: float) -> dict[int, float]:
    return dict(zip(CLASSES, figures, strict=True)) if figures else {}


def _uniform(batch: int, seq_len: int, peer: tuple[float, ...], goal: tuple[float, ...]) -> Target:
    return Target(f"{batch} x {seq_len}", (seq_len,) * batch, _by_class(*peer), _by_class(*goal))


def ragged_lengths(count: int = 64, low: int = 128, high: int = 16384, seed: int = 601) -> tuple[int, ...]:
    """Log-uniform lengths. The seed is one whose total, 187772 tokens, fits the times and shares of the peers' run."""
    rng = random.Random(seed)
    return tuple(round(math.exp(rng.uniform(math.log(low), math.log(high)))) for _ in range(count))


DECODE = (
    _uniform(1, 4096, (9.8, 9.7, 12.7), (8.5, 7, 6.5)),
    _uniform(16, 1024, (20.1, 16.6, 30.8), (19, 12.5, 9)),
    _uniform(1, 32768, (41.9, 30.6, 24.8), (38, 22, 14)),
    _uniform(8, 8192, (71.7, 50.3, 45.6), (69, 37, 22)),
    _uniform(1, 131072, (135, 91, 85), (133, 70, 40)),
    _uniform(8, 32768, (254, 168.6, 147.5), (252, 138, 79)),
    _uniform(64, 4096, (254, 158.5, 173.5), (252, 138, 79)),
    _uniform(128, 2048, (255, 136.8, 207.6), (253, 138, 79)),
    _uniform(256, 1024, (265, 145.3, 270.7), (258, 140, 82)),
    _uniform(32, 32768, (974, 497, 520), (975, 497, 290)),
    Target("64 ragged", ragged_lengths(), _by_class(189, 132.9, 142), _by_class(186, 100, 58)),
    Target("32 skewed", (131072, *[4096] * 31), _by_class(258, 166.6, 208), _by_class(256, 141, 80)),
)
# More mixes of lengths, without figures; that of one long sequence is "32 skewed".
MIXES = (
    Target("32 x 128 + 32 x 4096", (128,) * 32 + (4096,) * 32, {}, {}),
    Target("2 x 32768 + 30 x 4096", (32768,) * 2 + (4096,) * 30, {}, {}),
)

# Speculative decode at 64 x 4096, by query tokens. Within 15 % of one token where no figure of its own is set.
SPEC_BATCH, SPEC_LEN, SPEC_SLACK = 64, 4096, 1.15
SPEC_PEER_US: Mapping[int, Mapping[int, float]] = {4: {16: 273, 8: 215}, 8: {16: 274, 8: 218}}
SPEC_GOAL_US: Mapping[int, Mapping[int, float]] = {4: {16: 290, 8: 160, 4: 100}, 8: {16: 290, 8: 160, 4: 100}}

# Prefill, causal, paged: (sequences, new tokens, cached tokens with them) -> TFLOP/s of unmasked work.
PREFILL_PEER_TFLOPS: Mapping[tuple[int, int, int], Mapping[str, float]] = {
    (1, 2048, 8192): {"fa2 fp16": 288, "FA3 bf16": 588, "FA3 fp8": 578},
    (4, 2048, 8192): {"fa2 fp16": 324, "FA3 bf16": 660, "FA3 fp8": 619},
    (1, 2048, 32768): {"fa2 fp16": 320, "FA3 bf16": 670, "FA3 fp8": 578},
    (16, 512, 4096): {"fa2 fp16": 320, "FA3 bf16": 585, "FA3 fp8": 575},
}
PREFILL_FIRST_PEER = "fa2 fp16"  # the rate to reach first
PREFILL_QUANTISED_SHARE = 0.9  # of C16's rate, at 8 and 4 bits

CAPACITY_SLACK = 1.03  # a batch planned for 131072 tokens a sequence, beside the same planned for 4096
DYNAMIC_SLACK: Mapping[int, float] = {16: 1.0, 8: 1.03, 4: 1.08}  # dynamic scales, beside static ones
APPEND_256_US = 6.0
APPEND_COPY_SHARE = 0.8  # prefill append within 25 % of the copy rate
PLAN_256_US = 4.0


def width_class(spec: KVSpec) -> int | None:
    """The class of a mode: 16, 8 or 4; None where K and V differ in width."""
    bits = {spec.k.element.bits, spec.v.element.bits}
    return bits.pop() if len(bits) == 1 and bits <= set(CLASSES) else None


def goal_for(spec: KVSpec, goals: Mapping[int, float]) -> float | None:
    """Microseconds that `spec` is to reach, of goals by class; None where there is none for it."""
    width = width_class(spec)
    if width is None or width not in goals:
        return None
    dynamic = spec.k.is_dynamic or spec.v.is_dynamic
    return goals[width] * (DYNAMIC_SLACK[width] if dynamic else 1.0)
