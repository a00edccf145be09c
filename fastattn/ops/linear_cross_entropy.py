"""Linear and cross-entropy in one: argument checks, registered operators, autograd Function, public function."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastattn import reference
from fastattn.dispatch import (
    Implementation,
    Operation,
    autocasts,
    linear_dtype,
    refuse_transforms,
    refuse_triton,
)
from fastattn.ops._autograd import needs_graph, refuse_second_derivative
from fastattn.ops._check import check_floating, check_same_device, fits
from fastattn.ops._loss import LossOptions, check_classes, check_options, check_target, loss_dtype, signed
from fastattn.ops._loss_chunks import Chunks, chunk_rows_of, divides_first, shares_of
from fastattn.ops._loss_sums import CACHED_ROWS
from fastattn.ops._register import register

_CALL = (
    "int ignore_index, str reduction, float label_smoothing, float z_loss, float? softcap,"
    " int? memory_budget, ScalarType compute_dtype, bool triton"
)
_TENSORS = "Tensor input, Tensor weight, Tensor? bias, Tensor target"
_NEEDS = "bool needs_dinput, bool needs_dweight, bool needs_dbias"


def _fake_gradients(
    input: Tensor, weight: Tensor, needs: tuple[bool, bool, bool], wide: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(input) if needs[0] else input.new_empty(0),
        weight.new_empty(weight.shape, dtype=wide) if needs[1] else input.new_empty(0),
        weight.new_empty(weight.shape[:1], dtype=wide) if needs[2] else input.new_empty(0),
    )


def _forward_fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    needs_dinput: bool,
    needs_dweight: bool,
    needs_dbias: bool,
    loss_dtype: torch.dtype,
    *others: Any,
) -> tuple[Tensor, ...]:
    options, how = LossOptions(*others[:5]), Chunks(*others[5:])
    wide = torch.promote_types(how.compute_dtype, torch.float32)
    loss = input.new_empty(target.shape if options.reduction == "none" else (), dtype=loss_dtype)
    needs = (needs_dinput, needs_dweight, needs_dbias)
    return loss, input.new_empty((), dtype=wide), *_fake_gradients(input, weight, needs, wide)


def _backward_fake(
    dloss: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    needs_dinput: bool,
    needs_dweight: bool,
    needs_dbias: bool,
    *others: Any,
) -> tuple[Tensor, ...]:
    wide = torch.promote_types(Chunks(*others[5:]).compute_dtype, torch.float32)
    return _fake_gradients(input, weight, (needs_dinput, needs_dweight, needs_dbias), wide)


_forward = register(
    f"linear_cross_entropy_forward({_TENSORS}, {_NEEDS}, ScalarType loss_dtype, {_CALL})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    launcher="ops._loss_chunks",
    fake=_forward_fake,
)
_backward = register(
    f"linear_cross_entropy_backward(Tensor dloss, {_TENSORS}, {_NEEDS}, {_CALL}) -> (Tensor, Tensor, Tensor)",
    launcher="ops._loss_chunks",
    fake=_backward_fake,
)


class LinearCrossEntropyFunction(torch.autograd.Function):
    """Makes the gradients of the sum of the losses beside the loss, and gives them away in the first backward.

    Nobody else has seen them before, so that they are scaled where they are and the gradient of a weight is not there
    twice. A second backward, and with reduction "none" the first, computes every chunk again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        dtype: torch.dtype,
        options: LossOptions,
        how: Chunks,
    ) -> Tensor:
        ctx.options, ctx.how = options, how
        later = options.reduction == "none"
        needs = [need and not later for need in ctx.needs_input_grad[:3]]
        loss, kept, *gradients = _forward(input, weight, bias, target, *needs, dtype, *options, *how)
        # The tensors that a backward without `made` computes again from, and that a second derivative is refused for.
        ctx.save_for_backward(input, weight, bias, target, kept)
        ctx.made = None if later else gradients
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, target, kept = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        with torch.no_grad():
            divided = divides_first(ctx.options, ctx.how, input.dtype)
            scale: Tensor | None = dloss
            if ctx.options.reduction == "mean" and not divided:
                scale = dloss / kept.clamp(min=1.0)
            made, ctx.made = ctx.made, None
            if made is None:
                of_row = shares_of(target, kept) if divided else kept.new_ones(target.shape)
                if ctx.options.reduction == "none":
                    of_row, scale = dloss, None
                made = _backward(of_row, input, weight, bias, target, *needs, *ctx.options, *ctx.how)
            gradients = [
                _scaled(gradient, scale, like.dtype) if need else None
                for gradient, like, need in zip(made, (input, weight, bias), needs, strict=True)
            ]
        if torch.is_grad_enabled():
            present = [gradient for gradient in gradients if gradient is not None]
            refused = iter(
                refuse_second_derivative(
                    "fastattn.linear_cross_entropy",
                    present,
                    (dloss, input, weight, bias),
                    "implementation='reference' has one, in memory for all logits",
                )
            )
            gradients = [None if gradient is None else next(refused) for gradient in gradients]
        return (*gradients, None, None, None, None)


