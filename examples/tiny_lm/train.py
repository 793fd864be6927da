"""Train the checkpoint bundled with foldkv: a 5.8 M parameter Llama, on one GPU, in minutes.

python examples/tiny_lm/train.py --train train_tokens.u16.xz --valid valid_tokens.u16.bin \
    --tokenizer tokenizer --out OUT
"""
# ruff: noqa: E402

from __future__ import annotations

import time

START = time.monotonic()  # before the slow imports: the budget counts them

import argparse
import contextlib
import datetime
import json
import math
import platform
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers
from lm import (
    BOS,
    EOS,
    Optimiser,
    batches,
    check_forward,
    load_tokens,
    lr_factor,
    model_config,
    next_token_loss,
    rope_tables,
    windows,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

Loss = Callable[[Tensor], Tensor]
PROMPTS = ("The history of the city", "She opened the door and", "To create a new file, you")
ATTENTION = {
    "fused": [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION],
    "flash": [SDPBackend.FLASH_ATTENTION],
    "any": [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH],
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--train", type=Path, required=True, help="uint16 tokens, .xz or raw")
    add("--valid", type=Path, required=True, help="uint16 tokens, .xz or raw")
    add("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    add("--out", type=Path, required=True, help="folder for the checkpoint")
    add("--log", type=Path, help="JSON lines (default: OUT/train_log.jsonl)")
    add("--minutes", type=float, default=6.2, help="wall time from start to end, all included")
    add("--reserve", type=float, default=25.0, help="seconds of it kept for saving and samples")
    add("--tokens", type=int, default=0, help="stop after this many tokens (0: no limit)")
    add("--batch", type=int, default=48, help="sequences a step")
    add("--seq-len", type=int, default=2048)
    add("--lr", type=float, default=0.02, help="for Muon (matrices); 0: AdamW for all")
    add("--adam-lr", type=float, default=0.003, help="for AdamW (embedding, norms)")
    add("--weight-decay", type=float, default=0.1)
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--data-tokens", type=int, default=0, help="read only this many training tokens")
    add("--valid-tokens", type=int, default=200_000)
    add("--log-every", type=int, default=50, help="steps")
    add("--no-compile", action="store_true")
    add("--flash", action="store_true", help="flash attention, never cuDNN's")
    args = parser.parse_args(argv)
    args.log = args.log or args.out / "train_log.jsonl"
    return args


def say(text: str) -> None:
    """A line for the one who watches, with the seconds since the start."""
    print(f"[{time.monotonic() - START:6.1f} s] {text}", flush=True)


def autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """bf16 on the GPU; the CPU, for trials only, stays in fp32."""
    if device.type == "cuda":
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()


@torch.no_grad()
def evaluate(loss: Loss, data: Tensor, length: int = 1024, batch: int = 16) -> float:
    """Mean nats a token over `data`, in windows of `length` tokens."""
    total, count = 0.0, 0
    for tokens in windows(data, batch, min(length, data.numel() - 1)):
        targets = tokens[:, 1:].numel()
        total += float(loss(tokens)) * targets
        count += targets
    return total / count


def choose_loss(
    model: LlamaForCausalLM, args: argparse.Namespace, stack: contextlib.ExitStack
) -> tuple[Loss, Loss, str]:
    """The loss for training steps, the one for validation, and how the first runs.

    Compiled with the fused attention kernels if that works, else the next best; what works stays on
    until `stack` closes.
    """
    device = model.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    cos, sin = rope_tables(model, model.config.max_position_embeddings)
    trial = torch.randint(model.config.vocab_size, (args.batch, args.seq_len + 1))
    trial = trial.to(device)
    plans = [(True, "fused"), (True, "flash"), (False, "flash")] if device.type == "cuda" else []
    for compiled, attention in [*plans, (False, "any")]:
        if (compiled and args.no_compile) or (attention == "fused" and args.flash):
            continue
        step = torch.compile(next_token_loss, dynamic=False) if compiled else next_token_loss

        def loss(tokens: Tensor, step: Callable[..., Tensor] = step) -> Tensor:
            length = tokens.shape[1] - 1
            with autocast(device):
                return step(model, tokens, (cos[:, :length], sin[:, :length]), dtype)

        context = stack.enter_context(contextlib.ExitStack())
        try:
            context.enter_context(sdpa_kernel(ATTENTION[attention]))
            for _ in range(3):
                torch.autograd.backward(loss(trial))
                model.zero_grad(set_to_none=True)
            plain: Loss = lambda tokens: loss(tokens, next_token_loss)  # noqa: E731
            return loss, plain, f"{'compiled' if compiled else 'eager'}, {attention} attention"
        except Exception as error:
            context.close()
            torch.compiler.reset()
            model.zero_grad(set_to_none=True)
            say(f"compiled={compiled} attention={attention} failed: {str(error)[:500]}")
    raise RuntimeError("no way to run a training step on this device")


def train(
    model: LlamaForCausalLM,
    args: argparse.Namespace,
    loss: Loss,
    valid_loss: Callable[[], float],
    data: Tensor,
) -> dict[str, float]:
    """Train until the time or the tokens are used up; write the log; return the last figures."""
    optimiser = Optimiser(model, args.lr, args.adam_lr, args.weight_decay)
    begin, end = time.monotonic(), START + 60 * args.minutes - args.reserve
    if end <= begin:
        raise SystemExit(f"no time left to train: {begin - START:.0f} s used before the first step")
    source = batches(data, args.batch, args.seq_len)
    step, tokens, progress, evaluations = 0, 0, 0.0, 0
    record: dict[str, float] = {}
    recent, since, mark, marked = torch.zeros((), device=data.device), 0, begin, 0
    with args.log.open("w") as log:
        while progress < 1.0:
            factor = lr_factor(progress, step)
            value = loss(next(source))
            torch.autograd.backward(value)
            optimiser.step(factor)
            recent, since = recent + value.detach(), since + 1
            step, tokens = step + 1, tokens + args.batch * args.seq_len
            elapsed = (time.monotonic() - begin) / (end - begin)
            progress = max(elapsed, tokens / args.tokens if args.tokens else 0.0)
            if step % args.log_every and progress < 1.0:
                continue
            train_loss = float(recent) / since  # the one place that waits for the GPU
            now = time.monotonic()
            record = {
                "step": step,
                "tokens": tokens,
                "loss": round(train_loss, 4),
                "lr": round(args.lr * factor, 6),
                "tokens_per_second": round((tokens - marked) / (now - mark)),
                "seconds": round(now - START, 1),
            }
            if not math.isfinite(train_loss):
                raise SystemExit(f"the loss is {train_loss} at step {step}: lower --lr")
            if progress >= min(1.0, evaluations / 20):
                evaluations = 1 + int(progress * 20)
                record["valid_loss"] = round(valid_loss(), 4)
                say(json.dumps(record))
            log.write(json.dumps(record) + "\n")
            log.flush()
            recent, since, mark, marked = torch.zeros_like(recent), 0, time.monotonic(), tokens
    return record


def save(model: Any, tokenizer: Path, out: Path) -> None:
    """The checkpoint in bf16 with its tokenizer, whose JSON is written without white space."""
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig.from_dict(
        {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS}
    )
    model.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = json.loads((tokenizer / name).read_text(encoding="utf-8"))
        if "model_max_length" in content:
            content["model_max_length"] = model.config.max_position_embeddings
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        (out / name).write_text(text, encoding="utf-8")


def write_samples(model: Any, out: Path, new_tokens: int = 100) -> str:
    """Continue each prompt twice, greedily and sampled, into sample.txt."""
    tokenizer = AutoTokenizer.from_pretrained(out)
    sampled = {"do_sample": True, "temperature": 0.8, "top_p": 0.95, "top_k": 50}
    parts = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        for way in ({"do_sample": False}, sampled):
            ids = model.generate(**inputs.to(model.device), max_new_tokens=new_tokens, **way)
            parts.append(f"[{json.dumps(way)}]\n{tokenizer.decode(ids[0])}\n")
    text = "\n".join(parts)
    (out / "sample.txt").write_text(text, encoding="utf-8")
    return text


def main(argv: list[str] | None = None) -> None:
    """Train, save, load again, measure, and write training.json."""
    args = parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    args.log.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device(args.device)
    model: Any = LlamaForCausalLM(model_config())
    if args.seq_len > model.config.max_position_embeddings:
        raise SystemExit("--seq-len is longer than the model's context, 2048")
    check_forward(model)
    torch.nn.Module.to(model, device)
    with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as stack:
        loading: Future[Tensor] = pool.submit(load_tokens, args.train, args.data_tokens)
        valid = load_tokens(args.valid, args.valid_tokens).to(device)
        loss, plain, how = choose_loss(model, args, stack)
        untrained = evaluate(plain, valid)
        say(f"{how}; untrained validation loss {untrained:.4f}")
        data = loading.result().to(device)
        if int(data.max()) >= model.config.vocab_size:
            raise SystemExit(f"token id {int(data.max())} is outside the vocabulary")
        say(f"{data.numel():,} training tokens")
        last = train(model, args, loss, lambda: evaluate(plain, valid), data)
    save(model, args.tokenizer, args.out)
    stored: Any = AutoModelForCausalLM.from_pretrained(args.out, dtype="auto")
    torch.nn.Module.to(stored, device)
    final = evaluate(
        lambda t: cross_entropy(
            stored(input_ids=t[:, :-1], use_cache=False).logits.float().flatten(0, 1),
            t[:, 1:].flatten(),
        ),
        valid,
    )
    say(f"perplexity {math.exp(final):.2f} trained, {math.exp(untrained):.0f} untrained")
    print(write_samples(stored, args.out), flush=True)
    size = sum((args.out / f).stat().st_size for f in ("model.safetensors", "tokenizer.json"))
    shown = {k: v.name if isinstance(v, Path) else v for k, v in vars(args).items()}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    summary = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": name,
        "how": how,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "parameters": sum(p.numel() for p in stored.parameters()),
        "checkpoint_bytes": size,
        "steps": last["step"],
        "tokens_seen": last["tokens"],
        "train_tokens": data.numel(),
        "epochs": round(last["tokens"] / data.numel(), 2),
        "wall_seconds": round(time.monotonic() - START, 1),
        "final_train_loss": last["loss"],
        "valid_tokens": valid.numel(),
        "valid_window": 1024,
        "valid_loss": round(final, 4),
        "valid_loss_untrained": round(untrained, 4),
        "valid_perplexity": round(math.exp(final), 3),
        "valid_perplexity_untrained": round(math.exp(untrained), 1),
        "arguments": shown,
    }
    (args.out / "training.json").write_text(json.dumps(summary, indent=2) + "\n")
    say(json.dumps(summary))


if __name__ == "__main__":
    main(sys.argv[1:])
