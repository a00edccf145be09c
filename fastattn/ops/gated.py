"""Gated linear units' activation: argument checks, registered operators, autograd Functions, public functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn import reference
from fastattn.dispatch import Implementation, Operation, refuse_triton
from fastattn.kernels._layout import halves
from fastattn.ops._activations import GELU_FORMS, TORCH_ACTIVATIONS, check_approximate
from fastattn.ops._autograd import differentiable_gradients, needs_graph
from fastattn.ops._check import check_floating, check_same_device, fits
from fastattn.ops._register import register


def _contiguous(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_forward = register(
    "gated_forward(Tensor value, Tensor gate, str activation) -> Tensor",
    launcher="kernels.gated",
    fake=lambda value, gate, activation: _contiguous(value),
)
_backward = register(
    "gated_backward(Tensor dy, Tensor value, Tensor gate, str activation, bool need_dvalue, bool need_dgate)"
    " -> (Tensor, Tensor)",
    launcher="kernels.gated",
    fake=lambda dy, value, gate, activation, need_dvalue, need_dgate: (
        _contiguous(value) if need_dvalue else value.new_empty(0),
        _contiguous(gate) if need_dgate else gate.new_empty(0),
    ),
)
_packed_backward = register(
    "gated_packed_backward(Tensor dy, Tensor x, str activation, bool gate_first) -> Tensor",
    launcher="kernels.gated",
    fake=lambda dy, x, activation, gate_first: _contiguous(x),
)


class GatedFunction(torch.autograd.Function):
    """Of value and gate; saves both, and recomputes the activation."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gate: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(value, gate)
        ctx.activation = activation
        return _forward(value, gate, activation)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        value, gate = ctx.saved_tensors
        need_dvalue, need_dgate = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled():
            gradients = differentiable_gradients(
                lambda value, gate: _run_torch(value, gate, ctx.activation, False),
                (value, gate),
                (need_dvalue, need_dgate),
                dy,
            )
            return *gradients, None
        dvalue, dgate = _backward(dy, value, gate, ctx.activation, need_dvalue, need_dgate)
        return dvalue if need_dvalue else None, dgate if need_dgate else None, None


