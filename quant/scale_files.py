"""The two files of a calibration: read and written whole, in a pair, or refused.

`kv_cache_config.json` is written last and carries the sha256 of `kv_cache_scales.safetensors` and of itself, so that
files which do not belong together, or were changed, are told apart from those as written.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from .errors import ScaleFileError, describe

SCALES_FILE = "kv_cache_scales.safetensors"
CONFIG_FILE = "kv_cache_config.json"
AGAIN = "calibrate again"


def json_sha256(value: Any) -> str:
    """sha256 of the json of `value`, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_pair(directory: Path, tensors: dict[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write `tensors` and `config` into `directory` (made if missing).

    Both are written beside their places first and then moved by `os.replace`, the config last: an interruption leaves
    the old pair, the new pair, or, between the two moves, a pair that `read_pair` refuses by its hash.
    """
    directory.mkdir(parents=True, exist_ok=True)
    data = save_tensors(tensors)
    stamped = {**config, "scales_sha256": hashlib.sha256(data).hexdigest()}
    stamped["config_sha256"] = json_sha256(stamped)
    text = json.dumps(stamped, indent=2, ensure_ascii=False) + "\n"
    replace_files({directory / SCALES_FILE: data, directory / CONFIG_FILE: text.encode()})


def read_pair(directory: Path, expected: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the config of `directory`, hashes checked.

    expected: entries that the config must have, format version first. Errors: ScaleFileError.
    """
    config = _read_config(directory / CONFIG_FILE, expected)
    path = directory / SCALES_FILE
    data = _read_bytes(path)
    sha256, wanted = hashlib.sha256(data).hexdigest(), str(config.pop("scales_sha256", None))
    if sha256 != wanted:
        got = f"{sha256[:12]}... of {len(data)} bytes"
        fix = f"the file is damaged or was not written with {CONFIG_FILE}; {AGAIN}"
        raise ScaleFileError(describe(str(path), f"sha256 {wanted[:12]}...", got, fix))
    try:
        return load_tensors(data), config
    except (SafetensorError, ValueError, KeyError) as error:
        raise ScaleFileError(describe(str(path), "a safetensors file", str(error), AGAIN)) from error


def _read_config(path: Path, expected: Mapping[str, Any]) -> dict[str, Any]:
    try:
        config = json.loads(_read_bytes(path))
    except ValueError as error:
        raise ScaleFileError(describe(str(path), "json", str(error), AGAIN)) from error
    if not isinstance(config, dict):
        raise ScaleFileError(describe(str(path), "a json object", type(config).__name__, AGAIN))
    for name, wanted in expected.items():
        if config.get(name) != wanted:
            raise ScaleFileError(describe(f"{path} {name}", repr(wanted), repr(config.get(name)), AGAIN))
    own, sha256 = config.pop("config_sha256", None), json_sha256(config)
    if own != sha256:
        fix = f"it was changed after it was written; {AGAIN}"
        raise ScaleFileError(describe(f"{path} config_sha256", sha256, str(own), fix))
    return config


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        fix = "`foldkv calibrate` makes it"
        raise ScaleFileError(describe(str(path), "a readable file", error.strerror or str(error), fix)) from error


def replace_files(files: Mapping[Path, bytes]) -> None:
    """Write every file beside its place, then move them into place in order."""
    suffix = f".{os.getpid()}.{secrets.token_hex(4)}.tmp"
    staged = {path.with_name(f".{path.name}{suffix}"): path for path in files}
    try:
        for temporary, path in staged.items():
            with temporary.open("wb") as file:
                file.write(files[path])
                file.flush()
                os.fsync(file.fileno())
        for temporary, path in staged.items():
            os.replace(temporary, path)
    finally:
        for temporary in staged:
            temporary.unlink(missing_ok=True)
