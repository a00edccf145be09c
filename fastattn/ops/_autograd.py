"""What the autograd Functions share: which path a call takes, and gradients of gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastattn.dispatch import NotSupported


def needs_graph(*tensors: Tensor | None) -> bool:
    """Whether autograd must record a call on these tensors; without it the op runs at less host cost."""
    if torch.is_grad_enabled():
        for tensor in tensors:  # a generator in any() takes three times as long
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def differentiable_gradients(
    function: Callable[..., Tensor | Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    needed: Sequence[bool],
    grad_output: Tensor | Sequence[Tensor],
) -> list[Tensor | None]:
    """Gradients of `function(*inputs)` that can themselves be differentiated.

    A kernel's backward has no derivative of its own. Where a caller asks for one (`create_graph=True`), the
    backward is computed from PyTorch's operators instead, so that a second derivative is never silently
    dropped.
    """
    with torch.enable_grad():
        # Views stand for the inputs, so that autograd ends there: where one input is made from another, or is given
        # twice, or has a hook, what lies behind is the caller's own backward to run.
        views = [None if t is None else t.view_as(t) for t in inputs]
        wanted = [t for t, need in zip(views, needed, strict=True) if need and t is not None]
        gradients = iter(torch.autograd.grad(function(*views), wanted, grad_output, create_graph=True))
    return [
        next(gradients) if need and t is not None else None for t, need in zip(inputs, needed, strict=True)
    ]


class _NoSecondDerivative(torch.autograd.Function):
    """Passes a gradient on unchanged; its own backward raises."""

    @staticmethod
    def forward(ctx: Any, name: str, instead: str, gradient: Tensor, *sources: Tensor) -> Tensor:
        ctx.name, ctx.instead = name, instead
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> NoReturn:
        raise NotSupported(f"{ctx.name} has no second derivative; {ctx.instead}")


def refuse_second_derivative(
    name: str,
    gradients: Sequence[Tensor],
    sources: Sequence[Tensor | None],
    instead: str = "implementation='reference' has one, in quadratic memory",
) -> list[Tensor]:
    """The gradients, tied to what they were made from, so that differentiating them raises.

    Without the tie autograd would take them for constants and drop their part of a second derivative. `instead` ends
    the error's message.
    """
    tied = [t for t in sources if t is not None and t.requires_grad]
    return [
        _NoSecondDerivative.apply(name, instead, gradient, *tied) if tied else gradient
        for gradient in gradients
    ]
