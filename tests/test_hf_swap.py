"""`swap_kv_cache`: what it changes, that it changes it back, and that the paged cache holds what it should."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_helpers import (
    FAMILIES,
    ReferenceCache,
    generate,
    left_padded,
    logits,
    one_thread,
    save_checkpoint,
    tiny_model,
    tokens,
)
from transformers import AutoTokenizer, DynamicCache, PreTrainedModel, pipeline

from calib.derive import layer_params, layer_shaping
from foldkv.hf import FoldCache, current_swap, swap_kv_cache
from quant.backend import has_kernels
from quant.errors import ArgumentError, UnsupportedModelError
from quant.gram import normalised
from quant.pages import BALANCE, MEAN, SCALE, ZERO
from quant.scales import KVScales, LayerStats, TensorStats
from quant.spec import MODES, KVSpec, parse_modes

pytestmark = pytest.mark.usefixtures(one_thread.__name__)
PAGE = 16
H_KV, D, LAYERS = 2, 16, 2


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model()


@torch.no_grad()
def observed_scales(model: PreTrainedModel, max_position: int = 1024) -> KVScales:
    """Scales from the K and V of a few prompts, with every statistic that a mode needs."""
    cache = DynamicCache()
    model(tokens(8, 24, seed=9), past_key_values=cache)
    layers = []
    for layer in cache.layers:
        stats = []
        for x in (layer.keys, layer.values):
            rows = x.transpose(1, 2).flatten(0, 1)
            low, high, mean, var = rows.amin(0), rows.amax(0), rows.mean(0), rows.var(0)
            weight = 0.5 + torch.rand(mean.shape)
            gram = normalised(torch.einsum("thd,the->hde", rows.flip(-1), rows.flip(-1)))
            percentiles = torch.stack([mean] * 9)
            stats.append(TensorStats(low, high, mean, var, percentiles, weight, rows.shape[0], gram=gram))
        stats[0].query = torch.randn(H_KV, D)
        layers.append(LayerStats(*stats))
    return KVScales(layers, {"data": {"max_position": max_position}})


# --- swap and restore -------------------------------------------------------------------------------------------------


def snapshot(model: PreTrainedModel) -> dict[str, Any]:
    """Every instance attribute of every module and of the config."""
    found = {f"{name}.{key}": value for name, module in model.named_modules() for key, value in module.__dict__.items()}
    return found | {f"config.{key}": value for key, value in model.config.__dict__.items()}


def test_restore_leaves_nothing_behind(model: PreTrainedModel) -> None:
    ids = tokens()
    want, before = logits(model, ids), snapshot(model)
    with swap_kv_cache(model, "c4r", page_size=PAGE) as swap:
        assert current_swap(model) is swap and swap.is_on
        assert model.config._attn_implementation == "foldkv_paged"
        generate(model, ids)
        assert snapshot(model).keys() > before.keys()
    assert current_swap(model) is None and not swap.is_on
    after = snapshot(model)
    assert after.keys() == before.keys()
    assert [key for key in before if after[key] is not before[key] and after[key] != before[key]] == []
    assert torch.equal(logits(model, ids), want)
    swap.restore()
    assert torch.equal(logits(model, ids), want)


def test_restore_after_an_error_inside_the_block(model: PreTrainedModel) -> None:
    before = snapshot(model).keys()
    with pytest.raises(ZeroDivisionError), swap_kv_cache(model, "c8d"):
        raise ZeroDivisionError
    assert snapshot(model).keys() == before


def test_restore_puts_back_what_an_instance_had() -> None:
    model = tiny_model(num_hidden_layers=1)
    stock, calls = model.forward, []

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return stock(*args, **kwargs)

    model.forward = forward
    with swap_kv_cache(model, "c32"):
        generate(model, tokens(), max_new_tokens=3)
        assert len(calls) == 3
    assert model.__dict__["forward"] is forward


def test_swapping_twice_is_an_error_until_restored(model: PreTrainedModel) -> None:
    with swap_kv_cache(model, "c8d") as first:
        with pytest.raises(ArgumentError, match=r"swapped to 'c8d'; restore\(\) that swap first"):
            swap_kv_cache(model, "c4r")
        assert current_swap(model) is first
        first.restore()
        with swap_kv_cache(model, "c4r") as second:
            assert second.mode == "c4r"


def test_without_our_cache_a_swapped_model_is_the_stock_model(model: PreTrainedModel) -> None:
    ids, mask = left_padded()
    want = [logits(model, ids, attention_mask=mask, use_cache=use) for use in (True, False)]
    tokens_of_dynamic = generate(model, ids, attention_mask=mask, past_key_values=DynamicCache())
    with swap_kv_cache(model, "c4r"):
        got = [logits(model, ids, attention_mask=mask, use_cache=use) for use in (True, False)]
        assert torch.equal(generate(model, ids, attention_mask=mask, past_key_values=DynamicCache()), tokens_of_dynamic)
        assert torch.equal(generate(model, ids, attention_mask=mask, use_cache=False), tokens_of_dynamic)
        model.train()
        model(ids, attention_mask=mask, labels=ids).loss.backward()
        model.eval()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum() > 0
    model.zero_grad()


def test_the_eager_model_stays_eager_without_our_cache() -> None:
    model = tiny_model("gemma2")
    want = logits(model, tokens())
    with swap_kv_cache(model, "c32"):
        assert torch.equal(logits(model, tokens()), want)
    assert model.config._attn_implementation == "eager"


def test_training_through_the_paged_cache_is_refused(model: PreTrainedModel) -> None:
    with swap_kv_cache(model, "c32") as swap:
        model.train()
        try:
            with pytest.raises(UnsupportedModelError, match=r"model\.eval\(\)"):
                model(tokens(), past_key_values=swap.new_cache(1, 32))
        finally:
            model.eval()


def test_deep_copies_are_swapped_apart(model: PreTrainedModel) -> None:
    ids = tokens()
    want = generate(model, ids)
    with swap_kv_cache(model, "c32") as swap:
        twin = copy.deepcopy(model)
    assert current_swap(twin) is not swap
    assert torch.equal(generate(twin, ids), want)
    current_swap(twin).restore()
    assert current_swap(twin) is None and torch.equal(generate(twin, ids), want)


def test_saving_a_swapped_model_saves_the_stock_one(model: PreTrainedModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "stock")
    with swap_kv_cache(model, "c8d"):
        model.save_pretrained(tmp_path / "swapped")
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "stock" / name).read_bytes() == (tmp_path / "swapped" / name).read_bytes()


# --- generate ---------------------------------------------------------------------------------------------------------


def test_generate_takes_a_paged_cache_of_the_right_size(model: PreTrainedModel) -> None:
    with swap_kv_cache(model, "c8d", page_size=PAGE):
        out = generate(model, tokens(2), num_beams=3, return_dict_in_generate=True)
    cache = out.past_key_values
    assert isinstance(cache, FoldCache)
    assert (cache.batch_size, cache.get_seq_length()) == (6, 18)
    assert (cache.paged.max_batch, cache.paged.max_seq_len) == (6, 19)
    assert cache.bits_per_element == 9.0


def test_a_returned_cache_goes_on_and_grows(model: PreTrainedModel) -> None:
    ids = tokens()
    long = generate(model, ids, max_new_tokens=60)
    with swap_kv_cache(model, "c32", page_size=PAGE):
        out = generate(model, ids, max_new_tokens=5, return_dict_in_generate=True)
        cache = out.past_key_values
        size = cache.paged.max_seq_len
        assert cache.get_max_length() == cache.get_max_cache_shape() == -1
        more = generate(model, out.sequences, max_new_tokens=55, past_key_values=cache)
    assert torch.equal(more, long)
    assert cache.paged.max_seq_len > 2 * size


def test_pipelines_take_a_paged_cache(model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = AutoTokenizer.from_pretrained(save_checkpoint(model, tmp_path))
    write = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    want = write("w5 w7 w9", max_new_tokens=6, do_sample=False)
    with swap_kv_cache(model, "c32") as swap:
        made, new_cache = [], swap._new_cache
        monkeypatch.setattr(
            swap, "_new_cache", lambda *args, **kwargs: made.append(new_cache(*args, **kwargs)) or made[-1]
        )
        assert write("w5 w7 w9", max_new_tokens=6, do_sample=False) == want
    assert [cache.get_seq_length() for cache in made] == [8]


def test_cache_implementation_contradicts_a_swap(model: PreTrainedModel) -> None:
    with swap_kv_cache(model, "c8d"):
        with pytest.raises(ArgumentError, match=r"cache_implementation.*'static'"):
            generate(model, tokens(), cache_implementation="static")
        model.generation_config.cache_implementation = "static"  # a checkpoint's own default is overruled
        try:
            out = generate(model, tokens(), return_dict_in_generate=True)
        finally:
            model.generation_config.cache_implementation = None
    assert isinstance(out.past_key_values, FoldCache)


# --- quantised contents against the reference -------------------------------------------------------------------------


def test_parameters_of_calibrated_modes_reach_the_pages(model: PreTrainedModel) -> None:
    scales = observed_scales(model)
    with swap_kv_cache(model, "c4,1:c4r", scales, page_size=PAGE) as swap:
        cache = swap.new_cache(1, 32)
        logits(model, tokens(), past_key_values=cache)
    for idx, spec in enumerate((MODES["c4"], MODES["c4r"])):
        pages = cache.layers[idx].pages
        for part, want in zip((pages.k, pages.v), layer_shaping(scales, idx, spec), strict=True):
            assert (part.shaping is None) == (want is None) == (not part.fmt.shapes_rounding)
            assert want is None or (torch.equal(part.shaping, want) and (want[:, 0, 0] > 0).all())
        for part, want, fmt in zip((pages.k, pages.v), layer_params(scales, idx, spec), (spec.k, spec.v), strict=True):
            assert part.fmt == fmt
            assert torch.equal(part.params, want)
            rows = (MEAN, BALANCE) if fmt.is_dynamic else (SCALE, ZERO)
            assert all(part.params[row].unique().numel() > 1 for row in rows)


# Largest difference of two fp32 computations of the same logits (about 5 in size). The models have one layer: there K
# and V are the same bits, so the codes are the same too; one layer up, a last bit can turn a code.
TOLERANCE = 2e-5
# Kernels that multiply integers may err by this part of what the mode itself costs.
INTEGER_PART = 0.1


def check_logits(got: torch.Tensor, want: torch.Tensor, exact: torch.Tensor) -> None:
    """`got` is as near to the reference cache's `want` as a kernel must be; `exact` is without quantisation."""
    integer = has_kernels("cpu")
    own = (want - exact).abs()
    assert (got - want).abs().max() <= TOLERANCE + integer * INTEGER_PART * own.max()
    assert (got - want).abs().mean() <= TOLERANCE + integer * INTEGER_PART * own.mean()


