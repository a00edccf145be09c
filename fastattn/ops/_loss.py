"""What the losses share: the options of a cross-entropy, their checks, and the loss in PyTorch's operators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import (
    cross_entropy as torch_cross_entropy,  # bound here: F.cross_entropy may be replaced by ours
)

from fastattn.dispatch import autocasts, checking

_REDUCTIONS = ("mean", "sum", "none")
_TARGET_DTYPES = (torch.int64, torch.int32, torch.uint8)


class LossOptions(NamedTuple):
    """What a cross-entropy asks for, in the order of the registered operators."""

    ignore_index: int
    reduction: str
    label_smoothing: float
    z_loss: float
    softcap: float | None


def check_options(options: LossOptions) -> None:
    """Raises ValueError for a value out of range, TypeError for an ignore_index that is no number."""
    ignore_index, reduction, label_smoothing, z_loss, softcap = options
    if reduction not in _REDUCTIONS:
        raise ValueError(
            f"reduction={reduction!r} is not a valid value for reduction; there are {_REDUCTIONS}"
        )
    if not isinstance(ignore_index, (int, torch.SymInt)):
        raise TypeError(f"ignore_index={ignore_index!r} must be an int")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing={label_smoothing} must be between 0.0 and 1.0")
    if not 0.0 <= z_loss < math.inf:
        raise ValueError(f"z_loss={z_loss} must be at least 0 and finite")
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"softcap={softcap} must be above 0 and finite, or None")


def check_target(target: Tensor, device: torch.device) -> None:
    """Raises where the target is no tensor of indices or probabilities on this device."""
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a torch.Tensor, not {type(target).__name__}")
    if target.dtype not in _TARGET_DTYPES and not target.is_floating_point():
        raise TypeError(f"target has dtype={target.dtype}; int64, int32 or uint8 is needed")
    if target.device != device:
        raise ValueError(f"target is on {target.device}, but input is on {device}")


def signed(target: Tensor) -> Tensor:
    """The indices in a type that has an ignore_index such as -100: in uint8, PyTorch would compare with 156."""
    return target.int() if target.dtype == torch.uint8 else target


def check_classes(target: Tensor, classes: int, ignore_index: int) -> None:
    """Raises IndexError, as PyTorch does, for a target that is no class; on a GPU within `debug_checks` alone."""
    if not checking(target):
        return
    target = signed(target)
    kept = target[target != ignore_index]
    if kept.numel() == 0:
        return
    low, high = (int(end) for end in kept.aminmax())
    if low < 0 or high >= classes:
        raise IndexError(
            f"target holds {low if low < 0 else high}; it must be in [0, {classes}) or ignore_index={ignore_index}"
        )


def loss_dtype(dtype: torch.dtype, tensor: Tensor) -> torch.dtype:
    """PyTorch's rule: the input's dtype, but under autocast float32 or wider."""
    return torch.promote_types(dtype, torch.float32) if autocasts(tensor) else dtype


def operator_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    return_lse: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """The loss and the log-sum-exp by PyTorch's operators; the classes are dimension 1 (0 of a vector).

    In PyTorch's own operator where that suffices; else in float32 or wider, with several tensors of the logits' size.
    """
    ignore_index, reduction, _, z_loss, softcap = options
    if not target.is_floating_point():
        target = target.long()
    if not z_loss and softcap is None and not return_lse:
        return _plain(input, target, weight, options), None
    x = input.to(torch.promote_types(input.dtype, torch.float32))
    if softcap is not None:
        x = torch.tanh(x / softcap) * softcap
    loss = _plain(x, target, None if weight is None else weight.to(x.dtype), options)
    lse = torch.logsumexp(x.float() if x.dtype.itemsize < 4 else x, 1 if x.dim() > 1 else 0)
    if z_loss:
        squares = z_loss * lse.square()
        count: Tensor | int = squares.numel()
        if not target.is_floating_point():
            kept = (target != ignore_index).reshape(lse.shape)
            squares, count = torch.where(kept, squares, 0.0), kept.sum()
        if reduction != "none":
            squares = squares.sum()
        loss = loss + (squares / count if reduction == "mean" else squares)
    return loss.to(dtype), lse


def _plain(input: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions) -> Tensor:
    try:
        return torch_cross_entropy(
            input,
            target,
            weight,
            ignore_index=options.ignore_index,
            reduction=options.reduction,
            label_smoothing=options.label_smoothing,
        )
    except IndexError:
        classes = input.size(1 if input.dim() > 1 else 0)
        check_classes(target, classes, options.ignore_index)
        raise


def overlaps(tensor: Tensor) -> bool:
    """Whether two elements may lie at one place in memory, as in an expanded tensor."""
    extent = 1
    dims: Sequence[tuple[int, int]] = zip(tensor.stride(), tensor.shape, strict=True)  # type: ignore[assignment]
    for stride, size in sorted(pair for pair in dims if pair[1] != 1):
        if stride < extent:
            return True
        extent = (size - 1) * stride + extent
    return False
