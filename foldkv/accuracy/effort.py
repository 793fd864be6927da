"""How much is measured: `quick`, `standard` or `full`, and what each of them means in windows and tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from quant.errors import ArgumentError, describe


@dataclass(frozen=True)
class Effort:
    """Sizes of a report; 0 leaves a part out.

    windows, window_len: prefill in one piece. chunked_windows: of them, in chunks of 128. decode_windows, decode_len:
    token by token. ablation_windows, ablation_len: text of the ablations and the other formats. heads: ablation of
    single heads, without: of all heads but one too. max_heads: heads of the model beyond which single heads are left
    out. prompts, prompt_len, new_tokens: greedy continuations. baselines: other people's formats. needle: pass keys.
    """

    name: str
    windows: int
    window_len: int
    chunked_windows: int
    decode_windows: int
    decode_len: int
    ablation_windows: int = 0
    ablation_len: int = 0
    heads: bool = False
    without: bool = False
    max_heads: int = 64
    prompts: int = 0
    prompt_len: int = 64
    new_tokens: int = 0
    baselines: bool = False
    needle: bool = False

    def fit(self, max_len: float, **given: int | None) -> Effort:
        """With the sizes that a caller gave, and everything else cut to what the model can hold."""
        limit = int(min(max_len, 1 << 40))
        asked: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        sizes = replace(self, **asked)
        cut = {
            key: min(getattr(sizes, key), limit)
            for key in ("window_len", "decode_len", "ablation_len")
            if key not in asked
        }
        cut["ablation_len"] = min(cut.get("ablation_len", sizes.ablation_len), max(sizes.window_len, sizes.decode_len))
        sizes = replace(sizes, **cut)
        prompt_len = sizes.prompt_len if sizes.prompt_len < limit else max(1, limit // 2)
        return replace(sizes, prompt_len=prompt_len, new_tokens=max(0, min(sizes.new_tokens, limit - prompt_len)))


EFFORTS = {
    effort.name: effort
    for effort in (
        Effort("quick", windows=4, window_len=320, chunked_windows=0, decode_windows=4, decode_len=64),
        Effort(
            "standard", windows=8, window_len=512, chunked_windows=8, decode_windows=8, decode_len=256,
            ablation_windows=4, ablation_len=256, heads=True, prompts=8, new_tokens=128, baselines=True,
        ),
        Effort(
            "full", windows=32, window_len=2048, chunked_windows=32, decode_windows=32, decode_len=1024,
            ablation_windows=8, ablation_len=1024, heads=True, without=True, max_heads=100_000, prompts=16,
            prompt_len=128, new_tokens=2048, baselines=True, needle=True,
        ),
    )
}  # fmt: skip


def effort(name: str) -> Effort:
    """The effort of a name. ArgumentError for another one."""
    if name not in EFFORTS:
        raise ArgumentError(describe("level", f"one of {', '.join(EFFORTS)}", repr(name)))
    return EFFORTS[name]
