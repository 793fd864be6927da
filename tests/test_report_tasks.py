"""Pass keys and tasks of lm-evaluation-harness: that they go through the cache, and score what they should."""

from __future__ import annotations

import math
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from report_helpers import DishonestSource, save_checkpoint, tiny_model, tiny_scales, token_windows
from transformers import AutoTokenizer, PreTrainedModel

from foldkv.accuracy import accuracy_report, needle
from foldkv.accuracy import tasks as tasks_module
from foldkv.accuracy.needle import needle_grid, prompt
from foldkv.accuracy.report import make_sources
from foldkv.accuracy.sources import StockSource
from foldkv.accuracy.tasks import run_tasks
from quant.errors import ArgumentError

ROOT = Path(__file__).parents[1]
TASKS = ROOT / "examples" / "tasks"


class Words:
    """A tokenizer of whole words."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [self.known.setdefault(word, len(self.known)) for word in text.split()]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model()


def test_a_prompt_holds_its_key_at_its_depth() -> None:
    words = Words()
    for depth in (0.1, 0.5, 0.9):
        ids, answer = prompt(words, 400, depth, "48213")
        assert len(ids) + len(answer) == 400 and answer == words.encode("48213")
        at = ids.index(answer[0])
        assert at / 400 == pytest.approx(depth, abs=0.08)
        assert ids[-3:] == words.encode("pass key is")


def test_a_model_that_copies_finds_every_key(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a model: after "The pass key is" it says the word that came after those words first."""
    monkeypatch.setattr(needle, "LENGTHS", (64, 128))
    words = Words()

    class Copies:
        device = torch.device("cpu")
        forgets = False

        def __call__(self, ids: torch.Tensor, past_key_values: list[int], use_cache: bool) -> Any:
            past_key_values += ids[0].tolist()
            asked = words.encode("The pass key is")
            text = past_key_values
            places = [i for i in range(len(text) - 4) if text[i : i + 4] == asked]
            said = text[places[0] + 4] if places and not self.forgets else 0
            logits = torch.zeros(1, ids.shape[1], 200)
            # The key stands with a full stop in the text.
            name = next(word for word, number in words.known.items() if number == said).rstrip(".")
            logits[..., words.encode(name)[0]] = 1
            return type("Output", (), {"logits": logits})

    source = DishonestSource("copies", None)
    monkeypatch.setattr(source, "open", lambda model: nullcontext(lambda batch, size: []))
    copies = Copies()
    grid = needle_grid(copies, words, source, 200)  # type: ignore[arg-type]
    assert grid == {"lengths": [64, 128], "depths": [0.1, 0.5, 0.9], "right": [[1.0] * 3] * 2}
    copies.forgets = True
    assert needle_grid(copies, words, source, 100)["right"] == [[0.0] * 3]  # type: ignore[arg-type]


def test_the_grid_runs_through_a_real_cache(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(needle, "LENGTHS", (64,))
    save_checkpoint(model, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    base, sources = make_sources(model, ["c8"], tiny_scales(model))
    for source in (base, sources[0]):
        assert needle_grid(model, tokenizer, source, 512)["lengths"] == [64]


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="lm_eval is here")
def test_tasks_without_the_harness_are_refused_at_once(model: PreTrainedModel) -> None:
    with pytest.raises(ArgumentError, match="pip install lm_eval"):
        accuracy_report(model, ["c8d"], token_windows(2, 16, seed=1), scales=tiny_scales(model), tasks=["arc_easy"])


@pytest.fixture
def tiny_lm(monkeypatch: pytest.MonkeyPatch) -> tuple[PreTrainedModel, Any]:
    """The bundled checkpoint, where the harness is installed; nothing is looked for on a network."""
    pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.chdir(ROOT)
    import foldkv

    return foldkv.load_model(str(ROOT / "examples" / "tiny_lm" / "model"), "float32")


def test_what_a_task_generates_goes_through_the_cache(tiny_lm: tuple[PreTrainedModel, Any]) -> None:
    """Prompts of two lengths, padded on the left as the harness does: 16 bits write the stock model's text."""
    model, tokenizer = tiny_lm
    base, sources = make_sources(model, [], tiny_scales(model))
    texts = [tokenizer.encode(text) for text in ("The city of", "The history of the city began in the year")]
    prompts = torch.tensor([[0] * (len(texts[1]) - len(text)) + text for text in texts])
    found = {}
    for source in (StockSource(), base, sources[-1]):
        with source.open(model) as new_cache:
            lm = tasks_module._lm_class()(
                model, tokenizer, source, new_cache, route="prefill", batch_size=2, max_length=64
            )
            found[source.name] = lm._model_generate(prompts, 40, ["@@@"], attention_mask=(prompts != 0).long())
            assert lm.num_tokens == 2 * 40
    assert torch.equal(found["stock"], found["c16"]) and not torch.equal(found["stock"], found["c4x"])


def test_both_routes_score_alike_and_a_wrong_one_is_refused(tiny_lm: tuple[PreTrainedModel, Any]) -> None:
    model, tokenizer = tiny_lm
    base, sources = make_sources(model, [], tiny_scales(model))
    options = {"include_path": TASKS, "limit": 3, "max_length": 128}
    for source in (base, sources[-1], StockSource()):
        one, other = (
            run_tasks(model, tokenizer, source, ["who_has_what_text"], route=route, **options)["who_has_what_text"]
            for route in ("prefill", "decode")
        )
        assert one["word_perplexity"] == pytest.approx(other["word_perplexity"], rel=1e-3)
    with pytest.raises(ArgumentError, match="prefill, decode"):
        run_tasks(model, tokenizer, base, ["who_has_what_text"], route="sideways", **options)


def test_tasks_are_scored_through_the_cache(tiny_lm: tuple[PreTrainedModel, Any]) -> None:
    """The figures of a 16-bit cache are those that the stock model gives; the control's are not."""
    model, tokenizer = tiny_lm
    scales = tiny_scales(model)
    base, sources = make_sources(model, [], scales)
    names = ["who_has_what", "who_has_what_text"]
    stock, exact, control = (
        run_tasks(model, tokenizer, source, names, include_path=TASKS, limit=12)
        for source in (StockSource(), base, sources[-1])
    )
    assert exact["who_has_what"] == stock["who_has_what"]
    kind = "word_perplexity"
    assert exact["who_has_what_text"][kind] == pytest.approx(stock["who_has_what_text"][kind], rel=1e-3)
    assert abs(math.log(control["who_has_what_text"][kind] / stock["who_has_what_text"][kind])) > 0.05
    with pytest.raises(ArgumentError, match="unknown_task"):
        run_tasks(model, tokenizer, base, ["unknown_task"], include_path=TASKS)
