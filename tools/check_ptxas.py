"""Print what nvcc says of each kernel's registers, and fail where one spills or keeps an array in local memory.

Usage: python tools/check_ptxas.py build/ptxas.log
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


class Kernel(NamedTuple):
    """One kernel for one architecture; all but the registers in bytes."""

    name: str
    arch: str
    registers: int
    shared: int
    stack: int
    stores: int
    loads: int


def parse(log: str) -> list[Kernel]:
    """The kernels in the output of `nvcc -Xptxas -v`."""
    kernels = []
    for part in re.split(r"(?=ptxas info\s+: Compiling entry function)", log)[1:]:
        entry, memory, used = ENTRY.search(part), MEMORY.search(part), USED.search(part)
        if entry is None or memory is None or used is None:
            raise ValueError(f"ptxas log: expected a kernel's registers and stack, got {part[:200]!r}")
        shared = SHARED.search(part)
        sizes = map(int, memory.groups())
        kernels.append(Kernel(entry[1], entry[2], int(used[1]), int(shared[1]) if shared else 0, *sizes))
    return sorted(kernels)


def demangle(names: list[str]) -> list[str]:
    """Readable names, cut at the argument list; as they are where there is no c++filt."""
    if shutil.which("c++filt") is None:
        return names
    text = subprocess.run(["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [name.replace("(anonymous namespace)::", "").removeprefix("void ") for name in text.splitlines()]


def main() -> int:
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "build/ptxas.log")
    kernels = parse(path.read_text(encoding="utf-8"))
    if not kernels:
        print(f"{path}: expected kernels, got none; build with nvcc first")
        return 1
    print(f"{'registers':>9} {'shared':>7} {'stack':>6} {'spills':>7}  arch    kernel")
    bad = 0
    for kernel, name in zip(kernels, demangle([kernel.name for kernel in kernels]), strict=True):
        spills = kernel.stores + kernel.loads
        verdict = "  <- spills or local memory" if spills or kernel.stack else ""
        bad += bool(verdict)
        print(f"{kernel.registers:9} {kernel.shared:7} {kernel.stack:6} {spills:7}  {kernel.arch:7} {name}{verdict}")
    print(f"{len(kernels)} kernels, {bad} with spills or local memory")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
