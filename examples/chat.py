"""Talk to a model in the terminal, on a quantised cache that can be changed as you go.

    python examples/chat.py [MODEL] [--kv c8] [--device cuda]

Without a chat template in its tokenizer (the bundled model has none) the model continues the conversation as a text.
/kv c4 changes the cache (what was said is computed again), /new forgets everything, /stats says what the cache holds,
/quit ends.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import foldkv
from quant.errors import FoldkvError

BUNDLED = Path(__file__).parent / "tiny_lm" / "model"
MAX_SEQ_LEN = 2048


class Chat:
    """A conversation: what was said as token ids, and an engine of one row that goes on from there."""

    def __init__(self, model: str, kv: str, device: str, max_new_tokens: int, temperature: float, seed: int) -> None:
        loaded, self.tokenizer = foldkv.load_model(model, "float32" if device == "cpu" else "auto", device)
        folder = Path(model) / "kv_cache"
        if folder.is_dir():
            scales = foldkv.KVScales.load(folder, loaded.config)
        else:
            print("calibrating on text of the model's own ...", file=sys.stderr)
            scales = foldkv.calibrate(loaded, mode="c8", tokenizer=self.tokenizer, num_samples=16, max_seq_len=512)
        self.engine = foldkv.Engine(loaded, kv, scales, max_batch=1, max_seq_len=MAX_SEQ_LEN, tokenizer=self.tokenizer)
        self.sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": 0.95, "seed": seed}
        self.turns: list[dict[str, str]] = []

    def prompt(self) -> list[int]:
        """The conversation so far, by the tokenizer's template or as plain text, cut from the front to what fits."""
        if self.tokenizer.chat_template:
            ids = self.tokenizer.apply_chat_template(self.turns, add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
        else:
            ids = self.tokenizer(" ".join(turn["content"] for turn in self.turns))["input_ids"]
        return list(ids)[-(MAX_SEQ_LEN - int(self.sampling["max_new_tokens"])) :]

    def answer(self, text: str) -> None:
        """Print the model's answer to `text` as it comes."""
        self.turns.append({"role": "user", "content": text})
        tokens: list[int] = []
        shown = ""
        params = foldkv.SamplingParams(**self.sampling)  # type: ignore[arg-type]
        for _, token in self.engine.stream([self.prompt()], params):
            tokens.append(token)
            whole = self.tokenizer.decode(tokens, skip_special_tokens=True)
            if not whole.endswith("\ufffd"):  # else a character's bytes are not all here yet
                print(whole[len(shown) :], end="", flush=True)
                shown = whole
        print()
        self.turns.append({"role": "assistant", "content": shown})

    def command(self, line: str) -> None:
        """Obey /kv, /new or /stats."""
        name, _, argument = line[1:].partition(" ")
        if name == "kv":
            self.engine.load(argument.strip())
            print(self.engine)
        elif name == "new":
            self.turns.clear()
        elif name == "stats":
            swap: Any = self.engine.swap
            held = self.engine.memory.pool / 1e6
            print(f"{swap.mode}: {swap.bits_per_element:.4g} bits/element, pool {held:.2f} MB, {len(self.turns)} turns")
        else:
            print("expected /kv MODE, /new, /stats or /quit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(BUNDLED))
    parser.add_argument("--kv", default="c8")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--max-new-tokens", type=int, default=60)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chat = Chat(options.model, options.kv, options.device, options.max_new_tokens, options.temperature, options.seed)
    asks = sys.stdin.isatty()
    while True:
        print("> " if asks else "", end="", flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            return
        try:
            if line.startswith("/"):
                chat.command(line.strip())
            elif line.strip():
                chat.answer(line.strip())
        except FoldkvError as error:
            print(f"error: {error}")
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    main()
