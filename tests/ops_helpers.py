"""Random caches and ragged batches for the tests of the ops.

Pools start full of 0xFF, block tables end in a wild page id, workspaces are full of NaN, and q, k and v are strided views:
a kernel that reads what it should not, or assumes more than it is told, gives itself away.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quant import ops, reference
from quant.layout import shaping_bytes
from quant.pages import BALANCE, MEAN, QUERY, SCALE, ZERO, LayerPages, PagedTensor, identity_params
from quant.plan import TILE_ROWS, Capacity, Plan
from quant.spec import MODES, Format, KVSpec

# The tensors here are small, and a team of threads would mostly wait for itself. test_laws.py asks for more.
torch.set_num_threads(1)

WILD_PAGE = 2**30
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DIMS = (16, 48, 64, 80, 96, 128, 256, 512)

# Every way a row can be stored. The named modes use some of these; the ops must serve all.
FORMATS = {
    str(fmt): fmt
    for fmt in (
        Format("fp32"),
        Format("fp16"),
        Format("bf16"),
        Format("int8", "channel", symmetric=False),
        Format("int8", "head"),
        Format("int8", "token"),
        Format("int8", "token", center=True, balance=True),
        Format("int8", "token", center=True, balance=True, rotate=True),
        Format("int8", "token", symmetric=False, rotate=True),
        Format("int4", "channel", symmetric=False),
        Format("int4", "channel", symmetric=False, clip=0.8),
        Format("int4", "head"),
        Format("int4", "token"),
        Format("int4", "token", symmetric=False),
        Format("int4", "token", symmetric=False, center=True, balance=True, rotate=True),
    )
}
SPECS = {**MODES, "c16b": KVSpec(Format("bf16"), Format("bf16"), "c16b")}


def is_float(spec: KVSpec) -> bool:
    return not spec.k.element.is_integer and not spec.v.element.is_integer


def params_for(fmt: Format, x: Tensor) -> Tensor:
    """Params fp32 `[5, h_kv, d]` of `fmt`, fitted to rows `x` `[tokens, h_kv, d]` in the plainest way.

    Formats that steer get a direction, but for the last of several heads.
    """
    x = x.float()
    params = identity_params(fmt, *x.shape[1:], x.device)
    top, mid = fmt.element.max_code, fmt.element.mid_code
    low, high = x.amin(0), x.amax(0)
    if fmt.scaling == "head":
        low, high = (part.expand_as(low) for part in (low.amin(-1, keepdim=True), high.amax(-1, keepdim=True)))
    if fmt.is_static and fmt.symmetric:
        params[SCALE] = torch.maximum(low.abs(), high.abs()) * fmt.clip / (mid - 1)
    elif fmt.is_static:
        centre, half = (high + low) / 2, (high - low) / 2 * fmt.clip
        params[SCALE] = 2 * half / top
        params[ZERO] = -(centre - half) / params[SCALE]
    if fmt.steers_rounding:
        h_kv, d = x.shape[1:]
        place = torch.arange(h_kv * d, device=x.device).view(h_kv, d)
        params[QUERY] = torch.where(place % 5 == 0, 0.0, (place * 1.7).sin() * 511).round()
        params[QUERY, max(h_kv - 1, 1) :] = 0.0
    if fmt.center:
        params[MEAN] = x.mean(0)
    if fmt.balance:
        params[BALANCE] = (x.std(0) / x.std(0).mean(-1, keepdim=True)).sqrt()
    return params


def shaping_for(fmt: Format, h_kv: int, d: int) -> Tensor | None:
    """What rows of `fmt` are shaped by, int8 `[h_kv, d, d]`; zeros for the last of several heads, None for other formats."""
    if not shaping_bytes(fmt, h_kv, d):
        return None
    x = torch.randn(h_kv, d, d, generator=torch.Generator().manual_seed(d)) * torch.linspace(0.2, 2, d)
    cost = x.transpose(1, 2) @ x / d + 0.3 * torch.eye(d)
    shaping = (cost / cost.abs().amax((1, 2), keepdim=True) * 127).round().to(torch.int8)
    shaping[max(h_kv - 1, 1) :] = 0
    return shaping


def calibrated(pages: LayerPages, k_params: Tensor, v_params: Tensor) -> LayerPages:
    """`pages` with these params, and shaped where their formats shape."""
    for part, params in ((pages.k, k_params), (pages.v, v_params)):
        part.set_params(params)
        part.set_shaping(shaping_for(part.fmt, *params.shape[1:]))
    return pages


def odd_rows(d: int) -> Tensor:
    """fp32 `[rows, d]` that a quantiser may trip over: outliers, ties, one sign, few values, tiny and huge ones."""
    x, c = torch.randn(24, d), torch.arange(d)
    first = (c == 0).float()
    x[0], x[1], x[2] = first, -first, first - (c == d - 1).float()
    x[3], x[4] = 1e4 * first + x[3], x[4].abs() + 1e-3
    x[5], x[6], x[7] = c % 17 - 8.0, c % 31 / 2.0 - 7.5, (c * 7 % 481 - 240.0) / 64  # ties on every grid
    x[8], x[9], x[10] = torch.where(c % 2 == 0, 1.0, -1.0), -x[8].abs(), x[8].abs() + 1000
    x[11], x[12], x[13] = x[11] * 2.0**-49, x[12] * 2.0**-51, x[13] * 1e-42
    x[14], x[15] = x[14] * 1e29, torch.where(c % 3 == 0, 2.0**100, -(2.0**100))
    x[16], x[17] = torch.where(c == 1, -1e-30, x[16].abs()), torch.where(c == 1, 1e-44, -x[17].abs())
    x[18], x[19] = torch.full((d,), 0.02) + first - 0.021 * (c == 1), x[19].exp() - 1
    x[20], x[21] = (8 * x[20]).round(), torch.where(c % 2 == 0, 0.0, x[21])
    x[22], x[23] = x[22].clamp(min=0.0), -x[23].abs() - first * 1e-3
    return x


def poisoned(pages: LayerPages) -> LayerPages:
    """`pages` with every byte of every pool 0xFF: NaN in the float codecs, the top code and NaN scales in the others."""
    for part in (pages.k, pages.v):
        part.codes.fill_(0xFF)
        part.meta.fill_(0xFF)
    return pages


def twin(pages: LayerPages, device: torch.device | str | None = None) -> LayerPages:
    """A copy of `pages` that shares no memory with it, on its device or another."""
    parts = (
        PagedTensor(part.fmt, *(tensor.to(device, copy=True) for tensor in (part.codes, part.meta, *part.constants)))
        for part in (pages.k, pages.v)
    )
    return LayerPages(*parts, pages.page_size, pages.head_dim)


def pools(pages: LayerPages) -> list[Tensor]:
    return [pages.k.codes, pages.k.meta, pages.v.codes, pages.v.meta]


def same_bytes(a: LayerPages, b: LayerPages) -> bool:
    return all(torch.equal(x.cpu(), y.cpu()) for x, y in zip(pools(a), pools(b), strict=True))


def strided(x: Tensor) -> Tensor:
    """The same rows `[tokens, heads, d]` as a view with gaps between tokens and heads; the last dimension stays whole."""
    tokens, heads, d = x.shape
    room = torch.full((heads, tokens + 1, d + 16), float("nan"), dtype=x.dtype, device=x.device)
    view = room[:, 1:, :d].transpose(0, 1)
    view.copy_(x)
    return view


def fails(message: str, error: type[Exception] = RuntimeError) -> Any:
    """`pytest.raises` of a message that starts like this, word for word; "foldkv: " goes before those of the ops."""
    prefix = "foldkv: " if error is RuntimeError else ""
    return pytest.raises(error, match="^" + re.escape(prefix + message))


def int32(*numbers: int, device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=device)


@dataclass(frozen=True)
class Sequence:
    """One sequence: k, v `[seq_len, h_kv, d]` in a cache of its own, and its newest queries `[q_len, h_q, d]`."""

    k: Tensor
    v: Tensor
    q: Tensor
    start: int = 0


@dataclass
class Source:
    """A layer of a model as its cache sees it: channels with their own means and widths, and params fitted to them.

    Numbers are drawn on the CPU whatever the device, so that a seed means the same everywhere.
    """

    spec: KVSpec
    h_kv: int = 2
    group: int = 2
    d: int = 64
    page_size: int = 16
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    mean: Tensor = field(init=False, repr=False)
    width: Tensor = field(init=False, repr=False)
    params: tuple[Tensor, Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.mean = torch.randn(self.h_kv, self.d)
        self.width = torch.rand(self.h_kv, self.d) + 0.2
        sample = self.sequence(400, 0)
        self.params = params_for(self.spec.k, sample.k.cpu()), params_for(self.spec.v, sample.v.cpu())

    def sequence(self, seq_len: int, q_len: int, start: int = 0) -> Sequence:
        k = torch.randn(seq_len, self.h_kv, self.d) * self.width + self.mean
        v = torch.randn(seq_len, self.h_kv, self.d) * self.width.flip(-1) + 0.3
        q = torch.randn(q_len, self.h_kv * self.group, self.d)
        k, v, q = (x.to(self.dtype).to(self.device) for x in (k, v, q))
        return Sequence(k, v, q, start)

    def pages(self, num_pages: int) -> LayerPages:
        pages = LayerPages.empty(self.spec, num_pages, self.page_size, self.h_kv, self.d, self.device)
        return poisoned(calibrated(pages, *self.params))

    def capacity(self, **changes: Any) -> Capacity:
        """Room for the batches of the tests; tiles are the device's own, the workers few, so that short batches split."""
        heads = self.h_kv * self.group, self.h_kv, self.d
        kind = torch.device(self.device).type
        of_device = {"tile_rows": TILE_ROWS[kind], "chunk_groups": kind == "cuda"}
        base = Capacity(8, 256, 4096, 16384, *heads, self.page_size, num_workers=8, **of_device)
        return replace(base, **changes)


