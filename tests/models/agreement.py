"""How two implementations of one model are compared: loss and every parameter's gradient."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

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
    make_model: Callable[[str], nn.Module], *inputs: Any, device: torch.device, **keywords: Any
) -> None:
    """Under bfloat16 autocast, fastattn's loss is as near to float32's as PyTorch's is, or twice as far."""
    torch.manual_seed(0)
    truth = make_model("naive").to(device)(*inputs, **keywords).item()
    errors = {}
    for implementation in ("torch", "fastattn"):
        torch.manual_seed(0)
        model = make_model(implementation).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = model(*inputs, **keywords)
        assert loss.dtype == torch.float32
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        errors[implementation] = abs(loss.item() - truth)
    # The floor is one rounding to bfloat16 of logits that give a loss of this size.
    allowed = 2 * errors["torch"] + truth * 2.0**-8
    assert errors["fastattn"] <= allowed, f"{errors} against {truth}; {allowed:.2e} is allowed"
