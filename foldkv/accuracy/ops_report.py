"""The ops alone: what a mode's kernels and what its bits add to the error of attention, while a captured step replays.

Three errors of the same outputs, each over the rows of a step, as RMS of the difference over RMS of the truth:

total       op on the cache - fp64 attention over unquantised K and V
quantised   fp64 attention over quantised and dequantised K and V (`quant.reference`) - the same
kernel      op on the cache - fp64 attention over quantised and dequantised K and V

Plain PyTorch over the same dequantised K and V is the kernel's yardstick: in the queries' precision for float formats, in 16
bits for integer ones, whose kernels take 16-bit operands on every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quant import reference
from quant.pages import LayerPages, PagedTensor
from quant.scales import KVScales
from quant.spec import KVSpec, resolve_mode

from . import ops_bands, ops_cases
from .emulate import format_codec
from .ops_bands import Tally, outside_bands
from .ops_cases import Data, Shape
from .ops_harness import Step, schedule
from .stamp import machine, software

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCHEMA_VERSION = 1
BASE_MODE = "c16"
SEQUENCES = 3

TOKENS = {"quick": 300, "standard": 800, "full": 2400}
NUM_SHAPES = {"quick": 1, "standard": 2, "full": len(ops_cases.SHAPES)}


@dataclass(frozen=True)
class OpsReport:
    """What an op-level report found; `data` is ops.json as it is written."""

    data: dict[str, Any]

    @property
    def ok(self) -> bool:
        """Every case within every band."""
        return not self.data["outside"]

    def save(self, directory: Any) -> list[Any]:
        """Write ops.json, ops.md and ops.html into `directory`; each appears whole or not."""
        import json

        from .ops_render import to_html, to_markdown
        from .pages import write_files

        text = json.dumps(self.data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        contents = {"ops.json": text, "ops.md": to_markdown(self.data), "ops.html": to_html(self.data)}
        return write_files(directory, contents)


@torch.inference_mode()
def ops_report(
    modes: Sequence[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    level: str = "standard",
    model: PreTrainedModel | None = None,
    ids: Tensor | None = None,
    scales: KVScales | None = None,
    setup: dict[str, Any] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> OpsReport:
    """Measure the ops of these modes on synthetic data and, with a model, on what its attention was given.

    modes: names. dtype: of queries, K and V as given and outputs; default fp32 on a CPU, fp16 on a GPU. ids: int64 text
    `[sequences, tokens]` for the model, with its scales. Errors: ArgumentError for an unknown mode or level.
    """
    device = torch.device(device)
    dtype = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
    cases: list[tuple[Shape, Data]] = []
    for shape in ops_cases.SHAPES[: NUM_SHAPES[level]]:
        cases += [(shape, ops_cases.synthetic(name, shape, SEQUENCES, TOKENS[level])) for name in ops_cases.SYNTHETIC]
    if model is not None and ids is not None and scales is not None:
        cases += [(ops_cases.shape_of(data), data) for data in ops_cases.captured(model, ids[:SEQUENCES], scales)]
    codec = "bf16" if dtype == torch.bfloat16 else "fp16"
    specs = {mode: resolve_mode(mode, codec) for mode in dict.fromkeys([BASE_MODE, *modes])}
    rows: list[dict[str, Any]] = []
    for n, (shape, data) in enumerate(cases):
        rows += _run_case(specs, shape, data, dtype, device)
        if progress is not None:
            progress("replaying", n + 1, len(cases))
    outside = [f"{row['mode']}, {row['data']}, {row['shape']}: {text}" for row in rows for text in row["outside"]]
    return OpsReport({
        "schema_version": SCHEMA_VERSION,
        "cases": rows,
        "outside": outside,
        "bands": {
            "kernel": ops_bands.KERNEL_BAND, "lse": ops_bands.LSE_BAND, "sum": ops_bands.SUM_BAND,
            "steps": ops_bands.STEP_BAND,
        },
        "setup": {**machine(device), **software(), "dtype": str(dtype).removeprefix("torch."), "level": level,
                  "graph": device.type == "cuda", "command": None, **(setup or {})},
    })  # fmt: skip


def _run_case(
    specs: dict[str, KVSpec], shape: Shape, data: Data, dtype: torch.dtype, device: torch.device
) -> list[dict[str, Any]]:
    steps = {mode: Step(spec, shape, data, dtype, device) for mode, spec in specs.items()}
    # What the ops are given: rows rounded to the dtype of the queries.
    q, k, v = (x.to(device).to(dtype).double() for x in (data.q, data.k, data.v))
    dequantised = {
        mode: tuple(_through(part, x, dtype) for part, x in ((step.pages.k, k), (step.pages.v, v)))
        for mode, step in steps.items()
    }
    tallies = {mode: Tally() for mode in specs}
    replays = 0
    for lengths, new, measured in schedule(data.k.shape[0], data.k.shape[1], shape.page_size):
        for step in steps.values():
            step.load(lengths, new)
            if replays:
                step.replay()
            else:
                step.capture()
        replays += 1
        if not measured:
            continue
        for b, length in enumerate(lengths):
            if new[b]:
                _measure(steps, dequantised, tallies, b, length, (q, k, v))
    return [_row(mode, specs[mode], steps[mode], tallies[mode], dequantised[mode], (k, v), replays) for mode in specs]


def _through(part: PagedTensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """fp64 `[n, tokens, h, d]` that a cache of this format gives back for rows of `dtype`."""
    codec = format_codec(part.fmt, part.params, part.shaping)
    return codec(x.to(dtype).transpose(1, 2)).transpose(1, 2).double()


def _measure(
    steps: dict[str, Step],
    dequantised: dict[str, tuple[Tensor, ...]],
    tallies: dict[str, Tally],
    b: int,
    length: int,
    rows: tuple[Tensor, Tensor, Tensor],
) -> None:
    q, k, v = (x[b, :length] for x in rows)
    fp16 = None
    for mode, step in steps.items():
        at = step.rows(b)
        query = q[length - (at.stop - at.start) :]
        out, lse, tally = step.out[at], step.lse[at], tallies[mode]
        k_got, v_got = (x[b, :length] for x in dequantised[mode])
        truth, _ = reference.attention(query, k, v)
        want, want_lse = reference.attention(query, k_got, v_got)
        plain, plain_lse = _plain(query, k_got, v_got, step.yardstick)
        fp16 = out.double() if fp16 is None else fp16
        tally.nonfinite += int((~torch.isfinite(out)).sum())
        for kind, got, goal in (
            ("total", out, truth), ("quantised", want, truth), ("kernel", out, want), ("plain", plain, want),
            ("vs_fp16", out, fp16),
        ):  # fmt: skip
            tally.add(length, kind, got.double(), goal)
        tally.lse = max(tally.lse, float((lse - want_lse).abs().max()))
        tally.plain_lse = max(tally.plain_lse, float((plain_lse - want_lse).abs().max()))
        tally.lengths.add(length)


def _plain(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Attention as PyTorch does it: operands in `dtype`, softmax in fp32; the reference's own walk in that precision."""
    q, k, v = (x.to(dtype) for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    logits = torch.einsum("qhd,khd->hqk", q, k).float() / math.sqrt(q.shape[-1])
    place = torch.arange(k.shape[0], device=q.device)
    logits = logits.masked_fill(place > (place[-len(q) :, None]), -math.inf)
    out = torch.einsum("hqk,khd->qhd", logits.softmax(-1).to(dtype), v)
    return out.double(), logits.logsumexp(-1).transpose(0, 1).double()


def _row(
    mode: str,
    spec: KVSpec,
    step: Step,
    tally: Tally,
    dequantised: tuple[Tensor, ...],
    exact: tuple[Tensor, Tensor],
    replays: int,
) -> dict[str, Any]:
    kinds = {kind: errors.to_json() for kind, errors in tally.kinds.items()}
    in_steps = {
        name: _in_steps(fmt, part.params, x, got)
        for name, fmt, part, x, got in zip(
            "kv", (spec.k, spec.v), (step.pages.k, step.pages.v), exact, dequantised, strict=True
        )
    }
    row = {
        "mode": mode, "data": step.data.name, "shape": str(step.shape), **asdict(step.shape),
        "bits_per_element": spec.bits_per_element(step.shape.d), "replays": replays,
        "longest": max(tally.lengths), "lengths": len(tally.lengths), **kinds, "lse": tally.lse,
        "plain_lse": tally.plain_lse, "nonfinite": tally.nonfinite, "wrong_bytes": wrong_bytes(step),
        "steps": in_steps,
        "by_length": [{"begin": begin, **{kind: x.rms for kind, x in found.items()}}
                      for begin, found in sorted(tally.buckets.items())],
    }  # fmt: skip
    return row | {"outside": outside_bands(row, spec, step.yardstick)}


def wrong_bytes(step: Step) -> int:
    """Bytes of K, V and their scale data that are not those which the reference writes for the whole sequences."""
    wanted = _reference_pages(step)
    return sum(
        int((a != b).sum())
        for mine, theirs in ((step.pages.k, wanted.k), (step.pages.v, wanted.v))
        for a, b in ((mine.codes, theirs.codes), (mine.meta, theirs.meta))
    )


def _reference_pages(step: Step) -> LayerPages:
    """Pages as the step's, written by the reference with every token of every sequence."""
    k, v = (
        PagedTensor(part.fmt, torch.zeros_like(part.codes), torch.zeros_like(part.meta), *part.constants)
        for part in (step.pages.k, step.pages.v)
    )
    pages = LayerPages(k, v, step.pages.page_size, step.pages.head_dim)
    tokens, size = step.data.k.shape[1], step.shape.page_size
    position = torch.arange(tokens)
    for b in range(step.count):
        slots = (step.table[b].long()[position // size] * size + position % size).to(step.device)
        k_rows, v_rows = (x[b].to(step.device, step.dtype) for x in (step.data.k, step.data.v))
        reference.append_kv(pages, k_rows, v_rows, slots)
    return pages


def _in_steps(fmt: Any, params: Tensor, x: Tensor, got: Tensor) -> float | None:
    """RMS error of an integer format in its own quantisation steps; None for a float one, or a balanced or rotated one."""
    if not fmt.element.is_integer or fmt.balance or fmt.rotate:
        return None
    rows = x.flatten(0, 1).float()
    _, scale, _ = reference.quantize(rows, fmt, params)
    return float(((got.flatten(0, 1) - rows.double()) / scale.double()).square().mean().sqrt())
