"""What was built, what runs on this machine, and why not: the facts behind `foldkv doctor`."""

from __future__ import annotations

import json
import os
import platform
import warnings
from dataclasses import asdict, dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from foldkv.version import __version__

PACKAGES = ("torch", "transformers", "numpy", "safetensors")


@dataclass
class Device:
    """One device: what it is, and for each op whether "compiled" kernels or "pytorch" serve it."""

    name: str
    description: str
    ops: dict[str, str]
    check: str  # "ok", or what went wrong when a page was copied on it


@dataclass
class Diagnosis:
    """All that `foldkv doctor` knows. `notes` are sentences: what is not as it could be, why, and what to do."""

    versions: dict[str, str]
    extension: str  # the file, "" where it is not loaded
    build: dict[str, Any]  # quant._C.build_info(): isas, cuda, cuda_archs, compiler, ...
    cpu_isa: str  # the instruction set in use, "" without the extension
    cpu_isa_forced: str  # the environment variable FOLDKV_ISA
    devices: list[Device] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def diagnose() -> Diagnosis:
    """Look at this machine; loads torch and the extension. Never raises for what it is to report."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the missing extension is among the notes
        from quant import backend, ops
    versions = {"foldkv": __version__, "python": platform.python_version(), "platform": platform.platform()}
    versions |= {name: _package_version(name) for name in PACKAGES} | {"torch": torch.__version__}
    found = Diagnosis(versions, backend.EXTENSION_FILE, {}, "", os.environ.get("FOLDKV_ISA", ""))
    if backend.EXTENSION_FILE:
        extension = import_module("quant._C")
        found.build = json.loads(extension.build_info())
        found.cpu_isa = extension.cpu_isa()
        if not found.cpu_isa:
            found.notes.append(
                f"FOLDKV_ISA: expected one of {', '.join(found.build['isas'])} that this CPU runs, got "
                f"{found.cpu_isa_forced!r}; unset it or name another"
            )
    else:
        found.notes.append(
            f"the extension is not loaded ({backend.EXTENSION_ERROR}): slow PyTorch ops serve all devices; "
            "run `pip install .` in a checkout"
        )
    devices = [(torch.device("cpu"), cpu_name())]
    if torch.cuda.is_available():
        devices += [(torch.device("cuda", i), torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count())]
    else:
        found.notes.append(_why_no_cuda())
    for device, description in devices:
        served = {name: "compiled" if backend.has_kernels(device.type, name) else "pytorch" for name in ops.SCHEMAS}
        if device.type == "cuda":
            capability = torch.cuda.get_device_capability(device)
            description += f", sm_{capability[0]}{capability[1]}"
            found.notes += _cuda_notes(str(device), capability, found.build)
        found.devices.append(Device(str(device), description, served, _copy_a_page(device)))
    return found


def runs_on(archs: list[str], capability: tuple[int, int]) -> bool:
    """True if code built for `archs` ("8.0", "9.0a", "9.0+PTX") runs on a GPU of this compute capability."""
    for arch in archs:
        number = arch.removesuffix("+PTX")
        if number.endswith(("a", "f")):  # this very architecture, or this family
            if number[:-1] == f"{capability[0]}.{capability[1]}":
                return True
            continue
        major, minor = map(int, number.split("."))
        same_major = major == capability[0] and minor <= capability[1]
        if same_major or (arch.endswith("+PTX") and (major, minor) <= capability):
            return True
    return False


def _cuda_notes(name: str, capability: tuple[int, int], build: dict[str, Any]) -> list[str]:
    archs = build.get("cuda_archs", [])
    if not build or runs_on(archs, capability):
        return []
    wanted = f"{capability[0]}.{capability[1]}"
    if not archs:
        return [f"{name}: the extension has no CUDA kernels, as there was no nvcc at build time; build it with nvcc"]
    return [f"{name}: built for {', '.join(archs)}, not for {wanted}; build with TORCH_CUDA_ARCH_LIST={wanted}"]


def _why_no_cuda() -> str:
    import torch

    if torch.version.cuda is None:
        return f"no CUDA: this PyTorch ({torch.__version__}) is built without it"
    return f"no CUDA: PyTorch is built for CUDA {torch.version.cuda}, but finds no GPU or no driver for it"


def _copy_a_page(device: Any) -> str:
    """Run one op for real: a build for the wrong architecture or driver shows only there."""
    import torch

    try:
        pool = torch.arange(64, dtype=torch.uint8, device=device).view(2, 1, 32)
        ids = torch.tensor([[1], [0]], device=device)
        torch.ops.foldkv.copy_pages(pool, ids[0], ids[1])
        return "ok" if torch.equal(pool[0], pool[1]) else "a copied page differs from its source"
    except RuntimeError as error:
        return str(error).splitlines()[0]


def cpu_name() -> str:
    """Model name of the CPU and how many hardware threads this process may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} threads"


def _package_version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
