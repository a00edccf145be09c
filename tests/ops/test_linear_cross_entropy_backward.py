"""How fastattn.linear_cross_entropy makes its gradients in the forward, gives them away, and makes them again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from tests.ops.test_linear_cross_entropy import (
    FAST,
    ROWS,
    TINY,
    formula,
    make_inputs,
    peer,
    results,
)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_backward_is_the_first(reduction: str, implementation: str, device: torch.device) -> None:
    """The first gives its gradients away, where a caller may write to them; the second makes them again."""
    leaves, target = make_inputs("bf16", device)
    leaves = tuple(t.requires_grad_() for t in leaves)
    input, weight, bias = leaves
    copies = [t.detach().clone() for t in leaves]
    loss = fastattn.linear_cross_entropy(
        input, weight, target, linear_bias=bias, reduction=reduction, memory_budget=TINY,
        implementation=implementation,
    )  # fmt: skip
    dloss = torch.full_like(loss, 3.0)
    first = torch.autograd.grad(loss, leaves, dloss, retain_graph=True)
    kept = [t.clone() for t in first]
    for gradient in first:
        gradient.zero_()
    for _ in range(2):
        second = torch.autograd.grad(loss, leaves, dloss, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(kept, second, strict=True))
    assert (dloss == 3.0).all() and all(torch.equal(a, b) for a, b in zip(copies, leaves, strict=True))


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_gradients_asked_for_are_made(
    reduction: str, implementation: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    (input, weight, bias), target = make_inputs("fp32", device)
    made = []
    plain = fastattn.ops._loss_sums.Sums.of

    def of(*arguments: Any) -> Any:
        made.append(arguments[2:5])
        return plain(*arguments)

    monkeypatch.setattr(fastattn.ops._loss_sums.Sums, "of", staticmethod(of))

    def run(*wanted: Tensor) -> tuple[Tensor, ...]:
        made.clear()
        loss = fastattn.linear_cross_entropy(
            input, weight, target, linear_bias=bias, reduction=reduction, implementation=implementation
        )
        return torch.autograd.grad(loss.sum(), wanted) if wanted else ()

    run()
    assert made == [(False, False, False)]
    weight.requires_grad_()
    (dweight,) = run(weight)
    assert made[-1] == (False, True, False) and len(made) == (2 if reduction == "none" else 1)
    weight.requires_grad_(False)
    bias.requires_grad_()
    run(bias)
    assert made[-1] == (False, False, True)
    with torch.no_grad():
        run()
    assert made == [(False, False, False)]
    expected = formula(input, weight.requires_grad_(), target, linear_bias=bias, reduction=reduction)
    torch.testing.assert_close(dweight, torch.autograd.grad(expected.sum(), weight)[0])


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_are_refused(reduction: str, implementation: str, device: torch.device) -> None:
    leaves, target = make_inputs("fp32", device)
    input, weight, bias = (t.requires_grad_() for t in leaves)
    loss = fastattn.linear_cross_entropy(
        input, weight, target, linear_bias=bias, reduction=reduction, implementation=implementation
    )
    gradients = torch.autograd.grad(loss.sum(), (input, weight, bias), create_graph=True)
    for leaf in (input, weight):
        with pytest.raises(
            fastattn.NotSupported, match=r"linear_cross_entropy has no second derivative.* all logits"
        ):
            torch.autograd.grad(gradients[0].square().sum(), leaf, retain_graph=True)


def test_gradients_accumulate(device: torch.device) -> None:
    """Micro-batches into .grad, as a training loop has them."""
    (input, weight, _), target = make_inputs("fp32", device)
    weight = weight.requires_grad_()
    for part in (slice(0, 5), slice(5, ROWS)):
        fastattn.linear_cross_entropy(input[part], weight, target[part], reduction="sum").backward()
    (expected,) = torch.autograd.grad(peer(input, weight, target, reduction="sum"), weight)
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize("implementation", FAST)
def test_checkpoint_gives_the_same_gradients(implementation: str, device: torch.device) -> None:
    (input, weight, _), target = make_inputs("fp32", device)
    leaves = input.requires_grad_(), weight.requires_grad_()

    def loss(input: Tensor, weight: Tensor) -> Tensor:
        return fastattn.linear_cross_entropy(input, weight, target, implementation=implementation)

    plain = torch.autograd.grad(loss(*leaves), leaves)
    kept = torch.utils.checkpoint.checkpoint(loss, *leaves, use_reentrant=False)
    assert all(torch.equal(a, b) for a, b in zip(plain, torch.autograd.grad(kept, leaves), strict=True))


@pytest.mark.gpu
def test_nothing_waits_for_the_device(device: torch.device) -> None:
    leaves, target = make_inputs("bf16", device)
    for _ in range(2):  # the first call may try what products the device has
        results(fastattn.linear_cross_entropy, leaves, target, memory_budget=TINY)
        torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")