def _scaled(gradient: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """gradient * scale in `dtype`, in the gradient's own memory where that suits."""
    if scale is None:
        return gradient.to(dtype)
    # One element of one dimension: of none, it would be rounded to the gradient's dtype first.
    scale = scale.reshape((1,) * gradient.dim())
    if torch.compiler.is_compiling():
        return (gradient * scale).to(dtype)
    if gradient.dtype == dtype:
        return gradient.mul_(scale)
    result = torch.empty_like(gradient, dtype=dtype)
    if not gradient.is_cpu:
        return torch.mul(gradient, scale, out=result)
    # Some rows at a time: what is multiplied is still in the cache when it is rounded.
    for rows, rounded in zip(gradient.split(CACHED_ROWS), result.split(CACHED_ROWS), strict=True):
        rounded.copy_(rows.mul_(scale))
    return result


Arguments = tuple[Tensor, Tensor, "Tensor | None", Tensor, LossOptions, "int | None", "torch.dtype | None"]


def _pack(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    ignore_index: int | None,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    memory_budget: int | None,
    out_dtype: torch.dtype | None,
) -> Arguments:
    if ignore_index is None:
        ignore_index = -100
    options = LossOptions(ignore_index, reduction, label_smoothing, z_loss, softcap)
    return input, linear_weight, linear_bias, target, options, memory_budget, out_dtype


def _check(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    options: LossOptions,
    memory_budget: int | None,
    out_dtype: torch.dtype | None,
) -> None:
    if (
        input is None
        or weight is None
        or not (fits(input, input) and fits(weight, input) and fits(bias, input))
    ):
        check_floating("input", "linear_weight", input=input, linear_weight=weight, linear_bias=bias)
        check_same_device("input", input, linear_weight=weight, linear_bias=bias)
    check_options(options)
    check_target(target, input.device)
    if target.is_floating_point():
        raise TypeError(f"target has dtype={target.dtype}; class indices, int64, int32 or uint8, are needed")
    if input.dim() == 0 or weight.dim() != 2 or input.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"input has shape {tuple(input.shape)} and linear_weight {tuple(weight.shape)}; (..., width) and "
            "(classes, width) are needed"
        )
    if target.shape != input.shape[:-1]:
        raise ValueError(
            f"target has shape {tuple(target.shape)}; input's {tuple(input.shape[:-1])} is needed"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear_bias has shape {tuple(bias.shape)}; {tuple(weight.shape[:1])} is needed")
    if memory_budget is not None and memory_budget < 1:
        raise ValueError(f"memory_budget={memory_budget} must be at least 1 byte, or None")
    if out_dtype is not None and not (isinstance(out_dtype, torch.dtype) and out_dtype.is_floating_point):
        raise TypeError(f"out_dtype={out_dtype} must be a floating-point dtype, or None")
    if (weight.dtype != input.dtype or (bias is not None and bias.dtype != input.dtype)) and not autocasts(
        input
    ):
        dtypes = (input.dtype, weight.dtype, None if bias is None else bias.dtype)
        raise TypeError(f"input, linear_weight and linear_bias have dtypes {dtypes}; one for all is needed")


def _refuse_triton(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    options: LossOptions,
    budget: int | None,
    out_dtype: torch.dtype | None,
) -> str | None:
    if weight.size(0) == 0:
        return "classes=0 must be at least 1"
    return refuse_triton(input, linear_dtype(input))


def _run(triton: bool, *arguments: Any) -> Tensor:
    input, weight, bias, target, options, budget, out_dtype = arguments
    check_classes(target, weight.size(0), options.ignore_index)
    how = Chunks(budget, linear_dtype(input), triton)
    dtype = out_dtype or loss_dtype(input.dtype, input)
    rows, flat = input.reshape(-1, input.size(-1)), signed(target).reshape(-1)
    if needs_graph(input, weight, bias):
        loss = LinearCrossEntropyFunction.apply(rows, weight, bias, flat, dtype, options, how)
    else:
        loss = _forward(rows, weight, bias, flat, False, False, False, dtype, *options, *how)[0]
    return loss.reshape(target.shape) if options.reduction == "none" else loss


def _describe(triton: bool, *arguments: Any) -> str:
    input, weight, _, _, options, budget, _ = arguments
    rows = input.reshape(-1, input.size(-1))
    size = chunk_rows_of(rows, weight, options.softcap, Chunks(budget, linear_dtype(input), triton))
    by = "Triton kernels" if triton else "PyTorch's operators"
    return f"chunks of {size} rows, their products by PyTorch, losses and dlogits by {by}"


def _run_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    options: LossOptions,
    budget: int | None,
    out_dtype: torch.dtype | None,
) -> Tensor:
    check_classes(target, weight.size(0), options.ignore_index)
    logits = torch.nn.functional.linear(input.reshape(-1, input.size(-1)), weight, bias)
    dtype = out_dtype or loss_dtype(input.dtype, input)
    wide = torch.promote_types(logits.dtype, dtype)
    loss = reference.cross_entropy(logits.to(wide), target.reshape(-1), None, *options)
    assert isinstance(loss, Tensor)
    loss = loss.to(dtype)
    return loss.reshape(target.shape) if options.reduction == "none" else loss


