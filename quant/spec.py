"""What a cache holds: the format of K and of V, and the named modes that pair them.

A format says how one row (one token, one kv head, `d` channels) becomes codes:

    y = hadamard((x - mean) / balance)        mean, balance: static, fp32, per channel; each step only where it is on
    code = clamp(round_half_even(y / scale + zero), 0, 2**bits - 1)
    x = balance * hadamard(((code - zero) * scale)) + mean

A scale multiplies to dequantise. `docs/format.md` has the bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from .codecs import Codec, codec, codecs
from .errors import ArgumentError, describe

SCALINGS = ("none", "head", "channel", "token")
TRANSFORMS = ("center", "balance", "rotate")
PAGE_SIZES = (16, 32, 64, 128)
MAX_HEAD_DIM = 512
# Of larger heads rounding is not shaped: a matrix a head would outgrow what a kernel holds.
MAX_SHAPED_DIM = 256


@dataclass(frozen=True)
class Format:
    """How K, or V, is stored.

    codec:     a name of `codecs.def`.
    scaling:   "none" (float codecs), "head" or "channel" (static, calibrated), "token" (dynamic per token and head).
    symmetric: no zero point; the middle code decodes to zero.
    center:    subtract the calibrated per-channel mean first (dynamic formats; free for K, as softmax does not see it).
    balance:   divide by the calibrated per-channel balance first (dynamic formats).
    rotate:    Hadamard rotation before quantisation, after RoPE (dynamic formats).
    clip:      static formats: the range covered, as a fraction of the calibrated one.
    """

    codec: str
    scaling: str = "none"
    symmetric: bool = True
    center: bool = False
    balance: bool = False
    rotate: bool = False
    clip: float = 1.0

    def __post_init__(self) -> None:
        element = codec(self.codec)
        if self.scaling not in SCALINGS:
            raise ArgumentError(describe("Format.scaling", f"one of {', '.join(SCALINGS)}", repr(self.scaling)))
        if element.is_integer == (self.scaling == "none"):
            wanted = "'head', 'channel' or 'token'" if element.is_integer else "'none'"
            raise ArgumentError(describe(f"Format.scaling of codec {self.codec}", wanted, repr(self.scaling)))
        if not self.is_dynamic and (self.center or self.balance or self.rotate):
            raise ArgumentError(
                describe("Format", "center, balance and rotate only with scaling='token'", f"scaling={self.scaling!r}")
            )
        if not self.symmetric and not element.is_integer:
            raise ArgumentError(describe("Format", "symmetric=True for a float codec", "symmetric=False"))
        if not 0.0 < self.clip <= 2.0:
            raise ArgumentError(describe("Format.clip", "a fraction in (0, 2]", str(self.clip)))

    @property
    def element(self) -> Codec:
        return codec(self.codec)

    @property
    def is_dynamic(self) -> bool:
        """Scales are computed per token and head when a row is appended."""
        return self.scaling == "token"

    @property
    def is_static(self) -> bool:
        """Scales come from a calibration."""
        return self.scaling in ("head", "channel")

    @property
    def searches_range(self) -> bool:
        """A row's range is the best of a few (`quant.dynamic.search_range`), not its min .. max."""
        return self.is_dynamic and not self.symmetric and self.element.bits == 4

    @property
    def steers_rounding(self) -> bool:
        """A row's codes are chosen together (`quant.steering`) where its layer's params hold a direction of queries."""
        return self.is_static and self.element.bits == 4

    @property
    def shapes_rounding(self) -> bool:
        """A row's codes are chosen together (`quant.shaping`) where its layer has a matrix, heads of at most 256 channels."""
        return self.searches_range or (self.is_dynamic and self.element.bits == 8)

    @property
    def meta_bytes(self) -> int:
        """Bytes of dynamic scale data per token and head: bf16 scale, then fp16 zero where asymmetric."""
        return 0 if not self.is_dynamic else 2 if self.symmetric else 4

    @property
    def code(self) -> int:
        """The format as the kernels take it: codec id | dynamic << 8 | stored zero << 9 | rotate << 10."""
        stored_zero = self.is_dynamic and not self.symmetric
        return self.element.id | self.is_dynamic << 8 | stored_zero << 9 | self.rotate << 10

    def bits_per_element(self, head_dim: int) -> float:
        """Stored bits per element, dynamic scale data included."""
        return self.element.bits + 8 * self.meta_bytes / head_dim

    def __str__(self) -> str:
        parts = [self.codec]
        if self.scaling != "none":
            parts += [self.scaling, "sym" if self.symmetric else "asym"]
        parts += [name for name in TRANSFORMS if getattr(self, name)]
        if self.clip != 1.0:
            parts.append(f"clip={self.clip:g}")
        return ".".join(parts)


