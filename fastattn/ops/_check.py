"""Argument checks shared by the public functions: each error names the value and the bound."""

from __future__ import annotations

import torch
from torch import Tensor


def fits(tensor: Tensor | None, x: Tensor) -> bool:
    """Whether this is None, or a floating-point tensor on x's device.

    Asked before `check_floating` and `check_same_device`, because a call by keyword for each costs a microsecond of
    host time.
    """
    return tensor is None or (
        isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.device == x.device
    )


def check_floating(*needed: str, **tensors: Tensor | None) -> None:
    """Raises TypeError for an argument that is no floating-point tensor.

    None stands for one not given, which those named in `needed` must be.
    """
    for name, tensor in tensors.items():
        if tensor is None and name not in needed:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, not {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} has dtype={tensor.dtype}; a floating-point dtype is needed")


def check_same_device(first: str, tensor: Tensor, **others: Tensor | None) -> None:
    """Raises ValueError for a tensor on another device than the first."""
    device = tensor.device
    for name, other in others.items():
        if other is not None and other.device != device:
            raise ValueError(f"{name} is on {other.device}, but {first} is on {device}")


def check_attention_shapes(q: Tensor, k: Tensor, v: Tensor, packed: bool = False) -> None:
    """Raises ValueError where (batch, heads, seq, head_dim) shapes do not fit together.

    Packed tensors have passed through `(1, heads, total, head_dim)`, and their errors speak of what was given.
    """
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    # The usual case at once. Not while the compiler traces, which would take the comparison for a condition.
    if not torch.compiler.is_compiling() and q_shape == k_shape == v_shape and len(q_shape) == 4:
        return
    if not len(q_shape) == len(k_shape) == len(v_shape) == 4:
        raise ValueError(
            f"q, k and v have {q.dim()}, {k.dim()} and {v.dim()} dimensions; "
            "(batch, heads, seq, head_dim), so 4, are needed"
        )
    batch, heads, _, head_dim = q_shape
    kv_batch, kv_heads, _, kv_head_dim = k_shape
    if k_shape[:3] != v_shape[:3]:
        shown = [(s[2], s[1], s[3]) if packed else tuple(s) for s in (k_shape, v_shape)]
        raise ValueError(f"k has shape {shown[0]} and v {shown[1]}; they may differ in the last size alone")
    if batch != kv_batch:
        raise ValueError(f"k has batch={kv_batch}, but q has batch={batch}")
    if head_dim != kv_head_dim:
        raise ValueError(f"k has head_dim={kv_head_dim}, but q has head_dim={head_dim}")
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(f"q's heads={heads} must be a multiple of k's heads={kv_heads}")
