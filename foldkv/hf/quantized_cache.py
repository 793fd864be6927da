"""transformers' own `QuantizedCache`, set up as its guide has it: a row of the benchmark and a baseline of the report."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROUP = 64
"""Elements that share a scale and a zero point, transformers' default."""

RESIDUAL = 128
"""Newest tokens that stay in 16 bits, transformers' default; then the whole cache is quantised again."""


@dataclass(frozen=True)
class QuantizedCacheKind:
    """A backend of `QuantizedCache` at a width, and the package that it needs."""

    backend: str
    nbits: int
    package: str

    @property
    def bits(self) -> float:
        """Bits an element of what is quantised, with a 16-bit scale and zero point a group."""
        return self.nbits + 32 / GROUP

    def mean_bits(self, length: int) -> float:
        """Bits an element over a text of `length` tokens fed one by one, the newest in 16 bits counted as such."""
        # The first token is quantised at once.
        shares = [(tokens - 1) % RESIDUAL / tokens for tokens in range(1, length + 1)]
        return self.bits + (16 - self.bits) * sum(shares) / len(shares)

    def make(self, config: Any) -> Any:
        """An empty cache. ImportError without the package, ValueError for a model that transformers refuses."""
        from transformers import QuantizedCache

        # transformers' guide: HQQ wants axis 1; quanto's default of 0 is a row of channels.
        axes = {"axis_key": 1, "axis_value": 1} if self.backend == "hqq" else {}
        return QuantizedCache(
            self.backend, config, nbits=self.nbits, q_group_size=GROUP, residual_length=RESIDUAL, **axes
        )

    def refuses(self, model: PreTrainedModel) -> str | None:
        """Why the model cannot have it here, from a trial of two tokens on its device; None where it can."""
        import torch

        if not _installed(self.package):
            return f"{self.package} is not installed"
        try:
            cache, tokens = self.make(model.config), torch.ones(1, 1, dtype=torch.int64, device=model.device)
            with torch.no_grad():
                for _ in range(2):
                    model(tokens, past_key_values=cache, use_cache=True)
        except Exception as error:  # theirs: a compiler that is missing, a shape without whole groups, a layer type
            return "it fails on this model: " + (str(error).splitlines() or [type(error).__name__])[0]
        return None


QUANTIZED_CACHES = {
    "quanto4": QuantizedCacheKind("quanto", 4, "optimum.quanto"),
    "hqq8": QuantizedCacheKind("hqq", 8, "hqq"),
    "hqq4": QuantizedCacheKind("hqq", 4, "hqq"),
}
"""Name -> kind; quanto's caches have 2 or 4 bits, HQQ's 1, 2, 3, 4 or 8."""


def _installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False
