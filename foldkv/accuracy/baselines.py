"""Other people's 8- and 4-bit caches in the same harness, emulated: short, in fp32 PyTorch, for the figures alone.

Each is a pair of codecs (`emulate.Codec`) for K and V with the bits that it stores. What their own code does beside the
format is left out and said in the note: KIVI's and Hugging Face's caches, for one, hand unquantised K and V to the prefill.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foldkv.hf.models import kv_shapes
from foldkv.hf.quantized_cache import GROUP, QUANTIZED_CACHES, RESIDUAL, QuantizedCacheKind
from quant import reference
from quant.dynamic import min_max_rows
from quant.errors import ArgumentError, describe
from quant.spec import Format

from .emulate import Codec, Codecs, EmulatedSource
from .sources import CacheSource, NewCache, StockSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from quant.scales import KVScales

BLOCK = 32
"""Elements of a ggml block and of a KIVI group."""

E4M3_MAX = 448.0


def fp8_tensor(absmax: float) -> Codec:
    """e4m3 with one static scale for the whole tensor, amax / 448: vLLM's and TensorRT-LLM's fp8 cache."""
    scale = absmax / E4M3_MAX

    def codec(x: Tensor) -> Tensor:
        return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float() * scale

    return codec


def _blocks(x: Tensor) -> Tensor:
    """Blocks of 32 neighbours in the last dimension."""
    return x.float().unflatten(-1, (-1, BLOCK))


def q8_0(x: Tensor) -> Tensor:
    """ggml q8_0 (ggml-quants.c): 32 elements share an fp16 scale, absmax / 127; codes round half away from zero."""
    blocks = _blocks(x)
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    codes = _half_away(blocks / torch.where(scale > 0, scale, 1.0))
    return (codes * scale.half().float()).flatten(-2)


def _ggml_signed(bits: int) -> Codec:
    """ggml q4_0 and q5_0 (ggml-quants.c): the scale is the element of largest magnitude over -2^(bits - 1), in fp16."""
    half = 2 ** (bits - 1)

    def codec(x: Tensor) -> Tensor:
        blocks = _blocks(x)
        extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
        scale = extreme / -half
        codes = (blocks / torch.where(scale != 0, scale, 1.0) + half + 0.5).floor().clamp(0, 2 * half - 1)
        return ((codes - half) * scale.half().float()).flatten(-2)

    return codec


def rotated(inner: Codec) -> Codec:
    """`inner` between two Hadamard rotations of the head (llama.cpp #21038; QuaRot, arXiv 2404.00456)."""
    return lambda x: reference.hadamard(inner(reference.hadamard(x.float())))


def _group_minmax(x: Tensor, bits: int) -> Tensor:
    """Asymmetric min-max over the last dimension, fp16 scale and minimum (KIVI `new_pack.py`)."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).half().float()
    low = low.half().float()
    codes = ((x - low) / torch.where(scale > 0, scale, 1.0)).round().clamp(0, 2**bits - 1)
    return codes * scale + low


def kivi_k(bits: int) -> Codec:
    """KIVI's K (arXiv 2402.02750): per channel over groups of 32 tokens; the newest, incomplete group stays in 16 bits."""

    def codec(x: Tensor) -> Tensor:
        whole = x.shape[2] // BLOCK * BLOCK
        groups = x[:, :, :whole].float().unflatten(2, (-1, BLOCK)).transpose(-1, -2)
        done = _group_minmax(groups, bits).transpose(-1, -2).flatten(2, 3)
        return torch.cat((done, x[:, :, whole:].half().float()), dim=2)

    return codec


def kivi_v(bits: int) -> Codec:
    """KIVI's V: per token over groups of 32 channels; as many newest tokens as K's stay in 16 bits."""

    def codec(x: Tensor) -> Tensor:
        whole = x.shape[2] // BLOCK * BLOCK
        done = _group_minmax(_blocks(x[:, :, :whole]), bits).flatten(-2)
        return torch.cat((done, x[:, :, whole:].half().float()), dim=2)

    return codec


def _both(codec: Codec) -> Codecs:
    return lambda layer_idx: (codec, codec)


def _token(name: str, symmetric: bool) -> Codec:
    fmt = Format(name, "token", symmetric=symmetric)

    def codec(x: Tensor) -> Tensor:
        codes, scale, zero = min_max_rows(x.float(), fmt)
        return (codes - zero) * scale

    return codec


def _fp8(scales: KVScales | None) -> Codecs:
    def of_layer(layer_idx: int) -> tuple[Codec, Codec]:
        if scales is None:
            return fp8_tensor(E4M3_MAX), fp8_tensor(E4M3_MAX)  # a scale of 1, as vLLM takes without a calibration
        layer = scales[layer_idx]
        return fp8_tensor(float(layer.k.absmax.max())), fp8_tensor(float(layer.v.absmax.max()))

    return of_layer


Make = Callable[[int, "KVScales | None"], CacheSource]


def _ggml(name: str, codec: Codec, bits: float, rotate: bool = False) -> Make:
    note = f"llama.cpp {name}: blocks of 32, fp16 scale" + (", Hadamard on K and V" if rotate else "")
    full = name + ("+h" if rotate else "")
    return lambda head_dim, scales: EmulatedSource(full, _both(rotated(codec) if rotate else codec), bits, note=note)


def _kivi(bits: int) -> Make:
    note = f"KIVI, {bits} bits: K per channel, V per token, groups of 32; the last incomplete group in 16 bits"
    codecs = (kivi_k(bits), kivi_v(bits))
    return lambda head_dim, scales: EmulatedSource(
        f"kivi{bits}", lambda layer_idx: codecs, bits + 32 / BLOCK, on_read=True, note=note
    )


BASELINES: dict[str, Make] = {
    "fp8": lambda d, scales: EmulatedSource("fp8", _fp8(scales), 8.0, note="e4m3, one static scale a tensor (vLLM)"),
    "int8-token": lambda d, scales: EmulatedSource(
        "int8-token", _both(_token("int8", True)), 8 + 16 / d, note="int8, symmetric, a scale a token and head"
    ),
    "int4-token": lambda d, scales: EmulatedSource(
        "int4-token", _both(_token("int4", False)), 4 + 32 / d, note="int4 with zero point, a scale a token and head"
    ),
    "q8_0": _ggml("q8_0", q8_0, 8.5),
    "q5_0": _ggml("q5_0", _ggml_signed(5), 5.5),
    "q4_0": _ggml("q4_0", _ggml_signed(4), 4.5),
    "q5_0+h": _ggml("q5_0", _ggml_signed(5), 5.5, rotate=True),
    "q4_0+h": _ggml("q4_0", _ggml_signed(4), 4.5, rotate=True),
    "kivi4": _kivi(4),
    "kivi2": _kivi(2),
}

ANY_HEAD = ("fp8", "int8-token", "int4-token")
"""Those that need no whole blocks."""

HF_BASELINES = {f"hf-{name}": kind for name, kind in QUANTIZED_CACHES.items()}


class QuantizedCacheSource(CacheSource):
    """transformers' own `QuantizedCache`; what a step appends, a whole prompt say, is attended to unquantised."""

    fed = "decode"

    def __init__(self, name: str, kind: QuantizedCacheKind, length: int) -> None:
        super().__init__(name)
        self.kind, self.length = kind, length

    @contextmanager
    def open(self, model: PreTrainedModel) -> Iterator[NewCache]:
        with StockSource().open(model):
            yield lambda batch, max_seq_len: self.kind.make(model.config)

    def describe(self) -> dict[str, Any]:
        note = (
            f"transformers QuantizedCache, {self.kind.backend}, {self.kind.bits:g} bits in groups of {GROUP}; the newest "
            f"tokens, {RESIDUAL} at most, in 16 bits, counted over {self.length} tokens fed one by one"
        )
        return {"bits_per_element": self.kind.mean_bits(self.length), "note": note}


def make_baselines(
    names: list[str] | None, model: PreTrainedModel, scales: KVScales | None, decode_len: int
) -> tuple[list[CacheSource], list[str]]:
    """The sources of these baselines, and a sentence for each that is left out.

    names: None or ["all"]: all that fit the model and are installed. decode_len: tokens of the decoded windows, by which
    `QuantizedCache` is measured; 0 where nothing is decoded.
    Errors: ArgumentError for an unknown name, or one asked for by name that cannot be had.
    """
    every = [*BASELINES, *HF_BASELINES]
    head_dim = min(head_dim for _, head_dim in kv_shapes(model.config.get_text_config(decoder=True)))
    sources: list[CacheSource] = []
    left_out = []
    for name in every if names in (None, ["all"]) else names or ():
        if name not in every:
            raise ArgumentError(describe("baseline", f"one of {', '.join(every)}", repr(name)))
        why: str | None
        if name in BASELINES:
            fits = head_dim % BLOCK == 0 or name in ANY_HEAD
            why = None if fits else f"head_dim {head_dim} has no whole blocks of {BLOCK}"
        else:
            why = (
                HF_BASELINES[name].refuses(model) if decode_len else "it is fed token by token, and nothing is decoded"
            )
        if why is not None:
            left_out.append(f"{name}: {why}")
        elif name in BASELINES:
            sources.append(BASELINES[name](head_dim, scales))
        else:
            sources.append(QuantizedCacheSource(name, HF_BASELINES[name], decode_len))
    if names not in (None, ["all"]) and left_out:
        raise ArgumentError(describe("baselines", "those that can be run here", left_out[0]))
    return sources, left_out


def _half_away(x: Tensor) -> Tensor:
    return torch.sign(x) * (x.abs() + 0.5).floor()
