"""Other people's formats as the report emulates them, against values worked out by hand or byte by byte."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from report_helpers import tiny_model, tiny_scales, token_windows
from torch import Tensor

from foldkv.accuracy import accuracy_report, baselines
from foldkv.accuracy.baselines import BASELINES, make_baselines
from foldkv.accuracy.emulate import EmulatedSource, format_codec, pick_heads
from quant import reference
from quant.errors import ArgumentError
from quant.pages import identity_params
from quant.spec import MODES, Format


def blocks(x: np.ndarray, bits: int) -> np.ndarray:
    """ggml's quantize_row_q8_0, q5_0 and q4_0 and back, one block of 32 at a time, as its C code says it."""
    out = np.zeros_like(x)
    for i in range(0, len(x), 32):
        block = x[i : i + 32]
        if bits == 8:
            d = np.float32(np.abs(block).max() / np.float32(127))
            inverse = np.float32(1) / d if d else np.float32(0)
            codes = [np.sign(v * inverse) * np.floor(abs(v * inverse) + 0.5) for v in block]
            out[i : i + 32] = np.array(codes, np.float32) * np.float32(np.float16(d))
            continue
        half = 1 << (bits - 1)
        d = np.float32(block[np.abs(block).argmax()] / np.float32(-half))
        inverse = np.float32(1) / d if d else np.float32(0)
        codes = [min(2 * half - 1, int(v * inverse + np.float32(half + 0.5))) for v in block]
        out[i : i + 32] = (np.array(codes, np.float32) - half) * np.float32(np.float16(d))
    return out


@pytest.mark.parametrize(("name", "bits"), [("q8_0", 8), ("q5_0", 5), ("q4_0", 4)])
def test_ggml_blocks_are_ggmls(name: str, bits: int) -> None:
    x = torch.randn(1, 2, 50, 64) * 3
    x[0, 0, 0] = 0
    source = BASELINES[name](64, None)
    assert isinstance(source, EmulatedSource)
    for codec in source.codecs(0):
        got = codec(x).flatten().numpy()
        want = blocks(x.flatten().numpy(), bits)
        # 1 / d against a division: a value in ten thousand lies on a border and goes to the other side.
        step = np.abs(x.numpy()).max() / (2 ** (bits - 1) - 1)
        assert (np.abs(got - want) > 1e-6).mean() < 3e-3 and np.abs(got - want).max() <= step
    assert source.describe()["bits_per_element"] == bits + 0.5


def test_rotation_wraps_the_blocks() -> None:
    x = torch.randn(1, 1, 8, 64)
    x[..., 3] = 40
    plain, turned = (BASELINES[name](64, None).codecs(0)[0](x) for name in ("q4_0", "q4_0+h"))
    want = reference.hadamard(BASELINES["q4_0"](64, None).codecs(0)[0](reference.hadamard(x)))
    assert torch.equal(turned, want)
    ordinary = [i for i in range(64) if i != 3]
    assert (turned - x)[..., ordinary].square().mean() < (plain - x)[..., ordinary].square().mean()


def test_kivi_groups_k_by_channel_and_v_by_token() -> None:
    x = torch.randn(1, 1, 70, 64)
    k, v = BASELINES["kivi4"](64, None).codecs(0)
    k_got, v_got = k(x), v(x)
    for got, group in ((k_got, x[0, 0, 32:64, 5]), (v_got, x[0, 0, 40, 32:64])):
        scale = ((group.max() - group.min()) / 15).half().float()
        low = group.min().half().float()
        want = ((group - low) / scale).round().clamp(0, 15) * scale + low
        found = got[0, 0, 32:64, 5] if got is k_got else got[0, 0, 40, 32:64]
        assert torch.allclose(found, want, atol=1e-6)
    # What does not fill a group stays in 16 bits.
    for got in (k_got, v_got):
        assert torch.equal(got[:, :, 64:], x[:, :, 64:].half().float())


def test_fp8_takes_the_calibrated_range_of_the_tensor() -> None:
    scales = tiny_scales(tiny_model())
    absmax = float(scales[1].k.absmax.max())
    k, _ = BASELINES["fp8"](32, scales).codecs(1)
    x = torch.tensor([absmax, -absmax, 2 * absmax, absmax / 448]).view(1, 1, 1, 4)
    got = k(x).flatten()
    assert torch.allclose(got, torch.tensor([absmax, -absmax, absmax, absmax / 448]), rtol=1e-6)
    assert baselines.fp8_tensor(448.0)(torch.tensor([[[[1.06]]]])).item() == 1.0  # 3 bits of mantissa


def test_int4_of_others_takes_the_whole_range() -> None:
    """A scale from min .. max, as everybody has it: our search of 4-bit rows is not theirs."""
    x = torch.cat((torch.tensor([-1.0, 2.75]), torch.rand(62))).view(1, 1, 1, 64)
    codec, _ = BASELINES["int4-token"](64, None).codecs(0)
    assert torch.equal(codec(x)[..., :2], x[..., :2])  # the ends of 15 steps of 0.25
    assert (codec(x) - x).abs().max() <= 0.125
    assert not torch.equal(format_codec(Format("int4", "token", symmetric=False), None)(x)[..., :2], x[..., :2])


def test_the_emulated_format_is_the_references_own() -> None:
    """A codec gives what the reference writes and reads; chosen heads get it, the others do not."""
    x = torch.randn(2, 2, 9, 32)
    fmt = MODES["c4r"].k
    params = identity_params(fmt, 2, 32)
    rows = x.transpose(1, 2).reshape(-1, 2, 32)
    want = reference.decode(*reference.encode(rows, fmt, params), fmt, params, torch.float32)
    codec = format_codec(fmt, params)
    assert torch.equal(codec(x), want.view(2, 9, 2, 32).transpose(1, 2))

    def keep(y: Tensor) -> Tensor:
        return y

    mixed = pick_heads(codec, keep, [1])(x)
    assert torch.equal(mixed[:, 0], x[:, 0]) and torch.equal(mixed[:, 1], codec(x)[:, 1])


def test_names() -> None:
    odd = tiny_model(head_dim=48)
    sources, left_out = make_baselines(None, odd, None, decode_len=8)
    assert [source.name for source in sources][:3] == ["fp8", "int8-token", "int4-token"]
    assert any("q8_0" in text and "48" in text for text in left_out)
    with pytest.raises(ArgumentError, match="one of fp8"):
        make_baselines(["fp4"], odd, None, decode_len=8)
    with pytest.raises(ArgumentError, match="blocks of 32"):
        make_baselines(["q4_0"], odd, None, decode_len=8)


def test_they_stand_in_the_report() -> None:
    model = tiny_model()
    sizes = {"num_windows": 3, "window_len": 48, "decode_windows": 0}
    names = ["q8_0", "q4_0", "kivi2"]
    report = accuracy_report(
        model, ["c8d"], token_windows(3, 48, seed=2), scales=tiny_scales(model), level="quick", baselines=names, **sizes
    ).data
    assert list(report["baselines"]) == names
    kld = {name: entry["prefill"]["kld_mean"] for name, entry in report["baselines"].items()}
    assert 0 < kld["q8_0"] < kld["q4_0"] < kld["kivi2"]
    assert report["baselines"]["q4_0"]["bits_per_element"] == 4.5
