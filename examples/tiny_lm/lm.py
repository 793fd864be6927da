"""The parts that `train.py` puts together: model, loss, data, optimiser, schedule."""

from __future__ import annotations

import lzma
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

BOS, EOS = 0, 1
Rope = tuple[Tensor, Tensor]


def model_config(context: int = 2048) -> LlamaConfig:
    """5.8 M parameters: with the tokenizer, the checkpoint stays under 12 MB in bf16.

    There is no pad_token_id: it equals `<|eos|>`, which ends every document here, and an embedding
    row named as padding gets no gradient.
    """
    return LlamaConfig(
        vocab_size=8192,
        hidden_size=320,
        intermediate_size=568,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=context,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=None,
    )


def rope_tables(model: LlamaForCausalLM, length: int) -> Rope:
    """The model's own cosines and sines, each (1, length, head_dim), for positions from 0."""
    weight = model.model.embed_tokens.weight
    positions = torch.arange(length, device=weight.device)[None]
    cos, sin = model.model.rotary_emb(weight.detach(), positions)
    return cos, sin


def logits_of(model: LlamaForCausalLM, tokens: Tensor, rope: Rope, dtype: torch.dtype) -> Tensor:
    """The forward pass of `model` from its own modules, with plain causal SDPA.

    It says what `model(tokens).logits` says without building masks or caches, so that torch.compile
    sees one graph and attention is always the fused kernel. `check_forward` compares the two.
    """
    batch, length = tokens.shape
    x = model.model.embed_tokens(tokens).to(dtype)
    for layer in model.model.layers:
        attention = layer.self_attn
        h = layer.input_layernorm(x)
        heads = (batch, length, -1, attention.head_dim)
        q, k, v = (
            proj(h).view(heads).transpose(1, 2) for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *rope)
        q, k = q.to(v.dtype), k.to(v.dtype)
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + attention.o_proj(out.transpose(1, 2).reshape(batch, length, -1)).to(dtype)
        x = x + layer.mlp(layer.post_attention_layernorm(x)).to(dtype)
    logits: Tensor = model.lm_head(model.model.norm(x))
    return logits


def next_token_loss(model: LlamaForCausalLM, tokens: Tensor, rope: Rope, dtype: torch.dtype) -> Tensor:
    """Mean loss in nats a token; `tokens` is (batch, length + 1)."""
    logits = logits_of(model, tokens[:, :-1], rope, dtype)
    return cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def check_forward(model: LlamaForCausalLM) -> None:
    """Raise if `logits_of` and the model's own forward differ (fp32, on the CPU)."""
    tokens = torch.randint(model.config.vocab_size, (2, 48))
    ours = logits_of(model, tokens, rope_tables(model, 48), torch.float32)
    theirs = model(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def load_tokens(path: Path, limit: int = 0) -> Tensor:
    """Little-endian uint16 token ids, .xz or raw, as int32; only the first `limit` if given."""
    nbytes = 2 * limit if limit else -1
    with lzma.open(path) if path.suffix == ".xz" else path.open("rb") as file:
        ids = np.frombuffer(file.read(nbytes), dtype="<u2")
    return torch.from_numpy(ids.astype(np.int32))


def batches(data: Tensor, batch: int, length: int) -> Iterator[Tensor]:
    """Endless (batch, length + 1) windows; each epoch cuts the data anew, in random order."""
    span = torch.arange(length + 1, device=data.device)
    room = data.numel() - 1 - length
    if room < batch * length:
        raise ValueError(f"{data.numel()} tokens are too few for a batch of {batch} x {length}")
    while True:
        shift = int(torch.randint(length, ()))
        starts = shift + length * torch.randperm((room - shift) // length + 1, device=data.device)
        for chosen in torch.split(starts, batch):
            if chosen.numel() == batch:
                yield data[chosen[:, None] + span].long()


def windows(data: Tensor, batch: int, length: int) -> Iterator[Tensor]:
    """The data once, in order, in up to `batch` windows of (length + 1) tokens."""
    count = (data.numel() - 1) // length
    cut = data[: count * length + 1].unfold(0, length + 1, length).long()
    yield from torch.split(cut, batch)


def lr_factor(progress: float, step: int, warmup: int = 100, hold: float = 0.35) -> float:
    """Warm-up in steps, then flat, then linear to zero over the rest of the budget."""
    decay = min(1.0, max(0.0, (1.0 - progress) / (1.0 - hold)))
    return min(decay, (step + 1) / warmup)


def orthogonalise(x: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz: (n, rows, cols) with rows <= cols to about U V^T of its SVD, in bf16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon:
    """Muon with Nesterov momentum; matrices of one shape, transposed or not, go as one stack."""

    def __init__(self, params: list[Tensor], momentum: float = 0.95, weight_decay: float = 0.0):
        self.momentum, self.weight_decay = momentum, weight_decay
        self.groups: dict[tuple[int, int], list[Tensor]] = {}
        for p in params:
            rows, cols = p.shape
            self.groups.setdefault((min(rows, cols), max(rows, cols)), []).append(p)
        self.buffers = {k: p[0].new_zeros(len(p), *k) for k, p in self.groups.items()}
        self.scales = {
            key: torch.tensor(
                [math.sqrt(max(1.0, p.shape[0] / p.shape[1])) for p in group],
                device=group[0].device,
            )[:, None, None]
            for key, group in self.groups.items()
        }

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Apply the gradients, at this learning rate."""
        for key, group in self.groups.items():
            wide = [p.shape[0] <= p.shape[1] for p in group]
            grads = [p.grad for p in group if p.grad is not None]
            stack = torch.stack([g if w else g.mT for g, w in zip(grads, wide, strict=True)])
            buffer = self.buffers[key].lerp_(stack, 1.0 - self.momentum)
            update = orthogonalise(stack.lerp(buffer, self.momentum)) * self.scales[key]
            moves = [u if w else u.mT for u, w in zip(update.unbind(), wide, strict=True)]
            torch._foreach_mul_(group, 1.0 - lr * self.weight_decay)
            torch._foreach_add_(group, moves, alpha=-lr)


class Optimiser:
    """Muon for the layers' matrices (AdamW for them too where lr is 0), AdamW for the tied embedding and the norms."""

    def __init__(self, model: LlamaForCausalLM, lr: float, adam_lr: float, weight_decay: float):
        self.lr, self.adam_lr = lr, adam_lr
        self.params = list(model.parameters())
        matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
        norms = [p for p in self.params if p.ndim == 1]
        self.muon = Muon(matrices if lr > 0 else [], weight_decay=weight_decay)
        by_adam = [model.model.embed_tokens.weight] + ([] if lr > 0 else matrices)
        self.adam = torch.optim.AdamW(
            [
                {"params": by_adam, "weight_decay": weight_decay},
                {"params": norms, "weight_decay": 0.0},
            ],
            lr=adam_lr,
            betas=(0.9, 0.95),
            fused=self.params[0].is_cuda,
        )

    def step(self, factor: float, clip: float = 1.0) -> None:
        """Clip, apply and clear the gradients, at `factor` times the learning rates."""
        torch.nn.utils.clip_grad_norm_(self.params, clip)
        self.muon.step(self.lr * factor)
        for group in self.adam.param_groups:
            group["lr"] = self.adam_lr * factor
        self.adam.step()
        self.clear()

    def clear(self) -> None:
        """Drop the gradients."""
        for p in self.params:
            p.grad = None