def parse_format(text: str) -> Format:
    """The format whose `str` is `text`, as "int4.token.asym.center.rotate". ArgumentError for any other text."""
    head, _, clip = text.partition(".clip=")
    name, *parts = head.split(".")
    scaling, rest = parts[0] if parts else "none", parts[2:]
    try:
        fmt = Format(
            name, scaling, symmetric="asym" not in parts[1:2], center="center" in rest, balance="balance" in rest,
            rotate="rotate" in rest, clip=float(clip or 1.0),
        )  # fmt: skip
    except ValueError as error:
        raise ArgumentError(f"format {text!r}: {error}") from error
    if str(fmt) != text:
        raise ArgumentError(describe("format", f"the form CODEC.SCALING.sym|asym.TRANSFORMS, as {fmt}", repr(text)))
    return fmt


@dataclass(frozen=True)
class KVSpec:
    """The formats of K and of V, which are independent of each other."""

    k: Format
    v: Format
    name: str = "custom"

    @property
    def needs_scales(self) -> bool:
        """True where a calibration is required (static scales)."""
        return self.k.is_static or self.v.is_static

    def bits_per_element(self, head_dim: int) -> float:
        """Mean stored bits per element over K and V, dynamic scale data included."""
        return (self.k.bits_per_element(head_dim) + self.v.bits_per_element(head_dim)) / 2


def _static(name: str, scaling: str, *, symmetric: bool = False, clip: float = 1.0) -> Format:
    return Format(name, scaling, symmetric=symmetric, clip=clip)


_INT8_TOKEN = Format("int8", "token", symmetric=True)
_INT8_TOKEN_CENTERED = replace(_INT8_TOKEN, center=True, balance=True)
_INT8_CHANNEL = _static("int8", "channel")
_INT4_TOKEN = Format("int4", "token", symmetric=False)
_INT4_ROTATED = replace(_INT4_TOKEN, center=True, balance=True, rotate=True)

# One row a mode. c16 takes the model's 16-bit dtype (see `resolve_mode`).
MODES: dict[str, KVSpec] = {
    "c32": KVSpec(Format("fp32"), Format("fp32")),
    "c16": KVSpec(Format("fp16"), Format("fp16")),
    "c8": KVSpec(_INT8_CHANNEL, _INT8_CHANNEL),
    "c8h": KVSpec(_static("int8", "head", symmetric=True), _static("int8", "head", symmetric=True)),
    # Rotation takes a fifth off K's damage, and nothing off V's.
    "c8d": KVSpec(replace(_INT8_TOKEN_CENTERED, rotate=True), _INT8_TOKEN_CENTERED),
    "k8v4": KVSpec(_INT8_CHANNEL, _INT4_ROTATED),
    "c4s": KVSpec(_static("int4", "channel"), _static("int4", "channel")),
    "c4": KVSpec(_static("int4", "channel", clip=0.8), _INT4_ROTATED),
    "c4r": KVSpec(_INT4_ROTATED, _INT4_ROTATED),
    "c4d": KVSpec(replace(_INT4_ROTATED, rotate=False), replace(_INT4_ROTATED, rotate=False)),
    # The control that must look bad: symmetric static int4 per head.
    "c4x": KVSpec(_static("int4", "head", symmetric=True), _static("int4", "head", symmetric=True)),
}
MODES = {name: replace(spec, name=name) for name, spec in MODES.items()}
CONTROL_MODE = "c4x"
# The plan per layer that a calibration chose.
AUTO_MODE = "auto"


def resolve_mode(mode: str | KVSpec, float_codec: str = "fp16") -> KVSpec:
    """The `KVSpec` that `mode` names.

    mode: a name of `MODES`, `K/V` with two of them (K of the first, V of the second), or a ready `KVSpec`. A format's own
        text, as int4.token.asym.center.rotate, does where a name does.
    float_codec: the 16-bit codec that `c16` stands for, "fp16" or "bf16".
    """
    if isinstance(mode, KVSpec):
        return mode
    names = mode.split("/")
    if len(names) > 2 or any(name not in MODES and "." not in name for name in names):
        raise ArgumentError(describe("mode", f"one of {', '.join(MODES)}, or 'K/V' of two of them", repr(mode)))
    k, v = _part(names[0], "k"), _part(names[-1], "v")
    k, v = (Format(float_codec) if part == Format("fp16") else part for part in (k, v))
    return KVSpec(k, v, name=mode)


