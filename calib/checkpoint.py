"""Tensors of a safetensors checkpoint by name, one shard open at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from quant.errors import ArgumentError, describe

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"


class Checkpoint:
    """The safetensors files of a folder, sharded or not. `shards`: tensor name -> file name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / INDEX_FILE
        try:
            if index.is_file():
                self.shards: dict[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            else:
                with safe_open(folder / SINGLE_FILE, framework="pt") as file:
                    self.shards = dict.fromkeys(file.keys(), SINGLE_FILE)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            wanted = f"{INDEX_FILE} or {SINGLE_FILE}"
            raise ArgumentError(describe(f"checkpoint {folder}", wanted, str(error).splitlines()[0])) from error

    def load(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors called so, on the CPU. ArgumentError naming the first that is missing or unreadable."""
        wanted = list(names)
        absent = next((name for name in wanted if name not in self.shards), None)
        if absent is not None:
            raise ArgumentError(describe(f"checkpoint {self.folder}", f"a tensor {absent}", "none of that name"))
        found: dict[str, Tensor] = {}
        for shard in sorted({self.shards[name] for name in wanted}):
            try:
                with safe_open(self.folder / shard, framework="pt") as file:
                    found |= {name: file.get_tensor(name) for name in wanted if self.shards[name] == shard}
            except (OSError, SafetensorError) as error:
                got = str(error).splitlines()[0]
                raise ArgumentError(describe(str(self.folder / shard), "a whole safetensors file", got)) from error
        return found
