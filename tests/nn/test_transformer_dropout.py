"""Dropout in the Transformer's layers: each place, from one seed the same, and its gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastattn.testing import make_tensor
from tests.nn.layers import EMBED, HIDDEN, LAYERS, make_inputs, make_layer


def _only(site: str, p: float, device: torch.device) -> tuple[Any, Tensor]:
    """An encoder layer of pre-norm whose output less its input shows one dropout's factors, and the input."""
    layer = make_layer(LAYERS[0], device, norm_first=True)
    branch = torch.zeros(EMBED, device=device)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        if site == "dropout1":
            layer.self_attn.out_proj.bias.fill_(1.0)
        elif site == "dropout2":
            layer.linear2.bias.fill_(1.0)
        else:
            layer.linear1.bias.fill_(1.0)
            layer.linear2.weight.copy_(torch.eye(EMBED, HIDDEN))
    getattr(layer, site).p = p
    return layer, branch.expand(1, 40, EMBED)


@pytest.mark.parametrize("site", ["dropout1", "dropout", "dropout2"])
@pytest.mark.parametrize("p", [0.25, 1.0])
def test_dropout_drops_and_scales(site: str, p: float, device: torch.device) -> None:
    """Each place of three, of 640 elements: the share is off by less than 5 of its standard deviations."""
    layer, x = _only(site, p, device)
    found = layer(x)
    if p == 1.0:
        assert not found.any()
        return
    kept = found != 0
    torch.testing.assert_close(found[kept], torch.full_like(found[kept], 1 / (1 - p)))
    deviation = (p * (1 - p) / found.numel()) ** 0.5
    assert abs(kept.float().mean().item() - (1 - p)) < 5 * deviation
    assert not torch.equal(layer(x), found)
    torch.testing.assert_close(layer.eval()(x), torch.ones_like(x))


@pytest.mark.parametrize(("name", "norm_first"), [(LAYERS[0], True), (LAYERS[1], False)], ids=["pre", "post"])
def test_one_seed_drops_the_same_and_checkpointing_does(
    name: str, norm_first: bool, device: torch.device
) -> None:
    module = make_layer(name, device, norm_first=norm_first, dropout=0.3)
    found = []
    for call in (module, module, lambda *a: checkpoint(module, *a, use_reentrant=False)):
        inputs = [t.requires_grad_() for t in make_inputs(name, device)]
        torch.manual_seed(5)
        out = call(*inputs)
        found.append([out, *torch.autograd.grad(out.square().sum(), [*inputs, *module.parameters()])])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    assert not torch.equal(module(*inputs), found[0][0])


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_with_dropout_are_those_of_what_was_dropped(name: str, norm_first: bool) -> None:
    """In float64, by PyTorch's operators: every place drops, from one seed the same."""
    module = make_layer(name, norm_first=norm_first, dropout=0.3, activation="gelu", dtype=torch.float64)
    inputs = [t.requires_grad_() for t in make_inputs(name, "cpu", torch.float64)]
    parameters = list(module.parameters())

    def call(*tensors: Tensor) -> Tensor:
        torch.manual_seed(5)
        return module(*tensors[: len(inputs)])

    assert torch.autograd.gradcheck(call, (*inputs, *parameters), fast_mode=True)


@pytest.mark.parametrize("norm_first", [False, True], ids=["post", "pre"])
def test_the_kernels_gradients_with_dropout(norm_first: bool, device: torch.device) -> None:
    """The change of a sum along a direction, which the kernels' gradients foretell."""
    layer = make_layer(LAYERS[1], device, norm_first=norm_first, dropout=0.3, activation="gelu")
    inputs = [t.requires_grad_() for t in make_inputs(LAYERS[1], device)]
    leaves = [*inputs, *layer.parameters()]
    weights = make_tensor(*inputs[0].shape, seed=77, device=device)

    def value() -> Tensor:
        torch.manual_seed(5)
        return (layer(*inputs) * weights).sum(dtype=torch.float64)

    directions = [make_tensor(*t.shape, seed=n, device=device) for n, t in enumerate(leaves)]
    gradients = torch.autograd.grad(value(), leaves)
    foretold = sum((g.double() * d.double()).sum() for g, d in zip(gradients, directions, strict=True))
    values = []
    for step in (1e-3, -1e-3):
        with torch.no_grad():
            for leaf, direction in zip(leaves, directions, strict=True):
                leaf += step * direction
            values.append(value())
            for leaf, direction in zip(leaves, directions, strict=True):
                leaf -= step * direction
    found = (values[0] - values[1]) / 2e-3
    torch.testing.assert_close(found, foretold, atol=0.0, rtol=5e-3)
