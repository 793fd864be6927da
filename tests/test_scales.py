"""The calibration files: what is written comes back, and nothing damaged, incomplete or foreign is taken."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calib_helpers import H_KV, HEAD_DIM, random_scales, random_stats
from hf_helpers import tiny_model
from safetensors.torch import load_file, save_file

from quant import scale_files
from quant.errors import ArgumentError, CalibrationError, ScaleFileError
from quant.gram import normalised
from quant.scales import CONFIG_FILE, SCALES_FILE, KVScales, LayerStats, TensorStats, model_facts, model_hash


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    random_scales(mode="c8", data={"max_position": 32}).save(tmp_path)
    return tmp_path


def rewrite(
    folder: Path,
    edit_config: Callable[[dict[str, Any]], object] = lambda config: None,
    edit_tensors: Callable[[dict[str, torch.Tensor]], object] = lambda tensors: None,
) -> None:
    """Change the files and mend their hashes, as another writer might have produced them."""
    tensors, config = load_file(folder / SCALES_FILE), json.loads((folder / CONFIG_FILE).read_text())
    edit_tensors(tensors)
    edit_config(config)
    save_file(tensors, folder / SCALES_FILE)
    config["scales_sha256"] = hashlib.sha256((folder / SCALES_FILE).read_bytes()).hexdigest()
    config.pop("config_sha256")
    config["config_sha256"] = scale_files.json_sha256(config)
    (folder / CONFIG_FILE).write_text(json.dumps(config))


def same(a: TensorStats, b: TensorStats) -> bool:
    assert a.static is not None and b.static is not None
    parts = ("min", "max", "mean", "var", "percentiles", "weight")
    return (
        all(torch.equal(getattr(a, part), getattr(b, part)) for part in parts)
        and a.tokens == b.tokens
        and a.static.fmt == b.static.fmt
        and torch.equal(a.static.scale, b.static.scale)
        and torch.equal(a.static.zero_point, b.static.zero_point)
    )


# --- round trip -------------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path: Path) -> None:
    scales = random_scales(mode="c8", data={"max_position": 32})
    scales.save(tmp_path)
    loaded = KVScales.load(tmp_path)
    for idx in range(2):
        assert same(loaded[idx].k, scales[idx].k) and same(loaded[idx].v, scales[idx].v)
    assert loaded.config["mode"] == "c8"
    assert loaded.calibrated_len == 32
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG_FILE, SCALES_FILE]


def test_saving_what_was_loaded_gives_the_same_bytes(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    again = tmp_path_factory.mktemp("again")
    KVScales.load(saved).save(again)
    assert (again / SCALES_FILE).read_bytes() == (saved / SCALES_FILE).read_bytes()
    assert json.loads((again / CONFIG_FILE).read_text()) == json.loads((saved / CONFIG_FILE).read_text())


def test_names_shapes_and_dtypes_of_the_file(saved: Path) -> None:
    tensors = load_file(saved / SCALES_FILE)
    name = "model.layers.1.self_attn"
    for tensor in ("k", "v"):
        assert tensors[f"{name}.{tensor}_scale"].shape == (H_KV, 1, HEAD_DIM)
        assert tensors[f"{name}.{tensor}_zero_point"].shape == (H_KV, 1, HEAD_DIM)
        assert tensors[f"{name}.{tensor}_min"].shape == (H_KV, HEAD_DIM)
        assert tensors.pop(f"{name}.{tensor}_tokens").tolist() == [200]
    assert {t.dtype for key, t in tensors.items() if "tokens" not in key} == {torch.float32}


def test_layers_may_differ_in_shape_and_be_absent(tmp_path: Path) -> None:
    small, large = random_stats(1, 16, static=False), random_stats(4, 32, static=False)
    KVScales([LayerStats(small, small), None, LayerStats(large, large)]).save(tmp_path)
    loaded = KVScales.load(tmp_path)
    assert loaded[0].k.min.shape == (1, 16) and loaded[2].v.min.shape == (4, 32)
    assert loaded.layers[1] is None and loaded[0].k.static is None
    with pytest.raises(ScaleFileError, match="layer 1: expected statistics, got none"):
        loaded[1]
    with pytest.raises(ScaleFileError, match=r"layer: expected 0 .. 2, got 3"):
        loaded[3]


def test_a_mean_query_is_kept_and_files_without_one_load(saved: Path, tmp_path: Path) -> None:
    scales = KVScales.load(saved)
    assert scales[0].k.query is None
    scales[0].k.query = torch.randn(H_KV, HEAD_DIM)
    scales.save(tmp_path / "with")
    loaded = KVScales.load(tmp_path / "with")
    assert torch.equal(loaded[0].k.query, scales[0].k.query)
    assert loaded[0].v.query is None and loaded[1].k.query is None
    scales[0].k.query[1, 2] = float("nan")
    with pytest.raises(ScaleFileError, match="layer 0 K query, head 1: expected finite values"):
        scales.check()
    scales[0].k.query = torch.zeros(H_KV, 3)
    with pytest.raises(ScaleFileError, match="layer 0 K query: expected shape"):
        scales.check()


def gram_of(h_kv: int = H_KV, d: int = HEAD_DIM, seed: int = 0) -> torch.Tensor:
    rows = torch.randn(40, h_kv, d, generator=torch.Generator().manual_seed(seed))
    return normalised(torch.einsum("thd,the->hde", rows, rows))


def test_gram_matrices_are_kept_to_the_bit_and_files_without_one_load(saved: Path, tmp_path: Path) -> None:
    scales = KVScales.load(saved)
    assert scales[0].k.gram is None and scales[0].v.gram is None
    small = (saved / SCALES_FILE).stat().st_size
    scales[0].k.gram, scales[1].v.gram = gram_of(), gram_of(seed=1)
    scales.save(tmp_path / "with")
    loaded = KVScales.load(tmp_path / "with")
    for got, want in ((loaded[0].k, scales[0].k), (loaded[1].v, scales[1].v)):
        assert got.gram is not None and want.gram is not None and torch.equal(got.gram, want.gram)
    assert loaded[0].v.gram is None and loaded[1].k.gram is None
    # Two bytes for each number of a triangle, and the headers.
    assert (tmp_path / "with" / SCALES_FILE).stat().st_size - small < 2 * (H_KV * HEAD_DIM * (HEAD_DIM + 1) + 150)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda gram: gram[..., :-1], "layer 0 K gram: expected shape"),
        (lambda gram: gram[:1], "layer 0 K gram: expected shape"),
        (
            lambda gram: gram * torch.tensor([1.0, float("nan")])[:, None, None],
            "layer 0 K gram, head 1: expected finite",
        ),
        (
            lambda gram: gram.triu(),
            "layer 0 K gram, head 0 and 1 more: expected a symmetric matrix with a diagonal >= 0",
        ),
        (lambda gram: -gram, "layer 0 K gram, head 0 and 1 more: expected a symmetric matrix with a diagonal >= 0"),
    ],
)
def test_a_damaged_gram_matrix_is_refused(saved: Path, change: Callable[..., torch.Tensor], message: str) -> None:
    scales = KVScales.load(saved)
    scales[0].k.gram = change(gram_of())
    with pytest.raises(ScaleFileError, match=message):
        scales.check()


def test_a_damaged_gram_in_the_file_is_refused(saved: Path) -> None:
    scales = KVScales.load(saved)
    scales[0].k.gram = gram_of()
    scales.save(saved)
    name = "model.layers.0.self_attn.k_gram"
    for edit, message in (
        (lambda tensors: tensors.update({name: tensors[name].float()}), "k_gram: expected torch.float16"),
        (lambda tensors: tensors.update({name: tensors[name].half()[:, 1:].clone()}), "layer 0 K gram: expected shape"),
    ):
        rewrite(saved, edit_tensors=edit)
        with pytest.raises(ScaleFileError, match=message):
            KVScales.load(saved)


def test_half_precision_statistics_are_written_as_fp32(tmp_path: Path) -> None:
    scales = random_scales()
    scales[0].k.weight = scales[0].k.weight.bfloat16()
    scales.save(tmp_path)
    assert KVScales.load(tmp_path)[0].k.weight.dtype == torch.float32


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 200, 0.5, -1])
def test_truncated_tensors(saved: Path, keep: float) -> None:
    data = (saved / SCALES_FILE).read_bytes()
    end = int(len(data) * keep) if isinstance(keep, float) else keep
    (saved / SCALES_FILE).write_bytes(data[:end])
    with pytest.raises(ScaleFileError, match=f"{SCALES_FILE}: expected sha256"):
        KVScales.load(saved)


@pytest.mark.parametrize("place", [0, 9, 0.3, 0.7, -1])
def test_flipped_byte_in_the_tensors(saved: Path, place: float) -> None:
    data = bytearray((saved / SCALES_FILE).read_bytes())
    data[int(len(data) * place) if isinstance(place, float) else place] ^= 0x10
    (saved / SCALES_FILE).write_bytes(data)
    with pytest.raises(ScaleFileError, match="damaged or was not written with"):
        KVScales.load(saved)


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0nonsense", b"not safetensors at all" * 40])
def test_no_safetensors_though_the_hash_fits(saved: Path, content: bytes) -> None:
    (saved / SCALES_FILE).write_bytes(content)
    config = json.loads((saved / CONFIG_FILE).read_text())
    config["scales_sha256"] = hashlib.sha256(content).hexdigest()
    config.pop("config_sha256")
    config["config_sha256"] = scale_files.json_sha256(config)
    (saved / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(ScaleFileError, match="expected a safetensors file"):
        KVScales.load(saved)


@pytest.mark.parametrize("cut", [0, 1, 0.5, -3])
def test_truncated_config(saved: Path, cut: float) -> None:
    text = (saved / CONFIG_FILE).read_text()
    (saved / CONFIG_FILE).write_text(text[: int(len(text) * cut) if isinstance(cut, float) else cut])
    with pytest.raises(ScaleFileError, match=f"{CONFIG_FILE}: expected json"):
        KVScales.load(saved)


@pytest.mark.parametrize("text", ["[]", "3", "null"])
def test_config_that_is_no_object(saved: Path, text: str) -> None:
    (saved / CONFIG_FILE).write_text(text)
    with pytest.raises(ScaleFileError, match="expected a json object"):
        KVScales.load(saved)


@pytest.mark.parametrize(
    ("field", "value"), [("mode", "c4"), ("data", {"max_seq_len": 4096}), ("scales_sha256", "0" * 64), ("new", 1)]
)
def test_tampered_config(saved: Path, field: str, value: object) -> None:
    config = json.loads((saved / CONFIG_FILE).read_text())
    config[field] = value
    (saved / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(ScaleFileError, match="changed after it was written"):
        KVScales.load(saved)


@pytest.mark.parametrize(("field", "value"), [("format_version", 2), ("basis", "pre-rope"), ("percentiles", [50])])
def test_other_version_basis_or_percentiles(saved: Path, field: str, value: object) -> None:
    rewrite(saved, edit_config=lambda config: config.update({field: value}))
    with pytest.raises(ScaleFileError, match=rf"{field}: expected .*, got {value!r}".replace("[", r"\[")):
        KVScales.load(saved)


@pytest.mark.parametrize("name", [SCALES_FILE, CONFIG_FILE])
def test_missing_file(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(ScaleFileError, match=f"{name}: expected a readable file, got No such file"):
        KVScales.load(saved)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ScaleFileError, match="foldkv calibrate"):
        KVScales.load(tmp_path / "nowhere")


# --- content ----------------------------------------------------------------------------------------------------------

K1 = "model.layers.1.self_attn.k_"


def set_head(name: str, head: int, value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors[name][head].fill_(value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("scale", 0.0, "layer 1 K scale, head 1: expected finite values > 0"),
        ("scale", -1.0, "layer 1 K scale, head 1"),
        ("scale", float("nan"), "layer 1 K scale, head 1"),
        ("zero_point", float("inf"), "layer 1 K zero_point, head 1"),
        ("mean", float("nan"), "layer 1 K mean, head 1: expected finite values"),
        ("weight", -1.0, "layer 1 K, head 1: expected min <= max"),
        ("min", 1e9, "layer 1 K, head 1: expected min <= max"),
    ],
)
def test_unusable_values_name_layer_and_head(saved: Path, name: str, value: float, message: str) -> None:
    rewrite(saved, edit_tensors=set_head(K1 + name, 1, value))
    with pytest.raises(ScaleFileError, match=message):
        KVScales.load(saved)


def test_a_head_of_zeros_is_named(saved: Path) -> None:
    def kill(tensors: dict[str, torch.Tensor]) -> None:
        tensors[K1 + "min"][0] = tensors[K1 + "max"][0] = 0

    rewrite(saved, edit_tensors=kill)
    with pytest.raises(ScaleFileError, match="layer 1 K, head 0: expected a value other than 0"):
        KVScales.load(saved)


def test_unobserved_layer(saved: Path) -> None:
    rewrite(saved, edit_tensors=lambda tensors: tensors[K1 + "tokens"].zero_())
    with pytest.raises(ScaleFileError, match="layer 1 K: expected observed tokens, got 0"):
        KVScales.load(saved)


@pytest.mark.parametrize("part", ["scale", "zero_point", "min", "percentiles", "tokens"])
def test_missing_tensor(saved: Path, part: str) -> None:
    rewrite(saved, edit_tensors=lambda tensors: tensors.pop(K1 + part))
    with pytest.raises(ScaleFileError, match=f"layer 1 K: expected a tensor {K1}{part}, got none"):
        KVScales.load(saved)


def test_tensor_of_no_known_layer(saved: Path) -> None:
    rewrite(saved, edit_tensors=lambda t: t.update({"model.layers.7.self_attn.k_min": torch.zeros(1)}))
    with pytest.raises(ScaleFileError, match=r"expected 2 layers only, got model.layers.7"):
        KVScales.load(saved)


def test_fewer_layers_in_the_config_than_in_the_tensors(saved: Path) -> None:
    rewrite(saved, edit_config=lambda config: config["layers"].pop())
    with pytest.raises(ScaleFileError, match="expected 1 layers only"):
        KVScales.load(saved)


@pytest.mark.parametrize("entry", [{"h_kv": 2}, 3, "x"])
def test_malformed_layer_entry(saved: Path, entry: object) -> None:
    rewrite(saved, edit_config=lambda config: config["layers"].__setitem__(0, entry))
    with pytest.raises(ScaleFileError, match="layer 0: expected h_kv and head_dim"):
        KVScales.load(saved)


def test_shapes_that_the_config_denies(saved: Path) -> None:
    rewrite(saved, edit_config=lambda config: config["layers"][0].update(h_kv=4))
    with pytest.raises(ScaleFileError, match=r"layer 0 K: expected shape \(4, 16\), got \(2, 16\)"):
        KVScales.load(saved)


def test_wrong_dtype(saved: Path) -> None:
    rewrite(saved, edit_tensors=lambda t: t.update({K1 + "scale": t[K1 + "scale"].half()}))
    with pytest.raises(ScaleFileError, match="k_scale: expected torch.float32, got torch.float16"):
        KVScales.load(saved)


def test_no_layers_at_all(tmp_path: Path) -> None:
    with pytest.raises(ScaleFileError, match="at least one"):
        KVScales([None, None]).save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_check_raises_what_it_is_told_to() -> None:
    stats = random_stats()
    stats.static = None
    stats.percentiles = stats.percentiles[:2]
    with pytest.raises(CalibrationError, match="here percentiles: expected shape"):
        stats.check("here", CalibrationError)


# --- another model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, "model num_hidden_layers: expected 3, got 2"),
        ({"num_key_value_heads": 4}, "model num_key_value_heads: expected 4, got 2"),
        ({"hidden_size": 128}, "model hidden_size: expected 128, got 64"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "model rope_parameters: expected .*5.0"),
    ],
)
def test_another_models_scales(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    config = tiny_model().config
    random_scales(model={"config": model_facts(config)}).save(tmp_path)
    assert len(KVScales.load(tmp_path, config).layers) == 2
    other = tiny_model(**change).config
    with pytest.raises(ScaleFileError, match=message):
        KVScales.load(tmp_path, other)
    with pytest.raises(ScaleFileError, match=message):
        KVScales.load(tmp_path, other.to_dict())
    assert len(KVScales.load(tmp_path, other, allow_other_model=True).layers) == 2
    assert model_hash(config) != model_hash(other)


def test_layer_count_is_checked_even_without_model_facts(saved: Path) -> None:
    with pytest.raises(ScaleFileError, match="num_hidden_layers: expected 3, got 2"):
        KVScales.load(saved, {"num_hidden_layers": 3})


def test_model_config_of_no_known_kind(saved: Path) -> None:
    with pytest.raises(ArgumentError, match="a transformers config or a dict, got int"):
        KVScales.load(saved, 3)


# --- atomic writing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 2])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_interrupted_while_moving_into_place(
    saved: Path, monkeypatch: pytest.MonkeyPatch, stop: int, error: type[BaseException]
) -> None:
    """Stopped before the first move, the old pair stands; between the two, the pair is refused, never mixed."""
    moves = 0

    def replace(source: object, target: object) -> None:
        nonlocal moves
        moves += 1
        if moves == stop:
            raise error("stopped")
        real(source, target)  # type: ignore[arg-type]

    real = os.replace
    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(error):
        random_scales(layers=3, mode="c4").save(saved)
    assert sorted(path.name for path in saved.iterdir()) == [CONFIG_FILE, SCALES_FILE]
    if stop == 1:
        assert KVScales.load(saved).config["mode"] == "c8"
    else:
        with pytest.raises(ScaleFileError, match="was not written with"):
            KVScales.load(saved)


def test_interrupted_while_writing(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(KeyboardInterrupt):
        random_scales(layers=3, mode="c4").save(saved)
    assert KVScales.load(saved).config["mode"] == "c8"
    assert sorted(path.name for path in saved.iterdir()) == [CONFIG_FILE, SCALES_FILE]


def test_unsound_scales_replace_nothing(saved: Path) -> None:
    scales = random_scales(mode="c4")
    scales[1].v.max[0, 3] = float("nan")
    with pytest.raises(ScaleFileError, match="layer 1 V max, head 0"):
        scales.save(saved)
    assert KVScales.load(saved).config["mode"] == "c8"
