"""GELU: argument checks, registered operators, autograd Function, public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import reference
from fastattn.dispatch import Implementation, Operation, refuse_triton
from fastattn.ops._activations import check_approximate, torch_gelu
from fastattn.ops._autograd import differentiable_gradients, needs_graph
from fastattn.ops._check import check_floating
from fastattn.ops._register import register

_forward = register(
    "gelu_forward(Tensor x, str approximate) -> Tensor",
    launcher="kernels.gelu",
    fake=lambda x, approximate: torch.empty_like(x),
)
_backward = register(
    "gelu_backward(Tensor dy, Tensor x, str approximate) -> Tensor",
    launcher="kernels.gelu",
    fake=lambda dy, x, approximate: torch.empty_like(x),
)


class GeluFunction(torch.autograd.Function):
    """Saves x alone; the backward recomputes what it needs from it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, approximate: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.approximate = approximate
        return _forward(x, approximate)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (
                *differentiable_gradients(lambda x: torch_gelu(x, ctx.approximate), (x,), (True,), dy),
                None,
            )
        return _backward(dy, x, ctx.approximate), None


def _check(x: Tensor, approximate: str) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        check_floating("x", x=x)
    check_approximate(approximate)


def _refuse_triton(x: Tensor, approximate: str) -> str | None:
    return refuse_triton(x, x.dtype)


def _step_aside(x: Tensor, approximate: str) -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile fuses a GELU with its neighbours, which a kernel of its own would prevent"
    return None


def _run_triton(x: Tensor, approximate: str) -> Tensor:
    if needs_graph(x):
        return GeluFunction.apply(x, approximate)
    return _forward(x, approximate)


_GELU = Operation(
    "gelu",
    _check,
    (
        Implementation(
            "triton",
            run=_run_triton,
            refuse=_refuse_triton,
            step_aside=_step_aside,
            describe=lambda x, approximate: (
                "one Triton kernel each way, saving x alone (under torch.compile: "
                "PyTorch's operator, which the compiler fuses)"
            ),
        ),
        Implementation(
            "torch",
            run=torch_gelu,
            refuse=lambda x, approximate: None,
            describe=lambda x, approximate: (
                "x * torch.sigmoid(1.702 * x)" if approximate == "quick" else "torch.nn.functional.gelu"
            ),
        ),
        Implementation(
            "reference",
            run=reference.gelu,
            refuse=lambda x, approximate: None,
            describe=lambda x, approximate: "the formula in PyTorch operators",
            only_by_name=True,
        ),
    ),
)


@_GELU.public
def gelu(x: Tensor, approximate: str = "none", *, implementation: str | None = None) -> Tensor:
    r"""Gaussian error linear unit, as `torch.nn.functional.gelu`, and its quick form.

    .. math::
        \text{none:}\quad y = \frac{x}{2} \left(1 + \operatorname{erf}(x / \sqrt 2)\right) \qquad
        \text{tanh:}\quad y = \frac{x}{2}
        \left(1 + \tanh\left(\sqrt{2 / \pi}\,(x + 0.044715\,x^3)\right)\right) \qquad
        \text{quick:}\quad y = x\,\sigma(1.702\,x)

    Args:
        x: any shape and strides; float16, bfloat16 or float32 for Triton, any floating dtype otherwise.
        approximate: "none", "tanh" or "quick", which PyTorch's function has not (OpenAI's CLIP uses it).
        implementation: "triton", "torch" or "reference" forces one; None takes the first that can.

    Returns:
        y, of x's shape and dtype, in x's strides where x has neither holes nor overlaps.

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: `approximate` or `implementation` is unknown.
        NotSupported: the implementation asked for cannot take x.

    Notes:
        Computed in float32. The backward saves x alone. Triton copies an x with holes or overlaps. Double
        backward goes through PyTorch's operators.

    Source:
        Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016), section 2.
    """
    return _GELU(implementation, x, approximate)
