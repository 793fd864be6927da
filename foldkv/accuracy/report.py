"""`accuracy_report`: run every mode every way, look into it, put the figures together, save them."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from quant.errors import ArgumentError, describe
from quant.scale_files import SCALES_FILE
from quant.scales import KVScales
from quant.spec import CONTROL_MODE

from .assemble import assemble
from .baselines import make_baselines
from .effort import Effort, effort
from .evaluate import Way, make_ways
from .gates import Gate, GateResult, check_gate, evaluate_gate
from .measure import Found, OnResult, extra_paths, measure
from .mode_source import Mode, make_source
from .needle import needle_grid
from .pages import write_files
from .partial import Partial, scales_digest, weights_digest
from .sources import CacheSource
from .stamp import file_sha256, stamp
from .tasks import check_installed, run_tasks
from .windows import Progress, make_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BASE_MODE = "c16"
DEFAULT_MODES = ("c8", "k8v4", "c4")


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
            {"gate": result.gate.text, "value": result.value, "failed": result.failed, "close": result.close}
            for result in self.gates
        ]
        return self.failed_gates

    def save(self, directory: str | os.PathLike[str]) -> list[Path]:
        """Write report.json, report.md and report.html into `directory`, made if missing; each appears whole or not.

        Where an ops.html lies there, the two pages link to each other.
        """
        from .render import to_html, to_markdown

        return write_files(
            directory,
            {
                "report.json": json.dumps(self.data, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
                "report.md": to_markdown(self.data),
                "report.html": to_html(self.data),
            },
        )


def accuracy_report(
    model: PreTrainedModel,
    modes: Sequence[Mode] = DEFAULT_MODES,
    data: str | os.PathLike[str] | Iterable[str] | Tensor | None = None,
    *,
    tokenizer: Any = None,
    scales: KVScales | str | os.PathLike[str] | None = None,
    level: str = "standard",
    num_windows: int | None = None,
    window_len: int | None = None,
    decode_windows: int | None = None,
    decode_len: int | None = None,
    new_tokens: int | None = None,
    baselines: Sequence[str] | None = None,
    tasks: Sequence[str] = (),
    tasks_path: str | os.PathLike[str] | None = None,
    task_limit: int | None = None,
    graphs: bool | None = None,
    seed: int | None = None,
    text_column: str = "text",
    gates: Sequence[Gate] = (),
    setup: dict[str, Any] | None = None,
    work_dir: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    on_result: OnResult = lambda way, mode, figures: None,
) -> AccuracyReport:
    """Measure what cache modes cost a model: KLD to its 16-bit cache, top-1 agreement, perplexity, every way.

    model: in eval mode; float32 keeps the noise floor low. modes: names, `KVSpec`s, `LayerSpecs`, or a `CacheSource` of
        your own; the control `c4x` always runs beside them.
    data: a file or hub data set, strings, or token ids, as `calibrate` takes them; None: text that the model writes itself.
    tokenizer: needed for text. scales: of a calibration, or the folder that holds it.
    level: how much is measured, "quick", "standard" or "full" (`effort`); the sizes below take the place of its own.
    num_windows, window_len: text appended to the cache in one piece. decode_windows, decode_len: text decoded token by
        token, the beginnings of the same windows. 0 windows leave a way out. new_tokens: of greedy continuations.
    baselines: other formats beside ours, see `baselines.BASELINES`; None: the level's, an empty list: none.
    tasks: of lm-evaluation-harness, which must be installed, see `tasks.run_tasks`; tasks_path: a folder of their YAML files;
        task_limit: examples of each.
    graphs: decode our modes through `foldkv.Engine`, where each step is one captured graph; default on a GPU. Greedy texts
        go through it by default on a CPU too, without graphs.
    seed: of text that the model writes; by default one that the calibration did not use. text_column: of a .jsonl file.
    gates: see `gates.parse_gate`. setup: entries of the set-up stamp that the caller knows better ("model", "command").
    work_dir: keep finished runs here, and go on from those of an earlier call that was cut short.
    progress: called with (what is being done, steps done, steps in all); on_result: with way, mode and figures, as they
        come, "noise.split" and "noise.stock" for those of the noise floor.

    The model is restored after each mode, also on an error. Errors: ArgumentError, ScaleFileError, CalibrationError (bad
    data), UnsupportedModelError, each before anything is run where that can be told.
    """
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or float("inf")
    sizes = effort(level).fit(
        limit, windows=num_windows, window_len=window_len, decode_windows=decode_windows, decode_len=decode_len,
        chunked_windows=None if num_windows is None else min(num_windows, effort(level).chunked_windows),
        new_tokens=new_tokens,
    )  # fmt: skip
    ways = make_ways(
        sizes.windows, sizes.window_len, sizes.decode_windows, sizes.decode_len, sizes.chunked_windows,
        model.device.type == "cuda" if graphs is None else graphs,
    )  # fmt: skip
    _check_sizes(model, ways, limit)
    if tasks:
        check_installed()
        if tokenizer is None:
            raise ArgumentError(describe("tasks", "a tokenizer beside them", "none", "pass tokenizer="))
    scales, scales_facts = _load_scales(scales, model)
    base, sources = make_sources(model, modes, scales)
    names = None if baselines is None and sizes.baselines else list(baselines or ())
    others, left_out = make_baselines(names, model, scales, sizes.decode_len if sizes.decode_windows else 0)
    texts = bool(sizes.prompts and sizes.new_tokens) and graphs is not False
    longest = max(sizes.decode_len, sizes.prompt_len + sizes.new_tokens if texts else 0)
    wanted = texts or any(way.graphs for way in ways)
    refused = base.refuses_decode(model, longest) if wanted else None
    if refused is not None:
        if graphs:
            raise ArgumentError(describe("graphs", "a model that foldkv.Engine serves", refused))
        ways, texts = [replace(way, graphs=False) for way in ways], False
        left_out.append(f"foldkv.Engine, which refuses the model: {refused}")
    extras = extra_paths(sizes)
    for gate in gates:
        check_gate(gate, [source.name for source in sources], [way.name for way in ways], extras)
    text = make_text(
        model, tokenizer, data, max(way.windows for way in ways), max(way.length for way in ways),
        seed=seed, scales=scales, text_column=text_column, progress=progress,
    )  # fmt: skip
    facts = stamp(model) | {"scales": scales_facts, "data": text.facts, "seed": text.seed, "level": level}
    facts |= {"ways": [asdict(way) for way in ways], "sizes": asdict(sizes), "left_out": left_out}
    partial = Partial(None if work_dir is None else Path(work_dir), _fingerprint(model, scales, facts, work_dir))
    with warnings.catch_warnings():
        # Said once, as a note of the report.
        warnings.filterwarnings("ignore", message="foldkv: sequences are now longer", category=UserWarning)
        found = measure(
            model, text.ids, base, sources, others, ways, sizes, scales, partial,
            engine=texts, progress=progress, on_result=on_result,
        )  # fmt: skip
        if tokenizer is not None:
            args = (tokenizer, found, partial, [base, *sources])
            _needle(model, *args, limit if sizes.needle else 0)
            _tasks(model, *args, tasks, tasks_path, task_limit)
    facts |= {"resumed": partial.resumed, **(setup or {})}
    result = AccuracyReport(assemble(base, sources, others, found, facts, scales))
    result.check_gates(gates)
    return result


def make_sources(
    model: PreTrainedModel, modes: Sequence[Mode], scales: KVScales | None
) -> tuple[CacheSource, list[CacheSource]]:
    """The base and the sources to compare with it, in order, the control last. ArgumentError for a bad mode."""
    wanted = (*(mode for mode in modes if mode != CONTROL_MODE), CONTROL_MODE)
    sources = [make_source(mode, model, scales) for mode in wanted]
    names = [source.name for source in sources]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ArgumentError(describe("modes", "each one once", f"{twice[0]} twice"))
    return make_source(BASE_MODE, model, scales), sources


def _needle(
    model: PreTrainedModel, tokenizer: Any, found: Found, partial: Partial, sources: Sequence[CacheSource], limit: float
) -> None:
    """Pass keys of every source, up to `limit` tokens; 0: none."""
    for source in sources if limit else ():
        grid = partial.value(
            f"needle-{source.name}",
            lambda source=source: needle_grid(model, tokenizer, source, limit),  # type: ignore[misc]
        )
        found.details.setdefault(source.name, {})["needle"] = grid


def _tasks(
    model: PreTrainedModel,
    tokenizer: Any,
    found: Found,
    partial: Partial,
    sources: Sequence[CacheSource],
    tasks: Sequence[str],
    path: str | os.PathLike[str] | None,
    limit: int | None,
) -> None:
    """Scores of every source in every task."""
    key = f"{','.join(tasks)}-{limit}"
    for source in sources if tasks else ():
        found.details.setdefault(source.name, {})["tasks"] = partial.value(
            f"tasks-{source.name}-{key}",
            lambda source=source: run_tasks(model, tokenizer, source, tasks, include_path=path, limit=limit),  # type: ignore[misc]
        )


def _check_sizes(model: PreTrainedModel, ways: Sequence[Way], limit: float) -> None:
    if model.training:
        raise ArgumentError(describe("model", "one in eval mode", "one in training mode", "call model.eval()"))
    if not ways:
        raise ArgumentError(describe("windows", "at least one, for prefill or for decode", "none"))
    for way in ways:
        if not 2 <= way.length <= limit:
            wanted = f"2 .. {limit} tokens, the model's maximum" if limit < float("inf") else "at least 2 tokens"
            raise ArgumentError(describe(f"length of {way.name} windows", wanted, str(way.length)))


def _fingerprint(
    model: PreTrainedModel, scales: KVScales | None, facts: dict[str, Any], work_dir: object
) -> dict[str, Any]:
    """All that a finished run depends on; dates, commands and names are no part of it."""
    if work_dir is None:
        return {}
    keys = (
        "model_config_sha256",
        "dtype",
        "device_name",
        "kernels",
        "versions",
        "commit",
        "data",
        "seed",
        "ways",
        "sizes",
    )
    digests = {"weights": weights_digest(model), "scales": scales_digest(scales)}
    return {key: facts[key] for key in keys} | digests


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


__all__ = [
    "BASE_MODE", "DEFAULT_MODES", "AccuracyReport", "Effort", "accuracy_report", "make_sources",
]  # fmt: skip
