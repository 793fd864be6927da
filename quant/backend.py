"""Which kernels serve the ops: the compiled extension `quant._C`, or PyTorch where it has none."""

from __future__ import annotations

import importlib
import os
import warnings

import torch

from . import fallback


def _load() -> tuple[str, str]:
    """Load the extension; returns (file, "") or ("", why not)."""
    if os.environ.get("FOLDKV_EXTENSION", "1") == "0":
        return "", "FOLDKV_EXTENSION=0 turns it off"
    try:
        return importlib.import_module("quant._C").__file__ or "", ""
    except ImportError as error:
        return "", str(error)


EXTENSION_FILE, EXTENSION_ERROR = _load()


_pytorch_ops: set[tuple[str, str]] = set()  # (op, dispatch key) that `register` gave a PyTorch implementation


def has_kernels(device_type: str, op: str = "append_attention") -> bool:
    """True where a compiled kernel of `op` serves `device_type`, "cpu" or "cuda"."""
    key = device_type.upper()
    compiled = torch._C._dispatch_has_kernel_for_dispatch_key(f"foldkv::{op}", key)
    return compiled and (op, key) not in _pytorch_ops


def register(library: torch.library.Library) -> None:
    """Give each op of `library` a PyTorch implementation on every device for which the extension has none."""
    if EXTENSION_ERROR and os.environ.get("FOLDKV_EXTENSION") != "0":
        warnings.warn(
            f"foldkv: the compiled extension is not loaded ({EXTENSION_ERROR}), so slow PyTorch ops are used; "
            "`foldkv doctor` tells more, `pip install .` in a checkout builds it",
            stacklevel=2,
        )
    for key in ("CPU", "CUDA"):
        for name, function in fallback.OPS.items():
            if not torch._C._dispatch_has_kernel_for_dispatch_key(f"foldkv::{name}", key):
                library.impl(name, function, key)
                _pytorch_ops.add((name, key))
