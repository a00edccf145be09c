"""The gradients of a loss of chunks as they grow: products of each chunk, added up in float32 or wider."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

# Rows of a weight's gradient whose sums stay in a CPU's cache between the product and the addition.
CACHED_ROWS = 2048


class Sums(NamedTuple):
    """The gradients as they grow; None for one that is not asked for."""

    dinput: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None

    @staticmethod
    def of(
        input: Tensor, weight: Tensor, dinput: bool, dweight: bool, dbias: bool, wide: torch.dtype
    ) -> Sums:
        return Sums(
            torch.empty_like(input) if dinput else None,
            # The first chunk writes it, if there is one.
            _empty_or_zeros(weight, wide, input.size(0) == 0) if dweight else None,
            weight.new_zeros(weight.shape[:1], dtype=wide) if dbias else None,
        )

    def add(self, rows: slice, dlogits: Tensor, x: Tensor, weight: Tensor) -> None:
        """Adds what a chunk's dlogits contribute."""
        if self.dinput is not None:
            part = rows_of(self.dinput, rows)
            if part.dtype == dlogits.dtype:
                torch.mm(dlogits, weight, out=part)
            else:
                part.copy_(torch.mm(dlogits, weight))
        if self.dweight is not None:
            _add_product(self.dweight, dlogits.t(), x, first=rows.start == 0)
        if self.dbias is not None:
            self.dbias.add_(dlogits.sum(0, dtype=self.dbias.dtype))

    def given(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients, with an empty tensor for None: an operator cannot return that."""
        dinput, dweight, dbias = [like.new_empty(0) if t is None else t for t in self]
        return dinput, dweight, dbias


def rows_of(tensor: Tensor, rows: slice) -> Tensor:
    """A chunk's rows: the tensor itself where they are all, since a slice costs the host an allocation's time."""
    return tensor if rows.stop - rows.start == tensor.size(0) else tensor[rows]


def _empty_or_zeros(like: Tensor, dtype: torch.dtype, zeros: bool) -> Tensor:
    return (torch.zeros_like if zeros else torch.empty_like)(
        like, dtype=dtype, memory_format=torch.contiguous_format
    )


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a b, or where it is the first total = a b, with sums in total's dtype, float32 or wider."""
    dtype = total.dtype
    form = "widen" if a.dtype == dtype else _wide_product(a.device, a.dtype)
    if form == "rounded":
        _add_rounded_product(total, a, b, first)
    elif form == "widen":
        a, b = a.to(dtype), b.to(dtype)
        if first:
            torch.mm(a, b, out=total)
        else:
            total.addmm_(a, b)
    elif first:
        torch.mm(a, b, out_dtype=dtype, out=total)
    elif form == "addmm":
        torch.addmm(total, a, b, out_dtype=dtype, out=total)
    else:
        total.add_(torch.mm(a, b, out_dtype=dtype))


def _add_rounded_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """As `_add_product`, but of a product in a's dtype, some rows at a time so that they stay in the cache."""
    size = min(CACHED_ROWS, total.size(0))
    products = b.new_empty(size, total.size(1))
    # Widened before they are added: PyTorch's CPU adds mixed dtypes at a fifth of the speed.
    widened = torch.empty_like(products, dtype=total.dtype)
    for part, rows in zip(total.split(size), a.split(size), strict=True):
        product = torch.mm(rows, b, out=products[: len(part)])
        if first:
            part.copy_(product)
        else:
            part.add_(widened[: len(part)].copy_(product))


@cache
def _wide_product(device: torch.device, dtype: torch.dtype) -> str:
    """How products of 16-bit matrices are added up in float32 on a device.

    "addmm" and "mm" have float32 results; whether `out_dtype` is taken, tried once on a tile, depends on the device and
    on PyTorch's version. "widen" makes float32 products. "rounded" rounds each chunk's product to bfloat16 first, no
    more than PyTorch rounds that of all rows, where a float32 product takes four times as long; a sum of float16 could
    overflow.
    """
    if device.type == "cpu":
        return "rounded" if dtype == torch.bfloat16 else "widen"
    a = torch.zeros(16, 16, dtype=dtype, device=device)
    total = torch.zeros(16, 16, device=device)
    try:
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
        return "addmm"
    except (RuntimeError, TypeError):
        pass
    try:
        torch.mm(a, a, out_dtype=torch.float32)
        return "mm"
    except (RuntimeError, TypeError):
        return "widen"
