"""What produced a result: device, versions, commit, date, command."""

from __future__ import annotations

import datetime
import platform
from typing import Any

import torch

from foldkv.commit import running_commit
from foldkv.version import __version__

SCHEMA_VERSION = 1


def stamp(device: str, command: str) -> dict[str, Any]:
    """The head of a result file."""
    return {
        "schema_version": SCHEMA_VERSION,
        "device": device,
        "versions": {"foldkv": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "commit": running_commit() or "unknown",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
    }
