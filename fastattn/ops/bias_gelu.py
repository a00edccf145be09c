"""GELU of a sum with a bias: argument checks, registered operators, autograd Function, public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import reference
from fastattn.dispatch import Implementation, Operation, refuse_triton
from fastattn.ops._activations import GELU_FORMS, check_approximate, torch_gelu
from fastattn.ops._autograd import differentiable_gradients, needs_graph
from fastattn.ops._check import check_floating, check_same_device, fits
from fastattn.ops._register import register


def _contiguous(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _backward_fake(
    dy: Tensor,
    x: Tensor,
    bias: Tensor | None,
    activation: str,
    need_dx: bool,
    dbias_dtype: torch.dtype | None,
    need_y: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dbias = x.new_empty(0 if dbias_dtype is None else x.size(-1), dtype=dbias_dtype)
    return (
        _contiguous(x) if need_dx else x.new_empty(0),
        dbias,
        _contiguous(x) if need_y else x.new_empty(0),
    )


# Any activation of `fastattn.kernels._activation`, and no bias at all: `fastattn.mlp` calls them too.
bias_activation_forward = register(
    "bias_activation_forward(Tensor x, Tensor? bias, str activation) -> Tensor",
    launcher="kernels.bias_activation",
    fake=lambda x, bias, activation: _contiguous(x),
)
bias_activation_backward = register(
    "bias_activation_backward(Tensor dy, Tensor x, Tensor? bias, str activation, bool need_dx,"
    " ScalarType? dbias_dtype, bool need_y) -> (Tensor, Tensor, Tensor)",
    launcher="kernels.bias_activation",
    fake=_backward_fake,
)


class BiasGeluFunction(torch.autograd.Function):
    """Saves x and bias; their sum is made again in the backward, and dbias summed where dx is written."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, approximate: str) -> Tensor:
        ctx.save_for_backward(x, bias)
        ctx.approximate = approximate
        return bias_activation_forward(x, bias, GELU_FORMS[approximate])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        need_dx, need_dbias = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            gradients = differentiable_gradients(
                lambda x, bias: _run_torch(x, bias, ctx.approximate), (x, bias), (need_dx, need_dbias), dy
            )
            return *gradients, None
        dbias_dtype = bias.dtype if need_dbias else None
        activation = GELU_FORMS[ctx.approximate]
        dx, dbias, _ = bias_activation_backward(dy, x, bias, activation, need_dx, dbias_dtype, False)
        return dx if need_dx else None, dbias if need_dbias else None, None


def _check(x: Tensor, bias: Tensor, approximate: str) -> None:
    if x is None or bias is None or not (fits(x, x) and fits(bias, x)):
        check_floating("x", "bias", x=x, bias=bias)
        check_same_device("x", x, bias=bias)
    check_approximate(approximate)
    if x.dim() == 0:
        raise ValueError("x has 0 dimensions; at least 1 is needed, (..., width)")
    if bias.shape != x.shape[-1:]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; x's last dimension needs ({x.size(-1)},)")


def _refuse_triton(x: Tensor, bias: Tensor, approximate: str) -> str | None:
    reason = refuse_triton(x, x.dtype)
    if reason is None and bias.dtype != x.dtype:
        reason = refuse_triton(bias, bias.dtype)
    return reason


def _step_aside(x: Tensor, bias: Tensor, approximate: str) -> str | None:
    """With a gradient of the bias the kernel stays under torch.compile.

    What stands around bias and GELU are products, with which the compiler fuses nothing, and its own backward writes dx
    and then reads it, or makes it, once more for the sum over the rows. Without that gradient nothing is gained.
    """
    if torch.compiler.is_compiling() and not needs_graph(bias):
        return (
            "torch.compile does as well without a gradient of the bias, and fuses a GELU with its neighbours"
        )
    return None


def _run_triton(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    if not needs_graph(x, bias):
        return bias_activation_forward(x, bias, GELU_FORMS[approximate])
    if torch.compiler.is_compiling():
        # The compiler refuses a Function that is given one tensor twice.
        bias = bias.view_as(bias)
    return BiasGeluFunction.apply(x, bias, approximate)


def _run_torch(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    # In the wider of two dtypes, which is the sum's, and then in x's.
    return torch_gelu(x + bias, approximate).to(x.dtype)


_BIAS_GELU = Operation(
    "bias_gelu",
    _check,
    (
        Implementation(
            "triton",
            run=_run_triton,
            refuse=_refuse_triton,
            step_aside=_step_aside,
            describe=lambda *arguments: (
                "one Triton kernel forward, saving x and bias; backward one for x's gradient and the bias's partial "
                "sums, one that adds these (under torch.compile, without a gradient of the bias: PyTorch's operators)"
            ),
        ),
        Implementation(
            "torch",
            run=_run_torch,
            refuse=lambda *arguments: None,
            describe=lambda *arguments: "PyTorch's GELU of x + bias",
        ),
        Implementation(
            "reference",
            run=lambda x, bias, approximate: reference.bias_gelu(x, bias, approximate).to(x.dtype),
            refuse=lambda *arguments: None,
            describe=lambda *arguments: "the formula in PyTorch operators",
            only_by_name=True,
        ),
    ),
)


@_BIAS_GELU.public
def bias_gelu(
    x: Tensor, bias: Tensor, approximate: str = "none", *, implementation: str | None = None
) -> Tensor:
    r"""GELU of x plus a bias, y = gelu(x + bias): what follows a linear layer that leaves its bias out.

    Args:
        x: (..., width), any strides; float16, bfloat16 or float32 for Triton, any floating dtype otherwise.
        bias: (width,). Its dtype may differ from x's.
        approximate: "none", "tanh" or "quick", as for `fastattn.gelu`.
        implementation: "triton", "torch" or "reference" forces one; None takes the first that can.

    Returns:
        y, of x's shape and dtype, also under autocast; contiguous where Triton computes it.

    Raises:
        TypeError: a tensor is not floating-point.
        ValueError: shapes or devices do not fit, or `approximate` or `implementation` is unknown.
        NotSupported: the implementation asked for cannot take the call.

    Notes:
        Triton: the sum is not rounded on its way into GELU; the backward saves x and bias alone, makes the sum again,
        and adds the bias's gradient up in float32 in a fixed order, in the pass that writes x's: the same bits on every
        run. Rows at equal distances are read in place, an x (or an incoming gradient) of another layout is copied
        once. Double backward goes through PyTorch's operators. Under torch.compile the kernel stays where the bias has
        a gradient, which it saves a pass over memory for, and steps aside else.

    Source:
        Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016), section 2.
    """
    return _BIAS_GELU(implementation, x, bias, approximate)
