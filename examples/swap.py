"""Swap the KV cache of a model in ten lines: `python examples/swap.py`."""

import foldkv

model, tokenizer = foldkv.load_model("examples/tiny_lm/model")  # or any loaded transformers decoder
prompt = tokenizer("The history of the city began when", return_tensors="pt")
scales = foldkv.calibrate(model, mode="c8", tokenizer=tokenizer, num_samples=8, max_seq_len=256)  # text of its own
for mode in ("c16", "c8", "c4"):
    with foldkv.swap_kv_cache(model, mode, scales=scales) as swap:
        tokens = model.generate(**prompt, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        print(f"{mode:4} {swap.bits_per_element:5.3g} bits/element: {tokenizer.decode(tokens[0])!r}")
