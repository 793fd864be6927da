"""What cannot be swapped is refused, with the reason, before anything is touched; bad masks and scales likewise."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hf_helpers import FAMILIES, left_padded, one_thread, tiny_model, tokens
from transformers import AutoModelForCausalLM, PreTrainedModel

from foldkv.hf import REFUSED, SUPPORTED, check_model, current_swap, swap_kv_cache
from foldkv.hf.attention import active_cache, first_valid_column
from quant.errors import ArgumentError, PoolExhaustedError, ScaleFileError, UnsupportedModelError
from quant.scales import KVScales, LayerStats, TensorStats

pytestmark = pytest.mark.usefixtures(one_thread.__name__)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model()


def make(config: str, auto: Any = AutoModelForCausalLM, **settings: Any) -> PreTrainedModel:
    common = {
        "vocab_size": 99,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    return auto.from_config(getattr(transformers, config)(**{**common, **settings}))


LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 16, "head_dim": 8, "n_routed_experts": 2, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1,
    "moe_intermediate_size": 32,
}  # fmt: skip
SMALL_GPT = {"n_embd": 64, "n_layer": 1, "n_head": 4, "rotary_dim": 8}
OWN = "AttentionInterface"
UNSUPPORTED: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "mpt": (lambda: make("MptConfig", d_model=64, n_heads=4, n_layers=1), OWN),
    "bloom": (lambda: make("BloomConfig", n_layer=1, n_head=4), OWN),
    "falcon": (lambda: make("FalconConfig"), OWN),
    "gptj": (lambda: make("GPTJConfig", **SMALL_GPT), OWN),
    "codegen": (lambda: make("CodeGenConfig", **SMALL_GPT), OWN),
    "gpt_neo": (lambda: make("GPTNeoConfig", num_layers=1, num_heads=4, attention_types=[[["global"], 1]]), OWN),
    "deepseek_v3": (lambda: make("DeepseekV3Config", **LATENT), "latent attention"),
    "t5": (lambda: make("T5Config", transformers.AutoModelForSeq2SeqLM, d_model=64, d_ff=96), "encoder-decoder"),
    "bert": (lambda: make("BertConfig", transformers.AutoModelForMaskedLM), "no decoder"),
    "bert that generates": (lambda: make("BertConfig"), "looks both ways"),
    "llama without a head": (lambda: make("LlamaConfig", transformers.AutoModel), "AutoModelForCausalLM"),
    "mamba": (lambda: make("MambaConfig", state_size=4), "recurrent"),
    "llama4": (lambda: make("Llama4TextConfig", num_local_experts=2, head_dim=16), "chunked"),
    "diffllama": (lambda: make("DiffLlamaConfig", num_key_value_heads=2, head_dim=16), "changes K and V"),
    "odd heads": (lambda: tiny_model(head_dim=24), "multiple of 16 up to 512, got 24"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_models_are_refused_with_the_reason(name: str) -> None:
    build, reason = UNSUPPORTED[name]
    model = build()
    before, attention = set(model.__dict__), model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match=reason):
        swap_kv_cache(model, "c8d")
    with pytest.raises(UnsupportedModelError, match=reason):
        check_model(model)
    assert set(model.__dict__) == before and model.config._attn_implementation == attention


def test_every_refused_family_has_a_reason_and_is_not_supported() -> None:
    assert all(family.note for family in REFUSED)
    assert not {family.model_type for family in REFUSED} & {family.model_type for family in SUPPORTED}


def test_supported_families_pass_the_check() -> None:
    for family in FAMILIES:
        model = tiny_model(family)
        assert check_model(model) is model


def test_what_is_no_model_is_an_argument_error() -> None:
    for thing in (torch.nn.Linear(2, 2), "llama", None):
        with pytest.raises(ArgumentError, match="PreTrainedModel, got"):
            swap_kv_cache(thing, "c8d")


def test_a_model_on_several_devices_is_refused(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "hf_device_map", {"model.layers.0": 0, "model.layers.1": 1}, raising=False)
    with pytest.raises(UnsupportedModelError, match="several devices"):
        swap_kv_cache(model, "c8d")


def test_a_model_that_changes_cached_values_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foldkv.hf.models.REFUSED", ())
    model = make("DiffLlamaConfig", num_key_value_heads=2, head_dim=16).eval()
    with swap_kv_cache(model, "c32") as swap:
        cache = swap.new_cache(1, 32)
        with pytest.raises(UnsupportedModelError, match="those that the cache returned"):
            model(tokens(), past_key_values=cache)
        assert cache.get_seq_length() == 0


@pytest.mark.parametrize("layers", [(0, 1), (1,)])
def test_attention_that_never_reaches_the_kernels_is_caught(layers: tuple[int, ...]) -> None:
    model = tiny_model()
    with swap_kv_cache(model, "c32") as swap:
        for idx in layers:
            attention = model.model.layers[idx].self_attn
            attention.config = copy.deepcopy(attention.config)
            attention.config._attn_implementation_internal = "sdpa"
        cache = swap.new_cache(1, 32)
        with pytest.raises(UnsupportedModelError, match=f"2 layers that wrote the cache, {2 - len(layers)} that read"):
            model(tokens(), past_key_values=cache)
        assert (cache.get_seq_length(), cache.paged.num_used_pages) == (0, 0)


def test_a_forward_pass_that_ignores_the_cache_is_caught() -> None:
    model = tiny_model()
    stock = model.model.forward
    with swap_kv_cache(model, "c32") as swap:
        model.model.forward = lambda *args, past_key_values, **kwargs: stock(*args, **kwargs)
        with pytest.raises(UnsupportedModelError, match="those that the cache returned, got others in LlamaAttention"):
            model(tokens(), past_key_values=swap.new_cache(1, 32))
    model.model.layers = torch.nn.ModuleList()
    with (
        swap_kv_cache(model, "c32") as swap,
        pytest.raises(UnsupportedModelError, match="0 layers that wrote the cache"),
    ):
        model(tokens(), past_key_values=swap.new_cache(1, 32))


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "match"),
    [("c9", "mode: expected one of"), ("c4r,7:c16", r"0 \.\. 1, got 7"), ("c4r,x:c16", "LAYER:MODE")],
)
def test_unknown_modes(model: PreTrainedModel, mode: str, match: str) -> None:
    with pytest.raises(ArgumentError, match=match):
        swap_kv_cache(model, mode)
    assert current_swap(model) is None


def test_bad_sizes(model: PreTrainedModel) -> None:
    with pytest.raises(ArgumentError, match="page_size: expected one of 16, 32, 64, 128, got 20"):
        swap_kv_cache(model, "c8d", page_size=20)
    with swap_kv_cache(model, "c8d") as swap:
        for sizes in ((0, 8), (1, 0)):
            with pytest.raises(ArgumentError, match="at least 1"):
                swap.new_cache(*sizes)


@pytest.mark.parametrize("mode", ["c8", "c4", "k8v4", "c4r,1:c8"])
def test_static_modes_need_scales(model: PreTrainedModel, mode: str) -> None:
    with pytest.raises(ArgumentError, match=r"expected KVScales, got none; run foldkv\.calibrate"):
        swap_kv_cache(model, mode)
    assert current_swap(model) is None


def scales_for(layers: int = 2, h_kv: int = 2, d: int = 16, **facts: Any) -> KVScales:
    def stats() -> TensorStats:
        mean = torch.zeros(h_kv, d)
        return TensorStats(mean - 1, mean + 1, mean, mean + 1, torch.stack([mean] * 9), mean + 1, tokens=5)

    return KVScales(
        [LayerStats(stats(), stats()) for _ in range(layers)], {"model": {"config": facts}} if facts else {}
    )


def test_scales_of_the_model_itself_are_taken(model: PreTrainedModel) -> None:
    with swap_kv_cache(model, "c8", scales_for(hidden_size=64)) as swap:
        model.generate(tokens(), max_new_tokens=2, do_sample=False)
        assert swap.specs.needs_scales


@pytest.mark.parametrize(
    ("scales", "match"),
    [
        (scales_for(layers=3), "num_hidden_layers: expected 2, got 3"),
        (scales_for(h_kv=4), r"scales of layer 0: .*\(2, 16\), got \(4, 16\)"),
        (scales_for(d=32), r"scales of layer 0: .*\(2, 16\), got \(2, 32\)"),
        (scales_for(hidden_size=128), "hidden_size: expected 64, got 128"),
        (dataclasses.replace(scales_for(), layers=[None, scales_for()[0]]), "scales of layer 0: .*None"),
    ],
)
def test_scales_of_another_model_are_refused(model: PreTrainedModel, scales: KVScales, match: str) -> None:
    with pytest.raises(ScaleFileError, match=match):
        swap_kv_cache(model, "c8", scales)
    assert current_swap(model) is None


# --- masks ------------------------------------------------------------------------------------------------------------


def forward(model: PreTrainedModel, ids: torch.Tensor, cache: Any, mask: torch.Tensor | None) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, attention_mask=mask, past_key_values=cache).logits


def test_padding_between_tokens_is_refused(model: PreTrainedModel) -> None:
    ids, mask = left_padded()
    mask[0, 5] = 0
    with swap_kv_cache(model, "c32") as swap, pytest.raises(ArgumentError, match="padding_side = 'left'"):
        forward(model, ids, swap.new_cache(3, 32), mask)


def test_right_padding_is_harmless_until_more_tokens_come(model: PreTrainedModel) -> None:
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    with torch.no_grad():
        want = model(ids, attention_mask=mask).logits[mask.bool()]
    with swap_kv_cache(model, "c32") as swap:
        cache = swap.new_cache(2, 32)
        torch.testing.assert_close(forward(model, ids, cache, mask)[mask.bool()], want, rtol=1e-5, atol=2e-5)
        longer = torch.cat([mask, mask.new_ones(2, 1)], 1)
        with pytest.raises(ArgumentError, match="padding between tokens"):
            forward(model, ids[:, :1], cache, longer)
        assert cache.get_seq_length() == 9


def test_a_row_of_padding_only_harms_nobody(model: PreTrainedModel) -> None:
    ids = tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0] = 0
    with torch.no_grad():
        want = model(ids[1:]).logits[0]
    with swap_kv_cache(model, "c32") as swap:
        got = forward(model, ids, swap.new_cache(2, 32), mask)
    torch.testing.assert_close(got[1], want, rtol=1e-5, atol=2e-5)
    assert torch.isfinite(got).all()


def test_masks_of_other_shapes_are_refused(model: PreTrainedModel) -> None:
    ids = tokens(1, 8)
    with swap_kv_cache(model, "c32") as swap:
        cache = swap.new_cache(1, 32)
        for mask in (torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8, dtype=torch.bool)):
            with pytest.raises(UnsupportedModelError, match="none or left padding"):
                forward(model, ids, cache, mask)
        forward(model, ids, cache, None)
        with pytest.raises(ArgumentError, match=r"expected \[1, 10\], got \[1, 2\]"):
            forward(model, ids[:, :2], cache, torch.ones(1, 2, dtype=torch.long))
        assert cache.get_seq_length() == 8


def test_attention_that_looks_ahead_is_refused(model: PreTrainedModel) -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_causal_mask

    def both_ways(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (q_idx < 4) & (kv_idx < 4)

    embeds = torch.zeros(1, 8, 64)
    with swap_kv_cache(model, "c32") as swap:
        assert model.config._attn_implementation in ALL_MASK_ATTENTION_FUNCTIONS

        def forward_with_image(*args: Any, past_key_values: Any, **kwargs: Any) -> Any:
            return create_causal_mask(
                model.config, embeds, attention_mask=None, past_key_values=past_key_values, or_mask_function=both_ways
            )

        decoder, run = model.model, model.model.forward
        decoder.forward = forward_with_image
        try:
            with pytest.raises(UnsupportedModelError, match="causal or a sliding window"):
                model(tokens(1, 8), past_key_values=swap.new_cache(1, 32))
        finally:
            decoder.forward = run


def test_blocks_that_see_themselves_are_refused(model: PreTrainedModel) -> None:
    """The tokens of an image see each other; such masks come with no sign but their function."""

    def with_block(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (kv_idx <= q_idx) | ((batch_idx == 1) & (q_idx >= 5) & (q_idx < 8) & (kv_idx >= 5) & (kv_idx < 8))

    def causal(batch_idx: Any, head_idx: Any, q_idx: Any, kv_idx: Any) -> Any:
        return kv_idx <= q_idx

    with swap_kv_cache(model, "c32") as swap:
        token = active_cache.set(swap.new_cache(2, 32))
        try:
            for q_length, kv_length, mask_function in (
                (8, 8, causal),
                (1, 8, causal),
                (4, 12, causal),
                (4, 12, with_block),
            ):
                assert first_valid_column(2, q_length, kv_length, fallback="sdpa", mask_function=mask_function) is None
            with pytest.raises(UnsupportedModelError, match="causal or a sliding window"):
                first_valid_column(2, 3, 8, fallback="sdpa", mask_function=with_block)
        finally:
            active_cache.reset(token)


def test_empty_batches_and_prompts_are_errors(model: PreTrainedModel) -> None:
    with swap_kv_cache(model, "c32") as swap:
        cache = swap.new_cache(2, 32)
        for ids in (tokens(1, 8)[:0], tokens(1, 8)[:, :0]):
            with pytest.raises(ArgumentError, match="at least one row and one token"):
                forward(model, ids, cache, None)
        assert cache.get_seq_length() == 0


def test_a_pool_too_small_for_the_prompt_says_what_to_do(model: PreTrainedModel) -> None:
    with swap_kv_cache(model, "c32", page_size=16) as swap, pytest.raises(PoolExhaustedError, match=r"num_pages"):
        model.generate(tokens(2, 20), past_key_values=swap.new_cache(2, 64, num_pages=3), max_new_tokens=2)
