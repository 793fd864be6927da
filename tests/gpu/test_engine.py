"""The engine on a GPU: captured steps are the eager ones, nothing waits for the device, memory is as planned."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from engine_helpers import check_empty, check_same_or_tied, make_prompts, stock_tokens
from hf_helpers import FAMILIES, ReferenceCache, tiny_model
from soak import make_soak
from transformers import PreTrainedModel

from foldkv import Engine, SamplingParams, swap_kv_cache
from quant.spec import resolve_mode

from .helpers import DEVICE, ON_GPU, cuda_only

pytestmark = pytest.mark.gpu

# Heads as the tensor-core kernels have them.
WIDE = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
LENGTHS = (5, 130, 3, 17, 40, 64, 65, 1, 300)
# On a CPU without graphs "graphs=True" would be an error in no case, so both engines are the same there.
GRAPHS = True if ON_GPU else None
TIE = 0.1  # of a logit in 16 bits: within it, rounding by the batch decides between two tokens
# Copies a number from the host at each step in some versions of transformers.
MAY_FAIL = {"gemma3n_text"}


def wide_model(family: str = "llama", dtype: torch.dtype = torch.float16, **changes: int) -> PreTrainedModel:
    return tiny_model(family, dtype=dtype, **WIDE, **changes).to(DEVICE)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return wide_model()


@contextmanager
def swapped(model: PreTrainedModel, kv: str) -> Iterator[None]:
    with swap_kv_cache(model, kv, page_size=16):
        yield


def teacher_tokens(count: int = 6, length: int = 90) -> torch.Tensor:
    return torch.tensor(make_prompts([length] * count))


@pytest.mark.parametrize("kv", ["c16", "c8d", "c4r"])
def test_captured_steps_are_the_eager_ones_bit_for_bit(llama: PreTrainedModel, kv: str) -> None:
    """Teacher-forced logits, through graphs of a bucket larger than the batch and without graphs."""
    tokens = teacher_tokens()
    with swapped(llama, kv):
        with Engine(llama, max_batch=8, max_seq_len=128, graphs=False) as eager:
            want = torch.stack(list(eager.score(tokens, 33)))
        with Engine(llama, max_batch=8, max_seq_len=128, graphs=GRAPHS) as engine:
            assert not ON_GPU or not engine.no_graph_reason
            got = torch.stack(list(engine.score(tokens, 33)))
            again = torch.stack(list(engine.score(tokens, 33)))
            assert engine.runner.graphs.num_graphs == (1 if ON_GPU else 0)
            check_empty(engine)
    assert torch.isfinite(got).all()
    assert torch.equal(got, want) and torch.equal(again, want)


@pytest.mark.parametrize("kv", ["c16", "c8d", "c4r"])
def test_scores_are_near_those_of_the_reference(llama: PreTrainedModel, kv: str) -> None:
    """The stock model on what the reference keeps of K and V; what is left is rounding, and the codes that it tips over.

    In units of the logits' deviation. A wrong row, page or position would be off by about 1, the format itself by 0.03 (c8d)
    and 0.34 (c4r). On a CPU: 0.0014, 0.005, 0.024.
    """
    tokens, layers = teacher_tokens(), llama.config.num_hidden_layers
    cache = ReferenceCache([resolve_mode(kv)] * layers, [None] * layers, llama.dtype)
    with torch.no_grad():
        want = llama(tokens.to(llama.device), past_key_values=cache).logits[:, 32:-1].float()
    with swapped(llama, kv), Engine(llama, max_batch=8, max_seq_len=128) as engine:
        got = torch.stack(list(engine.score(tokens, 33)), dim=1).float()
    error = float((got - want).abs().mean() / want.std())
    assert error < {"c16": 0.01, "c8d": 0.015, "c4r": 0.1}[kv]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_tokens_of_the_stock_model(family: str) -> None:
    """fp32 and the exact cache, through graphs where the model can be captured."""
    model = wide_model(family, torch.float32)
    prompts = make_prompts(LENGTHS[:5])
    with swapped(model, "c32"), Engine(model, max_batch=4, max_seq_len=160, prefill_tokens=64) as engine:
        got = engine.generate(prompts, max_new_tokens=12)
        print(family, engine.no_graph_reason or "captured")
        assert not ON_GPU or family in MAY_FAIL or not engine.no_graph_reason, engine.no_graph_reason
    for prompt, tokens in zip(prompts, got, strict=True):
        want = stock_tokens(model, prompt, 12)
        if tokens != want:
            with swapped(model, "c32"), Engine(model, max_batch=1, max_seq_len=160) as engine:
                check_same_or_tied(engine, prompt, want, tokens, 2e-3)


def test_continuous_batching_through_graphs(llama: PreTrainedModel) -> None:
    """Rows come, go and move down; each sequence gets what it gets alone, but for ties of 16-bit logits."""
    prompts = make_prompts(LENGTHS)
    params = [SamplingParams(8 + 5 * idx) for idx in range(len(prompts))]
    with (
        swapped(llama, "c8d"),
        Engine(llama, max_batch=1, max_seq_len=384) as alone,
        Engine(llama, max_batch=6, max_seq_len=384, num_pages=60, prefill_tokens=128) as engine,
    ):
        want = [alone.generate([p], own)[0] for p, own in zip(prompts, params, strict=True)]
        got = engine.generate(prompts, params)
        same = [check_same_or_tied(alone, prompt, a, b, TIE) for prompt, a, b in zip(prompts, want, got, strict=True)]
        check_empty(engine)
    assert any(same)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8}, {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
                                     {"temperature": 0.8, "top_p": 0.9}])  # fmt: skip
def test_every_kind_of_sampling_is_captured(llama: PreTrainedModel, options: dict[str, float]) -> None:
    """The same seed gives the same tokens with and without graphs."""
    prompts = make_prompts((5, 9))
    params = [SamplingParams(20, seed=idx, **options) for idx in range(2)]  # type: ignore[arg-type]
    with swapped(llama, "c16"):
        with Engine(llama, max_batch=2, max_seq_len=64, graphs=False) as eager:
            want = eager.generate(prompts, params)
        with Engine(llama, max_batch=2, max_seq_len=64, graphs=GRAPHS) as engine:
            assert engine.generate(prompts, params) == want
            assert not ON_GPU or engine.runner.graphs.num_graphs == 1


@cuda_only
def test_a_decoding_step_never_waits_for_the_device(llama: PreTrainedModel) -> None:
    with swapped(llama, "c8d"), Engine(llama, max_batch=4, max_seq_len=256, graphs=True) as engine:
        engine.generate(make_prompts((5, 9, 17, 30)), max_new_tokens=4)
        sequences = [engine.submit(prompt, SamplingParams(100)) for prompt in make_prompts((5, 9, 17, 30))]
        engine.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(60):  # past several pages
                engine.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert len(sequences[0].output) > 40
        list(engine.run())


@cuda_only
def test_a_late_stop_token_costs_no_wrong_token(llama: PreTrainedModel) -> None:
    """The host hears of an end two steps later: rows past their end must neither write nor be counted."""
    prompts = make_prompts((9, 31, 14, 50))
    with swapped(llama, "c16"), Engine(llama, max_batch=4, max_seq_len=128, graphs=True) as engine:
        want = engine.generate(prompts, max_new_tokens=40)
        stops = [row[idx] for row, idx in zip(want, (3, 8, 20, 39), strict=True)]
        params = [SamplingParams(40, stop_token_ids=(stop,)) for stop in stops]
        got = engine.generate(prompts, params)
        check_empty(engine)
        for prompt, row, stop, tokens in zip(prompts, want, stops, got, strict=True):
            assert tokens[-1] == stop or len(tokens) == 40, "it ends with its stop token, or it never came"
            assert stop not in tokens[:-1], "nothing is heard of a row after its end"
            # A smaller bucket may round otherwise, which decides where two tokens are as good as tied.
            check_same_or_tied(engine, prompt, row[: row.index(stop) + 1], tokens, TIE)


@cuda_only
@pytest.mark.parametrize("kv", ["c16", "c4r"])
def test_peak_memory_is_the_planned_one(kv: str) -> None:
    """Weights, pool, workspace and the largest step: within 5 % through swap, prefill and decoding."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = tiny_model("llama", dtype=torch.float16, hidden_size=1024, intermediate_size=2048, num_hidden_layers=4,
                       num_attention_heads=16, num_key_value_heads=8, head_dim=64, max_position_embeddings=1 << 15)  # fmt: skip
    model.to(DEVICE)
    weights = torch.cuda.memory_allocated() - before
    with Engine(model, kv, max_batch=32, max_seq_len=1 << 15, memory="4GB") as engine:
        planned = engine.memory.total
        assert abs(engine.memory.weights - weights) <= 0.02 * weights
        engine.generate(make_prompts([2000] * 20), max_new_tokens=50)
        peak = engine.memory_report()["peak"] - before
        print(f"{kv}: planned {planned}, peak {peak}, {peak / planned - 1:+.2%}")
        assert abs(peak - planned) <= 0.05 * planned


