"""fastattn.linear_cross_entropy under torch.compile, export, autocast and torch.func; its operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fastattn
from tests.ops.comparison import ALL_CHECKS, CHECKS_OF_ARGUMENTS
from tests.ops.test_linear_cross_entropy import (
    ALL,
    FAST,
    ROWS,
    TINY,
    formula,
    make_inputs,
    peer,
    results,
)


@pytest.mark.parametrize(
    "reduction, implementation", [("mean", "triton"), ("none", "triton"), ("mean", "torch")]
)
def test_compiles_whole_with_dynamic_shapes(
    reduction: str, implementation: str, device: torch.device
) -> None:
    frames, compilations = CompileCounterWithBackend("aot_eager"), []

    def ours(*arguments: Any, **options: Any) -> Tensor:
        return fastattn.linear_cross_entropy(
            *arguments, memory_budget=TINY, reduction=reduction, implementation=implementation, **options
        )

    compiled = torch.compile(ours, fullgraph=True, backend=frames, dynamic=True)
    (input, weight, bias), target = make_inputs("fp32", device)
    for rows in (5, 9, 11):
        leaves = (input[:rows].clone(), weight, bias)
        found = results(compiled, leaves, target[:rows].clone())
        torch.testing.assert_close(found, results(formula, leaves, target[:rows], reduction=reduction))
        compilations.append(frames.frame_count)
    assert len(set(compilations)) == 1


@pytest.mark.parametrize("implementation", FAST)
def test_exports(implementation: str, device: torch.device) -> None:
    class Loss(torch.nn.Module):
        def forward(self, input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
            return fastattn.linear_cross_entropy(input, weight, target, implementation=implementation)

    (input, weight, _), target = make_inputs("fp32", device)
    rows = {0: torch.export.Dim("rows", min=2, max=100)}
    program = torch.export.export(Loss(), (input[:6], weight, target[:6]), dynamic_shapes=(rows, None, rows))
    torch.testing.assert_close(program.module()(input, weight, target), peer(input, weight, target))


@pytest.mark.parametrize("triton", [True, False], ids=["triton", "torch"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(reduction: str, triton: bool, device: torch.device) -> None:
    operators = torch.ops.fastattn
    (input, weight, bias), target = make_inputs("bf16", device)
    call = (-100, reduction, 0.1, 0.01, 3.0, TINY, torch.bfloat16, triton)
    tensors = (input, weight, bias, target)
    for needs in ((True, True, True), (False, True, False)):
        checks = ALL_CHECKS if triton and reduction == "mean" and all(needs) else CHECKS_OF_ARGUMENTS
        forward = (*tensors, *needs, torch.float32, *call)
        torch.library.opcheck(operators.linear_cross_entropy_forward.default, forward, test_utils=checks)
        backward = (torch.ones(ROWS, device=device), *tensors, *needs, *call)
        torch.library.opcheck(operators.linear_cross_entropy_backward.default, backward, test_utils=checks)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("parameters", ["fp32", "bf16"])
def test_autocast_is_that_of_linear(parameters: str, implementation: str, device: torch.device) -> None:
    """Products in the autocast dtype, the loss in float32, gradients in each tensor's own dtype."""
    (_, weight, bias), target = make_inputs(parameters, device)
    input = make_inputs("fp32", device)[0][0]
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found = results(
            fastattn.linear_cross_entropy, (input, weight, bias), target, implementation=implementation
        )
        theirs = results(peer, (input, weight, bias), target)
    assert found["loss"].dtype == torch.float32
    assert {name: t.dtype for name, t in found.items()} == {name: t.dtype for name, t in theirs.items()}
    rounded = tuple(t.bfloat16() for t in (input, weight, bias))
    truth = results(formula, tuple(t.double() for t in rounded), target)
    for name, actual in found.items():
        assert (actual - truth[name]).abs().max() <= 2e-2 * truth[name].abs().max()
    with pytest.raises(TypeError, match=r"have dtypes .*; one for all is needed"):
        fastattn.linear_cross_entropy(input, weight.double(), target)


def test_transforms_are_refused_but_by_the_formula(device: torch.device) -> None:
    (input, weight, _), target = make_inputs("fp32", device)

    def loss(input: Tensor, name: str | None) -> Tensor:
        return fastattn.linear_cross_entropy(input, weight, target, implementation=name)

    for name in (None, *FAST):
        with pytest.raises(fastattn.NotSupported, match=r"within torch.func transforms"):
            torch.func.grad(lambda x, name=name: loss(x, name))(input)
    found = torch.func.grad(lambda x: loss(x, "reference"))(input)
    leaf = input.clone().requires_grad_()
    torch.testing.assert_close(found, torch.autograd.grad(peer(leaf, weight, target), leaf)[0])
