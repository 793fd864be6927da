"""`foldkv generate` and `foldkv models`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hf_helpers import one_thread, save_checkpoint, tiny_model
from typer.testing import CliRunner

from foldkv.cli.main import app
from foldkv.hf import load_model
from foldkv.hf.models import REFUSED, SUPPORTED

pytestmark = pytest.mark.usefixtures(one_thread.__name__)
PROMPT = "w5 w7 w9 w11"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_checkpoint(tiny_model(), tmp_path_factory.mktemp("checkpoint")))


def run(*arguments: str, code: int = 0, stdin: str | None = None) -> tuple[str, str]:
    """Standard output and error of `foldkv ARGUMENTS`, which must end with `code`."""
    result = CliRunner().invoke(app, list(arguments), input=stdin)
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout, result.stderr


def test_generate_continues_the_prompt_as_the_stock_model_does(checkpoint: str) -> None:
    model, tokenizer = load_model(checkpoint)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    want = model.generate(**inputs, max_new_tokens=10, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    out, err = run("generate", checkpoint, "--kv", "c32", "--prompt", PROMPT, "--max-new-tokens", "10")
    assert out.strip() == tokenizer.decode(want, skip_special_tokens=True)
    assert err.startswith("c32: 32 bits/element, cache ") and err.rstrip().endswith("tokens/s")
    from_stdin, _ = run("generate", checkpoint, "--kv", "c32", "--prompt", "-", "--max-new-tokens", "10", stdin=PROMPT)
    assert from_stdin == out


def test_json_has_text_and_figures(checkpoint: str) -> None:
    arguments = (
        "generate",
        checkpoint,
        "--kv",
        "c4r,0:c16",
        "--prompt",
        PROMPT,
        "--max-new-tokens",
        "6",
        "--page-size",
        "16",
    )
    out, err = run(*arguments, "--json")
    found = json.loads(out)
    assert err == ""
    assert found["mode"] == "c4r,0:c16"
    assert found["bits_per_element"] == (16 + 4 + 2) / 2  # head_dim 16: two bits of scale and zero an element
    elements = 16 * 2 * 2 * 2 * 16  # page of 16 tokens, 2 layers, K and V, 2 heads of 16
    assert (found["cache_bytes"], found["cache_bytes_c16"]) == (elements * 11 // 8, elements * 2)
    assert (found["prompt_tokens"], found["new_tokens"]) == (4, 6)
    assert found["tokens_per_second"] == pytest.approx(found["new_tokens"] / found["seconds"])
    assert len(found["text"].split()) == 6


def test_sampling_follows_the_seed(checkpoint: str) -> None:
    def sample(seed: int) -> str:
        return run(
            "generate", checkpoint, "--kv", "c8d", "--prompt", PROMPT, "--temperature", "1.5", "--seed", str(seed)
        )[0]

    assert sample(1) == sample(1) != sample(2)


def test_beams(checkpoint: str) -> None:
    model, tokenizer = load_model(checkpoint)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    want = model.generate(**inputs, max_new_tokens=8, do_sample=False, num_beams=3)[0, 4:]
    out, _ = run("generate", checkpoint, "--kv", "c32", "--prompt", PROMPT, "--max-new-tokens", "8", "--num-beams", "3")
    assert out.strip() == tokenizer.decode(want, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--prompt", PROMPT), 1, "run `foldkv calibrate"),
        (("--prompt", PROMPT, "--kv", "c9"), 1, "mode: expected one of"),
        (("--prompt", PROMPT, "--scales", "nowhere"), 1, "nowhere"),
        (("--prompt", ""), 2, "--prompt: expected some text"),
        (("--prompt", PROMPT, "--kv", "c8d", "--chat"), 2, "a tokenizer with a chat template"),
        (("--prompt", PROMPT, "--kv", "c8d", "--max-new-tokens", "0"), 2, "max-new-tokens"),
        ((), 2, "--prompt"),
    ],
)
def test_bad_input_ends_in_one_line(checkpoint: str, arguments: tuple[str, ...], code: int, message: str) -> None:
    out, err = run("generate", checkpoint, *arguments, code=code)
    assert out == "" and message in err and "Traceback" not in err


def test_no_checkpoint(tmp_path: Path) -> None:
    _, err = run("generate", str(tmp_path / "absent"), "--prompt", PROMPT, code=1)
    assert "a checkpoint directory or a hub id" in err


def test_models_lists_every_family() -> None:
    out, _ = run("models")
    for family in (*SUPPORTED, *REFUSED):
        assert family.model_type in out
    found = json.loads(run("models", "--json")[0])
    assert [row["model_type"] for row in found["supported"]] == [family.model_type for family in SUPPORTED]
    assert all(row["note"] for row in found["refused"])


def test_help_and_models_import_neither_torch_nor_transformers() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom foldkv.cli.main import app\n"
        "for words in (['--help'], ['generate', '--help'], ['models']):\n"
        "    assert CliRunner().invoke(app, words).exit_code == 0\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
