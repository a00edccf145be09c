"""The arguments of the rotary functions: checked, and turned into the operators' arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastattn.dispatch import checking
from fastattn.ops._attention_call import check_cu_seqlens
from fastattn.ops._check import check_floating, check_same_device


class RotaryCall(NamedTuple):
    """What the operators take beside the tensors to rotate."""

    cos: Tensor
    sin: Tensor
    positions: Tensor | None
    starts: Tensor | None
    cu_seqlens: Tensor | None
    start: int
    interleaved: bool
    conjugate: bool


def pack_rotary(
    names: str,
    tensors: tuple[Tensor, ...],
    cos: Tensor,
    sin: Tensor,
    interleaved: bool,
    offsets: int | Tensor,
    positions: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    inplace: bool,
) -> tuple[Any, ...]:
    for index, x in enumerate(tensors):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            check_floating(names[index], **{names[index]: x})
        if x.dim() == 4 and cu_seqlens is None:
            continue
        if x.dim() != 3 or (cu_seqlens is None and positions is None):
            raise ValueError(
                f"{names[index]} has shape {tuple(x.shape)}; (batch, heads, seq, head_dim) is needed, or, with "
                "cu_seqlens or positions, (total, heads, head_dim)"
            )
    start, starts = (0, offsets) if isinstance(offsets, Tensor) else (offsets, None)
    if type(start) is not int and not isinstance(start, torch.SymInt):
        raise TypeError(f"offsets must be an int or a torch.Tensor, not {type(start).__name__}")
    if positions is not None:
        if not isinstance(positions, Tensor):
            raise TypeError(f"positions must be a torch.Tensor, not {type(positions).__name__}")
        cu_seqlens = None
    call = RotaryCall(cos, sin, positions, starts, cu_seqlens, start, bool(interleaved), False)
    return tensors, call, max_seqlen, bool(inplace)


def check_rotary(tensors: Sequence[Tensor], call: RotaryCall, max_seqlen: int | None, inplace: bool) -> None:
    x, cos, sin = tensors[0], call.cos, call.sin
    if not (isinstance(cos, Tensor) and isinstance(sin, Tensor)):
        check_floating("cos", "sin", cos=cos, sin=sin)
    _check_tables(x, cos, sin)
    if len(tensors) == 2:
        _check_two(*tensors)
    batch, seq = (1, x.size(0)) if x.dim() == 3 else (x.size(0), x.size(2))
    if call.positions is None and call.starts is None and call.cu_seqlens is None:
        _check_range(call.start, call.start + seq, cos, seq)
    else:
        _check_places(x, call, max_seqlen, batch, seq)
    if inplace:
        _check_writable(tensors)


def _check_tables(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    table, dtype, device = cos.shape, cos.dtype, cos.device
    if len(table) != 2 or table != sin.shape:
        raise ValueError(
            f"cos and sin have shapes {tuple(table)} and {tuple(sin.shape)}; (positions, rotary_dim / 2) is needed"
        )
    rotary_dim, head_dim = 2 * table[1], x.size(-1)
    if not 2 <= rotary_dim <= head_dim:
        raise ValueError(
            f"rotary_dim={rotary_dim}, twice cos's width, must lie within 2 and head_dim={head_dim}"
        )
    if dtype is not sin.dtype or (dtype is not torch.float32 and dtype is not x.dtype):
        raise TypeError(f"cos and sin have {dtype} and {sin.dtype}; both must have float32 or x's {x.dtype}")
    if x.device != device or sin.device != device:
        check_same_device("x", x, cos=cos, sin=sin)


def _check_two(q: Tensor, k: Tensor) -> None:
    if q.dtype != k.dtype:
        raise TypeError(f"q and k must have one dtype, not {q.dtype} and {k.dtype}")
    if q.device != k.device:
        check_same_device("q", q, k=k)
    if q.shape != k.shape and (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(
            f"q has shape {tuple(q.shape)} and k {tuple(k.shape)}; they may differ in their heads alone"
        )


def _check_places(x: Tensor, call: RotaryCall, max_seqlen: int | None, batch: int, seq: int) -> None:
    positions, starts, bounds = call.positions, call.starts, call.cu_seqlens
    check_same_device("x", x, positions=positions, offsets=starts, cu_seqlens=bounds)
    for name, tensor in (("positions", positions), ("offsets", starts)):
        if tensor is not None and tensor.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} has dtype={tensor.dtype} and must be int32 or int64")
    if bounds is not None:
        check_cu_seqlens("cu_seqlens", bounds, seq, seq if max_seqlen is None else max_seqlen)
    if positions is not None:
        if starts is not None or call.start != 0:
            raise ValueError("offsets and positions say the same; give one of them")
        allowed = ((seq,),) if x.dim() == 3 else ((seq,), (batch, seq))
        if positions.shape not in allowed:
            raise ValueError(
                f"positions has shape {tuple(positions.shape)}, not {' or '.join(map(str, allowed))}"
            )
        if checking(positions) and positions.numel():
            _check_range(int(positions.min()), int(positions.max()) + 1, call.cos, 1)
        return
    count = batch if bounds is None else bounds.numel() - 1
    if starts is not None and starts.shape != (count,):
        raise ValueError(f"offsets has shape {tuple(starts.shape)}, not ({count},)")
    least = most = call.start
    if starts is not None and count:
        if not checking(starts):
            return
        least, most = int(starts.min()), int(starts.max())
    longest = seq
    if bounds is not None:
        if checking(bounds):
            steps = bounds.diff()
            longest = int(steps.max()) if count else 0
            if starts is not None and count:
                most = int((starts + steps).max()) - longest
        elif max_seqlen is not None:
            longest = max_seqlen
        else:
            longest = 0
    _check_range(least, most + longest, call.cos, count * longest)


def _check_range(first: int, end: int, cos: Tensor, rows: int) -> None:
    """Raises where positions from first to end, without it, are not all in the tables; nothing is, of no rows."""
    if first < 0 or (end > cos.size(0) and rows != 0):
        wrong = first if first < 0 else end - 1
        raise ValueError(f"position {wrong} lies outside of cos and sin, which have {cos.size(0)} positions")


def _check_writable(tensors: Sequence[Tensor]) -> None:
    """Raises, before anything is written, where PyTorch would for an operation in place."""
    if len(tensors) == 2:
        _check_apart(*tensors)
    for x in tensors:
        if any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True)):
            raise ValueError(
                f"inplace=True with strides {x.stride()} would write elements that share memory; clone x before"
            )
        if not x.requires_grad or not torch.is_grad_enabled():
            continue
        base = x._base
        if x.is_leaf or (base is not None and base.is_leaf):
            raise RuntimeError(
                "a leaf Variable that requires grad, or a view of one, cannot be rotated in place"
            )
        if base is not None and not torch.compiler.is_compiling() and _made_beside_others(x):
            raise RuntimeError(
                "a view that was made beside others by one function (unbind, split, chunk), or without gradients, "
                "cannot be rotated in place; index its base instead, as in qkv[:, 0]"
            )


def _check_apart(q: Tensor, k: Tensor) -> None:
    """Raises where q and k share an element, which would be turned twice, or by two programs at a time."""
    if q is k:
        raise ValueError("q and k are one tensor, which cannot be rotated in place twice at a time")
    if torch.compiler.is_compiling() or not torch._C._is_alias_of(q, k):  # type: ignore[attr-defined]
        return
    distance = k.storage_offset() - q.storage_offset()
    if any(isinstance(n, torch.SymInt) for n in (*q.shape, *k.shape, distance)):
        return  # traced
    if _share_elements(q.shape, q.stride(), k.shape, k.stride(), distance):
        raise ValueError(
            f"q and k overlap in memory and cannot be rotated in place: shapes {tuple(q.shape)} and {tuple(k.shape)}, "
            f"strides {q.stride()} and {k.stride()}, k begins {distance} elements behind q; clone one of them before"
        )


@lru_cache(maxsize=1024)
def _share_elements(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    other_shape: tuple[int, ...],
    other_strides: tuple[int, ...],
    distance: int,
) -> bool:
    """Whether two tensors of one memory have an element in common, the second beginning `distance` behind the first.

    Views of packed q, k and v lie within each other's range and have none.
    """
    if 0 in shape or 0 in other_shape:
        return False
    # sum(index * stride) of the one is distance + sum(index * stride) of the other; equal strides are one term.
    bounds: dict[int, list[int]] = {}
    for size, stride in zip(shape, strides, strict=True):
        bounds.setdefault(stride, [0, 0])[1] += size - 1
    for size, stride in zip(other_shape, other_strides, strict=True):
        bounds.setdefault(stride, [0, 0])[0] -= size - 1
    bounds.pop(0, None)
    terms = sorted(((stride, least, most) for stride, (least, most) in bounds.items()), reverse=True)
    return _is_sum(distance, terms)


def _is_sum(number: int, terms: Sequence[tuple[int, int, int]]) -> bool:
    """Whether it is a sum of stride * n, with an n from least to most for each (stride, least, most).

    By descending strides what is left must be within reach of the smaller ones, so that few n are tried for each.
    """
    if not terms:
        return number == 0
    if number % math.gcd(*(stride for stride, _, _ in terms)):
        return False
    (stride, least, most), *rest = terms
    low, high = (sum(term[0] * term[end] for term in rest) for end in (1, 2))
    first, last = max(least, -((high - number) // stride)), min(most, (number - low) // stride)
    return any(_is_sum(number - n * stride, rest) for n in range(first, last + 1))


def _made_beside_others(view: Tensor) -> bool:
    """Whether PyTorch refuses to change this view in place; it would say so after the kernel has run."""
    autograd = torch._C._autograd
    return autograd._get_creation_meta(view) != autograd.CreationMeta.DEFAULT
