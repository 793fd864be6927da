"""What produced a result: device, versions, commit, date, command."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from foldkv.version import __version__

SCHEMA_VERSION = 1


def commit() -> str:
    """The commit of this checkout, marked where files differ from it. FOLDKV_COMMIT says it for a copy without its history."""
    if named := os.environ.get("FOLDKV_COMMIT"):
        return named
    root = Path(__file__).resolve().parents[2]
    try:
        words = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def stamp(device: str, command: str) -> dict[str, Any]:
    """The head of a result file."""
    return {
        "schema_version": SCHEMA_VERSION,
        "device": device,
        "versions": {"foldkv": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
    }
