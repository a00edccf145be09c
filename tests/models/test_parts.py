"""What fuses a model's parts leaves out none that was replaced or is watched."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fastattn.models import BERT, GPT, ImageTransformerConfig, ViT, tiny
from fastattn.testing import make_tensor
from tests.models.agreement import assert_near

TOKENS = torch.arange(14).view(2, 7)
TARGETS = TOKENS.roll(-1, 1)


def _gpt(implementation: str = "fastattn") -> GPT:
    torch.manual_seed(0)
    return GPT(tiny(n_layers=1, implementation=implementation))


class _DoubledLinear(nn.Linear):
    """An adapter."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class _Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def _subclass(module: nn.Module) -> None:
    module.__class__ = _DoubledLinear


def _hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, inputs, out: 2 * out)


def _own_forward(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda *inputs: 2 * forward(*inputs)


def _parametrize(module: nn.Module) -> None:
    parametrize.register_parametrization(module, "weight", _Doubled())


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "subclass": _subclass,
    "hook": _hook,
    "own_forward": _own_forward,
    "parametrized": _parametrize,
}
PARTS = ("blocks.0.mlp.expand", "blocks.0.mlp.contract", "blocks.0.mlp_norm", "final_norm", "head")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_part_is_called(change: str, part: str, device: torch.device) -> None:
    """The fused forms computed with its parameters: an adapter was left out of the loss, without a word."""
    if change == "subclass" and part.endswith("norm"):
        pytest.skip("the subclass is one of linear layers")
    tokens, targets = TOKENS.to(device), TARGETS.to(device)
    losses = []
    for implementation in ("naive", "fastattn"):
        model = _gpt(implementation).to(device)
        before = model(tokens, targets).item()
        CHANGES[change](model.get_submodule(part))
        loss = model(tokens, targets)
        assert abs(loss.item() - before) > 1e-4
        assert_near(loss, F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()))
        for _ in range(2):  # what a parametrization makes is made anew for each step
            model(tokens, targets).backward()
        losses.append(loss)
    assert_near(losses[1], losses[0])


def test_other_modules_take_the_places_of_ours() -> None:
    model = _gpt()
    expected = model(TOKENS, TARGETS)
    for name in ("attention_norm", "mlp_norm"):
        peer = nn.LayerNorm(32, eps=1e-5)
        setattr(model.blocks[0], name, peer)
    assert_near(model(TOKENS, TARGETS), expected)
    other: Any = nn.Sequential(model.blocks[0].mlp.expand, nn.GELU(), model.blocks[0].mlp.contract)
    model.blocks[0].mlp = other
    assert_near(model(TOKENS, TARGETS), expected)


def test_float64_is_left_alone_by_autocast() -> None:
    """The norms narrowed what they gave to linear layers that autocast leaves in float64."""
    image = ImageTransformerConfig(n_classes=3, image_size=8, patch_size=4, d_model=32, n_heads=2, n_layers=1)
    for model, inputs in (
        (_gpt(), (TOKENS, TARGETS)),
        (BERT(tiny(n_layers=1)), (TOKENS, TARGETS)),
        (ViT(image), (make_tensor(2, 3, 8, 8).double(), torch.tensor([0, 2]))),
    ):
        model = model.double()
        expected = model(*inputs)
        with torch.autocast("cpu", torch.bfloat16):
            assert_near(model(*inputs), expected.float())


def test_transforms_take_pytorchs_operators() -> None:
    """The chunked loss is refused within torch.func: the model holds the logits there, as PyTorch does."""
    gradients = []
    for implementation in ("naive", "fastattn"):
        model = _gpt(implementation)
        parameters = {name: p.detach() for name, p in model.named_parameters()}

        def loss(parameters: dict[str, Tensor], model: GPT = model) -> Tensor:
            return torch.func.functional_call(model, parameters, (TOKENS, TARGETS))

        gradients.append(torch.func.grad(loss)(parameters))
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-5, rtol=1e-4)