def run_in_steps(model: PreTrainedModel, cache: Any) -> torch.Tensor:
    """Logits of a left-padded prefill, a chunk of four tokens and one token more."""
    ids, mask = left_padded()
    more = tokens(3, 5, seed=4)
    longer = torch.cat([mask, torch.ones(3, 5, dtype=mask.dtype)], dim=1)
    first = logits(model, ids, attention_mask=mask, past_key_values=cache)[mask.bool()]
    chunk = logits(model, more[:, :4], attention_mask=longer[:, :-1], past_key_values=cache)
    step = logits(model, more[:, 4:], attention_mask=longer, past_key_values=cache)
    return torch.cat([first, chunk.flatten(0, 1), step.flatten(0, 1)])


TRANSFORMED = [f"int4.token.asym{k}/int4.token.asym{v}" for k, v in (
    (".center", ".rotate"), (".balance", ".center.rotate"), (".balance.rotate", ""), (".rotate", ".balance"),
)]  # fmt: skip
"""Mean, balance and rotation alone and in pairs; the modes have them together."""


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("mode", [*MODES, "c8/c4r", "c4r/c16", *TRANSFORMED])
def test_logits_are_those_of_the_reference_cache(mode: str, calibrated: bool) -> None:
    model = tiny_model(num_hidden_layers=1)
    scales = observed_scales(model) if calibrated else None
    if not calibrated and parse_modes(mode, 1).needs_scales:
        with pytest.raises(ArgumentError, match="scales of mode"):
            swap_kv_cache(model, mode)
        return
    with swap_kv_cache(model, mode, scales, page_size=PAGE) as swap:
        got = run_in_steps(model, swap.new_cache(3, 32))
    params = (
        (*layer_params(scales, 0, swap.specs[0]), *layer_shaping(scales, 0, swap.specs[0]))
        if scales is not None
        else None
    )
    want, exact = (run_in_steps(model, cache) for cache in (ReferenceCache(swap.specs, [params]), DynamicCache()))
    check_logits(got, want, exact)
    if mode != "c32":
        assert (want - exact).abs().max() > 4 * TOLERANCE  # the mode does something


