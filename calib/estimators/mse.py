"""mse: the factor of min .. max with the least squared error."""

from __future__ import annotations

from torch import Tensor

from .target import Estimator, Target, least


def find_range(target: Target) -> tuple[Tensor, Tensor]:
    """Least mean squared error over the sampled tokens, per channel or, where the scale is per head, per head.

    "Loss aware post-training quantization" (Nahshan et al. 2021) and most toolkits. Good for V; for K the channel's
    least error cuts the values that attention looks for, and the output's KL divergence grows (docs/accuracy.md).
    """
    x = target.tokens()

    def loss(factor: float) -> Tensor:
        error = (target.stored(x, factor) - x).double().square().mean(0)
        return error.mean(-1, keepdim=True) if target.fmt.scaling == "head" else error

    return least(target, loss)


ESTIMATOR = Estimator("mse", find_range, searches=True, needs="tokens")
