"""fastattn.linear_cross_entropy: values and gradients of every implementation."""

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
ROWS, WIDTH, CLASSES = 11, 8, 37
TINY = 2000  # bytes: chunks of a few rows
Leaves = tuple[Tensor, Tensor, Tensor]


def make_inputs(dtype: str, device: torch.device) -> tuple[Leaves, Tensor]:
    """(input, weight, bias) and targets, every third of which is ignored from the second on."""
    kind = DTYPES[dtype]
    input = make_tensor(ROWS, WIDTH, dtype=kind, device=device)
    weight = make_tensor(CLASSES, WIDTH, dtype=kind, device=device, seed=1)
    bias = make_tensor(CLASSES, dtype=kind, device=device, seed=2)
    target = torch.randint(CLASSES, (ROWS,), generator=torch.Generator().manual_seed(1))
    target[1::3] = -100
    return (input, weight, bias), target.to(device)


def formula(
    input: Tensor, weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None, **options: Any
) -> Tensor:
    return reference.linear_cross_entropy(input, weight, target, linear_bias, **options)


def peer(
    input: Tensor, weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None, **options: Any
) -> Tensor:
    """Whole logits by PyTorch, their loss as `fastattn.cross_entropy` hands it to PyTorch."""
    logits = F.linear(input, weight, linear_bias)
    loss: Tensor = fastattn.cross_entropy(logits, target, implementation="torch", **options)
    return loss


def results(
    function: Callable[..., Any], leaves: Leaves, target: Tensor, **options: Any
) -> dict[str, Tensor]:
    """The loss and every gradient, for an incoming gradient that is not 1."""
    input, weight, bias = (t.detach().requires_grad_() for t in leaves)
    loss = function(input, weight, target, linear_bias=bias, **options)
    dloss = torch.linspace(0.5, 1.5, loss.numel(), device=loss.device).reshape(loss.shape).to(loss.dtype)
    gradients = torch.autograd.grad(loss, (input, weight, bias), dloss)
    return dict(zip(("loss", "dinput", "dweight", "dbias"), (loss.detach(), *gradients), strict=True))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum", "label_smoothing": 0.1},
    "all": {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 4.0},
    "none": {"reduction": "none"},
    "none-all": {"reduction": "none", "label_smoothing": 0.1, "z_loss": 0.01, "softcap": 4.0},
}


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_reference(
    dtype: str, options: dict[str, Any], implementation: str, device: torch.device
) -> None:
    leaves, target = make_inputs(dtype, device)
    found = results(
        fastattn.linear_cross_entropy,
        leaves,
        target,
        memory_budget=TINY,
        implementation=implementation,
        **options,
    )
    theirs = results(peer, leaves, target, **options)
    wide = tuple(t.double() for t in leaves)
    truth = results(formula, wide, target, **options)
    for name, actual in found.items():
        assert_accurate(actual, theirs[name], truth[name], name=name)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_targets_and_gradients_that_lie_apart(
    reduction: str, implementation: str, device: torch.device
) -> None:
    """The kernel reads a row's target and incoming gradient side by side: a column of labels gave its neighbours'."""
    labels = torch.randint(0, 9, (12, 2), generator=torch.Generator().manual_seed(0)).to(device)
    x, weight = make_tensor(12, 16, device=device), make_tensor(9, 16, device=device, seed=1)
    for target in (labels[:, 0], labels[0, :1].expand(12)):
        found = []
        for given in (target, target.clone().contiguous()):
            leaves = [t.clone().requires_grad_() for t in (x, weight)]
            options = dict(reduction=reduction, implementation=implementation)
            loss = fastattn.linear_cross_entropy(*leaves, given, **options)
            loss.sum().backward()  # with "none" each row's incoming gradient is the same element
            found.append((loss.detach(), *(leaf.grad for leaf in leaves)))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("implementation", ALL)
def test_fits_the_models(implementation: str, device: torch.device) -> None:
    """(batch, seq, width), a tied weight, int32 targets, no bias."""
    (_, weight, _), target = make_inputs("fp32", device)
    weight = weight.requires_grad_()
    tokens = torch.arange(10, device=device).reshape(2, 5)
    x = F.embedding(tokens, weight).transpose(0, 1).contiguous().transpose(0, 1)
    target = (target[:10] % CLASSES).reshape(2, 5).int()
    for reduction in ("mean", "none"):
        loss = fastattn.linear_cross_entropy(
            x, weight, target, reduction=reduction, memory_budget=TINY, implementation=implementation
        )
        expected = F.cross_entropy(
            F.linear(x, weight).flatten(0, 1), target.flatten().long(), reduction=reduction
        )
        assert loss.shape == (target.shape if reduction == "none" else ())
        torch.testing.assert_close(loss.flatten(), expected.reshape(-1))
        (found,) = torch.autograd.grad(loss.sum(), weight, retain_graph=True)
        torch.testing.assert_close(found, torch.autograd.grad(expected.sum(), weight, retain_graph=True)[0])
    vector = fastattn.linear_cross_entropy(x[0, 0], weight, target[0, 0], implementation=implementation)
    torch.testing.assert_close(vector, F.cross_entropy(F.linear(x[0, 0], weight), target[0, 0].long()))


