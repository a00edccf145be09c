"""The activations by PyTorch's operators, forward and backward, under the names that the kernels know them by."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import gelu as _gelu  # bound here: F.gelu may be replaced by ours
from torch.nn.functional import relu, silu

from fastattn.kernels._pointwise_config import GELU_FORMS

_QUICK_SCALE = 1.702
_aten = torch.ops.aten


def check_approximate(approximate: str) -> None:
    """Raises ValueError where a form of GELU is unknown."""
    if approximate not in GELU_FORMS:
        raise ValueError(f"approximate={approximate!r} must be 'none', 'tanh' or 'quick'")


def torch_gelu(x: Tensor, approximate: str) -> Tensor:
    """GELU in one of its forms."""
    if approximate == "quick":
        return x * torch.sigmoid(_QUICK_SCALE * x)
    return _gelu(x, approximate=approximate)


# name -> what computes it
TORCH_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: _gelu(x),
    "gelu_tanh": lambda x: _gelu(x, approximate="tanh"),
    "gelu_quick": lambda x: torch_gelu(x, "quick"),
    "relu": relu,
    "silu": silu,
}


def torch_through_activation(dy: Tensor, x: Tensor, activation: str) -> Tensor:
    """dy * d activation(x) / dx, by the operators of PyTorch's own backward."""
    if activation == "relu":
        return _aten.threshold_backward(dy, x, 0)
    if activation == "silu":
        return _aten.silu_backward(dy, x)
    if activation == "gelu_quick":
        probability = torch.sigmoid(_QUICK_SCALE * x)
        return dy * probability + _aten.sigmoid_backward(dy * x, probability) * _QUICK_SCALE
    return _aten.gelu_backward(dy, x, approximate="tanh" if activation == "gelu_tanh" else "none")
