"""Build of the one extension, `quant._C` (PyTorch stable ABI, cp310-abi3). The rest of the metadata is in pyproject.toml.

`csrc/bind/*.cpp` sees torch and is compiled by torch's BuildExtension. All other code is torch-free and compiled by a ninja
file of ours into objects that are linked in:

    csrc/cpu/*.cpp          once, baseline flags
    csrc/**/cpu_isa.cpp     once per instruction set, with -DFOLDKV_ISA=plain|avx2|avx512
    csrc/**/*.cu            by nvcc, when it is there; register use goes to build/ptxas.log

Environment: FOLDKV_CUDA=auto|0|1 (1: fail without nvcc), TORCH_CUDA_ARCH_LIST (default "8.0;9.0", the newest also as PTX),
CUDA_HOME, CXX, MAX_JOBS, NVCC_THREADS. ccache is used when it is on the path.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))
from source_hash import source_hash  # noqa: E402

BUILD = Path("build/native")
PTXAS_LOG = Path("build/ptxas.log")

CXX_FLAGS = "-O3 -std=c++17 -fPIC -fvisibility=hidden -ffp-contract=off -Wall -Wextra -Werror=return-type -g0".split()
INCLUDES = ["-Icsrc", "-Iquant"]
ISA_FLAGS = {
    "plain": "",
    "avx2": "-mavx2 -mfma -mf16c",
    # GCC 12 warns about its own intrinsics' headers.
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mavx2 -mfma -mf16c -Wno-uninitialized",
}
X86 = platform.machine().lower() in ("x86_64", "amd64")
ISAS = list(ISA_FLAGS) if X86 else ["plain"]
NVCC_FLAGS = "-O3 -std=c++17 -Xcompiler -fPIC,-fvisibility=hidden,-Wall -Xptxas -v --expt-relaxed-constexpr".split()
TORCH_TARGET = "0x020a000000000000"


@dataclass
class Cuda:
    """The CUDA compiler and what it builds for; `nvcc` is "" where CUDA is off."""

    nvcc: str = ""
    version: str = ""
    library_dir: str = ""
    archs: list[str] = field(default_factory=list)

    @classmethod
    def find(cls) -> Cuda:
        wanted = os.environ.get("FOLDKV_CUDA", "auto")
        if wanted not in ("auto", "0", "1"):
            sys.exit(f"FOLDKV_CUDA: expected auto, 0 or 1, got {wanted!r}")
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        nvcc = (shutil.which("nvcc", path=f"{home}/bin") if home else None) or shutil.which("nvcc")
        nvcc = nvcc or shutil.which("nvcc", path="/usr/local/cuda/bin")
        if wanted == "0" or (nvcc is None and wanted == "auto"):
            return cls()
        if nvcc is None:
            sys.exit(
                "FOLDKV_CUDA=1: expected nvcc on the PATH or in CUDA_HOME, got none; install it or set FOLDKV_CUDA=0"
            )
        dry_run = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True, check=True
        )
        libraries = re.findall(r'"-L([^"]+)"', dry_run.stderr)
        folder = next((path for path in libraries if Path(path, "libcudart_static.a").exists()), None)
        if folder is None:
            sys.exit(f"nvcc: expected libcudart_static.a in one of {libraries}, got none; install the CUDA runtime")
        version = re.search(r"release ([\d.]+)", subprocess.check_output([nvcc, "--version"], text=True))
        listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0").replace(",", ";").replace(" ", ";")
        archs = [arch for arch in listed.split(";") if arch]
        if not any(arch.endswith("+PTX") for arch in archs):
            archs[-1:] = [f"{archs[-1]}+PTX"]
        return cls(nvcc, version[1] if version else "unknown", folder, archs)

    def gencode(self) -> list[str]:
        flags = []
        for arch in self.archs:
            number = arch.removesuffix("+PTX").replace(".", "")
            codes = [f"sm_{number}"] + ([f"compute_{number}"] if arch.endswith("+PTX") else [])
            flags.append(f"-gencode=arch=compute_{number},code=[{','.join(codes)}]")
        return flags


def native_macros(cuda: Cuda) -> list[str]:
    """Macros which csrc/cpu and csrc/bind share: what this build contains."""
    return (["-DFOLDKV_HAS_X86=1"] if X86 else []) + (["-DFOLDKV_HAS_CUDA=1"] if cuda.nvcc else [])


def ninja_file(cuda: Cuda) -> tuple[str, list[Path]]:
    """The text of build.ninja and the objects it makes."""
    launcher = [shutil.which("ccache") or ""]
    cxx = shlex.join([word for word in launcher + shlex.split(os.environ.get("CXX", "c++")) if word])
    nvcc = shlex.join([word for word in [*launcher, cuda.nvcc] if word])
    threads = ["--threads", os.environ.get("NVCC_THREADS", "2")]
    lines = [
        f"builddir = {BUILD}",
        f"cxxflags = {shlex.join([*CXX_FLAGS, *INCLUDES, *native_macros(cuda)])}",
        f"nvccflags = {shlex.join([*NVCC_FLAGS, *INCLUDES, *cuda.gencode(), *threads])}",
        "rule cxx",
        f"  command = {cxx} -MMD -MF $out.d $cxxflags $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule nvcc",
        f"  command = {nvcc} -MD -MF $out.d $nvccflags -c $in -o $out > $out.log 2>&1 || (cat $out.log; exit 1)",
        "  depfile = $out.d",
        "  deps = gcc",
    ]
    objects: list[Path] = []

    def add(rule: str, source: Path, tag: str = "", flags: str = "") -> None:
        output = (BUILD / source).with_suffix(f"{tag}.o")
        objects.append(output)
        lines.append(f"build {output}: {rule} {source}\n  flags = {flags}")

    lines.append(f"build {BUILD / 'build_info.o'}: cxx {BUILD / 'build_info.cpp'}")
    objects.append(BUILD / "build_info.o")
    for source in sorted(Path("csrc/cpu").glob("*.cpp")):
        if source.name != "cpu_isa.cpp":
            add("cxx", source)
    # Plain before avx2 before avx512: of an inline function that several objects hold, the linker keeps the first copy,
    # so code that every machine runs never comes from an object built for a newer one.
    for isa in ISAS:
        for source in sorted(Path("csrc").rglob("cpu_isa.cpp")):
            add("cxx", source, f".{isa}", f"-DFOLDKV_ISA={isa} {ISA_FLAGS[isa]}")
    if cuda.nvcc:
        for source in sorted(Path("csrc").rglob("*.cu")):
            add("nvcc", source, ".cu")
    return "\n".join(lines) + "\n", objects


def write_changed(path: Path, text: str) -> None:
    """Write a file unless it says so already, which would make ninja build again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def build_info(cuda: Cuda, version: str) -> str:
    """C++ source of the facts that `quant._C.build_info()` returns; the compiler adds its own name."""
    facts = {
        "version": version,
        "isas": ISAS,
        "cuda": cuda.version,
        "cuda_archs": cuda.archs,
        "torch_target": TORCH_TARGET,
        "sources": source_hash(ROOT),
    }
    return (
        '#include "bind/build_info.h"\n'
        "#ifdef __clang__\n#define FOLDKV_COMPILER __VERSION__\n#else\n"
        '#define FOLDKV_COMPILER "GCC " __VERSION__\n#endif\n'
        f'const char foldkv_build_info[] = R"({json.dumps(facts)[:-1]}, "compiler": ")" FOLDKV_COMPILER "\\"}}";\n'
    )


