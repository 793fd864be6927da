"""`foldkv generate`: text from a model whose KV cache is quantised."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quant.errors import ArgumentError, describe

from .common import UsageError, cli_errors, console, emit_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from foldkv.hf import FoldCache
    from quant.scales import KVScales

KV_CACHE_DIR = "kv_cache"


@cli_errors()
def generate(
    model: Annotated[str, typer.Argument(help="Checkpoint directory or hub id.", show_default=False)],
    prompt: Annotated[str, typer.Option(help="Text to continue; '-' reads it from stdin.", show_default=False)],
    kv: Annotated[str, typer.Option(help="Cache mode: c16, c8, c8d, k8v4, c4, c4r, ...; per layer: c4,0:c8.")] = "c8",
    scales: Annotated[Path | None, typer.Option(help="Folder of the calibration (default: MODEL/kv_cache)")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="Sample, with this temperature.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Sample from this probability mass.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the sampling.")] = None,
    num_beams: Annotated[int, typer.Option(min=1, help="Beams; 1 is no beam search.")] = 1,
    chat: Annotated[bool, typer.Option("--chat", help="Take the prompt as a user's turn in a chat.")] = False,
    page_size: Annotated[int, typer.Option(help="Tokens of a page: 16, 32, 64, 128.")] = 64,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="Compute dtype (default: the checkpoint's)")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print text and figures as JSON.")] = False,
) -> None:
    """Generate text on a quantised KV cache; greedy unless a temperature, top-p or beams are given."""
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise UsageError(describe("--prompt", "some text", "none"))
    from transformers import TextStreamer, set_seed

    from foldkv.engine import explain
    from foldkv.hf import load_model, swap_kv_cache

    loaded, tokenizer = load_model(model, dtype, device)
    swap = swap_kv_cache(loaded, kv, _find_scales(model, scales, kv, loaded), page_size=page_size)
    inputs = _encode(tokenizer, text, chat).to(loaded.device)
    prompt_tokens = inputs["input_ids"].shape[1]
    if not prompt_tokens:
        raise ArgumentError(describe("--prompt", "at least one token", "none, by this tokenizer"))
    streams = sys.stdout.isatty() and num_beams == 1 and not json
    if seed is not None:
        set_seed(seed)
    options: dict[str, Any] = {
        **inputs,
        **_sampling(temperature, top_p),
        "max_new_tokens": max_new_tokens,
        "num_beams": num_beams,
        "pad_token_id": tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        "streamer": TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if streams else None,
    }
    on_engine = explain(loaded, **options).on_engine
    begin = time.perf_counter()
    out: Any = loaded.generate(**options, **({} if on_engine else {"return_dict_in_generate": True}))
    seconds = time.perf_counter() - begin
    cache: FoldCache = swap.engine.runner.cache if on_engine else out.past_key_values
    tokens = (out if on_engine else out.sequences)[0]
    new = tokens[prompt_tokens:]
    answer = tokenizer.decode(new, skip_special_tokens=True)
    figures = {
        "mode": swap.mode,
        "bits_per_element": swap.bits_per_element,
        **_cache_bytes(cache, len(tokens) - 1, num_beams),
        "prompt_tokens": prompt_tokens,
        "new_tokens": len(new),
        "seconds": seconds,
        "tokens_per_second": len(new) / seconds,
        "engine": on_engine,
    }
    if cache.num_nonfinite:
        text = f"{cache.num_nonfinite} elements of K and V were NaN or infinite; try --dtype float32"
        console.print(f"[yellow]warning[/] {text}")
    if json:
        emit_json({"text": answer, **figures})
        return
    if not streams:
        typer.echo(answer)
    console.print(_summary(figures), highlight=False, soft_wrap=True)


def _find_scales(model: str, scales: Path | None, kv: str, loaded: PreTrainedModel) -> KVScales | None:
    """The scales asked for, or those beside the checkpoint; ArgumentError where the mode needs some and none are there."""
    from quant.scales import KVScales
    from quant.spec import parse_modes

    directory = scales or Path(model) / KV_CACHE_DIR
    if scales is not None or directory.is_dir():
        return KVScales.load(directory, loaded.config)
    if parse_modes(kv, loaded.config.get_text_config(decoder=True).num_hidden_layers, plan="c8").needs_scales:
        fix = f"run `foldkv calibrate {model}`, or take a mode without them (c8d, c4r)"
        raise ArgumentError(describe(f"scales of mode {kv!r}", str(directory), "no such folder", fix))
    return None


def _encode(tokenizer: Any, text: str, chat: bool) -> Any:
    if not chat:
        return tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    if not tokenizer.chat_template:
        raise UsageError(describe("--chat", "a tokenizer with a chat template", "none"))
    turns = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def _sampling(temperature: float | None, top_p: float | None) -> dict[str, Any]:
    """Options of `generate`; greedy, against whatever the checkpoint's defaults say, unless sampling is asked for."""
    if not temperature and top_p is None:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": temperature or 1.0, "top_p": 1.0 if top_p is None else top_p}


def _cache_bytes(cache: FoldCache, num_tokens: int, num_beams: int) -> dict[str, int]:
    """Bytes of the pages that were in use at the end, and of as many tokens at 16 bits."""
    paged = cache.paged
    pages = paged.num_used_pages if num_beams > 1 else paged.table.num_pages_for(num_tokens)
    used = pages * paged.page_size * paged.elements_per_token
    return {"cache_bytes": round(used * paged.bits_per_element / 8), "cache_bytes_c16": used * 2}


def _summary(figures: dict[str, Any]) -> str:
    kilobytes, plain = (figures[name] / 1e3 for name in ("cache_bytes", "cache_bytes_c16"))
    return (
        f"{figures['mode']}: {figures['bits_per_element']:.4g} bits/element, "
        f"cache {kilobytes:,.0f} kB (c16 {plain:,.0f} kB, {plain / kilobytes:.2f}x), "
        f"{figures['new_tokens']} tokens in {figures['seconds']:.2f} s = {figures['tokens_per_second']:.1f} tokens/s"
    )
