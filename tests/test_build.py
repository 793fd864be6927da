"""The extension as built, `foldkv doctor`, and the command line as a whole."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from foldkv.doctor import diagnose, runs_on
from foldkv.version import __version__
from quant import backend, ops

ROOT = Path(__file__).resolve().parents[1]
built = pytest.mark.skipif(not backend.EXTENSION_FILE, reason=f"no extension: {backend.EXTENSION_ERROR}")


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}
    )


def foldkv(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run("-m", "foldkv", *arguments, **environment)


@built
def test_extension_is_abi3() -> None:
    assert re.fullmatch(r"_C\.abi3\.(so|pyd)", Path(backend.EXTENSION_FILE).name)


@built
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_extension_needs_only_the_stable_abi() -> None:
    symbols = subprocess.check_output(["nm", "-D", backend.EXTENSION_FILE], text=True).split()
    mangled = [name for name in symbols if re.match(r"_Z.*(2at|3c10|5torch)", name)]
    assert not mangled
    assert "torch_library_impl" in symbols
    assert "PyInit__C" in symbols
    private = [name for name in symbols if name.startswith(("foldkv_", "_ZN6foldkv"))]
    assert not private, "our own symbols stay inside"


@built
def test_build_info_states_what_is_inside() -> None:
    from quant import _C

    info = json.loads(_C.build_info())
    assert info["version"] == __version__
    assert info["isas"][0] == "plain"
    assert info["torch_target"] == "0x020a000000000000"
    assert bool(info["cuda"]) == bool(info["cuda_archs"])
    assert re.fullmatch(r"[0-9a-f]{16}", info["sources"])


@built
def test_extension_is_built_from_these_sources() -> None:
    from quant import _C

    assert json.loads(_C.build_info())["sources"] == run("tools/source_hash.py").stdout.strip(), "rebuild the extension"


def test_diagnosis_names_who_serves_each_op() -> None:
    found = diagnose()
    assert found.devices[0].name == "cpu"
    assert len(found.devices) == 1 + torch.cuda.device_count()
    for device in found.devices:
        assert device.ops.keys() == ops.SCHEMAS.keys()
        assert set(device.ops.values()) <= {"compiled", "pytorch"}
        assert device.check == "ok"
        for name, server in device.ops.items():
            assert (server == "compiled") == backend.has_kernels(device.name.split(":")[0], name)
    assert found.cpu_isa in found.build.get("isas", [""])


@built
def test_doctor_names_a_forced_instruction_set() -> None:
    forced = json.loads(foldkv("doctor", "--json", FOLDKV_ISA="plain").stdout)
    assert forced["cpu_isa"] == forced["cpu_isa_forced"] == "plain"
    wrong = json.loads(foldkv("doctor", "--json", FOLDKV_ISA="mmx").stdout)
    assert wrong["cpu_isa"] == ""
    assert any("got 'mmx'" in note for note in wrong["notes"])


def test_doctor_prints_the_same_in_both_forms() -> None:
    text, data = foldkv("doctor"), foldkv("doctor", "--json")
    assert text.returncode == data.returncode == 0, text.stderr + data.stderr
    found = json.loads(data.stdout)
    assert found["versions"]["torch"] == torch.__version__
    for fact in (found["versions"]["torch"], found["extension"], *found["notes"]):
        assert fact in text.stdout


def test_doctor_says_why_there_is_no_extension() -> None:
    found = json.loads(foldkv("doctor", "--json", FOLDKV_EXTENSION="0").stdout)
    assert found["extension"] == ""
    assert set(found["devices"][0]["ops"].values()) == {"pytorch"}
    assert any("FOLDKV_EXTENSION=0" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("archs", "capability", "answer"),
    [
        (["8.0", "9.0+PTX"], (8, 0), True),
        (["8.0", "9.0+PTX"], (8, 9), True),
        (["8.0", "9.0+PTX"], (7, 5), False),
        (["8.0", "9.0+PTX"], (10, 0), True),
        (["8.0", "9.0"], (10, 0), False),
        (["8.6"], (8, 0), False),
        (["9.0a"], (9, 0), True),
        (["9.0a+PTX"], (10, 0), False),
        ([], (9, 0), False),
    ],
)
def test_which_gpus_a_build_serves(archs: list[str], capability: tuple[int, int], answer: bool) -> None:
    assert runs_on(archs, capability) is answer


def test_version() -> None:
    assert foldkv("--version").stdout.strip() == f"foldkv {__version__}"


def test_help_is_fast_and_imports_no_torch() -> None:
    """Under half a second of processor time; the clock on the wall would also tell how busy the machine is."""

    def processor_seconds() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    seconds = []
    for _ in range(3):
        start = processor_seconds()
        shown = foldkv("--help")
        seconds.append(processor_seconds() - start)
        assert shown.returncode == 0, shown.stderr
        assert "doctor" in shown.stdout
    imported = run("-c", "import sys, foldkv.cli.main; print({'torch', 'transformers'} & set(sys.modules))")
    assert imported.stdout.strip() == "set()", imported.stderr
    assert min(seconds) < 0.5


def test_an_unknown_command_is_a_usage_error() -> None:
    wrong = foldkv("callibrate")
    assert wrong.returncode == 2
    assert "callibrate" in wrong.stderr


def test_errors_become_exit_codes() -> None:
    program = """
import sys
from foldkv.cli.common import GateError, UsageError, cli_errors
from quant.errors import ArgumentError
import typer
app = typer.Typer()
@app.command()
@cli_errors()
def main(kind: str) -> None:
    raise {"argument": ArgumentError("[x]: expected a, got b"), "usage": UsageError("u"), "gate": GateError("g")}[kind]
app()
"""
    for kind, code in (("argument", 1), ("usage", 2), ("gate", 3)):
        ended = run("-c", program, kind)
        assert ended.returncode == code, ended.stderr
        assert ended.stderr.startswith("error ")
        assert len(ended.stderr.splitlines()) == 1
    assert "[x]: expected a, got b" in run("-c", program, "argument").stderr
