"""Layouts on the host's side of the kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Within a tile of at most 256 rows, offsets are 32-bit integers.
_MAX_ROW_STRIDE = (1 << 31) // 256


def empty_contiguous(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialized contiguous tensor of this one's shape; at half the host cost of `torch.empty`."""
    return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)


def empty_rows(tensor: Tensor) -> Tensor:
    """An uninitialized tensor like this one whose rows a kernel can write.

    It has the strides of `tensor` where these have neither holes nor overlaps and suit a kernel.
    """
    like = torch.empty_like(tensor)
    return (
        like
        if rows_readable(like.stride())
        else torch.empty_like(tensor, memory_format=torch.contiguous_format)
    )


def empty_gradient(tensor: Tensor) -> Tensor:
    """An uninitialized gradient of q, k, v, a bias (4-D) or of sinks."""
    return empty_rows(tensor) if tensor.dim() == 4 else torch.empty_like(tensor)


def empty_out(q: Tensor, v: Tensor) -> Tensor:
    """An uninitialized output: q's shape but v's width, with the order of q's dimensions in memory."""
    if q.shape[3] == v.shape[3]:
        return empty_rows(q)
    batch, heads, seq, _ = q.shape
    # (batch, seq, heads, width) in memory, as a projection leaves it, or (batch, heads, seq, width).
    if q.stride(2) > q.stride(1):
        return q.new_empty((batch, seq, heads, v.size(3))).transpose(1, 2)
    return q.new_empty((batch, heads, seq, v.size(3)))


def rows_contiguous(tensor: Tensor) -> Tensor:
    """The tensor itself if a kernel can read its rows, else a contiguous copy."""
    readable = rows_readable(tensor.stride())
    return tensor if readable else tensor.clone(memory_format=torch.contiguous_format)


def is_broadcast(plane: Tensor, dim: int) -> bool:
    """Whether all of a dimension is the same element in memory."""
    return plane.size(dim) == 1 or plane.stride(dim) == 0


def rows_too_far(plane: Tensor) -> bool:
    """Whether the rows or keys of a bias or mask lie too far apart for 32-bit offsets within a tile."""
    return any(
        size > 1 and stride >= _MAX_ROW_STRIDE // 2
        for size, stride in zip(plane.shape[-2:], plane.stride()[-2:], strict=True)
    )


def rows_readable(strides: Sequence[int]) -> bool:
    """Whether the last dimension is contiguous and neighbouring rows lie less than 2^31 / 256 elements apart."""
    return strides[-1] == 1 and strides[-2] < _MAX_ROW_STRIDE


def block_d(head_dim: int, least: int = 16) -> int:
    """Tile sides are powers of two, and a matrix instruction takes at least 16; of 8-bit operands 32."""
    return max(least, 1 << (head_dim - 1).bit_length())


def first_block(head_dim: int) -> int:
    """The columns of a row's first tile, where a row may lie in two (see `fastattn.kernels._parts`); else `block_d`.

    Two where the second is at most half as wide as the first: 80 = 64 + 16, 96 = 64 + 32, 192 = 128 + 64, but 112 would
    be 64 + 64 and stays one tile of 128. Below 64 columns products do not bind, and above 256 there are few calls.
    """
    whole = block_d(head_dim)
    half = whole // 2
    two = 64 <= half < 256 and block_d(head_dim - half) <= half // 2
    return half if two else whole


def rows_narrow(widths: Sequence[int], strides: Sequence[Sequence[int]]) -> bool:
    """Whether rows of 16 bits are not loaded 16 bytes at a time where they lie.

    So it is where 8 does not divide their width, or how far rows, heads or batches lie apart.
    """
    together = 0
    for number in widths:
        together |= number
    for of in strides:
        for number in of[:-1]:
            together |= number
    return together % 8 != 0


def halves(x: Tensor, second_first: bool) -> tuple[Tensor, Tensor]:
    """Both halves of the last dimension, as views, in either order."""
    first, second = x.chunk(2, dim=-1)
    return (second, first) if second_first else (first, second)
