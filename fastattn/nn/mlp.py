"""The MLP of a Transformer's block as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.nn._fusion import is_plain
from fastattn.ops._activations import TORCH_ACTIVATIONS
from fastattn.ops.mlp import mlp


class MLP(torch.nn.Module):
    """Two linear layers, `expand` and `contract`, with an activation between them, by `fastattn.mlp`.

    The layers are `torch.nn.Linear`s, with its initial values. Where one was replaced, has a hook or is parametrized,
    both are called, and nothing is fused. Dropout belongs behind the module: between the layers it would stand where
    the activation is fused.

    Args:
        in_features, hidden_features: widths of input and hidden layer.
        out_features: width of the output; None for that of the input.
        activation: "gelu", "gelu_tanh", "gelu_quick", "relu" or "silu".
        bias: whether the layers have one each.
        device, dtype: of the parameters.
        save: what is kept for the backward, as in `fastattn.mlp`.
        implementation: as in `fastattn.mlp`.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        activation: str = "gelu",
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        save: str = "both",
        implementation: str | None = None,
    ) -> None:
        super().__init__()
        out_features = in_features if out_features is None else out_features
        self.expand = torch.nn.Linear(in_features, hidden_features, bias, device, dtype)
        self.contract = torch.nn.Linear(hidden_features, out_features, bias, device, dtype)
        self.activation, self.save, self.implementation = activation, save, implementation

    def forward(self, input: Tensor) -> Tensor:
        if not (is_plain(self.expand, torch.nn.Linear) and is_plain(self.contract, torch.nn.Linear)):
            out: Tensor = self.contract(TORCH_ACTIVATIONS[self.activation](self.expand(input)))
            return out
        return mlp(
            input,
            self.expand.weight,
            self.expand.bias,
            self.contract.weight,
            self.contract.bias,
            activation=self.activation,
            save=self.save,
            implementation=self.implementation,
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, save={self.save!r}"