@cuda_only
def test_the_pool_is_sized_from_free_memory(llama: PreTrainedModel) -> None:
    """As large as the longest batch needs, or as what is free allows."""
    with swapped(llama, "c16"):
        with Engine(llama, max_batch=4, max_seq_len=256) as engine:
            assert engine.num_pages == 4 * 256 // 16
        free, _ = torch.cuda.mem_get_info()
        with Engine(llama, max_batch=4096, max_seq_len=1 << 17) as engine:
            assert 0.8 * free < engine.memory.pool < free
            assert len(engine.generate([[5, 6, 7]], max_new_tokens=5)[0]) == 5
    gc.collect()
    torch.cuda.empty_cache()


def test_soak() -> None:
    soak, restore = make_soak(DEVICE, "c8d" if ON_GPU else "c32", tolerance=TIE if ON_GPU else None)
    counts = soak.run(lambda number: number >= (12 if ON_GPU else 2))
    restore()
    print(dict(counts))
    assert counts["tokens"] > 0
    assert counts["sampled that parted"] <= counts["sequences"] // 8


@cuda_only
def test_a_compiled_step_is_near_the_plain_one(llama: PreTrainedModel) -> None:
    tokens = teacher_tokens(4, 60)
    with swapped(llama, "c8d"):
        with Engine(llama, max_batch=4, max_seq_len=64) as plain:
            want = torch.stack(list(plain.score(tokens, 33))).float()
        with Engine(llama, max_batch=4, max_seq_len=64, compile=True, graphs=True) as engine:
            got = torch.stack(list(engine.score(tokens, 33))).float()
            peak, planned = engine.memory_report()["peak"], engine.memory.total
    assert float((got - want).abs().mean() / want.std()) < 0.01
    print(f"compiled: planned {planned}, peak {peak}")