@pytest.mark.parametrize("implementation", FAST)
def test_what_the_mean_divides_by_is_not_rounded(implementation: str, device: torch.device) -> None:
    """1 / 7 in bfloat16 would shift every gradient the same way."""
    leaves, target = make_inputs("bf16", device)
    mean, total = (
        results(
            fastattn.linear_cross_entropy, leaves, target, reduction=reduction, implementation=implementation
        )["dinput"]
        for reduction in ("mean", "sum")
    )
    kept = (target != -100).sum().item()
    ratio = torch.dot(mean.double().flatten(), total.double().flatten()) / total.double().square().sum()
    # Some hundred roundings to either side; a 1 / kept in bfloat16 is off by more than 1e-3.
    assert abs(torch.tensor(1 / kept).bfloat16().item() * kept - 1) > 1e-3
    assert abs(ratio.item() * kept - 1) < 3e-4


@pytest.mark.parametrize("implementation", FAST)
def test_a_mean_is_no_less_exact_than_pytorchs(implementation: str, device: torch.device) -> None:
    """Its dinput was rounded to bfloat16 twice, before and after the division by the number of rows."""
    rows, width, classes = 100, 64, 5  # wide enough for the mean error to be within some percent
    # Small enough for the logits' own rounding not to hide it.
    weight = (0.1 * make_tensor(classes, width, device=device)).bfloat16()
    target = torch.arange(rows, device=device) % classes
    input = make_tensor(rows, width, dtype=torch.bfloat16, device=device, requires_grad=True)
    ours = fastattn.linear_cross_entropy(input, weight, target, implementation=implementation)
    torchs = F.cross_entropy(F.linear(input, weight).float(), target)
    wide = input.detach().double().requires_grad_()
    truth = torch.autograd.grad(F.cross_entropy(F.linear(wide, weight.double()), target), wide)[0]
    error, peer = (
        (torch.autograd.grad(loss, input)[0].double() - truth).square().mean().sqrt()
        for loss in (ours, torchs)
    )
    assert error < 1.05 * peer


@pytest.mark.parametrize("implementation", FAST)
def test_out_dtype(implementation: str, device: torch.device) -> None:
    """The loss of bfloat16 tensors in float32 is not one rounded to bfloat16."""
    (input, weight, _), target = make_inputs("bf16", device)
    losses = {
        dtype: fastattn.linear_cross_entropy(
            input, weight, target, out_dtype=dtype, implementation=implementation
        )
        for dtype in (None, torch.float32)
    }
    narrow, wide = losses[None], losses[torch.float32]
    assert wide.dtype == torch.float32 and wide != wide.bfloat16()
    assert torch.equal(narrow, wide.bfloat16())


@pytest.mark.parametrize("implementation", FAST)
def test_float16_inputs_do_not_underflow_under_bfloat16_autocast(
    implementation: str, device: torch.device
) -> None:
    """The mean was divided in the products' bfloat16, and dinput then rounded to float16's smallest numbers."""
    rows = 4096
    input = make_tensor(rows, 2, dtype=torch.float16, device=device, requires_grad=True)
    weight = (1e-2 * make_tensor(3, 2, device=device)).half()
    target = torch.arange(rows, device=device) % 3
    with torch.autocast(device.type, torch.bfloat16):
        loss = fastattn.linear_cross_entropy(input, weight, target, implementation=implementation)
    (dinput,) = torch.autograd.grad(65536 * loss, input)
    wide = input.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(65536 * F.cross_entropy(F.linear(wide, weight.double()), target), wide)
    assert (dinput.double() - truth).norm() < 1e-2 * truth.norm()