def build_native(cuda: Cuda, version: str) -> list[str]:
    """Compile what is out of date, write the register table, return all objects."""
    text, objects = ninja_file(cuda)
    path = BUILD / "build.ninja"
    write_changed(path, text)
    write_changed(BUILD / "build_info.cpp", build_info(cuda, version))
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    subprocess.run([ninja(), "-f", str(path), "-j", jobs], check=True)
    logs = [Path(f"{path}.log") for path in objects if path.name.endswith(".cu.o")]
    PTXAS_LOG.write_text("".join(log.read_text() for log in logs))
    return [str(path) for path in objects]


def ninja() -> str:
    try:
        from ninja import BIN_DIR

        return os.path.join(BIN_DIR, "ninja")
    except ImportError:
        found = shutil.which("ninja")
    return found or sys.exit("build: expected ninja, got none; pip install ninja")


class Build(BuildExtension):
    """torch's BuildExtension, with our own objects compiled first and linked in."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.build_temp = "build/bind"  # the same for in-place, editable and wheel builds, so none starts from nothing

    def build_extensions(self) -> None:
        for extension in self.extensions:
            extension.extra_objects = build_native(CUDA, self.distribution.get_version())
        super().build_extensions()


def extension() -> CppExtension:
    libraries = ["-ldl"]
    if CUDA.nvcc:
        libraries = [f"-L{CUDA.library_dir}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    return CppExtension(
        "quant._C",
        sorted(str(path) for path in Path("csrc/bind").glob("*.cpp")),
        extra_compile_args=[
            *CXX_FLAGS, *native_macros(CUDA), f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
            f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'quant'}", f"-ffile-prefix-map={ROOT}=.",
            *(f"-isystem{path}" for path in include_paths()),  # no warnings about torch's own headers
        ],
        extra_link_args=["-Wl,--exclude-libs,ALL", *libraries],
        py_limited_api=True,
    )  # fmt: skip


os.chdir(ROOT)
CUDA = Cuda.find()
setup(
    ext_modules=[extension()],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
