"""fastattn.cross_entropy, through every implementation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

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


def test_in_place_the_logits_become_their_gradient(device: torch.device) -> None:
    leaf, target = make_tensor(5, 7, device=device).requires_grad_(), make_target(5, classes=7, device=device)
    logits = 2 * leaf
    fastattn.cross_entropy(logits, target, inplace=True).backward()
    (dlogits,) = torch.autograd.grad(F.cross_entropy(x := (2 * leaf).detach().requires_grad_(), target), x)
    torch.testing.assert_close(logits.detach(), dlogits)
    torch.testing.assert_close(leaf.grad, 2 * dlogits)


def test_in_place_refuses_what_would_be_wrong(device: torch.device) -> None:
    leaf, target = make_tensor(5, 7, device=device).requires_grad_(), make_target(5, classes=7, device=device)
    with pytest.raises(ValueError, match="over input, a leaf that requires one"):
        fastattn.cross_entropy(leaf, target, inplace=True)
    with pytest.raises(ValueError, match="over a leaf that requires one: input is a view of it"):
        fastattn.cross_entropy(leaf.view(5, 7), target, inplace=True)
    with pytest.raises(ValueError, match=r"elements of input overlap, with strides \(0, 1\)"):
        fastattn.cross_entropy((2 * leaf)[:1].expand(5, 7), target, inplace=True)
    logits = 2 * leaf
    loss = fastattn.cross_entropy(logits, target, inplace=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="hold their gradient since the first backward"):
        loss.backward()
    logits = 2 * leaf
    losses = [fastattn.cross_entropy(logits, target, inplace=True) for _ in range(2)]
    losses[0].backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace=True: the logits, the target or the graph are not what"):
        losses[1].backward()
    logits = 2 * leaf
    loss = logits.square().sum() + fastattn.cross_entropy(logits, target, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # the loss's backward runs first, and what the square saved is gone


def test_without_inplace_nothing_is_written(device: torch.device) -> None:
    x, target = make_tensor(5, 7, device=device).requires_grad_(), make_target(5, classes=7, device=device)
    copy, dloss = x.detach().clone(), make_tensor(5, device=device, seed=1)
    kept = dloss.clone()
    loss = fastattn.cross_entropy(x, target, reduction="none", implementation="triton")
    first = torch.autograd.grad(loss, x, dloss, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, x, dloss)[0])
    assert torch.equal(x, copy) and torch.equal(dloss, kept)


def test_saves_the_logits_and_8_bytes_a_row(device: torch.device) -> None:
    x = make_tensor(5, 7, dtype=torch.bfloat16, device=device).requires_grad_()
    target = make_target(5, classes=7, device=device)
    loss = fastattn.cross_entropy(x, target, implementation="triton")
    saved = loss.grad_fn.saved_tensors
    assert [t.data_ptr() for t in saved[:2]] == [x.data_ptr(), target.data_ptr()]
    assert [(t.shape, t.dtype) for t in saved[2:]] == [((2, 5), torch.float32), ((), torch.float32)]


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
    torch.library.opcheck(operators.cross_entropy_forward.default, forward)
    loss, statistics, kept = operators.cross_entropy_forward(*forward)
    backward = (torch.ones_like(loss), statistics[0], x, target, statistics, kept, *options)
    torch.library.opcheck(operators.cross_entropy_backward.default, backward)
    torch.library.opcheck(operators.cross_entropy_backward.default, (None, *backward[1:]))
    torch.library.opcheck(operators.cross_entropy_backward_.default, backward)


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


def test_explain_names_every_refusal(device: torch.device) -> None:
    x, target = make_tensor(3, 5, device=device), torch.zeros(3, dtype=torch.long, device=device)

    def refusal(*arguments: Any, **options: Any) -> str:
        explanation = fastattn.explain(fastattn.cross_entropy, *arguments, **options)
        assert explanation.implementation == "torch"
        return explanation.refusals["triton"]

    assert fastattn.explain(fastattn.cross_entropy, x, target).implementation == "triton"
    assert "class weights are PyTorch's" in refusal(x, target, torch.ones(5, device=device))
    assert "holds class probabilities" in refusal(x, x.softmax(1))
    assert "float64 is not one of" in refusal(x.double(), target)
    assert "strides (1, 3); the classes must be contiguous" in refusal(x.t().contiguous().t(), target)
    assert "classes=0 must be at least 1" in refusal(x[:, :0], target)
    composed = fastattn.explain(fastattn.cross_entropy, x.double(), target, z_loss=0.1)
    assert "operators around it" in composed.description


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_a_target_that_is_no_class_is_named(implementation: str, z_loss: float, device: torch.device) -> None:
    x = make_tensor(3, 5, device=device)
    for wrong in (5, -1):
        target = torch.tensor([0, wrong, -100], device=device)
        with (
            fastattn.debug_checks(),
            pytest.raises(
                IndexError, match=rf"target holds {wrong}; it must be in \[0, 5\) or ignore_index=-100"
            ),
        ):
            fastattn.cross_entropy(x, target, z_loss=z_loss, implementation=implementation)


X = torch.randn(3, 5)
T = torch.tensor([0, 1, 2])
BAD_INPUTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "input-not-a-tensor": ({"input": [1.0]}, TypeError, r"input must be a torch.Tensor, not list"),
    "integers": ({"input": X.long()}, TypeError, r"input has dtype=torch.int64; a floating-point dtype"),
    "target-not-a-tensor": ({"target": 1}, TypeError, r"target must be a torch.Tensor, not int"),
    "bool-target": ({"target": T.bool()}, TypeError, r"target has dtype=torch.bool; int64, int32 or uint8"),
    "target-device": ({"target": T.to("meta")}, ValueError, r"target is on meta, but input is on cpu"),
    "scalar": ({"input": X[0, 0]}, ValueError, r"input has shape \(\); \(classes,\) or"),
    "batch": ({"target": T[:2]}, ValueError, r"target has shape \(2,\); \(3,\) is needed beside \(3, 5\)"),
    "rank": ({"input": X[None]}, ValueError, r"target has shape \(3,\); \(1, 5\) is needed"),
    "vector": ({"input": X[0]}, ValueError, r"target has shape \(3,\); \(\) is needed beside"),
    "probabilities": ({"target": X[:2]}, ValueError, r"shape \(2, 5\); probabilities of shape \(3, 5\)"),
    "ignored-probabilities": (
        {"target": X, "ignore_index": 1},
        ValueError,
        r"ignore_index=1 goes with class indices",
    ),
    "weight": ({"weight": X[0, :4]}, ValueError, r"weight has shape \(4,\); one of each of the 5 classes"),
    "reduction": ({"reduction": "max"}, ValueError, r"reduction='max' is not a valid value for reduction"),
    "smoothing": ({"label_smoothing": 1.5}, ValueError, r"label_smoothing=1.5 must be between 0.0 and 1.0"),
    "z-loss": ({"z_loss": -1.0}, ValueError, r"z_loss=-1.0 must be at least 0 and finite"),
    "softcap": ({"softcap": 0.0}, ValueError, r"softcap=0.0 must be above 0 and finite, or None"),
    "implementation": ({"implementation": "foo"}, ValueError, r"implementation='foo' is unknown"),
}


@pytest.mark.parametrize("change, error, message", BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_bad_input_names_the_value(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastattn.cross_entropy(**({"input": X, "target": T} | change))


@pytest.mark.gpu
def test_nothing_waits_for_the_device(device: torch.device) -> None:
    x, target = make_tensor(64, 1000, device=device), make_target(64, classes=1000, device=device)
    results(fastattn.cross_entropy, x, target)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(fastattn.cross_entropy, x, target, z_loss=0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_minus_infinity_is_as_pytorchs(device: torch.device) -> None:
    x, target = make_tensor(3, 5, device=device), torch.tensor([0, 1, 2], device=device)
    x[0, 3], x[1, 1], x[2] = -math.inf, -math.inf, -math.inf
    for options in ({"reduction": "none"}, {"reduction": "none", "label_smoothing": 0.1}):
        found = results(fastattn.cross_entropy, x, target, **options)
        torch.testing.assert_close(found, results(F.cross_entropy, x, target, **options), equal_nan=True)
