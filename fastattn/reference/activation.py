"""Activations, their gated forms and the MLP by their formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """x * Phi(x) ("none"), its tanh form ("tanh") or x * sigmoid(1.702 x) ("quick"), from elementary operators."""
    if approximate == "tanh":
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x.pow(3))))
    if approximate == "quick":
        return x * torch.sigmoid(1.702 * x)
    return 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0)))


def bias_gelu(x: Tensor, bias: Tensor, approximate: str = "none") -> Tensor:
    """gelu(x + bias)."""
    return gelu(x + bias, approximate)


def geglu(
    x: Tensor, gate: Tensor | None = None, approximate: str = "none", *, gate_first: bool = False
) -> Tensor:
    """value * gelu(gate), of two tensors or of the halves of one."""
    value, gate = _value_and_gate(x, gate, gate_first)
    return value * gelu(gate, approximate)


def swiglu(x: Tensor, gate: Tensor | None = None, *, gate_first: bool = False) -> Tensor:
    """value * gate * sigmoid(gate), of two tensors or of the halves of one."""
    value, gate = _value_and_gate(x, gate, gate_first)
    return value * silu(gate)


def reglu(x: Tensor, gate: Tensor | None = None, *, gate_first: bool = False) -> Tensor:
    """value * max(gate, 0), of two tensors or of the halves of one."""
    value, gate = _value_and_gate(x, gate, gate_first)
    return value * torch.relu(gate)


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x)."""
    return x * torch.sigmoid(x)


def _value_and_gate(x: Tensor, gate: Tensor | None, gate_first: bool) -> tuple[Tensor, Tensor]:
    if gate is not None:
        return x, gate
    first, second = x.chunk(2, dim=-1)
    return (second, first) if gate_first else (first, second)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu,
    "gelu_tanh": lambda x: gelu(x, "tanh"),
    "gelu_quick": lambda x: gelu(x, "quick"),
    "relu": torch.relu,
    "silu": silu,
}


def mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    activation: str = "gelu",
) -> Tensor:
    """activation(x W1^T + b1) W2^T + b2."""
    return F.linear(ACTIVATIONS[activation](F.linear(x, fc1_weight, fc1_bias)), fc2_weight, fc2_bias)
