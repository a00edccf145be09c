"""The autograd Function of the MLP, and the paths on which its first layer is computed, forward and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastattn.dispatch import NotSupported, autocasts
from fastattn.ops._activations import TORCH_ACTIVATIONS, torch_through_activation
from fastattn.ops._autograd import differentiable_gradients
from fastattn.ops._register import register
from fastattn.ops.bias_gelu import bias_activation_backward, bias_activation_forward


def _forward_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, need_pre: bool, need_act: bool
) -> tuple[Tensor, Tensor]:
    shape = (x.size(0), weight.size(0))
    return x.new_empty(shape if need_pre else 0), x.new_empty(shape if need_act else 0)


def _backward_fake(
    dy: Tensor,
    weight: Tensor,
    pre: Tensor,
    activation: str,
    dbias_dtype: torch.dtype | None,
    need_act: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dbias = pre.new_empty(0 if dbias_dtype is None else pre.size(1), dtype=dbias_dtype)
    return torch.empty_like(pre), dbias, torch.empty_like(pre) if need_act else pre.new_empty(0)


_forward = register(
    "linear_activation_forward(Tensor x, Tensor weight, Tensor? bias, str activation, bool need_pre, bool need_act)"
    " -> (Tensor, Tensor)",
    launcher="kernels.linear_activation",
    fake=_forward_fake,
)
_backward = register(
    "linear_activation_backward(Tensor dy, Tensor weight, Tensor pre, str activation, ScalarType? dbias_dtype,"
    " bool need_act) -> (Tensor, Tensor, Tensor)",
    launcher="kernels.linear_activation",
    fake=_backward_fake,
)


class _Path(NamedTuple):
    """How the first layer is computed, and the way back through it; `pre` is the argument of the activation.

    Attributes:
        first: (x, weight, bias, activation, need_pre, need_act) -> (pre, activation), of matrices.
        back: (dy, fc2_weight, pre, activation, dbias_dtype, need_act) -> (dpre, dbias, activation).
        activate: (pre, activation) -> activation.
    """

    first: Callable[..., tuple[Tensor, Tensor]]
    back: Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]
    activate: Callable[[Tensor, str], Tensor]


def _activate(pre: Tensor, activation: str) -> Tensor:
    return bias_activation_forward(pre, None, activation)


def _separate_first(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, need_pre: bool, need_act: bool
) -> tuple[Tensor, Tensor]:
    """The library adds the bias before it rounds: added to a rounded product, it may turn the sign of a small sum."""
    pre = linear(x, weight, bias)
    return pre, _activate(pre, activation) if need_act else pre


def _separate_back(
    dy: Tensor,
    weight: Tensor,
    pre: Tensor,
    activation: str,
    dbias_dtype: torch.dtype | None,
    need_act: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return bias_activation_backward(torch.mm(dy, weight), pre, None, activation, True, dbias_dtype, need_act)


def _torch_activate(pre: Tensor, activation: str) -> Tensor:
    return TORCH_ACTIVATIONS[activation](pre)


def _torch_first(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, need_pre: bool, need_act: bool
) -> tuple[Tensor, Tensor]:
    pre = linear(x, weight, bias)
    return pre, _torch_activate(pre, activation) if need_act else pre


def _torch_back(
    dy: Tensor,
    weight: Tensor,
    pre: Tensor,
    activation: str,
    dbias_dtype: torch.dtype | None,
    need_act: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    dpre = torch_through_activation(torch.mm(dy, weight), pre, activation)
    dbias = None if dbias_dtype is None else dpre.sum(0).to(dbias_dtype)
    return dpre, dbias, _torch_activate(pre, activation) if need_act else None


PATHS = {
    "fused": _Path(_forward, _backward, _activate),
    "separate": _Path(_separate_first, _separate_back, _activate),
    "torch": _Path(_torch_first, _torch_back, _torch_activate),
}


def _rows_of(x: Tensor) -> Tensor:
    """x as a matrix (rows, width), also where there are none: a view where it can be one."""
    return x.flatten(0, -2) if x.dim() > 1 else x[None]


class MlpFunction(torch.autograd.Function):
    """Saves the parameters and, by `save`, what is needed of x, the first product and its activation."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        activation: str,
        save: str,
        path: str,
    ) -> Tensor:
        need_x, need_w1, need_b1, need_w2, _ = ctx.needs_input_grad[:5]
        keeps_act = save == "both" and need_w2
        keeps_pre = save != "input" and (need_x or need_w1 or need_b1 or (need_w2 and not keeps_act))
        if activation == "relu" and keeps_act:
            # Its derivative is 1 where the argument, and so the value, is above 0.
            keeps_pre = False
        keeps_x = need_w1 or save == "input"
        pre, act = PATHS[path].first(_rows_of(x), w1, b1, activation, keeps_pre, True)
        ctx.save_for_backward(
            x if keeps_x else None,
            w1,
            b1,
            w2,
            b2,
            pre if keeps_pre else None,
            act if keeps_act else None,
        )
        ctx.activation, ctx.path, ctx.x_shape = activation, path, x.shape
        del pre  # where it is not kept, before the second product asks for memory
        return linear(act, w2, b2).reshape(*x.shape[:-1], w2.size(0))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return *_differentiable_backward(ctx, dy), None, None, None
        if autocasts(dy):
            # The gradients have the dtypes of what the forward was given, whatever is on around the backward.
            with torch.autocast(dy.device.type, enabled=False):
                return *_gradients(ctx, dy), None, None, None
        return *_gradients(ctx, dy), None, None, None


