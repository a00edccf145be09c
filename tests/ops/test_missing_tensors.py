"""What every operation says of a tensor that must be given and is None."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastattn

X, ROW, SQUARE = torch.randn(1, 2, 3, 4), torch.ones(4), torch.ones(4, 4)
COS, SIN = fastattn.rotary_tables(3, 4)
TARGET = torch.zeros(1, 2, 3, dtype=torch.long)
# Calls, whose arguments of these names are needed.
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any], tuple[str, ...]]] = {
    "attention": (fastattn.attention, {"q": X, "k": X, "v": X}, ("q", "k", "v")),
    "sdpa": (
        fastattn.scaled_dot_product_attention,
        {"query": X, "key": X, "value": X},
        ("query", "key", "value"),
    ),
    "layer_norm": (fastattn.layer_norm, {"x": X, "normalized_shape": 4, "weight": ROW}, ("x",)),
    "rms_norm": (fastattn.rms_norm, {"x": X, "normalized_shape": 4}, ("x",)),
    "add_layer_norm": (fastattn.add_layer_norm, {"x": X, "residual": X, "normalized_shape": 4}, ("x",)),
    "add_rms_norm": (fastattn.add_rms_norm, {"x": X, "residual": None, "normalized_shape": 4}, ("x",)),
    "rotary_embedding": (
        fastattn.rotary_embedding,
        {"x": X, "cos": COS, "sin": SIN},
        ("x", "cos", "sin"),
    ),
    "rotary_embedding_qk": (
        fastattn.rotary_embedding_qk,
        {"q": X, "k": X, "cos": COS, "sin": SIN},
        ("q", "k", "cos", "sin"),
    ),
    "gelu": (fastattn.gelu, {"x": X}, ("x",)),
    "bias_gelu": (fastattn.bias_gelu, {"x": X, "bias": ROW}, ("x", "bias")),
    "swiglu": (fastattn.swiglu, {"x": X}, ("x",)),
    "mlp": (
        fastattn.mlp,
        {"x": X, "fc1_weight": SQUARE, "fc1_bias": None, "fc2_weight": SQUARE, "fc2_bias": None},
        ("x", "fc1_weight", "fc2_weight"),
    ),
    "cross_entropy": (
        fastattn.cross_entropy,
        {"input": X[0, 0], "target": TARGET[0, 0]},
        ("input", "target"),
    ),
    "linear_cross_entropy": (
        fastattn.linear_cross_entropy,
        {"input": X, "linear_weight": SQUARE, "target": TARGET},
        ("input", "linear_weight", "target"),
    ),
}
MISSING = [(operation, name) for operation, (_, _, needed) in CALLS.items() for name in needed]


@pytest.mark.parametrize(
    "operation, name", MISSING, ids=[f"{operation}-{name}" for operation, name in MISSING]
)
def test_a_missing_tensor_is_named(operation: str, name: str) -> None:
    """None stands for a tensor that need not be given, and one that must be raised an AttributeError of None."""
    function, arguments, _ = CALLS[operation]
    function(**arguments)
    with pytest.raises(TypeError, match=rf"^{name} must be a torch.Tensor, not NoneType"):
        function(**arguments | {name: None})
