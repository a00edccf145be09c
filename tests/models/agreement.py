"""How two implementations of one model are compared: loss or logits, and every parameter's gradient."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastattn.nn import MultiheadAttention
from fastattn.testing import assert_accurate, make_tensor

IMPLEMENTATIONS = ("naive", "torch", "fastattn")

# float32, relative to the largest value of a result: some hundred roundings of 2^-24, as the sums behind a
# result are made in another order.
NEAR = 1e-5


def compile_whole(model: nn.Module, backend: Any = "aot_eager", dynamic: bool | None = None) -> Any:
    """The model compiled into one graph, or an error.

    Models compiled by earlier tests are forgotten first: all instances of a class share one limit of
    recompilations.
    """
    torch.compiler.reset()
    return torch.compile(model, fullgraph=True, backend=backend, dynamic=dynamic)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = NEAR, name: str = "result") -> None:
    """Asserts that no element is off by more than `tolerance` times the largest of all."""
    assert actual.shape == expected.shape, (
        f"{name} has shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    )
    assert actual.dtype == expected.dtype, f"{name} has {actual.dtype}, not {expected.dtype}"
    error = (actual.double() - expected.double()).abs().max().item()
    allowed = tolerance * expected.double().abs().max().item()
    assert error <= allowed, f"{name} is off by {error:.2e}; {allowed:.2e} is allowed"


def loss_and_gradients(model: nn.Module, *inputs: Any, **keywords: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The model's loss, and the gradient of every parameter by name."""
    model.zero_grad()
    loss = model(*inputs, **keywords)
    loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        gradients[name] = parameter.grad
    return loss.detach(), gradients


def assert_implementations_agree(
    make_model: Callable[[str], nn.Module], *inputs: Any, device: torch.device, **keywords: Any
) -> None:
    """From the same seed, every implementation has the naive one's loss and gradients in float32.

    Args:
        make_model: from the implementation's name.
        inputs, keywords: of the model's call, on the device; the call returns a loss.
    """
    results = {}
    for implementation in IMPLEMENTATIONS:
        torch.manual_seed(0)
        results[implementation] = loss_and_gradients(
            make_model(implementation).to(device), *inputs, **keywords
        )
    naive_loss, naive_gradients = results.pop("naive")
    # Some gradients are zero but for rounding (a key's bias moves no softmax): measured against the largest.
    floor = max(gradient.abs().max().item() for gradient in naive_gradients.values())
    for implementation, (loss, gradients) in results.items():
        assert_near(loss, naive_loss, name=f"{implementation}'s loss")
        for name, expected in naive_gradients.items():
            error = (gradients[name] - expected).abs().max().item()
            allowed = NEAR * max(expected.abs().max().item(), 0.1 * floor)
            assert error <= allowed, (
                f"{implementation}'s gradient of {name} is off by {error:.2e} > {allowed:.2e}"
            )


def assert_bfloat16_agrees(
    make_model: Callable[[str], nn.Module], device: torch.device, **inputs: Any
) -> None:
    """Under bfloat16 autocast, fastattn's logits and gradients are at most twice as far off as PyTorch's.

    The truth is the naive formulas in float64.

    Args:
        make_model: from the implementation's name.
        inputs: keywords of the model's call, on the device, `targets` (and `next_sentence`) among them.
    """
    truth = _outputs(make_model("naive").to(device).double(), None, inputs)
    peer, ours = (
        _outputs(make_model(name).to(device), torch.bfloat16, inputs) for name in ("torch", "fastattn")
    )
    assert truth.keys() == peer.keys() == ours.keys()
    for name, expected in truth.items():
        assert_accurate(ours[name], peer[name], expected, name=name)


def _outputs(model: nn.Module, autocast: torch.dtype | None, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Logits and gradients by name, from the same weights for every implementation."""
    randomize_(model)
    if autocast is None:
        inputs = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
    unlabelled = {n: t for n, t in inputs.items() if n not in ("targets", "next_sentence")}
    with torch.autocast(inputs["targets"].device.type, autocast, enabled=autocast is not None):
        with torch.no_grad():
            logits = model(**unlabelled)
        loss, gradients = loss_and_gradients(model, **inputs)
    assert loss.dtype == torch.float32
    named = {f"logits {i}": part for i, part in enumerate(logits if isinstance(logits, tuple) else [logits])}
    return named | {f"gradient of {name}": gradient for name, gradient in gradients.items()}


@torch.no_grad()
def randomize_(model: nn.Module) -> None:
    """Weights that keep a vector's size, so that attention's weights differ and its output matters."""
    for seed, parameter in enumerate(model.parameters()):
        values = make_tensor(*parameter.shape, seed=seed)
        if parameter.dim() >= 2:
            parameter.copy_(values / math.sqrt(parameter[0].numel()))
        else:
            parameter.add_(0.1 * values)


def break_attention(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """Breaks fastattn's attention alone.

    Args:
        how: "zeros" makes its output zero, "detached" its gradient of the value; another is the name of an
            argument to drop.
    """
    forward = MultiheadAttention.forward

    def broken(self: MultiheadAttention, *arguments: Any, **keywords: Any) -> Any:
        if self.implementation is not None:
            return forward(self, *arguments, **keywords)
        query, key, value = arguments
        if how == "detached":
            value = value.detach()
        out = forward(self, query, key, value, **{name: v for name, v in keywords.items() if name != how})[0]
        return (0 * out if how == "zeros" else out), None

    monkeypatch.setattr(MultiheadAttention, "forward", broken)
