"""fastattn.linear_cross_entropy, through every implementation, in chunks of all sizes."""

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
from benchmarks.memory import peak_memory
from fastattn import dispatch, reference
from fastattn.ops._loss_chunks import Chunks, chunk_rows, chunk_rows_of
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
@pytest.mark.parametrize("budget", [1, 4 * CLASSES * 4, 1 << 30, None])
def test_chunks_change_nothing(budget: int | None, implementation: str, device: torch.device) -> None:
    leaves, target = make_inputs("fp32", device)
    found = results(
        fastattn.linear_cross_entropy, leaves, target, memory_budget=budget, implementation=implementation
    )
    torch.testing.assert_close(found, results(formula, leaves, target))


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


def test_chunk_rows() -> None:
    """Without a budget a quarter of input and weight, but `least` rows; with one at least a row; even chunks."""

    def rows(count: int, budget: int | None = None, least: int = 128) -> int:
        return chunk_rows(count, 256, 32_768, 4, 4, least, budget)

    assert rows(512) == 128  # a quarter of the weight is 64 rows
    assert rows(8192, least=1024) == 1024
    assert rows(100) == 100
    assert rows(0) == 1
    assert rows(512, budget=1) == 1
    assert rows(512, budget=7 * 32_768 * 4) == 7
    assert rows(512, budget=300 * 32_768 * 4) == 256
    assert rows(1100, budget=1024 * 32_768 * 4) == 640  # not 1,024 and 76
    assert rows(512, budget=1 << 40) == 512
    # Wide models: a quarter of input and weight is 3,072 rows of logits in the same dtype.
    assert chunk_rows(65_536, 8192, 131_072, 2, 2, 1024, None) == 3072
    for count in (1, 129, 1000, 4097):
        for budget in (None, 1, 200 * 32_768 * 4):
            size = rows(count, budget)
            assert 1 <= size <= max(count, 1)


def test_operators_memory_is_counted() -> None:
    """Logits in float32 are worked on in place; 16 bits take a copy in float32, a soft cap one more."""
    input, weight = torch.empty(4096, 8, device="meta"), torch.empty(1000, 8, device="meta")
    for dtype, softcap, triton, size in (
        (torch.float32, None, False, 4),
        (torch.float32, 3.0, False, 8),
        (torch.bfloat16, None, False, 6),
        (torch.bfloat16, 3.0, False, 10),
        (torch.bfloat16, 3.0, True, 2),
        (torch.float64, None, False, 8),
    ):
        how = Chunks(256 * 1000 * size, dtype, triton)
        assert chunk_rows_of(input, weight, softcap, how) == 256


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
    plain = fastattn.ops._loss_chunks._Sums.of

    def of(*arguments: Any) -> Any:
        made.append(arguments[2:5])
        return plain(*arguments)

    monkeypatch.setattr(fastattn.ops._loss_chunks._Sums, "of", staticmethod(of))

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


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("reduction", ["mean", "none"])
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
        forward = (*tensors, *needs, torch.float32, *call)
        torch.library.opcheck(operators.linear_cross_entropy_forward.default, forward)
        backward = (torch.ones(ROWS, device=device), *tensors, *needs, *call)
        torch.library.opcheck(operators.linear_cross_entropy_backward.default, backward)


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


@pytest.mark.parametrize("implementation", FAST)
def test_checkpoint_gives_the_same_gradients(implementation: str, device: torch.device) -> None:
    (input, weight, _), target = make_inputs("fp32", device)
    leaves = input.requires_grad_(), weight.requires_grad_()

    def loss(input: Tensor, weight: Tensor) -> Tensor:
        return fastattn.linear_cross_entropy(input, weight, target, implementation=implementation)

    plain = torch.autograd.grad(loss(*leaves), leaves)
    kept = torch.utils.checkpoint.checkpoint(loss, *leaves, use_reentrant=False)
    assert all(torch.equal(a, b) for a, b in zip(plain, torch.autograd.grad(kept, leaves), strict=True))