@pytest.mark.parametrize("implementation", [*FAST, "reference"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_uint8_targets_are_not_compared_in_uint8(
    reduction: str, implementation: str, device: torch.device
) -> None:
    """PyTorch makes ignore_index=-100 a uint8 of 156 beside them: the rows of class 156 were left out."""
    input, weight = make_tensor(2, 16, device=device), make_tensor(200, 16, seed=1, device=device)
    target = torch.tensor([156, 3], dtype=torch.uint8, device=device)
    options = {"reduction": reduction, "implementation": implementation}
    leaves = input.requires_grad_(), weight.requires_grad_()
    found = fastattn.linear_cross_entropy(input, weight, target, **options)
    expected = F.cross_entropy(F.linear(input, weight), target.long(), reduction=reduction)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(
        torch.autograd.grad(found.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    if not input.is_cuda:
        with pytest.raises(IndexError, match="target holds 156"):
            fastattn.linear_cross_entropy(input, weight[:100], target, **options)


@pytest.mark.parametrize("implementation", FAST)
def test_float16_gradients_neither_underflow_nor_overflow(implementation: str, device: torch.device) -> None:
    """1 / rows times a small probability would vanish in float16, and a sum over many rows be infinite."""
    rows = 200
    input = torch.full((rows, 1), 400.0, dtype=torch.float16, device=device)
    weight = torch.zeros(8, 1, dtype=torch.float16, device=device).requires_grad_()
    target = torch.zeros(rows, dtype=torch.long, device=device)
    loss = fastattn.linear_cross_entropy(input, weight, target, implementation=implementation)
    (dweight,) = torch.autograd.grad(loss, weight)
    expected = torch.full((8, 1), 50.0, dtype=torch.float16, device=device)
    expected[0] = -350.0
    torch.testing.assert_close(dweight, expected)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_every_row_ignored_and_no_rows(reduction: str, implementation: str, device: torch.device) -> None:
    """NaN is the mean of nothing, and its gradients are 0, as PyTorch's."""
    leaves, target = make_inputs("fp32", device)
    options = {"reduction": reduction, "implementation": implementation}
    ignored = torch.full_like(target, -100)
    empty = (leaves[0][:0], *leaves[1:])
    for given, targets in ((leaves, ignored), (empty, target[:0])):
        found = results(fastattn.linear_cross_entropy, given, targets, **options)
        expected = results(peer, given, targets, reduction=reduction)
        if implementation == "reference":
            assert found["loss"].isnan().all() or reduction != "mean"
        else:
            torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("implementation", FAST)
def test_ignored_rows_and_minus_infinity(implementation: str, device: torch.device) -> None:
    """NaN in an ignored row touches no parameter; a class whose bias is -inf has probability 0."""
    (input, weight, bias), target = make_inputs("fp32", device)
    bias[5] = -math.inf
    target[target == 5] = 6
    clean = results(
        fastattn.linear_cross_entropy, (input, weight, bias), target, implementation=implementation
    )
    torch.testing.assert_close(clean, results(peer, (input, weight, bias), target))
    target[0] = 5
    loss = fastattn.linear_cross_entropy(
        input, weight, target, linear_bias=bias, reduction="none", implementation=implementation
    )
    assert loss[0] == math.inf and loss[1:].isfinite().all()


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("name", ["plain", "none-all"])
def test_a_target_that_is_no_class_gives_nan(
    name: str, implementation: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where targets are not looked at: PyTorch's gather asserted there, which ends the process.

    Every gradient of its row is NaN, and with it those of the parameters; other rows' are what they are without it.
    """
    monkeypatch.setattr("fastattn.ops._loss.checking", lambda tensor: False)
    leaves, target = make_inputs("fp32", device)
    options = {**OPTIONS[name], "implementation": implementation, "memory_budget": TINY}
    without = results(fastattn.linear_cross_entropy, leaves, target, **options)
    for wrong in (CLASSES, -1):
        target[4] = wrong
        found = results(fastattn.linear_cross_entropy, leaves, target, **options)
        assert (
            found["dinput"][4].isnan().all()
            and found["dweight"].isnan().all()
            and found["dbias"].isnan().all()
        )
        others = [row for row in range(ROWS) if row != 4]
        if name == "none-all":
            assert found["loss"].isnan().nonzero().flatten().tolist() == [4]
            torch.testing.assert_close(found["dinput"][others], without["dinput"][others])
        else:
            assert found["loss"].isnan() and found["dinput"][others].isfinite().all()


@pytest.mark.parametrize("implementation", ALL)
def test_no_ignored_index_is_pytorchs_own(implementation: str, device: torch.device) -> None:
    """None is -100, as for PyTorch's function of this name, where it has one."""
    (input, weight, _), target = make_inputs("fp32", device)
    found = fastattn.linear_cross_entropy(
        input, weight, target, ignore_index=None, implementation=implementation
    )
    torch.testing.assert_close(found, peer(input, weight, target, ignore_index=-100))
    if hasattr(F, "linear_cross_entropy"):
        torch.testing.assert_close(found, F.linear_cross_entropy(input, weight, target, ignore_index=None))


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_real_sizes(reduction: str, device: torch.device) -> None:
    """Chunks with float32 sums of 16-bit products, on the device's own products."""
    rows, width, classes = 3000, 768, 50_257
    input = make_tensor(rows, width, dtype=torch.bfloat16, device=device)
    weight = (make_tensor(classes, width, device=device, seed=1) * width**-0.5).bfloat16()
    bias = make_tensor(classes, dtype=torch.bfloat16, device=device, seed=2)
    target = torch.randint(classes, (rows,), device=device)
    leaves, options = (input, weight, bias), {"reduction": reduction}
    found = results(fastattn.linear_cross_entropy, leaves, target, implementation="triton", **options)
    theirs = results(peer, leaves, target, **options)
    truth = results(formula, tuple(t.float() for t in leaves), target, **options)
    for name, actual in found.items():
        assert_accurate(actual, theirs[name], truth[name], name=name)
