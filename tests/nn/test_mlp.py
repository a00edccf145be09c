"""The MLP is two linear layers of torch.nn's with an activation between them."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn.testing import make_tensor
from tests.nn.pairs import IMPLEMENTATIONS, assert_same, make_pair


class _MlpPeer(torch.nn.Module):
    def __init__(self, width: int, hidden: int, out: int | None = None, bias: bool = True) -> None:
        super().__init__()
        self.expand = torch.nn.Linear(width, hidden, bias=bias)
        self.contract = torch.nn.Linear(hidden, width if out is None else out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.contract(F.gelu(self.expand(x)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("sizes", [(6, 10), (6, 10, 7)], ids=str)
def test_mlp_matches(
    sizes: tuple[int, ...], bias: bool, implementation: str | None, device: torch.device
) -> None:
    module, peer = make_pair(
        fastattn.nn.MLP, _MlpPeer, device, *sizes, bias=bias, implementation=implementation
    )
    assert_same(module, peer, lambda m, x: m(x), make_tensor(3, 5, 6, device=device))


def test_mlp_has_the_initial_values_of_linear_layers() -> None:
    torch.manual_seed(0)
    module = fastattn.nn.MLP(6, 10, activation="relu", save="input")
    torch.manual_seed(0)
    peer = _MlpPeer(6, 10)
    for (name, ours), (peer_name, theirs) in zip(
        module.named_parameters(), peer.named_parameters(), strict=True
    ):
        assert name == peer_name and torch.equal(ours, theirs)
    assert "activation='relu', save='input'" in repr(module)


def test_mlp_saves_what_it_is_told(device: torch.device) -> None:
    module = fastattn.nn.MLP(6, 10, save="input").to(device)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        module(make_tensor(4, 6, device=device))
    assert (4, 10) not in kept
