"""KV scales for and from other engines: real files are read, ours come back as they went, bad ones are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calib_helpers import random_scales
from hf_helpers import save_checkpoint, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from typer.testing import CliRunner

from calib.derive import layer_params
from calib.interchange import FORMATS, export_scales, import_scales
from calib.interchange.engine_checkpoint import SCALE_SHARD
from foldkv.cli.main import app
from foldkv.hf import load_model
from quant.errors import ArgumentError, ScaleFileError
from quant.pages import SCALE
from quant.scales import KVScales
from quant.spec import MODES

DATA = Path(__file__).parent / "data" / "interchange"
SHAPES = [(2, 16)] * 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tiny_model(), tmp_path_factory.mktemp("model"))


def config_of(path: Path) -> Any:
    return AutoConfig.from_pretrained(path)


def absmax_of(scales: KVScales) -> list[torch.Tensor]:
    return [stats.absmax for layer in scales.layers if layer for stats in (layer.k, layer.v)]


# --- the real library's files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fp8_tensor", "fp8_head", "int8_head", "int8_head_asym"])
def test_files_of_llm_compressor_are_read(name: str) -> None:
    """The imported ranges are the absmax that plain hooks saw on the same text (see data/interchange/make.py)."""
    scales = import_scales(DATA / name, "compressed-tensors", config_of(DATA / name), SHAPES)
    seen = json.loads((DATA / "absmax.json").read_text())
    for idx in range(2):
        for tensor in ("k", "v"):
            wanted = torch.tensor(seen[str(idx)][tensor])
            wanted = wanted.amax().expand(2) if name == "fp8_tensor" else wanted
            got = getattr(scales[idx], tensor).absmax.amax(-1)
            if name == "int8_head_asym":
                # The range lies anywhere about zero: it reaches the absmax on one side, to half a step.
                assert ((got / wanted - 1).abs() < 0.01).all()
            else:
                torch.testing.assert_close(got, wanted, rtol=2e-6, atol=0)


def test_imported_scales_serve_a_swap(tmp_path: Path, checkpoint: Path) -> None:
    """Per head int8 takes the imported range; what the other tool's scale meant is what ours decodes with."""
    scales = import_scales(DATA / "int8_head", "vllm", config_of(DATA / "int8_head"), SHAPES)
    theirs = load_file(DATA / "int8_head" / "model.safetensors")["model.layers.0.self_attn.k_scale"].flatten()
    ours = layer_params(scales, 0, MODES["c8h"], head_room=1.0)[0][SCALE][:, 0]
    torch.testing.assert_close(ours * 127, theirs * 127.5)
    scales.save(tmp_path)
    assert KVScales.load(tmp_path).config["imported"]["format"] == "compressed-tensors"


# --- round trips ------------------------------------------------------------------------------------------------------

ROUND_TRIPS: list[tuple[str, dict[str, Any], Callable[[torch.Tensor], torch.Tensor]]] = [
    ("compressed-tensors", {"per": "tensor"}, lambda x: x.amax().expand_as(x)),
    ("compressed-tensors", {"per": "head"}, lambda x: x.amax(-1, keepdim=True).expand_as(x)),
    ("modelopt", {}, lambda x: x.amax().expand_as(x)),
    ("paddle", {"kind": "fp8"}, lambda x: x.amax(-1, keepdim=True).expand_as(x)),
    ("paddle", {"kind": "int8"}, lambda x: x),
]


