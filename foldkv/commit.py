"""Which commit of foldkv is running, for the stamps of reports and benchmarks."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def running_commit() -> str | None:
    """The commit of the checkout that foldkv runs from, marked where files differ from it; None for an installed package.

    FOLDKV_COMMIT says it for a copy without its history.
    """
    if named := os.environ.get("FOLDKV_COMMIT"):
        return named
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    words = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=10, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
