"""fastattn.cross_entropy: values and gradients of every implementation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn import reference
from fastattn.testing import assert_accurate, make_tensor

ALL = ("triton", "torch", "reference")
FAST = ("triton", "torch")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EXTRA = {"z_loss": 0.01, "softcap": 4.0}


def make_target(*shape: int, classes: int, device: torch.device, every: int = 3) -> Tensor:
    """Classes, and from the second on each third one ignored."""
    target = torch.randint(classes, shape, generator=torch.Generator().manual_seed(1))
    target.view(-1)[1::every] = -100
    return target.to(device)


def results(
    function: Callable[..., Any], input: Tensor, *arguments: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    """The loss and the gradient of input, for an incoming gradient that is not 1."""
    leaf = input.detach().requires_grad_()
    loss = function(leaf, *arguments, **options)
    dloss = torch.linspace(0.5, 1.5, max(loss.numel(), 1), device=loss.device)[: loss.numel()]
    return loss.detach(), torch.autograd.grad(loss, leaf, dloss.reshape(loss.shape).to(loss.dtype))[0]


def peer(input: Tensor, *arguments: Any, **options: Any) -> Tensor:
    """PyTorch's own operators, in the input's dtype."""
    z_loss, softcap = options.pop("z_loss", 0.0), options.pop("softcap", None)
    x = input if softcap is None else softcap * torch.tanh(input / softcap)
    loss = F.cross_entropy(x, *arguments, **options)
    if z_loss:
        target = arguments[0]
        kept = torch.ones_like(x[:, 0]) > 0 if target.is_floating_point() else target != -100
        squares = torch.where(kept, z_loss * torch.logsumexp(x, 1).square(), 0.0)
        reduction = options.get("reduction", "mean")
        loss = loss + (
            squares if reduction == "none" else squares.sum() / (kept.sum() if reduction == "mean" else 1)
        )
    return loss


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none", "label_smoothing": 0.1},
    "smooth-z-cap": {"label_smoothing": 0.1, **EXTRA},
    "none-z": {"reduction": "none", "z_loss": 0.1},
}


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_reference(
    dtype: str, options: dict[str, Any], implementation: str, device: torch.device
) -> None:
    input = 2 * make_tensor(7, 63, dtype=DTYPES[dtype], device=device)
    target = make_target(7, classes=63, device=device)
    found = results(fastattn.cross_entropy, input, target, implementation=implementation, **options)
    theirs = results(peer, input, target, **options)
    truth = results(reference.cross_entropy, input.double(), target, **options)
    for name, actual, rounded, exact in zip(("loss", "dinput"), found, theirs, truth, strict=True):
        if implementation == "reference" and dtype != "fp32":
            continue  # the formula in 16 bits is what plain operators give, worse than PyTorch's one
        assert_accurate(actual, rounded, exact, name=name)


SHAPES: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...], str]] = {
    "vector": (lambda x: x[0, 0], (), "triton"),
    "vector-one-target": (lambda x: x[0, 0], (1,), "triton"),
    "one-class": (lambda x: x[0, :, :1], (5,), "triton"),
    "shifted": (lambda x: x[:, :-1].transpose(1, 2), (4, 4), "triton"),
    "channels-last": (lambda x: x.reshape(2, 2, 5, 9).permute(0, 3, 1, 2), (2, 2, 5), "triton"),
    "classes-first": (lambda x: x, (4, 9), "torch"),
    "transposed": (lambda x: x[0].t(), (9,), "torch"),
    "every-other": (lambda x: x[0, :, ::2], (5,), "torch"),
    "expanded": (lambda x: x[0, :1].expand(6, 9), (6,), "triton"),
}


@pytest.mark.parametrize("layout", SHAPES)
@pytest.mark.parametrize("implementation", [None, "reference"])
def test_shapes_and_layouts(layout: str, implementation: str | None, device: torch.device) -> None:
    """Those of PyTorch; rows that lie where a kernel can read them are not copied."""
    view, shape, taken = SHAPES[layout]
    x = view(make_tensor(4, 5, 9, device=device))
    target = make_target(*shape, classes=x.size(1) if x.dim() > 1 else 9, device=device, every=4)
    if shape in ((), (1,)):
        target = torch.full(shape, 2, device=device)
    assert fastattn.explain(fastattn.cross_entropy, x, target).implementation == taken
    for reduction in ("mean", "none"):
        options = {"reduction": reduction, "label_smoothing": 0.1}
        found = results(fastattn.cross_entropy, x, target, implementation=implementation, **options)
        # PyTorch itself has no smoothed loss of a vector with one target in a list.
        theirs = results(F.cross_entropy, x, target.reshape(()) if x.dim() == 1 else target, **options)
        torch.testing.assert_close(found, theirs)
    loss, lse = fastattn.cross_entropy(x, target, return_lse=True, implementation=implementation)
    expected = torch.logsumexp(x, 1 if x.dim() > 1 else 0)
    torch.testing.assert_close(lse, expected)
    torch.testing.assert_close(loss, F.cross_entropy(x, target))


@pytest.mark.parametrize("implementation", ["torch", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("extra", [{}, EXTRA], ids=["plain", "z-cap"])
def test_weights_and_probabilities_are_pytorchs(
    extra: dict[str, Any], reduction: str, implementation: str, device: torch.device
) -> None:
    x, weight = make_tensor(5, 7, device=device), make_tensor(7, device=device, seed=1).abs()
    options = {"reduction": reduction, "label_smoothing": 0.1, **extra}
    for target in (make_target(5, classes=7, device=device), make_tensor(5, 7, device=device).softmax(1)):
        found = results(fastattn.cross_entropy, x, target, weight, implementation=implementation, **options)
        torch.testing.assert_close(found, results(peer, x, target, weight, **options))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize("implementation", ALL)
def test_targets_of_every_integer_dtype(
    dtype: torch.dtype, implementation: str, device: torch.device
) -> None:
    x, target = make_tensor(5, 7, device=device), torch.arange(5, device=device)
    found = fastattn.cross_entropy(x, target.to(dtype), ignore_index=3, implementation=implementation)
    torch.testing.assert_close(found, F.cross_entropy(x, target, ignore_index=3))


def test_deprecated_arguments_by_position(device: torch.device) -> None:
    x, target = make_tensor(5, 7, device=device), torch.arange(5, device=device)
    with pytest.warns(UserWarning, match="size_average and reduce args will be deprecated"):
        found = fastattn.cross_entropy(x, target, None, False, 2, True, "mean", 0.1)
    torch.testing.assert_close(found, F.cross_entropy(x, target, None, None, 2, None, "sum", 0.1))


@pytest.mark.parametrize("implementation", ALL)
def test_gradients_through_the_log_sum_exp(implementation: str, device: torch.device) -> None:
    """Alone and beside the loss's; ignored rows have one too."""
    x, target = make_tensor(5, 7, device=device), make_target(5, classes=7, device=device)
    dlse = make_tensor(5, device=device, seed=3)
    for share in (0.0, 1.0):

        def ours(x: Tensor, share: float = share) -> Tensor:
            loss, lse = fastattn.cross_entropy(x, target, return_lse=True, implementation=implementation)
            return (lse * dlse).sum() + (share * loss if share else 0.0)

        def theirs(x: Tensor, share: float = share) -> Tensor:
            return (torch.logsumexp(x, 1) * dlse).sum() + share * F.cross_entropy(x, target)

        torch.testing.assert_close(results(ours, x), results(theirs, x))


