"""The set-up stamp: what was run, on what, with which versions. Holds no path but those that the user typed."""

from __future__ import annotations

import hashlib
import platform
from datetime import datetime, timezone
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from foldkv.commit import running_commit
from foldkv.doctor import cpu_name
from foldkv.version import __version__
from quant import backend
from quant.scales import model_hash

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def stamp(model: PreTrainedModel) -> dict[str, Any]:
    """Facts about the model, the machine and the software; the caller may know better about "model" and "command"."""
    return {
        "model": Path(model.config.name_or_path).name or type(model).__name__,
        "architecture": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "model_config_sha256": model_hash(model.config),
        "dtype": str(model.dtype).removeprefix("torch."),
        **machine(model.device),
        **software(),
        "command": None,
    }


def machine(device: torch.device) -> dict[str, Any]:
    """Device and kernels."""
    return {
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "kernels": _kernels(device.type),
    }


def software() -> dict[str, Any]:
    """Versions, commit and date."""
    return {
        "versions": {
            "foldkv": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": metadata.version("transformers"),
        },
        "commit": running_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _kernels(device_type: str) -> str:
    """Which code runs the ops on this device."""
    if not backend.has_kernels(device_type):
        return "PyTorch fallback: right, and slow"
    return "compiled" if device_type != "cpu" else f"compiled, {import_module('quant._C').cpu_isa()}"
