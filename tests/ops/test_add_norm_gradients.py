"""Which gradients fastattn.add_layer_norm and add_rms_norm compute, and from which of their results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastattn import reference
from fastattn.testing import assert_accurate
from tests.ops.test_add_norm import ALL, FAST, NAMES, WIDTH, add_norm, dropped, leaves


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize(
    "compiled, statistics",
    [(False, False), (False, True), (True, True)],
    ids=["eager", "statistics", "compiled"],
)
def test_the_sum_of_frozen_tensors_needs_no_gradient(
    compiled: bool, statistics: bool, implementation: str, device: torch.device
) -> None:
    """Where only the weight is trained, autograd recorded all that follows h, for gradients that nobody gets."""
    x, residual, weight = leaves(3, device=device)
    x, residual = x.detach(), residual.detach()

    def norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return add_norm(
            "add_layer_norm", x, residual, weight, return_statistics=statistics, implementation=implementation
        )  # type: ignore[no-any-return]

    torch._dynamo.reset()
    run = torch.compile(norm, fullgraph=True, backend="aot_eager") if compiled else norm
    y, h, *others = run(x, residual, weight)
    assert [t.requires_grad for t in (y, h, *others)] == [True] + [False] * (1 + len(others))
    torch.testing.assert_close(h, x + residual)
    (dweight,) = torch.autograd.grad(y.sum(), weight)
    torch.testing.assert_close(dweight, torch.nn.functional.layer_norm(h, (WIDTH,)).sum(0))


@pytest.mark.parametrize("save", ["input", "output"])
@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.5}, {"rowscale": True}], ids=str)
def test_an_unused_y_has_no_part_in_the_gradients(
    options: dict[str, Any], save: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight of 0 behind a saved y leaves x_hat NaN: times the zeros that stood for y's gradient, so was dx.

    As on a GPU, where the weight's values are not looked at.
    """
    monkeypatch.setattr("fastattn.ops._norm_call.checking", lambda tensor: False)
    x, residual, weight = leaves(4, device=device)
    weight.data[5] = 0.0
    if "rowscale" in options:
        options = {"rowscale": torch.tensor([0.5, 0.0, 2.0, 1.0], device=device)}
    torch.manual_seed(1)
    _, h = add_norm("add_rms_norm", x, residual, weight, save=save, implementation="triton", **options)
    dh = torch.linspace(-1.0, 1.0, h.numel(), device=device).reshape(h.shape)
    found = torch.autograd.grad(h, (x, residual, weight), dh, create_graph=True, allow_unused=True)
    torch.manual_seed(1)
    factor = dropped(torch.ones_like(x), p=options.get("dropout_p", 0)).detach()
    if "rowscale" in options:
        factor = factor * options["rowscale"][:, None]
    torch.testing.assert_close(found[0], dh * factor)
    torch.testing.assert_close(found[1], dh)
    assert found[2] is None


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("part", ["y", "h"])
def test_a_gradient_that_arrives_at_one_result_alone(
    part: str, implementation: str, device: torch.device
) -> None:
    inputs = leaves(4, device=device)
    y, h = add_norm("add_layer_norm", *inputs, implementation=implementation)
    found = torch.autograd.grad((y if part == "y" else h).pow(3).sum(), inputs, allow_unused=True)
    y, h = add_norm("add_layer_norm", *inputs, implementation="reference")
    expected = torch.autograd.grad((y if part == "y" else h).pow(3).sum(), inputs, allow_unused=True)
    for ours, theirs in zip(found, expected, strict=True):
        if theirs is None:
            assert ours is None or not ours.any()
        else:
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("needed", ["x", "r", "w", "rw"])
@pytest.mark.parametrize("dropout_p", [0, 0.5])
def test_frozen_inputs_get_no_gradient(needed: str, dropout_p: float, device: torch.device) -> None:
    inputs = leaves(4, device=device)
    for letter, tensor in zip("xrw", inputs, strict=True):
        tensor.requires_grad_(letter in needed)
    y, h = add_norm("add_rms_norm", *inputs, dropout_p=dropout_p, implementation="triton")
    (y.sum() + h.sum()).backward()
    assert [tensor.grad is not None for tensor in inputs] == [letter in needed for letter in "xrw"]


def test_one_tensor_is_the_gradient_of_x_and_residual(device: torch.device) -> None:
    """And what a caller does with one of them does not change the other's."""
    inputs = leaves(4, device=device)
    y, _ = add_norm("add_layer_norm", *inputs, implementation="triton")
    y.square().sum().backward()
    x, residual, _ = inputs
    expected = residual.grad.clone()
    x.grad.zero_()
    assert torch.equal(residual.grad, expected)


@pytest.mark.parametrize("dropout_p", [0, 0.5])
@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives(name: str, dropout_p: float, device: torch.device) -> None:
    """Through both results, with dropout's mask drawn again."""
    inputs = leaves(4, device=device)
    torch.manual_seed(3)
    keep = dropped(torch.ones_like(inputs[0]), p=dropout_p) > 0

    def true(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        h = reference.residual_sum(x, residual, dropout_p=dropout_p, keep=keep)
        plain = reference.layer_norm if name == "add_layer_norm" else reference.rms_norm
        return plain(h, WIDTH, weight), h

    def ours(*inputs: Tensor) -> Any:
        torch.manual_seed(3)
        return add_norm(name, *inputs, dropout_p=dropout_p, implementation="triton")

    def second(function: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        y, h = function(*inputs)
        total = y.pow(3).sum() + (h * y).sum()
        first = torch.autograd.grad(total, inputs, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), inputs)

    peer = second(true, inputs)
    truth = second(true, tuple(t.detach().double().requires_grad_() for t in inputs))
    for found, rounded, exact in zip(second(ours, inputs), peer, truth, strict=True):
        assert_accurate(found, rounded, exact, growth=10.0)
