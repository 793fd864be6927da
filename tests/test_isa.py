"""Every instruction set gives the same bits, and PyTorch in their place the same bytes and nearly the same numbers.

The instruction set is chosen when the extension is first used, so each one runs this file in a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from ops_helpers import DTYPES, HEAD_DIMS, SPECS, Source, make_ragged, pools
from torch import Tensor

import quant
from quant import backend, ops

ISAS = ("plain", "avx2", "avx512")
compiled = pytest.mark.skipif(not backend.EXTENSION_FILE, reason="the extension is not built")


def sweep() -> tuple[dict[str, str], list[Tensor]]:
    """Hashes of cache bytes and of output bits over all modes and head_dims, and the outputs with their LSEs."""
    torch.manual_seed(0)
    caches, bits = hashlib.sha256(), hashlib.sha256()
    outputs: list[Tensor] = []
    for i, mode in enumerate(SPECS):
        for j, d in enumerate(HEAD_DIMS):
            source = Source(SPECS[mode], 1 + j % 2, (1, 4, 7)[(i + j) % 3], d, (16, 64)[j % 2], DTYPES[(i + j) % 3])
            batch = make_ragged(source, [(70 + 300 * (j % 3 == 0), 5), (0, 1), (33, 1), (19, 2, 3)])
            for pool in pools(batch.pages):
                caches.update(pool.numpy().tobytes())
            options = {"softcap": 5.0, "sinks": torch.randn(batch.q.shape[1])} if (i + j) % 2 else {}
            outputs += batch.attend(batch.plan(num_workers=3), **options)
            states = torch.randn(3, 4, 2, d, dtype=source.dtype), torch.randn(3, 4, 2) * 9
            outputs += ops.merge(*states)
    for tensor in outputs:
        bits.update(tensor.view(torch.uint8).numpy().tobytes())
    return {"cache": caches.hexdigest(), "outputs": bits.hexdigest()}, outputs


def run(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("FOLDKV_")}
    root = str(Path(quant.__file__).parents[1])
    environment |= {"PYTHONPATH": os.pathsep.join([root, str(Path(__file__).parent)])}
    return subprocess.run([sys.executable, *arguments], env=inherited | environment, capture_output=True, text=True)


@cache
def sweep_on(isa: str) -> dict[str, str]:
    done = run([__file__], FOLDKV_ISA=isa)
    if "FOLDKV_ISA: expected an instruction set that is built in and runs here" in done.stderr:
        pytest.skip(f"{isa} does not run here")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@compiled
@pytest.mark.parametrize("isa", ISAS)
def test_same_bits_on_every_instruction_set(isa: str) -> None:
    found = sweep_on(isa)
    assert found["isa"] == isa
    assert {**found, "isa": "plain"} == sweep_on("plain")


@compiled
def test_an_unknown_instruction_set_is_an_error() -> None:
    done = run([__file__], FOLDKV_ISA="mmx")
    assert done.returncode != 0
    assert "FOLDKV_ISA: expected an instruction set that is built in and runs here" in done.stderr
    assert "foldkv doctor" in done.stderr and "got 'mmx'; unset it" in done.stderr


@compiled
def test_pytorch_in_place_of_the_extension(tmp_path: Path) -> None:
    done = run([__file__, str(tmp_path / "outputs.pt")], FOLDKV_EXTENSION="0")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    hashes, outputs = sweep()
    assert found["isa"] == "" and found["cache"] == hashes["cache"]
    for theirs, mine in zip(torch.load(tmp_path / "outputs.pt"), outputs, strict=True):
        # Weights and queries in 16 bits against fp32: 3e-5 of the largest, times a few; then one rounding each.
        limit = 3e-4 + 2 * torch.finfo(mine.dtype).eps
        finite = torch.isfinite(mine)
        assert torch.equal(finite, torch.isfinite(theirs))
        scale = mine[finite].float().abs().max().clamp(min=1)
        assert ((theirs - mine)[finite].float().abs() / scale).max() <= limit


if __name__ == "__main__":
    numbers, tensors = sweep()
    name = ""
    if backend.EXTENSION_FILE:
        from quant import _C

        name = _C.cpu_isa()
    print(json.dumps({"isa": name, **numbers}))
    if len(sys.argv) > 1:
        torch.save(tensors, sys.argv[1])
