"""Results kept as they come, so that a report cut short goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from quant.scale_files import SCALES_FILE

from .metrics import TokenScores

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from quant.scales import KVScales

FOLDER = ".partial"
_SAMPLE = 4096

T = TypeVar("T")


class Partial:
    """Finished runs in a folder, each file written whole or not at all; `folder` None keeps nothing.

    The folder is named by a fingerprint of all that a result depends on, so a run of another model, text, size or version
    starts anew. resumed: how many results were found.
    """

    def __init__(self, folder: Path | None, facts: Mapping[str, Any]) -> None:
        text = json.dumps(facts, sort_keys=True, default=str)
        self.folder = None if folder is None else folder / FOLDER / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.root = folder
        self.resumed = 0
        self._made: set[Path] = set()

    def scores(self, way: str, runs: list[str]) -> dict[str, TokenScores]:
        """The runs of a way that are finished."""
        found = {}
        for run in runs:
            path = self._path(f"{way}-{run}", "npz")
            if path is not None and path.is_file():
                with np.load(path) as arrays:
                    found[run] = TokenScores(*(torch.from_numpy(arrays[field.name]) for field in fields(TokenScores)))
                self.resumed += 1
        return found

    def keep_scores(self, way: str, run: str, scores: TokenScores) -> None:
        """Keep one run."""
        path = self._path(f"{way}-{run}", "npz")
        if path is not None and not path.is_file():
            arrays: dict[str, Any] = {field.name: getattr(scores, field.name).numpy() for field in fields(TokenScores)}
            self._write(path, lambda temporary: np.savez(temporary, **arrays))

    def value(self, key: str, make: Callable[[], T]) -> T:
        """What `make` gives, JSON: taken from the folder where it is there, else made and kept."""
        path = self._path(key, "json")
        if path is not None and path.is_file():
            self.resumed += path not in self._made
            return json.loads(path.read_text(encoding="utf-8"))
        made = make()
        if path is not None:
            self._write(path, lambda temporary: temporary.write_text(json.dumps(made), encoding="utf-8"))
        return made

    def clear(self) -> None:
        """Forget everything, once the report is written."""
        if self.root is not None:
            shutil.rmtree(self.root / FOLDER, ignore_errors=True)

    def _path(self, key: str, ending: str) -> Path | None:
        if self.folder is None:
            return None
        digest = hashlib.sha256(key.encode()).hexdigest()[:8]
        plain = "".join(c if c.isalnum() or c in "-._" else "_" for c in key)[:80]
        return self.folder / f"{plain}-{digest}.{ending}"

    def _write(self, path: Path, write: Callable[[Path], object]) -> None:
        self._made.add(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{os.getpid()}.{path.name}")
        try:
            write(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def weights_digest(model: PreTrainedModel) -> str:
    """sha256 over the first values of every parameter: tells models of one shape apart, and costs nothing."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        sample = parameter.detach().flatten()[:_SAMPLE].float().cpu().numpy()
        digest.update(name.encode() + sample.tobytes())
    return digest.hexdigest()


def scales_digest(scales: KVScales | None) -> str | None:
    """sha256 of the statistics of all layers, as their file would hold them."""
    if scales is None:
        return None
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        scales.save(Path(folder) / "kv_cache")
        return hashlib.sha256((Path(folder) / "kv_cache" / SCALES_FILE).read_bytes()).hexdigest()