def test_gradients_accumulate(device: torch.device) -> None:
    """Micro-batches into .grad, as a training loop has them."""
    (input, weight, _), target = make_inputs("fp32", device)
    weight = weight.requires_grad_()
    for part in (slice(0, 5), slice(5, ROWS)):
        fastattn.linear_cross_entropy(input[part], weight, target[part], reduction="sum").backward()
    (expected,) = torch.autograd.grad(peer(input, weight, target, reduction="sum"), weight)
    torch.testing.assert_close(weight.grad, expected)


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


def test_explain_shows_the_chunks(device: torch.device) -> None:
    (input, weight, _), target = make_inputs("fp32", device)
    call = fastattn.linear_cross_entropy, input, weight, target
    explanation = fastattn.explain(*call, memory_budget=4 * CLASSES * 4)
    assert explanation.implementation == "triton"
    assert (
        explanation.description
        == "chunks of 4 rows, their products by PyTorch, losses and dlogits by Triton kernels"
    )
    double = fastattn.explain(call[0], input.double(), weight.double(), target)
    assert double.implementation == "torch" and "float64 is not one of" in double.refusals["triton"]


INPUT, WEIGHT, TARGET = torch.randn(2, 3, 4), torch.randn(5, 4), torch.zeros(2, 3, dtype=torch.long)
BAD_INPUTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "integers": ({"input": INPUT.long()}, TypeError, r"input has dtype=torch.int64; a floating-point"),
    "weight-not-a-tensor": (
        {"linear_weight": 1},
        TypeError,
        r"linear_weight must be a torch.Tensor, not int",
    ),
    "probabilities": ({"target": INPUT}, TypeError, r"target has dtype=torch.float32; class indices"),
    "width": (
        {"linear_weight": WEIGHT.t()},
        ValueError,
        r"\(2, 3, 4\) and linear_weight \(4, 5\); \(..., width\)",
    ),
    "target": ({"target": TARGET[0]}, ValueError, r"target has shape \(3,\); input's \(2, 3\) is needed"),
    "bias": ({"linear_bias": WEIGHT[0]}, ValueError, r"linear_bias has shape \(4,\); \(5,\) is needed"),
    "out_dtype": (
        {"out_dtype": torch.int64},
        TypeError,
        r"out_dtype=torch.int64 must be a floating-point dtype",
    ),
    "budget": ({"memory_budget": 0}, ValueError, r"memory_budget=0 must be at least 1 byte, or None"),
    "dtypes": ({"linear_weight": WEIGHT.half()}, TypeError, r"dtypes \(torch.float32, torch.float16, None\)"),
    "device": (
        {"linear_weight": WEIGHT.to("meta")},
        ValueError,
        r"linear_weight is on meta, but input is on",
    ),
    "class": ({"target": TARGET + 5}, IndexError, r"target holds 5; it must be in \[0, 5\)"),
    "z-loss": ({"z_loss": -1.0}, ValueError, r"z_loss=-1.0 must be at least 0"),
}


@pytest.mark.parametrize("change, error, message", BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_bad_input_names_the_value(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastattn.linear_cross_entropy(
            **({"input": INPUT, "linear_weight": WEIGHT, "target": TARGET} | change)
        )


def test_memory_on_a_cpu_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks, one gradient of the weight and one of the input, where whole logits take three times themselves."""
    monkeypatch.setattr(dispatch, "INTERPRETING", False)
    rows, width, classes = 512, 16, 4096
    input = torch.randn(rows, width, requires_grad=True)
    weight = torch.randn(classes, width, requires_grad=True)
    target = torch.randint(classes, (rows,))

    def step(loss: Callable[..., Tensor]) -> None:
        torch.autograd.grad(loss(input, weight, target), (input, weight))

    logits = rows * classes * 4
    gradients = (rows + classes) * width * 4
    found = peak_memory(lambda: step(fastattn.linear_cross_entropy), "cpu")
    assert found <= 1.05 * (logits / 4 + gradients)
    assert found <= peak_memory(lambda: step(peer), "cpu") / 4


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


@pytest.mark.gpu
def test_nothing_waits_for_the_device(device: torch.device) -> None:
    leaves, target = make_inputs("bf16", device)
    for _ in range(2):  # the first call may try what products the device has
        results(fastattn.linear_cross_entropy, leaves, target, memory_budget=TINY)
        torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")