_LINEAR_CROSS_ENTROPY = Operation(
    "linear_cross_entropy",
    _check,
    (
        Implementation(
            "triton",
            run=partial(_run, True),
            refuse=_refuse_triton,
            describe=partial(_describe, True),
        ),
        Implementation(
            "torch",
            run=partial(_run, False),
            refuse=lambda *arguments: refuse_transforms(),
            describe=partial(_describe, False),
        ),
        Implementation(
            "reference",
            run=_run_reference,
            refuse=lambda *arguments: None,
            describe=lambda *arguments: "the formula in PyTorch operators, with all logits at once",
            only_by_name=True,
        ),
    ),
    pack=_pack,
)


@_LINEAR_CROSS_ENTROPY.public
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    memory_budget: int | None = None,
    out_dtype: torch.dtype | None = None,
    implementation: str | None = None,
) -> Tensor:
    r"""Cross-entropy of logits = input W^T + b, which are never held whole: a chunk of rows at a time.

    .. math::
        \text{loss} = \operatorname{cross\_entropy}(\text{input}\, W^\top + b, \text{target})

    with the options of `fastattn.cross_entropy`.

    Args:
        input: (..., width), such as the (batch, seq, width) that a model's last layer leaves.
        linear_weight: (classes, width), such as a tied embedding.
        target: (...), class indices in int64, int32 or uint8.
        linear_bias: (classes,) or None.
        ignore_index: as for `fastattn.cross_entropy`; None for -100, as PyTorch's function of this name has it.
        reduction, label_smoothing, z_loss, softcap: as for `fastattn.cross_entropy`.
        memory_budget: bytes that a chunk's logits, and what is made of them, may take; at least one row is taken. None:
            a quarter of what input and linear_weight hold, but at least 1,024 rows on a GPU and 128 elsewhere
            (512 of 16 bits). On a CPU PyTorch's operators work on some rows of a chunk at a time.
        out_dtype: the loss's dtype; None for input's, under autocast float32 or wider.
        implementation: "triton", "torch" or "reference" forces one; None takes the first that can.

    Returns:
        loss, in `out_dtype`; of target's shape with "none", else ().

    Raises:
        TypeError: a tensor has a dtype that does not fit.
        ValueError: shapes or devices do not fit, or an option is out of range.
        IndexError: a target is no class; on a GPU within `debug_checks` alone, else its row's loss and gradient are
            NaN, and with them those of the parameters.
        NotSupported: the implementation asked for cannot take the call, or a second derivative is asked for.

    Notes:
        Beside a chunk, memory holds the gradients: dinput in input's dtype, those of the parameters in float32 (their
        sums over chunks are made in that), from the forward on; the first backward multiplies them by the incoming
        gradient where they are and gives them away, and a second one computes every chunk again, as one behind
        `torch.utils.checkpoint` does: the loss needs none, being in chunks already. With "none" each row has its own
        incoming gradient, and the backward computes every chunk again. Only gradients that are asked for are made,
        and without any only the loss. Under autocast the products are in its dtype, loss and sums in float32. Nothing
        waits for the device.
        Deterministic where PyTorch's matrix products are.

    Source:
        Gradients beside the loss, chunk by chunk: Hsu et al., "Liger Kernel" (2024), section 3.2.
    """
    return _LINEAR_CROSS_ENTROPY(
        implementation,
        *_pack(
            input, linear_weight, target, linear_bias, ignore_index, reduction, label_smoothing, z_loss, softcap,
            memory_budget, out_dtype,
        ),
    )  # fmt: skip
