"""A hash of the native sources. The extension carries it, so that a stale build is told from a fresh one."""

from __future__ import annotations

import hashlib
from pathlib import Path


def source_hash(root: Path) -> str:
    """16 hex digits over the names and contents of all that goes into the extension."""
    digest = hashlib.sha256()
    files = [path for path in (root / "csrc").rglob("*") if path.suffix in (".h", ".cuh", ".cpp", ".cu")]
    for path in sorted([*files, root / "quant/codecs.def", root / "setup.py"]):
        digest.update(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    print(source_hash(Path(__file__).resolve().parents[1]))