def _gradients(ctx: Any, dy: Tensor) -> list[Tensor | None]:
    x, w1, b1, w2, b2, pre, act = ctx.saved_tensors
    need_x, need_w1, need_b1, need_w2, need_b2 = ctx.needs_input_grad[:5]
    path, activation = PATHS[ctx.path], ctx.activation
    dy = _rows_of(dy)
    rows = None if x is None else _rows_of(x)
    needs_dpre, needs_act = need_x or need_w1 or need_b1, need_w2 and act is None
    if pre is None and activation == "relu":
        pre = act
    if pre is None and (needs_dpre or needs_act):
        pre = path.first(rows, w1, b1, activation, True, False)[0]
    dx = dw1 = db1 = None
    if needs_dpre:
        dbias_dtype = b1.dtype if need_b1 else None
        dpre, db1, again = path.back(dy, w2, pre, activation, dbias_dtype, needs_act)
        act = again if needs_act else act
        dx = torch.mm(dpre, w1).reshape(ctx.x_shape) if need_x else None
        dw1 = torch.mm(dpre.t(), rows) if need_w1 and rows is not None else None
    elif needs_act:
        act = path.activate(pre, activation)
    dw2 = torch.mm(dy.t(), act) if need_w2 else None
    db2 = dy.sum(0).to(b2.dtype) if need_b2 else None  # PyTorch adds 16-bit types up in float32
    return [dx, dw1, db1 if need_b1 else None, dw2, db2]


def _differentiable_backward(ctx: Any, dy: Tensor) -> list[Tensor | None]:
    x, w1, b1, w2, b2, _, _ = ctx.saved_tensors
    if x is None:
        raise NotSupported(
            "fastattn.mlp keeps no x where fc1_weight needs no gradient, and a second derivative needs it; "
            "save='input' keeps it"
        )
    return differentiable_gradients(
        lambda x, w1, b1, w2, b2: composed(x, w1, b1, w2, b2, ctx.activation),
        (x, w1, b1, w2, b2),
        ctx.needs_input_grad[:5],
        dy,
    )


def composed(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str
) -> Tensor:
    return linear(TORCH_ACTIVATIONS[activation](linear(x, w1, b1)), w2, b2)


def without_graph(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, activation: str, path: str
) -> Tensor:
    """The MLP where no gradient is asked for: nothing but the activation is written."""
    act = PATHS[path].first(_rows_of(x), w1, b1, activation, False, True)[1]
    return linear(act, w2, b2).reshape(*x.shape[:-1], w2.size(0))