@pytest.mark.parametrize("implementation", ALL)
def test_every_row_ignored_and_no_rows(implementation: str, device: torch.device) -> None:
    """The mean of nothing is NaN, its gradient 0, as PyTorch's."""
    for rows in (3, 0):
        x, target = make_tensor(rows, 5, device=device), torch.full((rows,), -100, device=device)
        for reduction in ("mean", "sum", "none"):
            found = results(
                fastattn.cross_entropy, x, target, reduction=reduction, implementation=implementation
            )
            expected = results(F.cross_entropy, x, target, reduction=reduction)
            if implementation == "reference":
                found, expected = found[:1], expected[:1]  # 0 / 0 has no gradient by the formula
            torch.testing.assert_close(found, expected, equal_nan=True)


def test_minus_infinity_is_as_pytorchs(device: torch.device) -> None:
    x, target = make_tensor(3, 5, device=device), torch.tensor([0, 1, 2], device=device)
    x[0, 3], x[1, 1], x[2] = -math.inf, -math.inf, -math.inf
    for options in ({"reduction": "none"}, {"reduction": "none", "label_smoothing": 0.1}):
        found = results(fastattn.cross_entropy, x, target, **options)
        torch.testing.assert_close(found, results(F.cross_entropy, x, target, **options), equal_nan=True)


@pytest.mark.parametrize("implementation", FAST)
def test_double_backward(implementation: str, device: torch.device) -> None:
    """The second derivative, and the mixed one with the incoming gradients, are those of the formula."""
    x = make_tensor(4, 7, device=device).requires_grad_()
    dloss = make_tensor(4, device=device, seed=1).requires_grad_()
    target = make_target(4, classes=7, device=device)

    def second(function: Callable[..., Any], **options: Any) -> tuple[Tensor, ...]:
        loss, lse = function(
            x, target, reduction="none", label_smoothing=0.1, z_loss=0.1, return_lse=True, **options
        )
        (dx,) = torch.autograd.grad((loss, lse), x, (dloss, dloss), create_graph=True)
        return torch.autograd.grad(dx.square().sum(), (x, dloss))

    found = second(fastattn.cross_entropy, implementation=implementation)
    torch.testing.assert_close(found, second(reference.cross_entropy))


@pytest.mark.parametrize("implementation", [None, "torch"])
def test_targets_that_lie_apart_are_counted_where_they_are(
    implementation: str | None, device: torch.device
) -> None:
    """A mean divided by the rows kept among the first numbers in memory: those between the targets, here ignored."""
    tokens = torch.full((6, 7), -100, device=device)
    tokens[:, 3] = torch.arange(6, device=device)
    tokens[5, 3] = -100
    logits = make_tensor(6, 8, device=device, requires_grad=True)
    found = fastattn.cross_entropy(logits, tokens[:, 3], implementation=implementation)
    expected = fastattn.cross_entropy(logits, tokens[:, 3].clone(), implementation=implementation)
    assert torch.isfinite(found) and torch.equal(found, expected)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (found, expected)]
    assert torch.equal(*gradients)
