"""The engine gives every sequence the tokens it would get alone, whatever comes and goes beside it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from engine_helpers import check_empty, make_prompts, stock_tokens
from hf_helpers import FAMILIES, MORE_FAMILIES, one_thread, tiny_model
from transformers import PreTrainedModel

from foldkv import Engine, SamplingParams, swap_kv_cache
from foldkv.engine.experts import has_experts
from foldkv.engine.sequence import Status
from quant.errors import ArgumentError, PoolExhaustedError

pytestmark = pytest.mark.usefixtures(one_thread.__name__)
PAGE = 16
LENGTHS = (5, 11, 3, 17, 40)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture
def engine(llama: PreTrainedModel) -> Iterator[Engine]:
    with make_engine(llama) as made:
        yield made
        check_empty(made)


def make_engine(model: PreTrainedModel, kv: str = "c32", **options: object) -> Engine:
    defaults = {"max_batch": 4, "max_seq_len": 64, "page_size": PAGE, "prefill_tokens": 16}
    return Engine(model, kv, **{**defaults, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("family", sorted(FAMILIES | MORE_FAMILIES))
def test_tokens_of_the_stock_model(family: str) -> None:
    """More sequences than rows, prompts in pieces and packed together."""
    model = tiny_model(family)
    prompts = make_prompts(LENGTHS)
    want = [stock_tokens(model, prompt, 10) for prompt in prompts]
    with make_engine(model) as engine:
        assert engine.generate(prompts, max_new_tokens=10) == want
        check_empty(engine)
        assert engine.generate(prompts[::-1], max_new_tokens=10) == want[::-1]
    assert stock_tokens(model, prompts[0], 10) == want[0], "the model is as it was"


@pytest.mark.parametrize(("prefill_tokens", "buckets"), [(1, None), (7, (1, 4)), (500, (4,))])
def test_pieces_and_buckets_do_not_matter(
    llama: PreTrainedModel, prefill_tokens: int, buckets: tuple[int, ...] | None
) -> None:
    prompts = make_prompts(LENGTHS)
    want = [stock_tokens(llama, prompt, 10) for prompt in prompts]
    with make_engine(llama, prefill_tokens=prefill_tokens, buckets=buckets) as engine:
        assert engine.generate(prompts, max_new_tokens=10) == want


@pytest.mark.parametrize("mode", ["c8d", "c4r"])
def test_quantised_modes_give_what_generate_gives(llama: PreTrainedModel, mode: str) -> None:
    prompts = make_prompts(LENGTHS)
    with swap_kv_cache(llama, mode, page_size=PAGE):
        want = [stock_tokens(llama, prompt, 10) for prompt in prompts]
        with Engine(llama, max_batch=3, max_seq_len=64) as engine:
            assert engine.generate(prompts, max_new_tokens=10) == want


@pytest.mark.parametrize(("mode", "tolerance"), [("c32", 1e-5), ("c8d", 1e-3)])
def test_scores_are_the_logits_of_the_swapped_model(llama: PreTrainedModel, mode: str, tolerance: float) -> None:
    """Prompts in other pieces round differently; where that turns a code over, 8 bits show it."""
    tokens = torch.tensor(make_prompts([24] * 3))
    with swap_kv_cache(llama, mode, page_size=PAGE) as swap:
        cache = swap.new_cache(3, 64)
        with torch.no_grad():
            want = [llama(tokens[:, :9], past_key_values=cache).logits[:, -1]]
            want += [llama(tokens[:, i : i + 1], past_key_values=cache).logits[:, 0] for i in range(9, 23)]
        with Engine(llama, max_batch=4, max_seq_len=64, prefill_tokens=7) as engine:
            got = list(engine.score(tokens, 9))
            check_empty(engine)
    assert len(got) == tokens.shape[1] - 9
    torch.testing.assert_close(torch.stack(got), torch.stack(want), rtol=0, atol=tolerance)


def test_scoring_can_be_left_early(engine: Engine) -> None:
    for _ in engine.score(torch.tensor(make_prompts([20, 20])), 5):
        break


def test_stream_gives_tokens_in_order_and_cancels_what_is_left(engine: Engine, llama: PreTrainedModel) -> None:
    prompts = make_prompts(LENGTHS)
    want = [stock_tokens(llama, prompt, 8) for prompt in prompts]
    got: list[list[int]] = [[] for _ in prompts]
    for index, token in engine.stream(prompts, max_new_tokens=8):
        got[index].append(token)
    assert got == want
    for _ in engine.stream(prompts, max_new_tokens=8):
        break


def test_stop_tokens_end_a_sequence_and_are_kept(engine: Engine, llama: PreTrainedModel) -> None:
    prompt = make_prompts([9])[0]
    want = stock_tokens(llama, prompt, 12)
    stop = want[5]
    first = want.index(stop)
    sequence = engine.submit(prompt, SamplingParams(max_new_tokens=12, stop_token_ids=(stop, 98)))
    outputs = list(engine.run())
    assert sequence.output == want[: first + 1] and sequence.finish_reason == "stop"
    assert [output.finish_reason for output in outputs] == [None] * first + ["stop"]


def test_eos_tokens_of_the_model_stop_unless_told_otherwise(engine: Engine, llama: PreTrainedModel) -> None:
    prompt = make_prompts([9])[0]
    want = stock_tokens(llama, prompt, 12)
    eos, llama.generation_config.eos_token_id = llama.generation_config.eos_token_id, [want[3]]
    try:
        assert engine.generate([prompt], max_new_tokens=12) == [want[: want.index(want[3]) + 1]]
        assert engine.generate([prompt], max_new_tokens=12, stop_token_ids=()) == [want]
    finally:
        llama.generation_config.eos_token_id = eos


def test_a_small_pool_makes_sequences_wait_and_give_way(llama: PreTrainedModel) -> None:
    prompts = make_prompts((14, 15, 13, 12, 14, 15))
    want = [stock_tokens(llama, prompt, 30) for prompt in prompts]
    with make_engine(llama, num_pages=7) as engine:
        assert engine.generate(prompts, max_new_tokens=30) == want
        assert engine.scheduler.num_preemptions > 0
        check_empty(engine)


def test_preempted_sampling_goes_on_as_if_it_had_not_been(llama: PreTrainedModel) -> None:
    prompts = make_prompts((14, 15, 13, 12))
    params = [SamplingParams(30, temperature=0.9, top_k=20, seed=seed) for seed in range(4)]
    with make_engine(llama) as engine:
        want = engine.generate(prompts, params)
        assert engine.scheduler.num_preemptions == 0
    with make_engine(llama, num_pages=6) as engine:
        assert engine.generate(prompts, params) == want
        assert engine.scheduler.num_preemptions > 0


def test_cancel_frees_the_pages_at_once(engine: Engine, llama: PreTrainedModel) -> None:
    prompts = make_prompts(LENGTHS)
    sequences = [engine.submit(prompt, SamplingParams(20)) for prompt in prompts]
    for _ in range(4):
        engine.step()
    assert {sequence.status for sequence in sequences} >= {Status.RUNNING, Status.WAITING}
    for sequence in (sequences[0], sequences[4], sequences[4]):
        engine.cancel(sequence)
    assert sequences[0].row == -1 and sequences[4].finish_reason == "cancelled"
    list(engine.run())
    assert [s.output for s in sequences[1:4]] == [stock_tokens(llama, prompt, 20) for prompt in prompts[1:4]]
    assert sequences[0].output == stock_tokens(llama, prompts[0], 20)[: len(sequences[0].output)]


def test_forks_share_pages_and_part(engine: Engine, llama: PreTrainedModel) -> None:
    prompt = make_prompts([18])[0]
    sequence = engine.submit(prompt, SamplingParams(16))
    for _ in range(6):
        engine.step()
    before = engine.num_free_pages
    copies = [engine.fork(sequence) for _ in range(2)]
    assert engine.num_free_pages == before
    sampled = engine.fork(sequence, SamplingParams(16, temperature=5.0, seed=3))
    list(engine.run())
    want = stock_tokens(llama, prompt, 16)
    assert [s.output for s in (sequence, *copies)] == [want] * 3
    assert sampled.output != want and len(sampled.output) == 16


def test_a_fork_of_a_waiting_sequence(engine: Engine, llama: PreTrainedModel) -> None:
    prompt = make_prompts([18])[0]
    sequence = engine.submit(prompt, SamplingParams(6))
    copy = engine.fork(sequence)
    list(engine.run())
    assert sequence.output == copy.output == stock_tokens(llama, prompt, 6)


def test_no_row_for_a_fork(engine: Engine) -> None:
    sequences = [engine.submit(prompt, SamplingParams(30)) for prompt in make_prompts([4] * 4)]
    for _ in range(3):
        engine.step()
    with pytest.raises(PoolExhaustedError, match="rows"):
        engine.fork(sequences[0])
    assert [len(s.output) for s in engine.scheduler.running] == [len(s.output) for s in sequences]
    list(engine.run())


@pytest.mark.parametrize("count", [0, 1, 5])
def test_rolled_back_tokens_are_generated_anew(engine: Engine, llama: PreTrainedModel, count: int) -> None:
    prompt, other = make_prompts([13, 6])
    sequence, beside = (engine.submit(tokens, SamplingParams(16)) for tokens in (prompt, other))
    for _ in range(6):
        engine.step()
    known = len(sequence.output)
    engine.rollback(sequence, count)
    assert len(sequence.output) == known - count
    list(engine.run())
    assert sequence.output == stock_tokens(llama, prompt, 16) and beside.output == stock_tokens(llama, other, 16)


def test_rollback_of_everything_and_of_too_much(engine: Engine, llama: PreTrainedModel) -> None:
    prompt = make_prompts([16])[0]
    sequence = engine.submit(prompt, SamplingParams(9))
    for _ in range(4):
        engine.step()
    with pytest.raises(ArgumentError, match="roll back"):
        engine.rollback(sequence, len(sequence.output) + 1)
    engine.rollback(sequence, len(sequence.output))
    assert sequence.output == []
    list(engine.run())
    assert sequence.output == stock_tokens(llama, prompt, 9)
    with pytest.raises(ArgumentError, match="length"):
        engine.rollback(sequence, 1)


def test_what_cannot_be_is_refused_at_once(engine: Engine, llama: PreTrainedModel) -> None:
    for prompt, params, message in (
        ([], None, "at least one token"),
        ([5, 1000], None, "ids 0"),
        ([5] * 60, SamplingParams(10), "at most 64"),
        ("text", None, "tokenizer"),
    ):
        with pytest.raises(ArgumentError, match=message):
            engine.submit(prompt, params)
    with pytest.raises(ArgumentError, match="2 prompts"):
        engine.generate([[5], [6]], [SamplingParams()])
    with pytest.raises(ArgumentError, match="own cache"):
        Engine(llama, "c32")
    for tokens, prefill in ((torch.ones(5, 9), 3), (torch.ones(2, 9), 9), (torch.ones(2, 9), 0), (torch.ones(9), 2)):
        with pytest.raises(ArgumentError, match="to score"):
            engine.score(tokens.long(), prefill)
    sequence = engine.submit([5, 6], SamplingParams(3))
    with pytest.raises(ArgumentError, match="while it scores"):
        engine.score(torch.ones(2, 9).long(), 3)
    engine.cancel(sequence)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_batch": 0}, "max_batch"), ({"memory": "x"}, "40GB"), ({"memory": 10, "num_pages": 3}, "both"),
     ({"memory": 10}, "one page"), ({"buckets": (1, 2)}, "buckets")],
)  # fmt: skip
def test_wrong_sizes(llama: PreTrainedModel, options: dict[str, object], message: str) -> None:
    with pytest.raises((ArgumentError, PoolExhaustedError), match=message):
        make_engine(llama, **options)
    assert not hasattr(llama, "_foldkv_swap"), "the model is as it was"


def test_memory_in_bytes_makes_that_pool(llama: PreTrainedModel) -> None:
    """fp32, 2 layers x 2 heads x 16 channels x K and V: 512 bytes a token."""
    with make_engine(llama, memory="64kB", max_batch=64) as engine:
        parameters = 2 * 2 * 5 * 2 * 16 * 4
        assert engine.num_pages == (64000 - parameters) // (PAGE * 512)
        planned = engine.memory_report()["planned"]
        assert planned["pool"] == engine.runner.paged.nbytes - planned["tables"] + engine.runner.rows.nbytes
        assert planned["total"] == sum(value for name, value in planned.items() if name != "total")


def test_an_interrupted_job_leaves_nothing_behind(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = iter(range(3))

    def step() -> list[object]:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return type(engine).step(engine)

    monkeypatch.setattr(engine, "step", step)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(make_prompts(LENGTHS), max_new_tokens=20)


@pytest.mark.parametrize(
    ("family", "backend", "engines"), [("llama", "aot_eager", 2), ("gemma3_text", "eager", 1), ("gpt_oss", "eager", 1)]
)
def test_a_compiled_step_has_no_graph_breaks(family: str, backend: str, engines: int) -> None:
    """`fullgraph=True` raises at a break; the counters say that there was one graph for each batch size, none again."""
    model = tiny_model(family)
    prompts = make_prompts((5, 11, 3))
    want = [stock_tokens(model, prompt, count) for prompt, count in zip(prompts, (5, 8, 8), strict=True)]
    torch._dynamo.utils.counters.clear()
    for _ in range(engines):  # they do not share what was compiled, nor its limit
        with make_engine(model, compile={"backend": backend}, buckets=(2, 4)) as engine:
            assert engine.generate(prompts, [SamplingParams(count) for count in (5, 8, 8)]) == want
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2 * engines
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe", "mixtral"])
def test_capturable_experts_give_the_same_tokens(family: str) -> None:
    """What a step on a GPU uses for experts, here on the CPU; and the model's own way afterwards."""
    model = tiny_model(family)
    prompts = make_prompts((5, 11, 3))
    want, before = [stock_tokens(model, prompt, 8) for prompt in prompts], model.get_experts_implementation()
    assert has_experts(model) and not has_experts(tiny_model("llama"))
    with make_engine(model) as engine:
        engine.runner._experts = True
        assert engine.generate(prompts, max_new_tokens=8) == want
    assert model.get_experts_implementation() == before
