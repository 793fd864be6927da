"""What plain PyTorch does for the report stays on the device of its input: tensors of the meta device refuse to meet others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foldkv.accuracy import damage, emulate
from foldkv.accuracy.baselines import BASELINES
from foldkv.accuracy.ops_report import _plain
from quant import reference
from quant.pages import NUM_PARAM_ROWS
from quant.spec import MODES, Format

META = torch.device("meta")
D, H_KV = 128, 2


@pytest.fixture
def x() -> Tensor:
    """K or V `[b, h_kv, s, d]`."""
    return torch.randn(2, H_KV, 64, D, device=META)


def test_the_meta_device_sees_a_tensor_of_another() -> None:
    with pytest.raises(RuntimeError, match="same device"):
        torch.copysign(torch.ones(()).expand(4), torch.ones(4, device=META))


@pytest.mark.parametrize(
    "fmt", {str(fmt): fmt for spec in MODES.values() for fmt in (spec.k, spec.v)}.values(), ids=str
)
def test_formats(fmt: Format, x: Tensor) -> None:
    params = torch.ones(NUM_PARAM_ROWS, H_KV, D)
    assert emulate.format_codec(fmt, params)(x).device == META
    assert damage.clip_rate(fmt, params, x).shape == (H_KV,)
    if not fmt.is_static:
        assert emulate.format_codec(fmt, None)(x).device == META


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_other_formats(name: str, x: Tensor) -> None:
    source = BASELINES[name](D, None)
    assert source is not None
    k_codec, v_codec = source.codecs(0)
    assert k_codec(x).device == v_codec(x).device == META


def test_attention_and_its_damage(x: Tensor) -> None:
    q, k = torch.randn(5, 4, D, device=META), torch.randn(64, H_KV, D, device=META)
    for tensor in (*reference.attention(q, k, k), *_plain(q, k, k, torch.float16)):
        assert tensor.device == META
    look = damage._Look(torch.randn(2, 4, 8, D, device=META), torch.arange(8), {"softcap": 30.0, "sliding_window": 4})
    weights = look.weights(x)
    for figure in (
        damage._kl(weights, weights, H_KV),
        damage._out_error(weights, x, weights, x),
        damage._relative(x, x),
    ):
        assert figure.device == META
