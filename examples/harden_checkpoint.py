"""Make a checkpoint whose KV cache is hard to quantise, without changing what the model computes.

    python examples/harden_checkpoint.py MODEL OUT --spread 2            channels of K and V scaled apart
    python examples/harden_checkpoint.py MODEL OUT --qwen2 --bias 50     K bias of 50 standard deviations on slow RoPE pairs
    ... --check TEXT.txt                                                 measure the change of the function

Three rewrites, each alone or together:

spread:  K channel pair (i, i + d/2) times 2^n, the group's query rows divided by it; RoPE turns both channels of a pair
         alike, so q.k stays. V channels times 2^n, o_proj's columns divided by it. n is normal with deviation SPREAD,
         rounded, at most `MAX_EXPONENT`: powers of two, so the weights stay exact in bf16. Works for any Llama-like model.
qwen2:   a Llama checkpoint as Qwen2: the same weights, query, key and value biases of zero.
bias:    a constant b on the K channels of the slowest pairs. It adds q.R(t - s)b to a logit, which softmax does not see
         only where R does not turn: so those pairs are slowed by `SLOW_FACTOR` (rope_type "llama3"). Slowing them is the
         one inexact step; `--check` says what it costs and what bias and scales cost beyond it.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

MAX_EXPONENT = 4
SLOW_PAIRS = 4
SLOW_FACTOR = 4096.0
MIN_MEASURE_TOKENS = 512


def as_qwen2(model: Any) -> Any:
    """A Llama model as Qwen2 with zero biases."""
    facts = model.config.to_dict()
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
        "num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
        "rope_parameters", "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    config = Qwen2Config(**{name: facts[name] for name in names if name in facts}, use_sliding_window=False)
    other = Qwen2ForCausalLM(config).to(model.dtype).eval()
    missing, unexpected = other.load_state_dict(model.state_dict(), strict=False)
    if unexpected or any("bias" not in name for name in missing):
        raise SystemExit(f"expected a Llama checkpoint, got other tensors: {[*missing, *unexpected][:3]}")
    for name, parameter in other.named_parameters():
        if name in missing:
            parameter.data.zero_()
    return other


@torch.no_grad()
def spread_channels(model: Any, deviation: float, generator: torch.Generator) -> None:
    """Scale pairs of K channels and channels of V apart, queries and output projection by the inverse."""
    for layer in model.model.layers:
        attention = layer.self_attn
        d = attention.head_dim
        h_kv = attention.k_proj.out_features // d
        group = attention.q_proj.out_features // d // h_kv
        pair = _powers((h_kv, d // 2), deviation, generator)
        k_factor = torch.cat((pair, pair), dim=-1)
        v_factor = _powers((h_kv, d), deviation, generator)
        _scale_rows(attention.k_proj, k_factor.flatten())
        _scale_rows(attention.q_proj, 1 / k_factor.repeat_interleave(group, dim=0).flatten())
        _scale_rows(attention.v_proj, v_factor.flatten())
        columns = 1 / v_factor.repeat_interleave(group, dim=0).flatten()
        attention.o_proj.weight.mul_(columns.to(attention.o_proj.weight.dtype))


def _powers(shape: tuple[int, int], deviation: float, generator: torch.Generator) -> Tensor:
    exponents = torch.randn(shape, generator=generator) * deviation
    return 2.0 ** exponents.round().clamp(-MAX_EXPONENT, MAX_EXPONENT)


def _scale_rows(linear: Any, factor: Tensor) -> None:
    linear.weight.mul_(factor.to(linear.weight.dtype)[:, None])
    if linear.bias is not None:
        linear.bias.mul_(factor.to(linear.bias.dtype))


def slow_pairs(model: Any, count: int, factor: float) -> Any:
    """A copy of `model` whose `count` slowest RoPE pairs turn `factor` times slower."""
    config = type(model.config)(**model.config.to_dict())
    rope = dict(config.rope_parameters)
    d = config.head_dim
    theta = rope["rope_theta"]
    # rope_type "llama3" slows the wavelengths above original / low_freq_factor and blends down to original / high.
    slowest_kept, fastest_slowed = (2 * math.pi * theta ** (2 * (d // 2 - n) / d) for n in (count + 1, count))
    edge = math.sqrt(slowest_kept * fastest_slowed)
    scale = 1024  # below max_position_embeddings, which transformers wants; only its ratios to the factors count
    rope |= {
        "rope_type": "llama3", "factor": factor, "original_max_position_embeddings": scale,
        "low_freq_factor": scale / edge, "high_freq_factor": scale / edge * (1 + 1e-9),
    }  # fmt: skip
    config.rope_parameters = rope
    slowed = type(model)(config).to(model.dtype).eval()
    slowed.load_state_dict(model.state_dict())
    turned = (slowed.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq).tolist()
    wanted = [1.0] * (d // 2 - count) + [1 / factor] * count
    if any(abs(a / b - 1) > 1e-3 for a, b in zip(turned, wanted, strict=True)):
        raise SystemExit(f"expected the {count} slowest pairs slowed {factor:g} times, got {turned[-count - 1 :]}")
    return slowed


@torch.no_grad()
def bias_keys(model: Any, sigmas: float, ids: Tensor, generator: torch.Generator) -> None:
    """Add `sigmas` standard deviations, measured on `ids`, of either sign to the K channels of the slow pairs."""
    deviations: dict[int, Tensor] = {}

    def measure(idx: int) -> Any:
        return lambda module, inputs, output: deviations.__setitem__(idx, output.flatten(0, 1).float().std(0))

    layers = model.model.layers
    hooks = [layer.self_attn.k_proj.register_forward_hook(measure(idx)) for idx, layer in enumerate(layers)]
    model(ids)
    for hook in hooks:
        hook.remove()
    for idx, layer in enumerate(layers):
        projection, d = layer.self_attn.k_proj, layer.self_attn.head_dim
        if projection.bias is None:
            raise SystemExit("--bias needs K biases: add --qwen2")
        channel = torch.arange(d) % (d // 2) >= d // 2 - SLOW_PAIRS
        chosen = channel.repeat(projection.out_features // d)
        sign = torch.randint(0, 2, (projection.out_features,), generator=generator) * 2 - 1
        # Between 0.8 and 1.2 times as asked: real biases differ.
        size = 0.8 + 0.4 * torch.rand(projection.out_features, generator=generator)
        projection.bias.add_((chosen * sign * size * sigmas * deviations[idx]).to(projection.bias.dtype))


@torch.no_grad()
def change(base: Any, other: Any, ids: Tensor) -> dict[str, float]:
    """Mean KL divergence, top-1 agreement and perplexities of two models on ids `[windows, len]`, in fp32."""
    kld, same, nll, base_nll = [], [], [], []
    for row in ids:
        a, b = (model(row[None]).logits[0, :-1].double().log_softmax(-1) for model in (base, other))
        kld.append((a.exp() * (a - b)).sum(-1))
        same.append((a.argmax(-1) == b.argmax(-1)).double())
        base_nll.append(-a.gather(1, row[1:, None]))
        nll.append(-b.gather(1, row[1:, None]))
    mean = [float(torch.cat(part).mean()) for part in (kld, same, base_nll, nll)]
    return {"kld": mean[0], "top1": mean[1], "base_ppl": math.exp(mean[2]), "ppl": math.exp(mean[3])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--qwen2", action="store_true", help="write a Llama checkpoint as Qwen2")
    parser.add_argument("--spread", type=float, default=0.0, help="deviation of the channels' binary exponents")
    parser.add_argument("--bias", type=float, default=0.0, help="K bias on slow pairs, in standard deviations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", type=Path, help="text to measure the change of the function on")
    parser.add_argument("--windows", type=int, default=4, help="windows of 1024 tokens for --check")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    base = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    stored = json.loads((arguments.model / "config.json").read_text())
    dtype = getattr(torch, stored.get("dtype") or stored.get("torch_dtype") or "float32")
    generator = torch.Generator().manual_seed(arguments.seed)

    model = as_qwen2(base) if arguments.qwen2 else AutoModelForCausalLM.from_pretrained(arguments.model).float().eval()
    steps = {}
    if arguments.bias:
        model = slow_pairs(model, SLOW_PAIRS, SLOW_FACTOR)
        steps["slow pairs"] = base, slow_pairs(as_qwen2(base) if arguments.qwen2 else base, SLOW_PAIRS, SLOW_FACTOR)
        ids = torch.randint(2, model.config.vocab_size, (4, MIN_MEASURE_TOKENS), generator=generator)
        bias_keys(model, arguments.bias, ids, generator)
    if arguments.spread:
        spread_channels(model, arguments.spread, generator)
    model = model.to(dtype)
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    if arguments.check:
        again = AutoModelForCausalLM.from_pretrained(arguments.out, dtype=torch.float32).eval()
        before = steps["slow pairs"][1] if steps else base
        steps["bias and scales" if steps else "rewrite"] = before, again
        count = arguments.windows * 1024
        tokens = tokenizer(arguments.check.read_text(encoding="utf-8")[: 16 * count], verbose=False)["input_ids"]
        ids = torch.tensor(tokens[:count]).view(-1, 1024)
        for name, pair in steps.items():
            found = change(*pair, ids)
            print(f"{name}: KLD {found['kld']:.2e}, top-1 {found['top1']:.2%}, "
                  f"perplexity {found['base_ppl']:.3f} -> {found['ppl']:.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
