"""Cross-entropy: argument checks, public function; its autograd Function is in `_cross_entropy_function`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import reference
from fastattn.dispatch import Implementation, Operation, refuse_triton
from fastattn.kernels._loss_config import row_strides
from fastattn.ops._check import check_floating, check_same_device, fits
from fastattn.ops._cross_entropy_function import apply_cross_entropy
from fastattn.ops._loss import (
    LossOptions,
    check_classes,
    check_options,
    check_target,
    loss_dtype,
    operator_loss,
    overlaps,
)

Arguments = tuple[Tensor, Tensor, "Tensor | None", LossOptions, bool, bool]


def _pack(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    size_average: bool | None,
    ignore_index: int,
    reduce: bool | None,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    return_lse: bool,
    inplace: bool,
) -> Arguments:
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    options = LossOptions(ignore_index, reduction, label_smoothing, z_loss, softcap)
    return input, target, weight, options, return_lse, inplace


def _check(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    return_lse: bool,
    inplace: bool,
) -> None:
    if input is None or not (fits(input, input) and fits(weight, input)):
        check_floating("input", input=input, weight=weight)
        check_same_device("input", input, weight=weight)
    check_options(options)
    check_target(target, input.device)
    shape = input.shape
    if not shape:
        raise ValueError("input has shape (); (classes,) or (batch, classes, ...) is needed")
    classes = shape[0] if len(shape) == 1 else shape[1]
    if target.is_floating_point():
        if target.shape != shape:
            raise ValueError(
                f"target has shape {tuple(target.shape)}; probabilities of shape {tuple(shape)} are needed"
            )
        if options.ignore_index >= 0:
            raise ValueError(
                f"ignore_index={options.ignore_index} goes with class indices, not with probabilities"
            )
    elif len(shape) == 1:
        if target.shape not in ((), (1,)):
            raise ValueError(
                f"target has shape {tuple(target.shape)}; () is needed beside an input (classes,)"
            )
    elif target.dim() != len(shape) - 1 or target.shape[0] != shape[0] or target.shape[1:] != shape[2:]:
        needed = (shape[0], *shape[2:])
        raise ValueError(
            f"target has shape {tuple(target.shape)}; {tuple(needed)} is needed beside {tuple(shape)}"
        )
    if weight is not None and weight.shape != (classes,):
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; one of each of the {classes} classes is needed"
        )
    if inplace and not torch.compiler.is_compiling():
        _check_in_place(input)


def _check_in_place(input: Tensor) -> None:
    if input.is_leaf and input.requires_grad and torch.is_grad_enabled():
        raise ValueError("inplace=True would write the gradient over input, a leaf that requires one")
    base = input._base
    if base is not None and base.is_leaf and base.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "inplace=True would write the gradient over a leaf that requires one: input is a view of it"
        )
    if overlaps(input):
        raise ValueError(f"inplace=True: elements of input overlap, with strides {input.stride()}")


def _rows(input: Tensor) -> Tensor:
    """The logits with the classes last."""
    return input.movedim(1, -1) if input.dim() > 2 else input


def _refuse_triton(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    return_lse: bool,
    inplace: bool,
) -> str | None:
    if weight is not None:
        return "weight is given, and class weights are PyTorch's alone"
    if target.is_floating_point():
        return "target holds class probabilities, not indices"
    reason = refuse_triton(input, input.dtype)
    if reason is not None:
        return reason
    rows = _rows(input)
    if rows.size(-1) == 0:
        return "classes=0 must be at least 1"
    if not rows.is_contiguous() and row_strides(rows.shape, rows.stride()) is None:
        return (
            f"input of shape {tuple(input.shape)} has strides {input.stride()}; the classes must be contiguous in "
            "memory, and their rows at most two strides apart"
        )
    return None


def _run_triton(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    return_lse: bool,
    inplace: bool,
) -> Any:
    rows = _rows(input)
    if input.dim() == 1:
        target = target.reshape(())
    check_classes(target, rows.size(-1), options.ignore_index)
    dtype = loss_dtype(input.dtype, input)
    loss, lse = apply_cross_entropy(rows, target, options, dtype, return_lse, inplace)
    return (loss, lse) if return_lse else loss


def _run_torch(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    return_lse: bool,
    inplace: bool,
) -> Any:
    if input.dim() == 1 and not target.is_floating_point():
        target = target.reshape(())
    loss, lse = operator_loss(input, target, weight, options, return_lse, loss_dtype(input.dtype, input))
    return (loss, lse) if return_lse else loss


def _run_reference(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    return_lse: bool,
    inplace: bool,
) -> Any:
    classes = input.size(1 if input.dim() > 1 else 0)
    if not target.is_floating_point():
        check_classes(target, classes, options.ignore_index)
    return reference.cross_entropy(
        input.to(loss_dtype(input.dtype, input)), target, weight, *options, return_lse
    )


def _describe_triton(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    return_lse: bool,
    inplace: bool,
) -> str:
    where = ", over them" if inplace else ""
    return f"Triton kernels: one read of the logits, and in the backward one more and one write of dlogits{where}"


def _describe_torch(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: LossOptions,
    return_lse: bool,
    inplace: bool,
) -> str:
    if options.z_loss or options.softcap is not None or return_lse:
        return "torch.nn.functional.cross_entropy and PyTorch's operators around it, in float32 or wider"
    return "torch.nn.functional.cross_entropy"


_CROSS_ENTROPY = Operation(
    "cross_entropy",
    _check,
    (
        Implementation("triton", run=_run_triton, refuse=_refuse_triton, describe=_describe_triton),
        Implementation("torch", run=_run_torch, refuse=lambda *arguments: None, describe=_describe_torch),
        Implementation(
            "reference",
            run=_run_reference,
            refuse=lambda *arguments: None,
            describe=lambda *arguments: "the formula in PyTorch operators",
            only_by_name=True,
        ),
    ),
    pack=_pack,
)


@_CROSS_ENTROPY.public
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    return_lse: bool = False,
    inplace: bool = False,
    implementation: str | None = None,
) -> Any:
    r"""Cross-entropy of logits and targets, as `torch.nn.functional.cross_entropy`, with more options.

    .. math::
        \text{loss} = \text{lse} - (1 - s)\, x_t - \frac{s}{C} \sum_c x_c + z\, \text{lse}^2 \qquad
        \text{lse} = \log \sum_c e^{x_c} \qquad
        x = \text{softcap} \cdot \tanh(\text{input} / \text{softcap})

    for each row, with s = label_smoothing, z = z_loss and C classes.

    Args:
        input: (batch, classes), (batch, classes, d1, ...) or (classes,); float16, bfloat16 or float32 for Triton, any
            floating dtype otherwise.
        target: class indices (batch), (batch, d1, ...) or (), in int64, int32 or uint8; or class probabilities of
            input's shape.
        weight: (classes,), a weight for each class, or None.
        size_average, reduce: deprecated, as PyTorch's.
        ignore_index: rows with this target add nothing and get gradient 0.
        reduction: "mean" over the rows that are kept (with `weight`, over their weights), "sum" or "none".
        label_smoothing: in [0, 1].
        z_loss: times lse^2 is added to each row's loss; with "mean", its mean over the rows that are kept.
        softcap: bounds the logits to (-softcap, softcap) before the softmax; None for none.
        return_lse: also return the log-sum-exp of each row, ignored ones too.
        inplace: lets the backward write dlogits over the memory of input, which then holds that. The Triton kernels do
            so outside of torch.compile; others leave input as it is.
        implementation: "triton", "torch" or "reference" forces one; None takes the first that can.

    Returns:
        loss, in input's dtype, under autocast in float32 or wider; of target's shape with "none", else (). With
        `return_lse` also lse in natural logarithm, differentiable, in target's shape and float32 (float64 for float64).

    Raises:
        TypeError: input is not floating-point, or target is neither indices nor probabilities.
        ValueError: shapes or devices do not fit, or an option is out of range.
        IndexError: a target is no class; on a GPU within `debug_checks` alone, else its row's loss and gradient are
            NaN by Triton, and PyTorch's operators assert on the device.
        RuntimeError: a second backward with `inplace`, or one after something else has written to input.
        NotSupported: the implementation asked for cannot take the call.

    Notes:
        Triton computes in float32. The forward reads the logits once, the backward reads them once more and writes
        dlogits; saved are the logits and 8 bytes a row. Rows may be a slice of a longer tensor, as of
        `logits[:, :-1].transpose(1, 2)`, and are read where they are; dlogits has the classes last in memory. Nothing
        waits for the device. Deterministic. The mean of no rows is NaN, with gradient 0, as PyTorch's. Double backward
        goes through PyTorch's operators. Triton leaves rows alone that are ignored; NaN in them stays there.

    Source:
        Online softmax: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018). z-loss: Chowdhery et
        al., "PaLM" (2022), section 5. Soft cap: Gemma Team, "Gemma 2" (2024), section 2.
    """
    return _CROSS_ENTROPY(
        implementation,
        *_pack(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing, z_loss, softcap,
            return_lse, inplace,
        ),
    )  # fmt: skip
