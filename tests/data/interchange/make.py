"""Writes the fixtures beside it with the real library; run by hand:

    python -m venv VENV && VENV/bin/pip install torch==2.13.0 compressed-tensors==0.19.0 llmcompressor==0.14.0.1
    VENV/bin/python tests/data/interchange/make.py

A random Llama of two layers goes through llm-compressor's `oneshot` with each KV cache scheme. Of the checkpoint that it
saves, config.json and the KV scales stay (the weights are random anyhow); `absmax.json` holds the post-RoPE absmax of K
and V, per layer and head, taken by plain hooks on the same text.
"""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from transformers.integrations.sdpa_attention import sdpa_attention_forward

HERE = Path(__file__).parent
SCHEMES = {
    "fp8_tensor": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    "fp8_head": {"num_bits": 8, "type": "float", "strategy": "attn_head"},
    "int8_head": {"num_bits": 8, "type": "int", "strategy": "attn_head"},
    "int8_head_asym": {"num_bits": 8, "type": "int", "strategy": "attn_head", "symmetric": False},
}
CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)


def absmax(model, rows):
    seen = {}

    def look(module, q, k, v, *args, **kwargs):
        entry = seen.setdefault(module.layer_idx, {"k": [], "v": []})
        entry["k"].append(k.abs().amax((0, 2, 3)))
        entry["v"].append(v.abs().amax((0, 2, 3)))
        return sdpa_attention_forward(module, q, k, v, *args, **kwargs)

    AttentionInterface.register("look", look)
    model.set_attn_implementation("look")
    with torch.no_grad():
        for row in rows:
            model(torch.tensor([row]), use_cache=False)
    model.set_attn_implementation("sdpa")
    return {
        str(idx): {name: torch.stack(parts).amax(0).tolist() for name, parts in entry.items()}
        for idx, entry in seen.items()
    }


def main():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG).float()
    rows = torch.randint(0, 64, (8, 32)).tolist()
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * 32] * 8})
    (HERE / "absmax.json").write_text(json.dumps(absmax(model, rows)) + "\n")
    words = Tokenizer(WordLevel({f"w{idx}": idx for idx in range(64)}, unk_token="w2"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w2", pad_token="w0")
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary) / "base"
        model.save_pretrained(base)
        for name, scheme in SCHEMES.items():
            fresh = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            scheme = {"dynamic": False, "symmetric": True, "observer": "static_minmax", **scheme}
            out = Path(temporary) / name
            oneshot(
                model=fresh,
                processor=tokenizer,
                dataset=data,
                recipe=[QuantizationModifier(kv_cache_scheme=scheme)],
                num_calibration_samples=8,
                max_seq_length=32,
            )
            fresh.save_pretrained(out, save_compressed=True)
            target = HERE / name
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            shutil.copyfile(out / "config.json", target / "config.json")
            with safe_open(out / "model.safetensors", framework="pt") as file:
                kept = {key: file.get_tensor(key) for key in list(file.keys()) if "scale" in key or "zero_point" in key}
            save_file(kept, target / "model.safetensors")
            print(name, {key: tuple(value.shape) for key, value in kept.items()})


if __name__ == "__main__":
    main()
