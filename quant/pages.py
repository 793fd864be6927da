"""The tensors of one layer's cache: page pools and scale parameters of K and of V."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import ArgumentError, describe
from .layout import meta_page_bytes, page_bytes, shaping_bytes
from .spec import Format, KVSpec, check_head_dim, check_page_size

# Rows of a params tensor, fp32 [5, h_kv, d].
NUM_PARAM_ROWS = 5
SCALE, ZERO, MEAN, BALANCE, QUERY = range(NUM_PARAM_ROWS)


def identity_params(fmt: Format, h_kv: int, head_dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Params that change nothing: fp32 `[5, h_kv, d]`, scale and balance 1, the middle code as zero, mean and query 0."""
    params = torch.zeros(NUM_PARAM_ROWS, h_kv, head_dim, dtype=torch.float32, device=device)
    params[SCALE] = params[BALANCE] = 1.0
    if fmt.element.is_integer:
        params[ZERO] = float(fmt.element.mid_code)
    return params


@dataclass
class PagedTensor:
    """K or V of one layer.

    codes:  uint8 `[num_pages, h_kv, page_size * row_bytes]`.
    meta:   uint8 `[num_pages, h_kv, page_size * meta_bytes]`, dynamic scale data; zero bytes wide for other formats.
    params: fp32 `[5, h_kv, d]`: static scale, zero, mean, balance, direction of queries (`quant.steering`); rewritten in place,
            so its address is stable.
    shaping: int8 `[h_kv, d, d]`, symmetric, what `quant.shaping` weighs errors by, zeros where it is unknown; rewritten in
            place. None for formats and heads that are not shaped.
    """

    fmt: Format
    codes: Tensor
    meta: Tensor
    params: Tensor
    shaping: Tensor | None = None

    @classmethod
    def empty(
        cls, fmt: Format, num_pages: int, page_size: int, h_kv: int, head_dim: int, device: torch.device | str
    ) -> PagedTensor:
        shape = (num_pages, h_kv)
        codes = torch.zeros(*shape, page_bytes(fmt, head_dim, page_size), dtype=torch.uint8, device=device)
        meta = torch.zeros(*shape, meta_page_bytes(fmt, page_size), dtype=torch.uint8, device=device)
        shaping = None
        if shaping_bytes(fmt, h_kv, head_dim):
            shaping = torch.zeros(h_kv, head_dim, head_dim, dtype=torch.int8, device=device)
        return cls(fmt, codes, meta, identity_params(fmt, h_kv, head_dim, device), shaping)

    @property
    def constants(self) -> tuple[Tensor, ...]:
        """What calibrations put in place: `params`, and `shaping` where there is room for one."""
        return (self.params,) if self.shaping is None else (self.params, self.shaping)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.meta.nbytes + sum(tensor.nbytes for tensor in self.constants)

    def set_params(self, params: Tensor) -> None:
        """Copy fp32 `[5, h_kv, d]` `params` into place (same address, so captured graphs see them)."""
        if params.shape != self.params.shape:
            raise ArgumentError(describe("params", f"shape {tuple(self.params.shape)}", str(tuple(params.shape))))
        if not torch.isfinite(params).all() or not (params[SCALE] > 0).all() or not (params[BALANCE] > 0).all():
            raise ArgumentError(
                describe("params", "finite values, scale and balance > 0", "others", "calibrate the model again")
            )
        self.params.copy_(params)

    def set_shaping(self, shaping: Tensor | None) -> None:
        """Copy int8 `[h_kv, d, d]` `shaping` into place (same address, so captured graphs see it); None rounds plainly.

        Errors: ArgumentError for another dtype or shape, for a matrix that is not symmetric or has a negative diagonal, and
        for any matrix where rows are not shaped.
        """
        if self.shaping is None:
            if shaping is not None:
                raise ArgumentError(describe("shaping", f"None for {self.fmt}", f"shape {tuple(shaping.shape)}"))
            return
        if shaping is None:
            self.shaping.zero_()
            return
        if shaping.dtype != torch.int8 or shaping.shape != self.shaping.shape:
            wanted, got = (f"{x.dtype} of shape {tuple(x.shape)}" for x in (self.shaping, shaping))
            raise ArgumentError(describe("shaping", wanted, got))
        diagonal = shaping.diagonal(dim1=1, dim2=2)
        if not torch.equal(shaping, shaping.transpose(1, 2)) or not (diagonal >= 0).all():
            fix = "calibrate the model again"
            raise ArgumentError(describe("shaping", "symmetric matrices, diagonal >= 0", "others", fix))
        self.shaping.copy_(shaping)


@dataclass
class LayerPages:
    """The cache of one layer: K and V pools that share page ids."""

    k: PagedTensor
    v: PagedTensor
    page_size: int
    head_dim: int

    @classmethod
    def empty(
        cls, spec: KVSpec, num_pages: int, page_size: int, h_kv: int, head_dim: int, device: torch.device | str = "cpu"
    ) -> LayerPages:
        """Zero-filled pools for `num_pages` pages of `page_size` tokens."""
        check_head_dim(head_dim)
        check_page_size(page_size)
        args = (num_pages, page_size, h_kv, head_dim, device)
        return cls(PagedTensor.empty(spec.k, *args), PagedTensor.empty(spec.v, *args), page_size, head_dim)

    @property
    def num_pages(self) -> int:
        return self.k.codes.shape[0]

    @property
    def h_kv(self) -> int:
        return self.k.codes.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes held, scale data and parameters included."""
        return self.k.nbytes + self.v.nbytes
