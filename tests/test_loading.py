"""`load_model`: whole checkpoints load as they are; damaged ones are named, with what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hf_helpers import one_thread, save_checkpoint, tiny_model, tokens
from safetensors.torch import load_file, save_file

from foldkv.hf import load_model
from quant.errors import ArgumentError

pytestmark = pytest.mark.usefixtures(one_thread.__name__)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in one file."""
    return save_checkpoint(tiny_model(), tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in several files, with an index."""
    path = save_checkpoint(tiny_model(), tmp_path_factory.mktemp("sharded"), max_shard_size="60KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_a_checkpoint_gives_its_model_and_tokenizer(kind: str, request: pytest.FixtureRequest) -> None:
    model, tokenizer = load_model(request.getfixturevalue(kind))
    assert not model.training and model.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, tiny_model()(tokens()).logits)
    assert tokenizer("w5 w7")["input_ids"] == [5, 7]


@pytest.mark.parametrize(
    ("dtype", "want"),
    [
        (None, torch.float32),
        ("auto", torch.float32),
        ("bf16", torch.bfloat16),
        ("float16", torch.float16),
        (torch.bfloat16, torch.bfloat16),
    ],
)
def test_dtypes(whole: Path, dtype: str | torch.dtype | None, want: torch.dtype) -> None:
    assert load_model(whole, dtype)[0].dtype == want


def test_auto_is_the_dtype_of_the_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tiny_model(dtype=torch.bfloat16, num_hidden_layers=1), tmp_path)
    assert load_model(tmp_path)[0].dtype == torch.bfloat16
    assert load_model(tmp_path, "float32")[0].dtype == torch.float32


def cut(size: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        file = path / "model.safetensors"
        file.write_bytes(file.read_bytes()[:size])

    return damage


def flip_header(path: Path) -> None:
    file = path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[10] = 0xFF
    file.write_bytes(data)


def drop_tensor(path: Path) -> None:
    file = path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, file, {"format": "pt"})


def reshape_tensor(path: Path) -> None:
    file = path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = torch.ones(32)
    save_file(tensors, file, {"format": "pt"})


def drop_tokenizer(path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).unlink()


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty file": (cut(0), r"model\.safetensors: expected a whole safetensors file, got .*; download"),
    "cut in the header": (cut(100), r"model\.safetensors: expected a whole safetensors file"),
    "cut in the data": (cut(20_000), r"model\.safetensors: expected a whole safetensors file, got .*not fully covered"),
    "corrupt header": (flip_header, r"model\.safetensors: expected a whole safetensors file"),
    "missing tensor": (
        drop_tensor,
        r"all tensors of the model, got 1 missing .*, model\.layers\.1\.self_attn\.k_proj\.weight",
    ),
    "wrong shape": (reshape_tensor, r"all tensors of the model, got 1 .* another shape, model\.norm\.weight"),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "or its shards, got no weights"),
    "no config": (lambda path: (path / "config.json").unlink(), r"config\.json: expected a JSON file, got none"),
    "broken config": (lambda path: (path / "config.json").write_text("{"), r"config\.json: expected a JSON file"),
    "config of no object": (lambda path: (path / "config.json").write_text("[]"), "a JSON object, got list"),
    "no tokenizer": (drop_tokenizer, "tokenizer files, got .*; put tokenizer.json"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_checkpoints_are_named(whole: Path, tmp_path: Path, name: str) -> None:
    damage, match = DAMAGE[name]
    path = Path(shutil.copytree(whole, tmp_path / "model"))
    damage(path)
    with pytest.raises(ArgumentError, match=match):
        load_model(path)


def test_damaged_shards_are_named(sharded: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(sharded, tmp_path / "model"))
    shard = sorted(path.glob("*.safetensors"))[1]
    data = shard.read_bytes()
    shard.write_bytes(data[:-10])
    with pytest.raises(ArgumentError, match=rf"{shard.name}: expected a whole"):
        load_model(path)
    shard.unlink()
    with pytest.raises(ArgumentError, match=rf"1 missing, {shard.name}; download"):
        load_model(path)
    shard.write_bytes(data)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(ArgumentError, match="a weight_map, got none"):
        load_model(path)


def test_what_is_no_checkpoint(tmp_path: Path, whole: Path) -> None:
    (tmp_path / "file.txt").write_text("text")
    for path in (tmp_path / "absent", tmp_path / "file.txt", "a/b/c"):
        with pytest.raises(ArgumentError, match="a checkpoint directory or a hub id"):
            load_model(path)
    encoder_decoder = Path(shutil.copytree(whole, tmp_path / "t5"))
    (encoder_decoder / "config.json").write_text(json.dumps({"model_type": "t5", "architectures": ["T5Model"]}))
    with pytest.raises(ArgumentError, match="a decoder checkpoint, got Unrecognized configuration class"):
        load_model(encoder_decoder)


def test_bad_dtypes_and_devices(whole: Path) -> None:
    with pytest.raises(ArgumentError, match="dtype: expected auto, float32, .*'int8'"):
        load_model(whole, "int8")
    with pytest.raises(ArgumentError, match="device: expected one that torch can use, got abacus"):
        load_model(whole, device="abacus")
