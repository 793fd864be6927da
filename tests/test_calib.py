"""Calibration: the observed statistics are those of the captured K, V and Q; the model is left as it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from calib_helpers import capture, rows_of
from hf_helpers import FAMILIES, MORE_FAMILIES, left_padded, tiny_model, tokens
from torch import Tensor

from calib import calibrate
from calib.collect import collect
from calib.observers import TensorObserver, TokenSample
from quant.errors import ArgumentError, CalibrationError, UnsupportedModelError
from quant.scales import PERCENTILES, KVScales, LayerStats, TensorStats
from quant.spec import MODES, parse_modes


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def present(layers: list[LayerStats | None]) -> list[LayerStats]:
    found = [layer for layer in layers if layer is not None]
    assert len(found) == len(layers)
    return found


def assert_stats_of(stats: TensorStats, rows: Tensor) -> None:
    """`stats` are those of fp32 rows `[tokens, h_kv, d]`, computed at once in fp64."""
    exact = rows.double()
    assert stats.tokens == len(rows)
    assert torch.equal(stats.min, rows.amin(0)) and torch.equal(stats.max, rows.amax(0))
    torch.testing.assert_close(stats.mean.double(), exact.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(stats.var.double(), exact.var(0, correction=0), rtol=1e-5, atol=1e-9)
    wanted = torch.quantile(exact, torch.tensor(PERCENTILES, dtype=torch.float64) / 100, dim=0)
    torch.testing.assert_close(stats.percentiles.double(), wanted, rtol=1e-5, atol=1e-6)


def assert_gram(gram: Tensor | None, exact: Tensor) -> None:
    """`gram` is `exact` scaled to a mean diagonal of 1, in values that fp16 holds."""
    assert gram is not None and torch.equal(gram, gram.mT) and torch.equal(gram, gram.half().float())
    exact = exact / exact.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
    torch.testing.assert_close(gram.double(), exact, rtol=1e-3, atol=1e-5)


# --- statistics -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "phi3"])
def test_statistics_are_those_of_the_captured_tensors(family: str) -> None:
    model, ids = tiny_model(family), tokens(6, 20)
    layers = present(collect(model, ids.split(2)))
    for idx, (q, k, v) in capture(model, ids).items():
        assert_stats_of(layers[idx].k, rows_of(k))
        assert_stats_of(layers[idx].v, rows_of(v))
        queries = rows_of(q).double().square().mean(0).view(2, 2, 16).mean(1)
        torch.testing.assert_close(layers[idx].k.weight.double(), queries, rtol=1e-5, atol=1e-7)
        assert layers[idx].k.query is not None and layers[idx].v.query is None
        queries = rows_of(q).double().mean(0).view(2, 2, 16).mean(1)
        torch.testing.assert_close(layers[idx].k.query.double(), queries, rtol=1e-5, atol=1e-6)
        projection = model.model.layers[idx].self_attn.o_proj.weight.double()
        columns = projection.square().sum(0).view(2, 2, 16).sum(1)
        torch.testing.assert_close(layers[idx].v.weight.double(), columns, rtol=1e-5, atol=1e-7)
        queries = rows_of(q).double().view(-1, 2, 2, 16)
        assert_gram(layers[idx].k.gram, torch.einsum("thgd,thge->hde", queries, queries))
        # Of the first four sequences: how much of an error in one token's V each head lets through.
        logits = q[:4].double() @ k[:4].double().repeat_interleave(2, 1).mT / 4
        seen = torch.ones(20, 20).tril()
        seen = seen.triu(1 - window) if (window := getattr(model.config, "sliding_window", None)) else seen
        weights = logits.masked_fill(seen == 0, -torch.inf).softmax(-1)
        heads = weights.square().sum((0, 2, 3)).view(2, 2)
        parts = projection.view(-1, 2, 2, 16)
        assert_gram(layers[idx].v.gram, torch.einsum("hg,ohgd,ohge->hde", heads, parts, parts))


@pytest.mark.parametrize("family", sorted(FAMILIES | MORE_FAMILIES))
def test_every_family_is_observed_and_put_back(family: str) -> None:
    model, ids = tiny_model(family), tokens(2, 12)
    before = model(ids).logits
    implementation = model.config._attn_implementation
    layers = collect(model, [ids])
    shared = getattr(model.config, "num_kv_shared_layers", None) or 0
    assert [layer is None for layer in layers] == [False] * (len(layers) - shared) + [True] * shared
    assert len(layers) == model.config.num_hidden_layers
    assert model.config._attn_implementation == implementation
    assert torch.equal(model(ids).logits, before)


def test_observing_changes_no_output() -> None:
    """The forward under observation gives what the model gives alone: masks, window and softcap included."""
    for family in ("mistral", "gemma2"):
        model, ids = tiny_model(family), tokens(2, 12)
        alone, seen = model.base_model(ids).last_hidden_state, []
        hook = model.base_model.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out.last_hidden_state))
        collect(model, [ids])
        hook.remove()
        assert torch.equal(seen[0], alone)


def test_batches_do_not_matter() -> None:
    model, ids = tiny_model("qwen2"), tokens(8, 16)
    whole = present(collect(model, [ids], sample_tokens=50))
    parts = present(collect(model, ids.split((1, 3, 4)), sample_tokens=50))
    for a, b in zip(whole, parts, strict=True):
        for x, y in ((a.k, b.k), (a.v, b.v)):
            torch.testing.assert_close(x.var, y.var, rtol=1e-5, atol=1e-8)
            torch.testing.assert_close(x.percentiles, y.percentiles, rtol=1e-5, atol=1e-6)


def test_the_seed_chooses_the_percentile_sample() -> None:
    model, ids = tiny_model(), tokens(8, 32)

    def percentiles(seed: int) -> Tensor:
        return present(collect(model, ids.split(2), seed=seed, sample_tokens=32))[0].k.percentiles

    assert torch.equal(percentiles(3), percentiles(3))
    assert not torch.equal(percentiles(3), percentiles(4))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_counted(side: str) -> None:
    """Each row's real tokens count as they do alone, though the padding's K and V are the largest there are."""
    model = tiny_model("qwen2")
    ids, mask = left_padded()
    if side == "right":
        ids, mask = ids.flip(1), mask.flip(1)
    model.get_input_embeddings().weight.data[0] *= 1e4
    padded = present(collect(model, [{"input_ids": ids, "attention_mask": mask}]))
    assert padded[0].k.tokens == int(mask.sum()) < ids.numel()
    # Positions count from the row's start: ask for those of the padded batch.
    rows: dict[int, list[tuple[Tensor, Tensor]]] = {0: [], 1: []}
    for row, kept in zip(ids, mask.bool(), strict=True):
        for idx, (_, k, v) in capture(model, row[None], attention_mask=kept[None].long()).items():
            rows[idx].append((rows_of(k)[kept], rows_of(v)[kept]))
    for idx, layer in enumerate(padded):
        for stats, part in ((layer.k, 0), (layer.v, 1)):
            expected = torch.cat([pair[part] for pair in rows[idx]])
            torch.testing.assert_close(stats.max, expected.amax(0), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(stats.min, expected.amin(0), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(stats.mean, expected.mean(0), rtol=1e-4, atol=1e-5)


def test_a_batch_of_padding_alone_counts_nothing() -> None:
    model, ids = tiny_model(), tokens(2, 12)
    batch = {"input_ids": ids, "attention_mask": torch.zeros_like(ids)}
    assert present(collect(model, [batch, ids]))[0].k.tokens == ids.numel()
    with pytest.raises(CalibrationError, match="expected at least one observed token, got none"):
        collect(model, [batch])


def test_mean_and_variance_stay_sound_under_a_large_offset() -> None:
    """A channel 10^4 deviations from zero, merged from many small batches."""
    rows = torch.randn(4000, 2, 16) + 1e4
    observer, sample = TensorObserver(rows, 64), TokenSample(64, 0)
    for part in rows.split(7):
        sample.advance(len(part))
        observer.update(part, sample)
    stats = observer.finish(torch.ones(2, 16))
    torch.testing.assert_close(stats.var.double(), rows.double().var(0, correction=0), rtol=2e-3, atol=0)
    torch.testing.assert_close(stats.mean.double(), rows.double().mean(0), rtol=1e-7, atol=1e-3)


def test_the_token_sample_is_uniform_and_without_repeats() -> None:
    counts = torch.zeros(60)
    for seed in range(400):
        sample, kept = TokenSample(10, seed), torch.full((10,), -1)
        for start in range(0, 60, 5):
            sample.advance(5)
            kept[sample.slots] = start + sample.rows
        assert len(set(kept.tolist())) == 10 and kept.min() >= 0
        counts[kept] += 1
    # 400 draws of 10 in 60: mean 66.7, deviation 7.5.
    assert counts.min() > 66.7 - 4.5 * 7.5 and counts.max() < 66.7 + 4.5 * 7.5


def test_a_sample_as_large_as_the_stream_keeps_all_in_place() -> None:
    sample = TokenSample(20, 0)
    for start in (0, 8):
        sample.advance(8)
        assert sample.slots.tolist() == list(range(start, start + 8)) and sample.rows.tolist() == list(range(8))


# --- restoring --------------------------------------------------------------------------------------------------------


def test_an_error_in_the_model_leaves_it_as_it_was() -> None:
    model, ids = tiny_model("gemma2"), tokens(2, 12)
    model.train()
    model.model.layers[0].eval()
    flags = [module.training for module in model.modules()]

    def fail(*args: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        collect(model, [ids])
    hook.remove()
    assert model.config._attn_implementation == "eager"
    assert [module.training for module in model.modules()] == flags
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_a_vision_tower_keeps_its_attention() -> None:
    text = {
        "model_type": "llama", "vocab_size": 99, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    }  # fmt: skip
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 8, "patch_size": 4, "projection_dim": 16,
    }  # fmt: skip
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_id=98)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    seen: list[str] = []
    model.get_decoder().register_forward_hook(lambda *a: seen.append(model.config.vision_config._attn_implementation))
    assert len(present(collect(model, [tokens(2, 12)]))) == 2
    assert seen == ["sdpa"]
    assert model.config.text_config._attn_implementation == "sdpa"


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.BloomConfig(hidden_size=32, n_layer=1, n_head=2, vocab_size=99), "attention that can be switched"),
        (transformers.MptConfig(d_model=32, n_layers=1, n_heads=2, vocab_size=99), "attention that can be switched"),
        (
            transformers.DeepseekV3Config(
                hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=99, first_k_dense_replace=1,
                intermediate_size=32, kv_lora_rank=16, q_lora_rank=None, qk_rope_head_dim=8, qk_nope_head_dim=8,
                v_head_dim=8,
            ),
            "multi-head latent attention",
        ),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)  # fmt: skip
def test_models_that_cannot_be_observed(config: Any, message: str) -> None:
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedModelError, match=message):
        collect(model, [tokens(1, 8)])
    with pytest.raises(UnsupportedModelError, match=message):
        calibrate(model, tokens(4, 8), num_samples=4, max_seq_len=8)


def test_encoder_decoders_and_other_modules_are_refused() -> None:
    t5 = transformers.T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=99)
    with pytest.raises(UnsupportedModelError, match="an encoder-decoder"):
        collect(transformers.T5ForConditionalGeneration(t5), [tokens(1, 8)])
    with pytest.raises(UnsupportedModelError, match="a transformers PreTrainedModel, got Linear"):
        collect(torch.nn.Linear(2, 2), [tokens(1, 8)])  # type: ignore[arg-type]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["k", "v"])
def test_non_finite_values_name_layer_and_head(name: str, poison: float) -> None:
    model = tiny_model("qwen2")
    # Row 20 of the projection is head 1, channel 4.
    getattr(model.model.layers[1].self_attn, f"{name}_proj").bias.data[20] = poison
    with pytest.raises(CalibrationError, match=f"layer 1 {name.upper()}, head 1: expected finite values"):
        collect(model, [tokens(2, 12)])


@pytest.mark.parametrize("name", ["k", "v"])
def test_a_head_of_zeros_is_an_error_and_a_constant_channel_is_not(name: str) -> None:
    model = tiny_model("qwen2")
    projection = getattr(model.model.layers[0].self_attn, f"{name}_proj")
    projection.weight.data[:16] = 0
    projection.bias.data[:16] = 0
    with pytest.raises(CalibrationError, match=f"layer 0 {name.upper()}, head 0: expected a value other than 0"):
        collect(model, [tokens(2, 12)])
    if name == "v":
        projection.bias.data[3] = 2.5
        stats = present(collect(model, [tokens(2, 12)]))[0].v
        assert stats.min[0, 3] == stats.max[0, 3] == 2.5 and stats.var[0, 3] == 0


def test_a_layer_that_is_never_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    monkeypatch.setattr(
        model.model.layers[1], "forward", lambda hidden_states, *args, **kwargs: hidden_states, raising=True
    )
    with pytest.raises(CalibrationError, match="layer 1: expected observed tokens, got none"):
        collect(model, [tokens(2, 12)])


def test_no_batches() -> None:
    with pytest.raises(CalibrationError, match="at least one observed token, got none; give text"):
        collect(tiny_model(), [])


def test_batches_of_wrong_shape() -> None:
    with pytest.raises(ArgumentError, match=r"input_ids: expected shape \[batch, seq\], got \(12,\)"):
        collect(tiny_model(), [tokens(1, 12)[0]])
    with pytest.raises(ArgumentError, match=r"attention_mask: expected shape \(2, 12\), got \(2, 11\)"):
        collect(tiny_model(), [{"input_ids": tokens(2, 12), "attention_mask": torch.ones(2, 11)}])


# --- calibrate --------------------------------------------------------------------------------------------------------


def test_calibrate_stores_scales_and_origin(tmp_path: Any) -> None:
    model, ids = tiny_model("qwen2", dtype=torch.bfloat16), tokens(6, 32)
    steps: list[tuple[str, int, int]] = []
    scales = calibrate(
        model, ids, mode="c8,1:k8v4", num_samples=6, max_seq_len=32, seed=5,
        progress=lambda *step: steps.append(step),
    )  # fmt: skip
    assert steps == [("calibrating", 4, 6), ("calibrating", 6, 6)]
    assert scales.config["mode"] == "c8,1:k8v4"
    assert scales.calibrated_len == 32
    data, about = scales.config["data"], scales.config["model"]
    assert (data["num_samples"], data["seed"], data["source"], len(data["sha256"])) == (6, 5, "tokens", 64)
    assert about["dtype"] == "bfloat16" and about["config"]["num_key_value_heads"] == 2
    assert scales.config["versions"]["torch"] == torch.__version__
    assert scales[0].v.static is not None and scales[0].v.static.fmt == str(MODES["c8"].v)
    assert scales[1].k.static is not None and scales[1].v.static is None
    scales.save(tmp_path)
    assert KVScales.load(tmp_path, model.config)[1].k.tokens == 6 * 32


def test_the_same_call_gives_the_same_scales() -> None:
    model = tiny_model()
    once, twice = (calibrate(model, num_samples=3, max_seq_len=24, seed=7) for _ in range(2))
    other = calibrate(model, num_samples=3, max_seq_len=24, seed=8)
    assert once.config["data"] == twice.config["data"]
    assert torch.equal(once[1].k.max, twice[1].k.max)
    assert other.config["data"]["sha256"] != once.config["data"]["sha256"]


def test_every_mode_can_be_calibrated_for() -> None:
    model, ids = tiny_model(), tokens(4, 16)
    for name, spec in MODES.items():
        scales = calibrate(model, ids, mode=parse_modes(name, 2), num_samples=4, max_seq_len=16)
        assert (scales[0].k.static is not None) == spec.k.is_static


def test_max_position_spreads_the_windows() -> None:
    """K is that of the same windows further on, evenly spread up to the last position; V does not change."""
    model, ids = tiny_model("qwen2", max_position_embeddings=64), tokens(5, 16)
    scales = calibrate(model, ids, num_samples=5, max_seq_len=16, max_position=64, batch_size=2)
    assert scales.calibrated_len == 64 and scales.config["data"]["max_seq_len"] == 16
    places = torch.tensor([0, 12, 24, 36, 48])[:, None] + torch.arange(16)
    for idx, (_, k, v) in capture(model, ids, position_ids=places).items():
        torch.testing.assert_close(scales[idx].k.max, rows_of(k).amax(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(scales[idx].k.mean, rows_of(k).mean(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(scales[idx].v.mean, rows_of(v).mean(0), rtol=1e-5, atol=1e-5)
    short = calibrate(model, ids, num_samples=5, max_seq_len=16)
    torch.testing.assert_close(short[0].v.var, scales[0].v.var, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(short[0].k.mean, scales[0].k.mean, rtol=1e-2)


@pytest.mark.parametrize("asked", [15, 65])
def test_max_position_out_of_bounds(asked: int) -> None:
    model = tiny_model(max_position_embeddings=64)
    with pytest.raises(ArgumentError, match=rf"max_position: expected .*, 16 .. 64, got {asked}"):
        calibrate(model, tokens(2, 16), num_samples=2, max_seq_len=16, max_position=asked)


def test_the_default_length_is_capped_and_an_asked_one_is_not() -> None:
    model = tiny_model(max_position_embeddings=24)
    assert calibrate(model, tokens(2, 40), num_samples=2).calibrated_len == 24
    with pytest.raises(ArgumentError, match="max_seq_len: expected at most 24, the model's maximum, got 25"):
        calibrate(model, tokens(2, 40), num_samples=2, max_seq_len=25)


@pytest.mark.parametrize("name", ["num_samples", "max_seq_len", "batch_size"])
def test_counts_below_one(name: str) -> None:
    with pytest.raises(ArgumentError, match=f"{name}: expected at least 1, got 0"):
        calibrate(tiny_model(), tokens(4, 16), **{"num_samples": 4, "max_seq_len": 16, name: 0})


def test_one_token_is_too_few() -> None:
    with pytest.raises(CalibrationError, match="expected at least 16 tokens, got 1 x 1"):
        calibrate(tiny_model(), tokens(1, 1), num_samples=1, max_seq_len=1)


def test_ids_outside_the_vocabulary() -> None:
    ids = tokens(4, 16)
    ids[2, 3] = 99
    with pytest.raises(ArgumentError, match=r"token ids: expected 0 .. 98, got 3 .. 99; use the tokenizer"):
        calibrate(tiny_model(), ids, num_samples=4, max_seq_len=16)


def test_an_unknown_mode_is_refused_before_any_work() -> None:
    with pytest.raises(ArgumentError, match="mode: expected one of"):
        calibrate(tiny_model(), tokens(4, 16), mode="c3", num_samples=4, max_seq_len=16)
