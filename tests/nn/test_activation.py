"""GELU is torch.nn's, and the gated linear layers are those of their formulas."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn.testing import make_tensor
from tests.models.agreement import assert_near
from tests.nn.pairs import IMPLEMENTATIONS, assert_same, make_pair


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_matches(implementation: str | None, approximate: str, device: torch.device) -> None:
    keywords = {"approximate": approximate, "implementation": implementation}
    module, peer = make_pair(fastattn.nn.GELU, torch.nn.GELU, device, **keywords)
    assert_same(module, peer, lambda m, x: m(x), make_tensor(3, 17, device=device))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_quick_gelu_is_a_module_too(implementation: str | None, device: torch.device) -> None:
    module = fastattn.nn.GELU("quick", implementation=implementation)
    assert repr(module) == "GELU(approximate='quick')"
    x = make_tensor(3, 17, device=device)
    assert_near(module(x), x * torch.sigmoid(1.702 * x))


class _GatedPeer(torch.nn.Module):
    """As diffusers' GEGLU, with any activation."""

    def __init__(
        self, activation: Callable[[Tensor], Tensor], dim_in: int, dim_out: int, bias: bool = True
    ) -> None:
        super().__init__()
        self.activation = activation
        self.proj = torch.nn.Linear(dim_in, 2 * dim_out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * self.activation(gate)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize(
    ("ours", "activation"),
    [
        (fastattn.nn.GEGLU, F.gelu),
        (partial(fastattn.nn.GEGLU, approximate="tanh"), partial(F.gelu, approximate="tanh")),
        (fastattn.nn.SwiGLU, F.silu),
        (fastattn.nn.ReGLU, F.relu),
    ],
    ids=["geglu", "geglu-tanh", "swiglu", "reglu"],
)
def test_gated_linear_matches(
    ours: Any, activation: Any, bias: bool, implementation: str | None, device: torch.device
) -> None:
    module, peer = make_pair(
        ours, partial(_GatedPeer, activation), device, 6, 9, bias=bias, implementation=implementation
    )
    assert_same(module, peer, lambda m, x: m(x), make_tensor(3, 5, 6, device=device))
