"""Kernel arguments in tuples: a tensor with its strides, and all that modifies a score.

Triton flattens a tuple, and compiles a field that is None away: `if score.bias is not None` costs nothing in a
kernel without a bias. A tuple that is compared with None, asked for its type or returned may have no field that is None
or a string in Triton 3.6: `Score` and `Sequences` have such, and are none of that.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastattn.kernels import _target
from fastattn.kernels._attention_tables import AttentionTiles
from fastattn.kernels._layout import is_broadcast
from fastattn.kernels._options import AttentionOptions

LOG2_E = 1.4426950408889634


class Rows(NamedTuple):
    """A tensor (batch, heads, seq, width) whose last dimension is contiguous.

    The strides count `unit` elements, 1, 2, 4 or 8: see `_in_elements`.
    """

    ptr: Any
    stride_b: Any
    stride_h: Any
    stride_m: Any
    unit: Any = tl.constexpr(1)


class Plane(NamedTuple):
    """A tensor (batch, heads, seq_q, seq_k); a stride is 0 where it is broadcast.

    `along` says of stride_m (1) and stride_n (2) which are not: a tile of a plane that is broadcast is one row or one
    column, and loaded as one. size_n is its own number of keys, of which Triton knows whether 16 divides it: only then
    can loads that it bounds be wide.
    """

    ptr: Any
    stride_b: Any
    stride_h: Any
    stride_m: Any
    stride_n: Any
    size_n: Any
    along: Any = tl.constexpr(3)


class Matrix(NamedTuple):
    """A tensor (rows, width) whose last dimension is contiguous."""

    ptr: Any
    stride_m: Any


class Vectors(NamedTuple):
    """A tensor (batch, heads)."""

    ptr: Any
    stride_b: Any
    stride_h: Any


class Dropout(NamedTuple):
    """Seed and offset, two int64; the probability to drop; what multiplies the values that are kept."""

    seed_ptr: Any
    probability: Any
    kept_scale: Any


class Score(NamedTuple):
    """What becomes of a product q . k, see `fastattn.kernels._scores`; a field is None where nothing is asked for.

    `scale` gives the score in base 2, or with `softcap`, in base 2, the argument of tanh, whose result the cap turns
    into one; `tanh` is the form of it in `fastattn.kernels._math`.
    """

    scale: Any
    softcap: Any
    slopes: Any
    bias: Any
    mask: Any
    dropout: Any
    quantized: Any = None
    tanh: Any = None


class Quantized(NamedTuple):
    """What is known of e4m3 operands beside their values, as `quantize.Operands` has it."""

    k_scales_ptr: Any
    terms_ptr: Any
    statistics_ptr: Any


class Sequences(NamedTuple):
    """Where sequences begin, in packed tensors, and how many keys of each count; None where all are full."""

    starts_q: Any
    starts_k: Any
    key_lengths: Any


def rows_of(tensor: Tensor) -> Rows:
    stride_b, stride_h, stride_m, _ = tensor.stride()
    together = (stride_b | stride_h | stride_m) % 16
    if together == 0 or together % 2:
        return Rows(tensor, stride_b, stride_h, stride_m)
    unit = together & -together
    return Rows(tensor, stride_b // unit, stride_h // unit, stride_m // unit, tl.constexpr(unit))


@triton.jit
def _in_elements(rows):
    """`Rows` whose strides count elements, or a descriptor as it is.

    Triton knows of an argument whether 16 divides it and nothing else; of a product with a constant it knows that. Rows
    of 72 or 100 elements are loaded 16 or 8 bytes at a time so, and else element by element.
    """
    if isinstance(rows, tl.tensor_descriptor) or rows.unit == 1:
        return rows
    else:
        return Rows(rows.ptr, rows.stride_b * rows.unit, rows.stride_h * rows.unit, rows.stride_m * rows.unit)


def read_rows(tensor: Tensor, tiles: AttentionTiles, rows: int, width: int) -> Rows | TensorDescriptor:
    """What a kernel's loop reads `rows` rows at a time of, `width` columns wide, in the form that the tiles say.

    A descriptor is made here, on the host, and copied to the device among the kernel's arguments. Made in the kernel it
    would cost every program a write to memory and a fence, and each launch a buffer for them.
    """
    if tiles.form == "pointers":
        return rows_of(tensor)
    # A dimension of size 1 may have any stride, which a descriptor would refuse; 16 elements are 16 bytes or more.
    strides = [
        stride if size > 1 else 16 for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True)
    ]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], [1, 1, rows, width])


def plane_of(tensor: Tensor) -> Plane:
    """Of a 4-D tensor some of whose sizes may be 1."""
    stride_b, stride_h, stride_m, stride_n = (
        0 if is_broadcast(tensor, dim) else tensor.stride(dim) for dim in range(4)
    )
    along = _ALONG[(stride_m != 0) + 2 * (stride_n != 0)]
    return Plane(tensor, stride_b, stride_h, stride_m, stride_n, tensor.size(3), along)


_ALONG = tuple(map(tl.constexpr, range(4)))


def score_of(options: AttentionOptions, like: Tensor) -> Score:
    """What becomes of the scores of a query like this one."""
    scale, softcap, tanh = options.scale * LOG2_E, None, None
    if options.softcap:
        scale, softcap = options.scale / options.softcap, options.softcap * LOG2_E
        tanh = tl.constexpr(_tanh_form(like))
    slopes = options.alibi_slopes
    return Score(
        scale,
        softcap,
        None
        if slopes is None
        else Vectors(slopes, 0 if slopes.size(0) == 1 else slopes.stride(0), slopes.stride(1)),
        None if options.bias is None else plane_of(options.bias),
        None if options.mask is None else plane_of(options.mask.view(torch.uint8)),
        dropout_of(options.dropout_seed, options.dropout_p),
        None,
        tanh,
    )


def _tanh_form(like: Tensor) -> str:
    """float32 to the last bit; for 16-bit inputs an error below theirs, by one instruction where there is one."""
    if like.dtype == torch.float32:
        return "exact"
    return "instruction" if _target.target_of(like.device).backend == "cuda" else "ratio"


def dropout_of(seed: Tensor | None, p: float) -> Dropout | None:
    """Dropout with probability p, or None where there is none."""
    if p == 0.0 or seed is None:
        return None
    return Dropout(seed, p, 1.0 / (1.0 - p) if p < 1.0 else 0.0)


def sequences_of(options: AttentionOptions) -> Sequences:
    return Sequences(options.cu_seqlens_q, options.cu_seqlens_k, options.key_lengths)