class PackedGatedFunction(torch.autograd.Function):
    """Of value and gate in one tensor; saves it, and writes its gradient in one pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: str, gate_first: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.activation, ctx.gate_first = activation, gate_first
        return _forward(*halves(x, gate_first), activation)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            (dx,) = differentiable_gradients(
                lambda x: _run_torch(x, None, ctx.activation, ctx.gate_first), (x,), (True,), dy
            )
            return dx, None, None
        return _packed_backward(dy, x, ctx.activation, ctx.gate_first), None, None


def _check(x: Tensor, gate: Tensor | None, activation: str, gate_first: bool) -> None:
    if x is None or not (fits(x, x) and fits(gate, x)):
        check_floating("x", x=x, gate=gate)
        check_same_device("x", x, gate=gate)
    if gate is None:
        if x.dim() == 0 or x.size(-1) % 2:
            raise ValueError(f"x has shape {tuple(x.shape)}; without a gate its last size must be even")
        return
    if gate.shape != x.shape:
        raise ValueError(f"gate has shape {tuple(gate.shape)}, but x has {tuple(x.shape)}")
    if gate.dtype != x.dtype:
        raise TypeError(f"gate has dtype={gate.dtype}, but x has {x.dtype}")
    if gate_first:
        raise ValueError("gate_first=True is for a packed x, and a gate is given")


def _refuse_triton(x: Tensor, gate: Tensor | None, activation: str, gate_first: bool) -> str | None:
    return refuse_triton(x, x.dtype)


def _step_aside(x: Tensor, gate: Tensor | None, activation: str, gate_first: bool) -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile fuses a gated activation with its neighbours, which a kernel of its own would prevent"
    return None


def _run_triton(x: Tensor, gate: Tensor | None, activation: str, gate_first: bool) -> Tensor:
    if gate is None:
        if needs_graph(x):
            return PackedGatedFunction.apply(x, activation, gate_first)
        return _forward(*halves(x, gate_first), activation)
    if x.dim() == 0:
        return _run_triton(x[None], gate[None], activation, gate_first)[0]
    if not needs_graph(x, gate):
        return _forward(x, gate, activation)
    if torch.compiler.is_compiling():
        # The compiler refuses a Function that is given one tensor twice.
        gate = gate.view_as(gate)
    return GatedFunction.apply(x, gate, activation)


def _run_torch(x: Tensor, gate: Tensor | None, activation: str, gate_first: bool) -> Tensor:
    value, gate = halves(x, gate_first) if gate is None else (x, gate)
    return value * TORCH_ACTIVATIONS[activation](gate)


def _run_reference(x: Tensor, gate: Tensor | None, activation: str, gate_first: bool) -> Tensor:
    value, gate = halves(x, gate_first) if gate is None else (x, gate)
    return value * reference.activation.ACTIVATIONS[activation](gate)


_IMPLEMENTATIONS = (
    Implementation(
        "triton",
        run=_run_triton,
        refuse=_refuse_triton,
        step_aside=_step_aside,
        describe=lambda *arguments: (
            "one Triton kernel each way, saving the inputs alone (under torch.compile: PyTorch's operators, which the "
            "compiler fuses)"
        ),
    ),
    Implementation(
        "torch",
        run=_run_torch,
        refuse=lambda *arguments: None,
        describe=lambda *arguments: "PyTorch's activation and product",
    ),
    Implementation(
        "reference",
        run=_run_reference,
        refuse=lambda *arguments: None,
        describe=lambda *arguments: "the formula in PyTorch operators",
        only_by_name=True,
    ),
)


def _pack_geglu(x: Tensor, gate: Tensor | None, approximate: str, gate_first: bool) -> tuple[Any, ...]:
    check_approximate(approximate)
    return x, gate, GELU_FORMS[approximate], gate_first


def _pack(activation: str) -> Callable[..., tuple[Any, ...]]:
    return lambda x, gate, gate_first: (x, gate, activation, gate_first)


_GEGLU = Operation("geglu", _check, _IMPLEMENTATIONS, pack=_pack_geglu)
_SWIGLU = Operation("swiglu", _check, _IMPLEMENTATIONS, pack=_pack("silu"))
_REGLU = Operation("reglu", _check, _IMPLEMENTATIONS, pack=_pack("relu"))


@_GEGLU.public
def geglu(
    x: Tensor,
    gate: Tensor | None = None,
    approximate: str = "none",
    *,
    gate_first: bool = False,
    implementation: str | None = None,
) -> Tensor:
    r"""A gated GELU, y = value * gelu(gate).

    Args:
        x: with a gate, the value, of any shape and strides; without one (..., 2 * width), value first and gate second,
            the order of `torch.nn.functional.glu`. float16, bfloat16 or float32 for Triton, any floating dtype else.
        gate: None, or a tensor of x's shape and dtype.
        approximate: "none", "tanh" or "quick", as for `fastattn.gelu`.
        gate_first: of a packed x, the gate is the first half.
        implementation: "triton", "torch" or "reference" forces one; None takes the first that can.

    Returns:
        y, of value's shape and dtype, also under autocast; contiguous where Triton computes it.

    Raises:
        TypeError: a tensor is not floating-point, or the dtypes differ.
        ValueError: shapes or devices do not fit, a packed x has an odd width, `gate_first` is given with a gate, or
            `approximate` or `implementation` is unknown.
        NotSupported: the implementation asked for cannot take the call.

    Notes:
        Computed in float32. The backward saves x and gate alone, and writes the gradient of a packed x in one pass;
        halves of a tensor given as x and gate are read in place, but autograd then puts their gradients together.
        Rows at equal distances are read in place, another layout is copied once. Double backward goes through
        PyTorch's operators.

    Source:
        Shazeer, "GLU Variants Improve Transformer" (2020), equation 5.
    """
    return _GEGLU(implementation, *_pack_geglu(x, gate, approximate, gate_first))


@_SWIGLU.public
def swiglu(
    x: Tensor, gate: Tensor | None = None, *, gate_first: bool = False, implementation: str | None = None
) -> Tensor:
    r"""A gated SiLU, y = value * gate * sigmoid(gate), as Llama's MLP has between its layers.

    Arguments, returns, raises and notes are those of `fastattn.geglu`.

    Source:
        Shazeer, "GLU Variants Improve Transformer" (2020), equation 5.
    """
    return _SWIGLU(implementation, x, gate, "silu", gate_first)


@_REGLU.public
def reglu(
    x: Tensor, gate: Tensor | None = None, *, gate_first: bool = False, implementation: str | None = None
) -> Tensor:
    r"""A gated ReLU, y = value * max(gate, 0).

    Arguments, returns, raises and notes are those of `fastattn.geglu`; the slope at 0 is 0.

    Source:
        Shazeer, "GLU Variants Improve Transformer" (2020), equation 5.
    """
    return _REGLU(implementation, x, gate, "relu", gate_first)