def _part(name: str, tensor: str) -> Format:
    """The format of K or V in a mode, or the one that `name` spells out."""
    if name not in MODES:
        return parse_format(name)
    return MODES[name].k if tensor == "k" else MODES[name].v


@dataclass(frozen=True)
class LayerSpecs:
    """A mode for every layer: `default`, except where `layers` says otherwise (layer index -> spec)."""

    default: KVSpec
    layers: Mapping[int, KVSpec] = field(default_factory=dict)

    def __getitem__(self, layer_idx: int) -> KVSpec:
        return self.layers.get(layer_idx, self.default)

    @property
    def name(self) -> str:
        return self.default.name + "".join(f",{idx}:{spec.name}" for idx, spec in sorted(self.layers.items()))

    @property
    def needs_scales(self) -> bool:
        return self.default.needs_scales or any(spec.needs_scales for spec in self.layers.values())


def parse_modes(
    text: str | KVSpec | LayerSpecs | Mapping[int | str, str | KVSpec],
    num_layers: int,
    float_codec: str = "fp16",
    plan: str | None = None,
) -> LayerSpecs:
    """The per-layer map that a user's words mean.

    text: a mode (`c4`), a mode with exceptions (`c4,0:c8,4-6:c16`), a mapping {"default": mode, 0: mode, ...}, or
        "auto": what `plan` says.
    plan: the map that a calibration chose (`KVScales.plan`), written as the others are.
    Errors: ArgumentError for an unknown mode, a layer outside 0 .. num_layers - 1, or "auto" without a plan.
    """
    if text == AUTO_MODE:
        if plan is None:
            fix = "choose one: foldkv calibrate MODEL --mode auto"
            raise ArgumentError(describe(f"mode {AUTO_MODE!r}", "scales with a plan for every layer", "none", fix))
        text = plan
    if isinstance(text, LayerSpecs):
        return text
    if isinstance(text, KVSpec):
        return LayerSpecs(text)
    if isinstance(text, Mapping):
        default = text.get("default", "c16")
        layers = {int(key): resolve_mode(mode, float_codec) for key, mode in text.items() if key != "default"}
    else:
        default, *exceptions = (part.strip() for part in text.split(","))
        layers = {}
        for part in exceptions:
            span, colon, mode = part.partition(":")
            first, _, last = span.partition("-")
            if not colon or not first.isdigit() or (last and not last.isdigit()):
                raise ArgumentError(describe("per-layer mode", "'LAYER:MODE' or 'FIRST-LAST:MODE'", repr(part)))
            layers |= {i: resolve_mode(mode, float_codec) for i in range(int(first), int(last or first) + 1)}
    wrong = [i for i in layers if not 0 <= i < num_layers]
    if wrong:
        raise ArgumentError(describe("layer of a per-layer mode", f"0 .. {num_layers - 1}", str(wrong[0])))
    return LayerSpecs(resolve_mode(default, float_codec), layers)


def check_head_dim(head_dim: int) -> None:
    """ArgumentError unless `head_dim` is a multiple of 16 up to 512."""
    if head_dim % 16 or not 16 <= head_dim <= MAX_HEAD_DIM:
        fix = "this model's heads cannot be cached by foldkv"
        raise ArgumentError(describe("head_dim", f"a multiple of 16 up to {MAX_HEAD_DIM}", str(head_dim), fix))


def check_page_size(page_size: int) -> None:
    """ArgumentError unless `page_size` is 16, 32, 64 or 128."""
    if page_size not in PAGE_SIZES:
        raise ArgumentError(describe("page_size", f"one of {', '.join(map(str, PAGE_SIZES))}", str(page_size)))


__all__ = [
    "AUTO_MODE", "CONTROL_MODE", "MAX_HEAD_DIM", "MODES", "PAGE_SIZES", "TRANSFORMS", "Format", "KVSpec", "LayerSpecs",
    "check_head_dim", "check_page_size", "codecs", "parse_format", "parse_modes", "resolve_mode",
]  # fmt: skip
