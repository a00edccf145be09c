"""fastattn.cross_entropy under torch.compile, export, autocast, checkpointing and torch.func; its operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fastattn
from fastattn.testing import make_tensor
from tests.ops.comparison import ALL_CHECKS, CHECKS_OF_ARGUMENTS
from tests.ops.test_cross_entropy import ALL, DTYPES, EXTRA, FAST, make_target, peer, results


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, **EXTRA}], ids=["plain", "all"])
def test_compiles_whole_with_dynamic_shapes(options: dict[str, Any], device: torch.device) -> None:
    frames, compilations = CompileCounterWithBackend("aot_eager"), []

    def loss(x: Tensor, target: Tensor) -> Tensor:
        return fastattn.cross_entropy(x, target, implementation="triton", inplace=True, **options)

    compiled = torch.compile(loss, fullgraph=True, backend=frames, dynamic=True)
    for rows, classes in ((5, 9), (40, 7), (7, 11)):
        leaf = make_tensor(rows, classes, device=device)
        target = make_target(rows, classes=classes, device=device)
        found = results(lambda x, t: compiled(2 * x, t), leaf, target)
        torch.testing.assert_close(found, results(lambda x, t: peer(2 * x, t, **options), leaf, target))
        compilations.append(frames.frame_count)
    assert len(set(compilations)) == 1


def test_exports(device: torch.device) -> None:
    class Loss(torch.nn.Module):
        def forward(self, x: Tensor, target: Tensor) -> Tensor:
            return fastattn.cross_entropy(x, target, implementation="triton")

    x, target = make_tensor(5, 9, device=device), make_target(5, classes=9, device=device)
    rows = torch.export.Dim("rows", min=2, max=100)
    program = torch.export.export(Loss(), (x, target), dynamic_shapes=({0: rows}, {0: rows}))
    assert "fastattn.cross_entropy_forward" in str(program.graph)
    longer, targets = make_tensor(8, 9, device=device), make_target(8, classes=9, device=device)
    torch.testing.assert_close(program.module()(longer, targets), F.cross_entropy(longer, targets))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(reduction: str, device: torch.device) -> None:
    operators = torch.ops.fastattn
    x, target = make_tensor(4, 6, device=device), make_target(4, classes=6, device=device)
    options = (-100, reduction, 0.1, 0.01, 3.0)
    forward = (x, target, *options, torch.float32, True)
    checks = ALL_CHECKS if reduction == "mean" else CHECKS_OF_ARGUMENTS
    torch.library.opcheck(operators.cross_entropy_forward.default, forward, test_utils=checks)
    loss, statistics, kept = operators.cross_entropy_forward(*forward)
    backward = (torch.ones_like(loss), statistics[0], x, target, statistics, kept, *options)
    torch.library.opcheck(
        operators.cross_entropy_backward.default, (None, *backward[1:]), test_utils=CHECKS_OF_ARGUMENTS
    )
    torch.library.opcheck(operators.cross_entropy_backward.default, backward, test_utils=checks)
    torch.library.opcheck(operators.cross_entropy_backward_.default, backward, test_utils=checks)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("extra", [{}, EXTRA], ids=["plain", "z-cap"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_autocast_gives_a_float32_loss(
    dtype: str, extra: dict[str, Any], implementation: str, device: torch.device
) -> None:
    """As PyTorch's, on every device type; the gradient has the logits' dtype."""
    x, target = (
        make_tensor(5, 7, dtype=DTYPES[dtype], device=device),
        make_target(5, classes=7, device=device),
    )

    def under_autocast(function: Callable[..., Any], **options: Any) -> tuple[Tensor, Tensor]:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return results(function, x, target, **options)

    found = under_autocast(fastattn.cross_entropy, implementation=implementation, **extra)
    assert found[0].dtype == under_autocast(F.cross_entropy)[0].dtype == torch.float32
    assert found[1].dtype == x.dtype
    expected = results(peer, x.float(), target, **extra)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1].float(), expected[1], rtol=2e-2, atol=1e-3)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert fastattn.cross_entropy(x.double(), target).dtype == torch.float64


@pytest.mark.parametrize("implementation", FAST)
def test_checkpoint_gives_the_same_gradients(implementation: str, device: torch.device) -> None:
    x, target = make_tensor(5, 7, device=device).requires_grad_(), make_target(5, classes=7, device=device)

    def loss(x: Tensor) -> Tensor:
        return fastattn.cross_entropy(x, target, z_loss=0.1, implementation=implementation)

    plain = torch.autograd.grad(loss(x), x)
    kept = torch.utils.checkpoint.checkpoint(loss, x, use_reentrant=False)
    assert torch.equal(plain[0], torch.autograd.grad(kept, x)[0])


def test_transforms_go_to_pytorchs_operators(device: torch.device) -> None:
    x, target = make_tensor(3, 5, 7, device=device), make_target(3, 5, classes=7, device=device)

    def of(function: Callable[..., Any]) -> Tensor:
        return torch.func.grad(lambda x: torch.vmap(function)(x, target).square().sum())(x)

    torch.testing.assert_close(of(fastattn.cross_entropy), of(F.cross_entropy))
    tangent = torch.ones_like(x[0])
    for function in (fastattn.cross_entropy, F.cross_entropy):
        _, dloss = torch.func.jvp(lambda x, f=function: f(x, target[0]), (x[0],), (tangent,))
        assert dloss.abs() < 1e-5  # a constant added to all logits changes nothing
