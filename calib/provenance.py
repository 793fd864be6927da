"""What a calibration file says of its origin: weights, versions, date."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def weight_index_hash(name_or_path: str) -> str | None:
    """sha256 of a checkpoint's weight index, or of its safetensors headers; None where neither is on this machine.

    name_or_path: a local folder, or a hub id whose files are in the cache.
    """
    digest = hashlib.sha256()
    index = _find(name_or_path, _INDEX)
    if index is not None:
        digest.update(index.read_bytes())
        return digest.hexdigest()
    parts = list(_headers(name_or_path))
    for header in parts:
        digest.update(header)
    return digest.hexdigest() if parts else None


def _find(name_or_path: str, name: str) -> Path | None:
    if not name_or_path:
        return None
    if Path(name_or_path).is_dir():
        path = Path(name_or_path) / name
        return path if path.is_file() else None
    try:
        cached = try_to_load_from_cache(name_or_path, name)
    except ValueError:
        return None
    return Path(cached) if isinstance(cached, str) else None


def _headers(name_or_path: str) -> Iterator[bytes]:
    """The headers (names, shapes, offsets) of the safetensors files, each behind its 8-byte length."""
    single = _find(name_or_path, _SINGLE)
    folder = Path(name_or_path)
    files = [single] if single else sorted(folder.glob("*.safetensors")) if name_or_path and folder.is_dir() else []
    for path in files:
        with path.open("rb") as file:
            yield file.read(int.from_bytes(file.read(8), "little"))


def versions() -> dict[str, str]:
    """Versions of what takes part."""
    found = {"python": platform.python_version()}
    for name in ("foldkv", "torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
