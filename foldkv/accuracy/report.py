"""`accuracy_report`: run every mode both ways, put the figures together, save them."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from quant.errors import ArgumentError, describe
from quant.scale_files import SCALES_FILE
from quant.scales import KVScales
from quant.spec import CONTROL_MODE, KVSpec, LayerSpecs, parse_modes

from .assemble import assemble
from .evaluate import Way, evaluate, make_ways, total_tokens
from .gates import Gate, GateResult, check_gate, evaluate_gate
from .metrics import TokenScores
from .probe import Probe, probe
from .sources import CacheSource, ModeSource
from .stamp import file_sha256, stamp
from .summary import summarise
from .windows import Progress, make_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BASE_MODE = "c16"
DEFAULT_MODES = ("c8", "k8v4", "c4")
NUM_WINDOWS, WINDOW_LEN, DECODE_WINDOWS, DECODE_LEN = 8, 512, 8, 256

Mode = str | KVSpec | LayerSpecs | CacheSource


@dataclass
class AccuracyReport:
    """What a report found. `data` is report.json as it is written; `gates` what the gates came to."""

    data: dict[str, Any]
    gates: list[GateResult] = field(default_factory=list)

    @property
    def trusted(self) -> bool:
        """Every check of the harness held, the failing control's among them."""
        return self.data["verdict"]["trusted"]

    @property
    def failed_gates(self) -> list[GateResult]:
        return [result for result in self.gates if result.failed]

    def check_gates(self, gates: Sequence[Gate]) -> list[GateResult]:
        """Hold `gates` against the figures; they become part of the report. Returns those that failed."""
        self.gates = [evaluate_gate(gate, self.data) for gate in gates]
        self.data["gates"] = [
            {"gate": result.gate.text, "value": result.value, "failed": result.failed} for result in self.gates
        ]
        return self.failed_gates

    def save(self, directory: str | os.PathLike[str]) -> list[Path]:
        """Write report.json, report.md and report.html into `directory`, made if missing; each appears whole or not."""
        from .render import to_html, to_markdown

        contents = {
            "report.json": json.dumps(self.data, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
            "report.md": to_markdown(self.data),
            "report.html": to_html(self.data),
        }
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        written = []
        for name, text in contents.items():
            temporary = folder / f".{name}.{os.getpid()}.tmp"
            try:
                temporary.write_text(text, encoding="utf-8")
                os.replace(temporary, folder / name)
            finally:
                temporary.unlink(missing_ok=True)
            written.append(folder / name)
        return written


def accuracy_report(
    model: PreTrainedModel,
    modes: Sequence[Mode] = DEFAULT_MODES,
    data: str | os.PathLike[str] | Iterable[str] | Tensor | None = None,
    *,
    tokenizer: Any = None,
    scales: KVScales | str | os.PathLike[str] | None = None,
    num_windows: int = NUM_WINDOWS,
    window_len: int = WINDOW_LEN,
    decode_windows: int = DECODE_WINDOWS,
    decode_len: int = DECODE_LEN,
    seed: int | None = None,
    text_column: str = "text",
    gates: Sequence[Gate] = (),
    setup: dict[str, Any] | None = None,
    progress: Progress | None = None,
    on_result: Callable[[str, str, dict[str, Any]], None] = lambda way, mode, figures: None,
) -> AccuracyReport:
    """Measure what cache modes cost a model: KLD to its 16-bit cache, top-1 agreement, perplexity, both ways.

    model: in eval mode; float32 keeps the noise floor low. modes: names, `KVSpec`s, `LayerSpecs`, or a `CacheSource` of
        your own; the control `c4x` always runs beside them.
    data: a file or hub data set, strings, or token ids, as `calibrate` takes them; None: text that the model writes itself.
    tokenizer: needed for text. scales: of a calibration, or the folder that holds it.
    num_windows, window_len: text appended to the cache in one piece. decode_windows, decode_len: text decoded token by
        token, the beginnings of the same windows. 0 windows leave a way out.
    seed: of text that the model writes; by default one that the calibration did not use. text_column: of a .jsonl file.
    gates: see `gates.parse_gate`. setup: entries of the set-up stamp that the caller knows better ("model", "command").
    progress: called with (what is being done, steps done, steps in all); on_result: with way, mode and figures, as they
        come, "noise.split" and "noise.stock" for those of the noise floor.

    The model is restored after each mode, also on an error. Errors: ArgumentError, ScaleFileError, CalibrationError (bad
    data), UnsupportedModelError, each before anything is run where that can be told.
    """
    ways = make_ways(num_windows, window_len, decode_windows, decode_len)
    _check_sizes(model, ways)
    scales, scales_facts = _load_scales(scales, model)
    base, sources = make_sources(model, modes, scales)
    for gate in gates:
        check_gate(gate, [source.name for source in sources], [way.name for way in ways])
    text = make_text(
        model, tokenizer, data, max(way.windows for way in ways), max(way.length for way in ways),
        seed=seed, scales=scales, text_column=text_column, progress=progress,
    )  # fmt: skip
    done, total = 0, total_tokens(ways, len(sources))

    def advance(tokens: int) -> None:
        nonlocal done
        done += tokens
        if progress is not None:
            progress("measuring", done, total)

    runs: dict[str, dict[str, TokenScores]] = {}
    probes: dict[str, dict[str, Probe]] = {source.name: {} for source in (base, *sources)}
    with warnings.catch_warnings():
        # Said once, as a note of the report.
        warnings.filterwarnings("ignore", message="foldkv: sequences are now longer", category=UserWarning)
        for way in ways:
            for source in (base, *sources):
                if source.kernels:
                    probes[source.name][way.name] = _probe(model, source, way, text.ids)
            runs[way.name] = evaluate(
                model, text.ids, way, base, sources, advance=advance,
                on_result=lambda way, run, scores: on_result(way, run, summarise(scores)),
            )  # fmt: skip
    facts = stamp(model) | {"scales": scales_facts, "data": text.facts, "seed": text.seed}
    facts |= {"ways": [asdict(way) for way in ways], **(setup or {})}
    result = AccuracyReport(assemble(base, sources, runs, probes, facts, scales))
    result.check_gates(gates)
    return result


def make_sources(
    model: PreTrainedModel, modes: Sequence[Mode], scales: KVScales | None
) -> tuple[CacheSource, list[CacheSource]]:
    """The base and the sources to compare with it, in order, the control last. ArgumentError for a bad mode."""
    float_codec = "bf16" if model.dtype == torch.bfloat16 else "fp16"
    num_layers = model.config.get_text_config(decoder=True).num_hidden_layers

    def source(mode: Mode) -> CacheSource:
        if isinstance(mode, CacheSource):
            return mode
        specs = parse_modes(mode, num_layers, float_codec, scales.plan if scales else None)
        if scales is None and specs.needs_scales:
            fix = "calibrate the model first: foldkv calibrate MODEL"
            raise ArgumentError(describe(f"mode {specs.name}", "the scales of a calibration", "none", fix))
        return ModeSource(mode if isinstance(mode, str) else specs.name, specs, scales)

    sources = [source(mode) for mode in (*(mode for mode in modes if mode != CONTROL_MODE), CONTROL_MODE)]
    names = [source.name for source in sources]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ArgumentError(describe("modes", "each one once", f"{twice[0]} twice"))
    return source(BASE_MODE), sources


def _check_sizes(model: PreTrainedModel, ways: Sequence[Way]) -> None:
    if model.training:
        raise ArgumentError(describe("model", "one in eval mode", "one in training mode", "call model.eval()"))
    if not ways:
        raise ArgumentError(describe("windows", "at least one, for prefill or for decode", "none"))
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or float("inf")
    for way in ways:
        if not 2 <= way.length <= limit:
            wanted = f"2 .. {limit} tokens, the model's maximum" if limit < float("inf") else "at least 2 tokens"
            raise ArgumentError(describe(f"length of {way.name} windows", wanted, str(way.length)))


def _probe(model: PreTrainedModel, source: CacheSource, way: Way, ids: Tensor) -> Probe:
    """Three passes the way's way over the beginning of the first window: 3 tokens, or 3 whole beginnings."""
    length = min(way.length, 3 if way.chunk == 1 else 48)
    return probe(model, source, ids[:1, :length], min(way.chunk, length))


def _load_scales(
    scales: KVScales | str | os.PathLike[str] | None, model: PreTrainedModel
) -> tuple[KVScales | None, dict[str, Any] | None]:
    """The scales, and what the report says of them."""
    if scales is None:
        return None, None
    digest = None
    if not isinstance(scales, KVScales):
        digest = file_sha256(Path(scales) / SCALES_FILE) if (Path(scales) / SCALES_FILE).is_file() else None
        scales = KVScales.load(scales, model.config)
    return scales, {"calibrated_len": scales.calibrated_len, "sha256": digest}
