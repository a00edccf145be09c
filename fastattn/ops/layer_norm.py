"""LayerNorm: argument checks, registered operators, autograd Function, public function."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import (
    layer_norm as torch_layer_norm,  # bound here: F.layer_norm may be replaced by ours
)

from fastattn import reference
from fastattn.dispatch import Implementation, Operation, autocasts, refuse_triton
from fastattn.ops._autograd import differentiable_gradients, needs_graph
from fastattn.ops._check import check_floating, check_same_device
from fastattn.ops._register import register

_TORCH_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _forward_fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, dims: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows = x.shape[: x.dim() - dims]
    mean = x.new_empty(rows, dtype=torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), mean, torch.empty_like(mean)


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dims: int,
    need_dx: bool,
    dweight_dtype: torch.dtype | None,
    dbias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = x.shape[x.dim() - dims :]
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_dx else x.new_empty(0)
    dweight = x.new_empty(0 if dweight_dtype is None else shape, dtype=dweight_dtype)
    return dx, dweight, x.new_empty(0 if dbias_dtype is None else shape, dtype=dbias_dtype)


# `dims` is the number of trailing dimensions that are normalized over. A gradient's dtype of None says that
# the gradient is not asked for; an operator cannot return None, so an empty tensor stands in its place.
_forward = register(
    "layer_norm_forward(Tensor x, Tensor? weight, Tensor? bias, int dims, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    launcher="kernels.layer_norm_forward",
    fake=_forward_fake,
)
_backward = register(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, int dims,"
    " bool need_dx, ScalarType? dweight_dtype, ScalarType? dbias_dtype) -> (Tensor, Tensor, Tensor)",
    launcher="kernels.layer_norm_backward",
    fake=_backward_fake,
)


class LayerNormFunction(torch.autograd.Function):
    """Saves x, weight and the float32 statistics; x-hat is recomputed from them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, dims: int, eps: float
    ) -> Tensor:
        y, mean, rstd = _forward(x, weight, bias, dims, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        # Of bias, backward needs the dtype alone; double backward takes its value to be zero.
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.dims, ctx.eps = dims, eps
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        need_dx, need_dweight, need_dbias = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            return *_differentiable_backward(ctx, dy, x, weight), None, None
        dx, dweight, dbias = _backward(
            dy,
            x,
            weight,
            mean,
            rstd,
            ctx.dims,
            need_dx,
            weight.dtype if need_dweight else None,
            ctx.bias_dtype if need_dbias else None,
        )
        return (
            dx if need_dx else None,
            dweight if need_dweight else None,
            dbias if need_dbias else None,
            None,
            None,
        )


def _differentiable_backward(ctx: Any, dy: Tensor, x: Tensor, weight: Tensor | None) -> list[Tensor | None]:
    shape = x.shape[x.dim() - ctx.dims :]
    # No gradient depends on bias, so any value will do.
    bias = None if ctx.bias_dtype is None else x.new_zeros(shape, dtype=ctx.bias_dtype).requires_grad_()
    return differentiable_gradients(
        lambda x, weight, bias: _run_torch(x, shape, weight, bias, ctx.eps),
        (x, weight, bias),
        ctx.needs_input_grad[:3],
        dy,
    )


def _check(
    x: Tensor, normalized_shape: int | Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> None:
    check_floating(x=x, weight=weight, bias=bias)
    check_same_device("x", x, weight=weight, bias=bias)
    shape = _as_shape(normalized_shape)
    if x.shape[-len(shape) :] != shape:
        raise ValueError(
            f"normalized_shape={shape} must be the last {len(shape)} dimensions of x, which has "
            f"shape {tuple(x.shape)}"
        )
    if weight is not None and weight.shape != shape:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, not normalized_shape={shape}")
    if bias is not None and bias.shape != shape:
        raise ValueError(f"bias has shape {tuple(bias.shape)}, not normalized_shape={shape}")
    if not isinstance(eps, (float, int)):
        raise TypeError(f"eps must be a float, not {type(eps).__name__}")


def _as_shape(normalized_shape: int | Sequence[int]) -> tuple[int, ...]:
    if isinstance(normalized_shape, (int, torch.SymInt, Integral)):
        normalized_shape = (normalized_shape,)
    elif not isinstance(normalized_shape, (tuple, list, Sequence)):
        raise TypeError(
            f"normalized_shape must be an int or a sequence of ints, not {type(normalized_shape).__name__}"
        )
    for size in normalized_shape:
        if not isinstance(size, (int, torch.SymInt, Integral)) or isinstance(size, bool):
            raise TypeError(f"normalized_shape={normalized_shape!r} holds {size!r}, which is not an int")
    if not normalized_shape:
        raise ValueError("normalized_shape=() must have at least one dimension")
    return tuple(normalized_shape)


def _refuse_triton(
    x: Tensor, normalized_shape: int | Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> str | None:
    reason = refuse_triton(x, x.dtype)
    if reason is None and weight is not None and weight.dtype != x.dtype:
        reason = refuse_triton(weight, weight.dtype)
    if reason is None and bias is not None and bias.dtype != x.dtype:
        reason = refuse_triton(bias, bias.dtype)
    return reason


def _refuse_torch(
    x: Tensor, normalized_shape: int | Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> str | None:
    if x.dtype not in _TORCH_DTYPES:
        return f"dtype={x.dtype} is not one of float16, bfloat16, float32, float64"
    return None


def _under_autocast(
    x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The tensors as autocast hands them to `torch.nn.functional.layer_norm` on this device type.

    A GPU's autocast computes LayerNorm in float32, but in float64 where that is given; the CPU's leaves it
    alone, and meta tensors have none.
    """
    if x.device.type == "cpu" or not autocasts(x):
        return x, weight, bias
    return _to_float32(x), _to_float32(weight), _to_float32(bias)


def _to_float32(tensor: Any) -> Any:
    return tensor if tensor is None or tensor.dtype == torch.float64 else tensor.float()


def _run_triton(
    x: Tensor, normalized_shape: int | Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    dims = 1 if isinstance(normalized_shape, int) else len(_as_shape(normalized_shape))
    x, weight, bias = _under_autocast(x, weight, bias)
    if not needs_graph(x, weight, bias):
        return _forward(x, weight, bias, dims, eps)[0]
    if torch.compiler.is_compiling():
        # The compiler refuses a Function that is given one tensor twice.
        weight = None if weight is None else weight.view_as(weight)
        bias = None if bias is None else bias.view_as(bias)
    return LayerNormFunction.apply(x, weight, bias, dims, eps)


def _run_torch(
    x: Tensor, normalized_shape: int | Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else _as_shape(normalized_shape)
    dtype = x.dtype
    if (weight is None or weight.dtype == dtype) and (bias is None or bias.dtype == dtype):
        return torch_layer_norm(x, shape, weight, bias, eps)
    return _run_torch_mixed(x, shape, weight, bias, eps)


def _run_torch_mixed(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """PyTorch's operator takes few mixtures of dtypes, and which ones depends on the device."""
    x, weight, bias = _under_autocast(x, weight, bias)
    weight_dtype = torch.float32 if weight is None else weight.dtype
    bias_dtype = torch.float32 if bias is None else bias.dtype
    native = x.is_cpu and x.dtype.itemsize == 2 and weight_dtype == bias_dtype == torch.float32
    if native and not needs_graph(weight, bias):
        # The CPU's reads 16-bit x beside float32 parameters, so that no wide copy of x is made. Where these need
        # gradients, it would sum them over the rows in x's dtype.
        return torch_layer_norm(x, shape, weight, bias, eps)
    wide = torch.promote_types(torch.promote_types(x.dtype, weight_dtype), bias_dtype)
    weight = None if weight is None else weight.to(wide)
    bias = None if bias is None else bias.to(wide)
    return torch_layer_norm(x.to(wide), shape, weight, bias, eps).to(x.dtype)


def _run_reference(
    x: Tensor, normalized_shape: int | Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    x, weight, bias = _under_autocast(x, weight, bias)
    return reference.layer_norm(x, _as_shape(normalized_shape), weight, bias, eps)


_LAYER_NORM = Operation(
    "layer_norm",
    _check,
    (
        Implementation(
            "triton",
            run=_run_triton,
            refuse=_refuse_triton,
            describe=lambda *arguments: "Triton kernels each way, saving x and float32 mean and rstd",
        ),
        Implementation(
            "torch",
            run=_run_torch,
            refuse=_refuse_torch,
            describe=lambda *arguments: "torch.nn.functional.layer_norm",
        ),
        Implementation(
            "reference",
            run=_run_reference,
            refuse=lambda *arguments: None,
            describe=lambda *arguments: "the formula in PyTorch operators",
            only_by_name=True,
        ),
    ),
)


@_LAYER_NORM.public
def layer_norm(
    x: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    implementation: str | None = None,
) -> Tensor:
    r"""Layer normalization over the trailing dimensions, as `torch.nn.functional.layer_norm`.

    .. math::
        y = \frac{x - \operatorname{mean}(x)}{\sqrt{\operatorname{variance}(x) + \epsilon}}
        \cdot \text{weight} + \text{bias}

    Args:
        x: (..., *normalized_shape); float16, bfloat16 or float32 for Triton, float64 too otherwise.
        normalized_shape: the trailing dimensions the mean and the (biased) variance are taken over; an int
            stands for one dimension.
        weight: (*normalized_shape), or None for ones. Its dtype may differ from x's.
        bias: (*normalized_shape), or None for zeros. Its dtype may differ from x's.
        eps: added to the variance.
        implementation: "triton", "torch" or "reference" forces one; None takes the first that can.

    Returns:
        y, of x's shape and dtype, contiguous. Under a GPU's autocast float32, as PyTorch's.

    Raises:
        TypeError: a tensor is not floating-point, or `normalized_shape` is not made of ints.
        ValueError: shapes or devices do not fit, or `implementation` is unknown.
        NotSupported: the implementation asked for cannot take the call.

    Notes:
        Triton: statistics and sums are in float32 at any width; the backward saves x, weight and one float32
        mean and rstd a row, and is deterministic; rows at equal distances are read in place, an x (or an
        incoming gradient) of another layout is copied once; double backward goes through PyTorch's operators.
        PyTorch's own CPU operator sums the gradients of 16-bit parameters in their dtype, over many rows with
        few correct digits; float32 parameters beside a 16-bit x get float32 sums here.

    Source:
        Ba, Kiros and Hinton, "Layer Normalization" (2016), section 3.1, equation 4.
    """
    return _LAYER_NORM(implementation, x, normalized_shape, weight, bias, eps)
