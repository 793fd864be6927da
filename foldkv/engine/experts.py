"""Mixture-of-experts layers in a captured step: by the implementation that asks the host for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel


def has_experts(model: PreTrainedModel) -> bool:
    """Whether transformers can switch how this model computes its experts."""
    return any("_apply_gate" in type(module).__dict__ for module in model.modules())


@contextmanager
def capturable_experts(model: PreTrainedModel) -> Iterator[None]:
    """Within it the experts of `model` run without a look at which of them were chosen.

    bf16: grouped matrix products, which take the groups' sizes from the device. Other dtypes: PyTorch's grouped product
    loops over the groups on the host, so each token's experts are gathered (batched_mm), which costs memory: tokens times
    experts a token times the weights of one.
    """
    before = model.get_experts_implementation()
    model.set_experts_implementation("grouped_mm" if model.dtype == torch.bfloat16 else "batched_mm")
    try:
        yield
    finally:
        model.set_experts_implementation(before)