@pytest.mark.parametrize("kind", ["sliding_attention", "full_attention"])
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_windows_softcap_and_sinks_on_a_quantised_cache(family: str, kind: str) -> None:
    model = tiny_model(family, num_hidden_layers=1, layer_types=[kind])
    with swap_kv_cache(model, "c4r", page_size=PAGE) as swap:
        got = run_in_steps(model, swap.new_cache(3, 32))
    check_logits(got, *(run_in_steps(model, cache) for cache in (ReferenceCache(swap.specs, [None]), DynamicCache())))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_on_a_quantised_cache(family: str) -> None:
    """One layer of it: layers that share K and V are the business of the strategies' tests."""
    changes: dict[str, Any] = {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}
    if family in ("gemma3n_text", "gemma4_text"):
        changes["num_kv_shared_layers"] = 0
    if family == "gemma3n_text":
        changes |= {"intermediate_size": [96], "activation_sparsity_pattern": [0.0]}
    if "layer_types" not in FAMILIES[family][1]:
        del changes["layer_types"]
    model = tiny_model(family, **changes)
    with swap_kv_cache(model, "c8d/c4r", page_size=PAGE) as swap:
        got = run_in_steps(model, swap.new_cache(3, 32))
    check_logits(got, *(run_in_steps(model, cache) for cache in (ReferenceCache(swap.specs, [None]), DynamicCache())))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_c16_stores_the_models_own_16_bits(dtype: torch.dtype) -> None:
    """Against the same model in fp32, the paged cache errs no more than twice what the stock cache errs."""
    model = tiny_model(dtype=dtype)
    ids, mask = left_padded()
    truth = copy.deepcopy(model).float()
    with swap_kv_cache(model, "c16", page_size=PAGE) as swap:
        cache = swap.new_cache(3, 32)
        got = logits(model, ids, attention_mask=mask, past_key_values=cache)[mask.bool()].float()
    stock = logits(model, ids, attention_mask=mask)[mask.bool()].float()
    want = logits(truth, ids, attention_mask=mask)[mask.bool()]
    assert cache.layers[0].pages.k.fmt.codec == {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    assert (got - want).abs().mean() <= 2 * (stock - want).abs().mean()


# --- modes and sizes --------------------------------------------------------------------------------------------------


def test_bits_per_element_of_mixed_layers(model: PreTrainedModel) -> None:
    with swap_kv_cache(model, {"default": "c16", 1: "c4r"}, page_size=PAGE) as swap:
        assert swap.bits_per_element == pytest.approx((16 + (4 + 8 * 4 / D)) / 2)
        cache = swap.new_cache(1, 16)
        logits(model, tokens(), past_key_values=cache)
        assert cache.bits_per_element == pytest.approx(swap.bits_per_element)
        row = 2 * H_KV * (2 * D) + 2 * H_KV * (D // 2 + 4)
        assert cache.nbytes == PAGE * row + 2 * LAYERS * 5 * 4 * H_KV * D + 2 * H_KV * D * D + 4 + 4
        assert "'c16,1:c4r'" in repr(swap)


def test_a_spec_of_ones_own(model: PreTrainedModel) -> None:
    with swap_kv_cache(model, KVSpec(MODES["c8d"].k, MODES["c4r"].v, name="mine")) as swap:
        assert (swap.mode, swap.bits_per_element) == ("mine", (9 + 6) / 2)


def test_warns_once_beyond_the_calibrated_length(model: PreTrainedModel) -> None:
    ids = tokens(1, 8)
    scales = observed_scales(model, max_position=12)
    with swap_kv_cache(model, "c8", scales), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        generate(model, ids, max_new_tokens=4)
        assert not [w for w in caught if "calibrated" in str(w.message)]
        generate(model, ids, max_new_tokens=12)
        generate(model, ids, max_new_tokens=12)
    assert len([w for w in caught if "longer than the 12 positions" in str(w.message)]) == 1