@pytest.mark.parametrize(("name", "options", "joined"), ROUND_TRIPS)
def test_round_trip(
    tmp_path: Path, checkpoint: Path, name: str, options: dict[str, Any], joined: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """The ranges come back, joined as coarsely as the format knows them; a second trip gives the same bytes."""
    scales, config = random_scales(), config_of(checkpoint)
    export_scales(scales, name, checkpoint, tmp_path / "a", **options)
    back = import_scales(tmp_path / "a", name, config, SHAPES)
    for got, sent in zip(absmax_of(back), absmax_of(scales), strict=True):
        torch.testing.assert_close(got, joined(sent), rtol=1e-6, atol=0)
    export_scales(back, name, checkpoint, tmp_path / "b", **options)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_sglang_round_trip(tmp_path: Path, checkpoint: Path) -> None:
    """One scale for K and V, the larger; with two ranks each has its own head's."""
    scales = random_scales()
    for ranks in (1, 2):
        path = tmp_path / f"{ranks}.json"
        export_scales(scales, "sglang", checkpoint, path, ranks=ranks)
        value = json.loads(path.read_text())
        assert value["model_type"] == "llama" and list(value["kv_cache"]["scaling_factor"]) == [
            str(r) for r in range(ranks)
        ]
        back = import_scales(path, "sglang", config_of(checkpoint), SHAPES)
        assert back.config["imported"]["merged"] is True
        for idx in range(2):
            both = torch.maximum(scales[idx].k.absmax, scales[idx].v.absmax).amax(-1)
            wanted = both if ranks == 2 else both.amax().expand(2)
            for stats in (back[idx].k, back[idx].v):
                torch.testing.assert_close(stats.absmax[:, 0], wanted, rtol=1e-6, atol=0)


def test_paddle_int4_keeps_step_and_zero_point(tmp_path: Path, checkpoint: Path) -> None:
    scales = random_scales()
    export_scales(scales, "paddle", checkpoint, tmp_path, kind="int4")
    tensors = load_file(tmp_path / "kv_cache_scales.safetensors")
    key = "ernie.layers.1.self_attn.cachev_matmul.activation_"
    stats = scales[1].v
    step, zero = tensors[f"{key}scale"].view(2, 16), tensors[f"{key}zero_point"].view(2, 16)
    torch.testing.assert_close(-zero * step, stats.min, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((15 - zero) * step, stats.max, rtol=1e-4, atol=1e-5)
    back = import_scales(tmp_path, "paddle", config_of(checkpoint), SHAPES)
    params = layer_params(back, 1, MODES["c4s"])[1]
    assert torch.equal(params[0], step) and torch.equal(params[1], zero)


def test_the_three_conventions_of_paddle(tmp_path: Path, checkpoint: Path) -> None:
    """int8 stores absmax, fp8 absmax / 448 in JSON, int4 the step."""
    scales = random_scales()
    for kind in ("int8", "int4", "fp8"):
        export_scales(scales, "paddle", checkpoint, tmp_path / kind, kind=kind)
    key, stats = "ernie.layers.0.self_attn.cachek_matmul.activation_scale", scales[0].k
    int8 = load_file(tmp_path / "int8" / "kv_cache_scales.safetensors")[key]
    assert torch.equal(int8.view(2, 16), stats.absmax)
    fp8 = json.loads((tmp_path / "fp8" / "kv_cache_scale.json").read_text())[key]
    torch.testing.assert_close(torch.tensor(fp8) * 448, stats.absmax.amax(-1))
    int4 = load_file(tmp_path / "int4" / "kv_cache_scales.safetensors")[key]
    torch.testing.assert_close(int4.view(2, 16), (stats.max - stats.min) / 15)


# --- the exported checkpoint ------------------------------------------------------------------------------------------


def test_an_exported_checkpoint_is_whole(tmp_path: Path, checkpoint: Path) -> None:
    """Same weights under an index, tokenizer and all; the original is untouched; names and shapes are the library's."""
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    export_scales(random_scales(), "compressed-tensors", checkpoint, tmp_path / "out", per="head")
    assert before == {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    theirs = load_file(DATA / "fp8_head" / "model.safetensors")
    ours = load_file(tmp_path / "out" / SCALE_SHARD)
    assert {k: (tuple(v.shape), v.dtype) for k, v in ours.items()} == {
        k: (tuple(v.shape), torch.float32) for k, v in theirs.items()
    }
    weights = load_file(checkpoint / "model.safetensors")
    assert set(index) == {*weights, *ours} and not (tmp_path / "out" / "model.safetensors").exists()
    for shard in set(index.values()) - {SCALE_SHARD}:
        for key, value in load_file(tmp_path / "out" / shard).items():
            assert torch.equal(value, weights[key])
    scheme = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    wanted = json.loads((DATA / "fp8_head" / "config.json").read_text())["quantization_config"]
    wanted.pop("version")
    assert scheme == wanted


@pytest.mark.parametrize("name", ["compressed-tensors", "modelopt"])
def test_no_integer_scheme_ever_reaches_config_json(tmp_path: Path, checkpoint: Path, name: str) -> None:
    """vLLM refuses to load such a checkpoint: whatever mode was calibrated, what is written is fp8."""
    export_scales(random_scales(mode="c4s"), name, checkpoint, tmp_path / "out")
    scheme = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    assert (scheme["num_bits"], scheme["type"]) == (8, "float")
    with pytest.raises(TypeError):
        export_scales(random_scales(), name, checkpoint, tmp_path / "int8", kind="int8")
    assert not (tmp_path / "int8").exists()


def test_a_failed_export_leaves_nothing(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from calib.interchange import engine_checkpoint

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(engine_checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        export_scales(random_scales(), "compressed-tensors", checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    export_scales(random_scales(), "compressed-tensors", checkpoint, tmp_path / "out")
    with pytest.raises(ArgumentError, match="expected a folder that is not there yet"):
        export_scales(random_scales(), "compressed-tensors", checkpoint, tmp_path / "out")
    with pytest.raises(ArgumentError, match="expected one without a quantization_config, got compressed-tensors"):
        export_scales(random_scales(), "modelopt", tmp_path / "out", tmp_path / "twice")


# --- what is refused --------------------------------------------------------------------------------------------------


def edited(tmp_path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """A copy of a fixture with other scales."""
    tensors = load_file(DATA / "fp8_head" / "model.safetensors")
    edit(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((DATA / "fp8_head" / "config.json").read_bytes())
    return tmp_path


K0, V1 = "model.layers.0.self_attn.k_scale", "model.layers.1.self_attn.v_scale"
BAD: list[tuple[Callable[[dict[str, torch.Tensor]], object], str]] = [
    (lambda t: t.pop(V1), "layer 1 v_scale: expected a tensor, got none"),
    (lambda t: t.update({K0.replace("k_", "kv_"): torch.ones(1)}), "a merged one, model.layers.0.self_attn.kv_scale"),
    (lambda t: t.update({k: torch.ones_like(v) for k, v in t.items() if "k_scale" in k}), "k_scale: expected calibrated"),
    (lambda t: t.update({K0: torch.zeros(2, 1, 1)}), "layer 0 k_scale: expected finite scales > 0"),
    (lambda t: t.update({K0: torch.full((2, 1, 1), torch.nan)}), "layer 0 k_scale: expected finite scales > 0"),
    (lambda t: t.update({K0: torch.rand(3, 1, 1) + 0.1}), "layer 0 K scale: expected shape"),
    (lambda t: t.update({"model.layers.0.self_attn.k_proj.k_scale": torch.ones(1)}), "layer 0 k_scale: expected one tensor"),
    (lambda t: t.update({k.replace("1", "2"): t[k].clone() for k in [*t] if "s.1" in k}), "layers with scales: expected 2"),
    (lambda t: (t.clear(), t.update({"x": torch.ones(1)})), "got none"),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "message"), BAD)
def test_bad_scales_are_refused_by_name(
    tmp_path: Path, edit: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    folder = edited(tmp_path, edit)
    with pytest.raises(ScaleFileError, match=message.replace("(", r"\(")):
        import_scales(folder, "compressed-tensors", config_of(DATA / "fp8_head"), SHAPES)


def test_other_files_are_refused(tmp_path: Path, checkpoint: Path) -> None:
    config = config_of(checkpoint)
    with pytest.raises(ScaleFileError, match="expected compressed-tensors with a kv_cache_scheme, got None"):
        import_scales(checkpoint, "compressed-tensors", config, SHAPES)
    with pytest.raises(ScaleFileError, match="hf_quant_config.json: expected ModelOpt's"):
        import_scales(checkpoint, "modelopt", config, SHAPES)
    path = tmp_path / "s.json"
    export_scales(random_scales(), "sglang", checkpoint, path)
    value = json.loads(path.read_text())
    value["kv_cache"]["scaling_factor"]["0"].pop("0")
    path.write_text(json.dumps(value))
    with pytest.raises(ScaleFileError, match="rank 0, layer 0: expected a scale, got none"):
        import_scales(path, "sglang", config, SHAPES)
    export_scales(random_scales(), "paddle", checkpoint, tmp_path)
    values = json.loads((tmp_path / "kv_cache_scale.json").read_text())
    values.pop("ernie.layers.1.self_attn.cachev_matmul.activation_scale")
    (tmp_path / "kv_cache_scale.json").write_text(json.dumps(values))
    with pytest.raises(ScaleFileError, match="layer 1 v, activation_scale: expected a tensor"):
        import_scales(tmp_path, "paddle", config, SHAPES)
    with pytest.raises(ArgumentError, match="format: expected one of compressed-tensors"):
        import_scales(path, "gguf", config, SHAPES)


# --- the command line -------------------------------------------------------------------------------------------------


def test_export_and_import_on_the_command_line(tmp_path: Path, checkpoint: Path) -> None:
    model, _ = load_model(checkpoint)
    scales = random_scales(model={"config": {"num_hidden_layers": 2}})
    scales.save(tmp_path / "kv")

    def run(*arguments: object) -> Any:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    out = tmp_path / "out"
    for name in ("vllm", "paddle"):
        done = run("export", checkpoint, "--scales", tmp_path / "kv", "--format", name, "--out", out / name)
        assert done.exit_code == 0, done.output
        done = run("import", out / name, "--model", checkpoint, "--format", name, "--out", tmp_path / name)
        assert done.exit_code == 0, done.output
        back = KVScales.load(tmp_path / name, model.config)
        assert (back[0].k.absmax >= scales[0].k.absmax * (1 - 1e-6)).all()
    assert run("import", out / "vllm", "--model", checkpoint, "--out", tmp_path / "vllm").exit_code == 2
    assert run("export", checkpoint, "--out", tmp_path / "x", "--format", "gguf").exit_code == 2
    done = run("export", checkpoint, "--out", tmp_path / "x", "--scales", tmp_path / "nowhere")
    assert done.exit_code == 1 and "expected a readable file" in done.stderr
    assert set(FORMATS) == {"compressed-tensors", "vllm", "modelopt", "sglang", "paddle"}
