"""Layouts on the host's side of the attention kernels."""

from __future__ import annotations

import torch
from torch import Tensor

# Within a tile of at most 256 rows, offsets are 32-bit integers.
_MAX_ROW_STRIDE = (1 << 31) // 256


def empty_rows(tensor: Tensor) -> Tensor:
    """An uninitialized tensor like this one whose rows a kernel can write.

    It has the strides of `tensor` where these have neither holes nor overlaps and suit a kernel.
    """
    like = torch.empty_like(tensor)
    return like if _has_rows(like) else torch.empty_like(tensor, memory_format=torch.contiguous_format)


def rows_contiguous(tensor: Tensor) -> Tensor:
    """The tensor itself if a kernel can read its rows, else a contiguous copy."""
    return tensor if _has_rows(tensor) else tensor.clone(memory_format=torch.contiguous_format)


def _has_rows(tensor: Tensor) -> bool:
    """Whether the last dimension is contiguous and neighbouring rows lie less than 2^31 / 256 elements apart."""
    return tensor.stride(-1) == 1 and tensor.stride(-2) < _MAX_ROW_STRIDE


def causal_offset(causal: str, seq_q: int, seq_k: int) -> int:
    """Query i sees keys up to and including i + offset."""
    return seq_k - seq_q if causal == "bottom_right" else 0


def block_d(head_dim: int) -> int:
    """Tile sides are powers of two, and a matrix instruction takes at least 16."""
    return max(16, 1 << (head_dim - 1).bit_length())