@dataclass
class Batch:
    """Sequences in one pool, with the tensors that the ops take."""

    source: Source
    sequences: list[Sequence]
    pages: LayerPages
    block_table: Tensor
    seq_lens: Tensor
    cu_seqlens_q: Tensor
    seq_starts: Tensor | None
    q: Tensor

    def slots(self, b: int) -> Tensor:
        """Slots int64 `[seq_len]` of sequence `b`."""
        position = torch.arange(int(self.seq_lens[b]), device=self.block_table.device)
        size = self.source.page_size
        return self.block_table[b].long()[position // size] * size + position % size

    def rows(self, b: int) -> slice:
        return slice(int(self.cu_seqlens_q[b]), int(self.cu_seqlens_q[b + 1]))

    def plan(self, window_left: int = -1, **changes: int) -> Plan:
        """A plan updated for this batch; `changes` go to the capacity. Buffers start poisoned."""
        plan = Plan(self.source.capacity(**changes), window_left, self.source.device)
        plan.buffer.fill_(-1)
        plan.workspace.fill_(float("nan"))
        plan.update(self.seq_lens, self.cu_seqlens_q, self.seq_starts)
        return plan

    def attend(self, plan: Plan | None = None, **options: Any) -> tuple[Tensor, Tensor]:
        """Output and LSE of the op; `options` as of `ops.append_attention`."""
        plan = self.plan(options.get("window_size", (-1, -1))[0]) if plan is None else plan
        out = torch.full(self.q.shape, float("nan"), dtype=self.q.dtype, device=self.q.device)
        tensors = (self.block_table, self.seq_lens, self.cu_seqlens_q)
        return ops.append_attention(
            self.pages, self.q, *tensors, plan, seq_starts=self.seq_starts, out=out, return_lse=True, **options
        )

    def _keywords(self, options: dict[str, Any]) -> dict[str, Any]:
        renamed = dict(options)
        renamed["window_left"] = renamed.pop("window_size", (-1, -1))[0]
        return renamed

    def truth(self, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Tensor, Tensor]:
        """What the reference makes of the stored bytes, in `dtype`."""
        tensors = (self.block_table, self.seq_lens, self.cu_seqlens_q)
        keywords = self._keywords(options) | {"seq_starts": self.seq_starts}
        return reference.append_attention(self.pages, self.q, *tensors, dtype=dtype, **keywords)

    def unquantised(self, **options: Any) -> tuple[Tensor, Tensor]:
        """fp64 attention over the rows as they were before they were stored."""
        out = torch.zeros_like(self.q, dtype=torch.float64)
        lse = torch.full_like(out[..., 0], -torch.inf)
        for b, one in enumerate(self.sequences):
            if len(one.q):
                rows, keys = self.rows(b), (one.k.double(), one.v.double())
                out[rows], lse[rows] = reference.attention(
                    self.q[rows], *keys, start=one.start, **self._keywords(options)
                )
        return out, lse


def make_batch(source: Source, sequences: list[Sequence], *, spare_pages: int = 3, spare_rows: int = 0) -> Batch:
    """Append every sequence into shuffled pages of a poisoned pool. spare_rows: rows of q that no sequence owns."""
    size, device = source.page_size, source.device
    counts = [-(-len(one.k) // size) for one in sequences]
    pages = source.pages(sum(counts) + spare_pages)
    order = torch.randperm(pages.num_pages).int()
    table = torch.full((len(sequences), max([*counts, 0]) + 2), WILD_PAGE, dtype=torch.int32)
    for b, ids in enumerate(order[: sum(counts)].split(counts) if counts else ()):
        table[b, : len(ids)] = ids
    starts = int32(*(one.start for one in sequences), device=device) if any(one.start for one in sequences) else None
    lengths = [len(one.q) for one in sequences]
    bounds = int32(0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist(), device=device)
    queries = [one.q for one in sequences] + [source.sequence(0, spare_rows).q]
    seq_lens = int32(*(len(one.k) for one in sequences), device=device)
    batch = Batch(
        source, sequences, pages, table.to(device), seq_lens, bounds, starts, strided(torch.cat(queries))
    )  # fmt: skip
    for b, one in enumerate(sequences):
        ops.append_kv(pages, strided(one.k), strided(one.v), batch.slots(b))
    return batch


def make_ragged(source: Source, lengths: list[tuple[int, ...]], **options: int) -> Batch:
    """`make_batch` of random sequences, each given as (seq_len, q_len) or (seq_len, q_len, start)."""
    return make_batch(source, [source.sequence(*numbers) for numbers in lengths], **options)


def norm_error(x: Tensor, truth: Tensor) -> float:
    return float((x.double() - truth).norm())


def check_attention(batch: Batch, **options: Any) -> tuple[Tensor, Tensor]:
    """Assert that the op is as right as it can be asked to be, and return what it gave.

    All errors are norms over the batch, against fp64 attention over the stored bytes. Float codecs: at most twice that
    of plain PyTorch in fp32, and one rounding to the output's dtype. Integer codecs: at most a tenth of the error that
    the format itself makes, or twice that rounding.
    """
    out, lse = batch.attend(**options)
    want, want_lse = batch.truth(**options)
    plain, plain_lse = batch.truth(dtype=torch.float32, **options)
    exact, exact_lse = batch.unquantised(**options)
    rounding = torch.finfo(out.dtype).eps / 2 * float(want.norm())
    seen = torch.isfinite(want_lse)
    assert torch.equal(torch.isfinite(lse), seen)
    assert torch.equal(lse[~seen], want_lse[~seen].float())
    assert not out[want.abs().amax(-1) == 0].any()
    lse_error = [float((x.double() - want_lse)[seen].abs().max()) for x in (lse, plain_lse, exact_lse)]
    largest_lse = float(want_lse[seen].abs().max())
    # exp is good to 1e-7 (csrc/cpu/simd.h) and the result is rounded once.
    lse_limit = 2 * lse_error[1] + 1e-7 + 2**-24 * largest_lse
    if is_float(batch.source.spec):
        limit = 2 * norm_error(plain, want) + rounding
    else:
        limit = max(norm_error(exact, want) / 10, 2 * rounding)
        lse_limit = max(lse_limit, lse_error[2] / 10)
    assert norm_error(out, want) <= limit
    assert lse_error[0] <= lse_limit
    return out, lse


# What the tests of attention ask for besides a batch; `with_sinks` fills in what "sinks" stands for.
OPTIONS: list[dict[str, Any]] = [
    {},
    {"window_size": (100, 0)},
    {"softcap": 3.0, "sinks": True},
    {"softmax_scale": 0.31, "window_size": (0, 0)},
    {"window_size": (280, -1), "softcap": 20.0, "sinks": True},
]


def with_sinks(options: dict[str, Any], h_q: int, device: torch.device | str = "cpu") -> dict[str, Any]:
    return options | ({"sinks": torch.randn(h_q).to(device)} if options.get("sinks") else {})


def check_idempotent(source: Source, slots: Tensor) -> None:
    """Rows of `source` written in another order, one by one, over a draft and twice leave the bytes of writing once."""
    one, draft = source.sequence(len(slots), 0), source.sequence(12, 0)
    once = source.pages(4)
    again = twin(once)
    ops.append_kv(once, one.k, one.v, slots)
    for i in torch.randperm(len(slots)).tolist():
        ops.append_kv(again, one.k[i : i + 1], one.v[i : i + 1], slots[i : i + 1])
    assert same_bytes(again, once)
    ops.append_kv(again, draft.k, draft.v, slots[-12:])
    assert not same_bytes(again, once)
    ops.append_kv(again, one.k[-12:], one.v[-12:], slots[-12:])
    assert same_bytes(again, once)
    ops.append_kv(again, one.k, one.v, slots)
    assert same_bytes(again, once)


def check_merge(o: Tensor, lse: Tensor, ulps: int = 1) -> tuple[Tensor, Tensor]:
    """Merge by the op, held to twice the error of plain fp32 and one rounding to the dtype, the LSE to `ulps` roundings."""
    lse = lse.float()
    got, got_lse = ops.merge(o, lse)
    want, want_lse = reference.merge(o, lse)
    weights = torch.softmax(lse, 0).nan_to_num()
    plain = (torch.where(weights[..., None] > 0, o.float(), 0.0) * weights[..., None]).sum(0)
    rounding = torch.finfo(o.dtype).eps / 2 * want.norm()
    assert got.dtype == o.dtype and got_lse.dtype == torch.float32
    assert (got.double() - want).norm() <= 2 * (plain.double() - want).norm() + rounding
    seen = torch.isfinite(want_lse)
    assert torch.equal(got_lse[~seen], want_lse[~seen].float())
    torch.testing.assert_close(got_lse[seen].double(), want_lse[seen], rtol=ulps * 2**-23, atol=ulps * 2e-7)
    return got, got_lse
