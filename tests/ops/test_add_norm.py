"""fastattn.add_layer_norm and add_rms_norm, through every implementation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn import reference
from fastattn.testing import assert_accurate, make_tensor

FAST = ("triton", "torch")
ALL = (*FAST, "reference")
NAMES = ("add_layer_norm", "add_rms_norm")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WIDTH = 33


def leaves(
    *leading: int, dtype: str = "fp32", residual: str | None = None, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """x, residual and weight that require gradients."""
    x = make_tensor(*leading, WIDTH, dtype=DTYPES[dtype], device=device, requires_grad=True)
    other = DTYPES[residual or dtype]
    return (
        x,
        make_tensor(*leading, WIDTH, dtype=other, device=device, requires_grad=True, seed=1),
        make_tensor(WIDTH, dtype=DTYPES[dtype], device=device, requires_grad=True, seed=2),
    )


def add_norm(name: str, x: Tensor, residual: Tensor | None, weight: Tensor | None, **options: Any) -> Any:
    return getattr(fastattn, name)(x, residual, WIDTH, weight, **options)


def gradients(function: Any, inputs: tuple[Tensor, ...], dtype: torch.dtype | None = None) -> list[Tensor]:
    """y, h and the gradients of the inputs, where gradients of the inputs' own dtypes arrive at both."""
    dy = make_tensor(*inputs[0].shape, dtype=inputs[0].dtype, device=inputs[0].device, seed=9)
    dh = make_tensor(*inputs[0].shape, dtype=inputs[1].dtype, device=inputs[0].device, seed=8)
    inputs = tuple(t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs)
    y, h = function(*inputs)
    found = torch.autograd.grad((y, h), inputs, (dy.to(y.dtype), dh.to(h.dtype)))
    return [y.detach(), h.detach(), *found]


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype, residual", [("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32")], ids=str)
@pytest.mark.parametrize("scaled", [False, True], ids=["", "rowscale"])
def test_matches_reference(
    scaled: bool, dtype: str, residual: str, name: str, implementation: str, device: torch.device
) -> None:
    """The peer is what PyTorch's operators compute in the same dtypes."""
    inputs = leaves(2, 5, dtype=dtype, residual=residual, device=device)
    rowscale = make_tensor(2, 5, device=device, seed=4).to(DTYPES[dtype]) if scaled else None
    options = {"rowscale": rowscale}

    def peer(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        h = residual + (x if rowscale is None else x * rowscale[..., None])
        plain = reference.layer_norm if name == "add_layer_norm" else reference.rms_norm
        return plain(h, WIDTH, weight, out_dtype=x.dtype), h

    def true(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        wide = {"rowscale": None if rowscale is None else rowscale.double()}
        eps = {} if name == "add_layer_norm" else {"eps": torch.finfo(torch.float32).eps}
        return add_norm(name, *inputs, **wide, **eps, implementation="reference")

    found = gradients(lambda *t: add_norm(name, *t, **options, implementation=implementation), inputs)
    rounded, truth = gradients(peer, inputs), gradients(true, inputs, torch.float64)
    for part, ours, theirs, exact in zip(
        ("y", "h", "dx", "dresidual", "dweight"), found, rounded, truth, strict=True
    ):
        growth = 10**0.5 if part == "dweight" else 1.0
        assert_accurate(ours, theirs, exact, name=part, growth=growth)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("name", NAMES)
def test_y_is_the_norm_of_the_sum_that_is_returned(
    name: str, implementation: str, device: torch.device
) -> None:
    """In bfloat16, where the sum before it is rounded would give another y."""
    x, residual, weight = leaves(40, dtype="bf16", device=device)
    y, h = add_norm(name, x, residual, weight, out_dtype=torch.float32, implementation=implementation)
    alone = getattr(fastattn, name.removeprefix("add_"))
    assert torch.equal(h, residual + x)
    expected = alone(h, WIDTH, weight, out_dtype=torch.float32, implementation=implementation)
    torch.testing.assert_close(y, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("residual", [None, "bf16", "fp32"])
def test_residual_dtype(residual: str | None, implementation: str, device: torch.device) -> None:
    """The sum of two bfloat16 in float32 is exact: it is not rounded before it is stored."""
    x, other, weight = leaves(4, dtype="bf16", residual=residual, device=device)
    given = other if residual else None
    y, h = add_norm(
        "add_layer_norm", x, given, weight, residual_dtype=torch.float32, implementation=implementation
    )
    assert (y.dtype, h.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(h, x.float() + (other.float() if residual else 0.0))
    tensors = (x, other) if residual else (x,)
    found = torch.autograd.grad((y.sum(), h.sum()), tensors)
    assert [gradient.dtype for gradient in found] == [t.dtype for t in tensors]
    _, narrow = add_norm(
        "add_layer_norm", x, given, weight, residual_dtype=torch.bfloat16, implementation=implementation
    )
    assert torch.equal(narrow, h.bfloat16())


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("name", NAMES)
def test_without_a_residual_the_sum_is_x(name: str, implementation: str, device: torch.device) -> None:
    x, _, weight = leaves(4, device=device)
    y, h, *statistics = add_norm(name, x, None, weight, return_statistics=True, implementation=implementation)
    assert h.data_ptr() == x.data_ptr() and len(statistics) == (1 if name == "add_rms_norm" else 2)
    (dx,) = torch.autograd.grad((y.square().sum(), h.sum()), x)
    plain = getattr(fastattn, name.removeprefix("add_"))(x, WIDTH, weight)
    torch.testing.assert_close(dx, torch.autograd.grad(plain.square().sum(), x)[0] + 1.0)


def dropped(x: Tensor, implementation: str | None = "triton", p: float = 0.4) -> Tensor:
    """What dropout makes of x: the sum without a residual."""
    return add_norm("add_rms_norm", x, None, None, dropout_p=p, implementation=implementation)[1]


@pytest.mark.parametrize("implementation", ALL)
def test_dropout_follows_manual_seed(implementation: str, device: torch.device) -> None:
    x = torch.ones(30, WIDTH, device=device)
    torch.manual_seed(1)
    first, second = dropped(x, implementation), dropped(x, implementation)
    torch.manual_seed(1)
    assert torch.equal(dropped(x, implementation), first) and not torch.equal(first, second)
    assert set(first.unique().tolist()) == {0.0, torch.tensor(1 / 0.6).item()}
    assert abs((first > 0).float().mean().item() - 0.6) < 0.08
    assert not dropped(x, implementation, p=1).any() and torch.equal(dropped(x, implementation, p=0), x)


@pytest.mark.parametrize("name", NAMES)
def test_dropout_and_its_gradients_are_the_references_with_the_same_mask(
    name: str, device: torch.device
) -> None:
    x, residual, weight = leaves(3, 5, device=device)
    rowscale = make_tensor(3, 5, device=device, seed=4)
    torch.manual_seed(3)
    keep = dropped(torch.ones_like(x)) > 0

    def true(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        h = reference.residual_sum(x, residual, dropout_p=0.4, keep=keep, rowscale=rowscale.to(x.dtype))
        plain = reference.layer_norm if name == "add_layer_norm" else reference.rms_norm
        return plain(h, WIDTH, weight), h

    def ours(*inputs: Tensor) -> Any:
        torch.manual_seed(3)
        return add_norm(name, *inputs, dropout_p=0.4, rowscale=rowscale, implementation="triton")

    inputs = (x, residual, weight)
    for found, truth in zip(gradients(ours, inputs), gradients(true, inputs, torch.float64), strict=True):
        torch.testing.assert_close(found, truth.float(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("implementation", FAST)
def test_checkpoint_drops_the_same_elements_again(implementation: str, device: torch.device) -> None:
    inputs = leaves(6, device=device)

    def block(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        y, h = add_norm("add_layer_norm", x, residual, weight, dropout_p=0.5, implementation=implementation)
        return y.square() + h

    def run(function: Any) -> tuple[Tensor, ...]:
        torch.manual_seed(5)
        return torch.autograd.grad(function().sum(), inputs)

    kept = run(
        lambda: torch.utils.checkpoint.checkpoint(block, *inputs, use_reentrant=False)  # type: ignore[no-any-return]
    )
    assert all(torch.equal(a, b) for a, b in zip(run(lambda: block(*inputs)), kept, strict=True))


@pytest.mark.parametrize("implementation", FAST)
def test_compiles_whole_and_exports(implementation: str, device: torch.device) -> None:
    """One graph for several numbers of rows, in which x is the residual too."""
    torch._dynamo.reset()

    class Norm(torch.nn.Module):
        def forward(self, x: Tensor, rowscale: Tensor, weight: Tensor) -> Any:
            y, h = add_norm("add_layer_norm", x, x, weight, rowscale=rowscale, implementation=implementation)
            return fastattn.add_rms_norm(
                y, h, WIDTH, weight, residual_dtype=torch.float32, implementation=implementation
            )

    module = Norm()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (5, 7):
        x, _, weight = leaves(rows, device=device)
        rowscale = torch.rand(rows, device=device)
        found, expected = compiled(x, rowscale, weight), module(x, rowscale, weight)
        torch.testing.assert_close(found, expected)
        sums = [sum(t.square().sum() for t in results) for results in (found, expected)]
        torch.testing.assert_close(
            *(torch.autograd.grad(total, (x, weight)) for total in sums), atol=1e-4, rtol=1e-4
        )
    given = (x.detach(), rowscale, weight.detach())
    rows = torch.export.Dim("rows")
    exported = torch.export.export(module, given, dynamic_shapes=({0: rows}, {0: rows}, None))
    x, rowscale = make_tensor(9, WIDTH, device=device), torch.rand(9, device=device)
    torch.testing.assert_close(exported.module()(x, rowscale, given[2]), module(x, rowscale, given[2]))


def test_dropout_compiles_whole(device: torch.device) -> None:
    torch._dynamo.reset()
    inputs = leaves(5, device=device)

    def norm(*inputs: Tensor) -> Any:
        return add_norm("add_layer_norm", *inputs, dropout_p=0.5, implementation="triton")

    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, norm):
        torch.manual_seed(7)
        y, h = function(*inputs)
        results.append((y, h, *torch.autograd.grad(y.square().sum() + h.sum(), inputs)))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("name", NAMES)
def test_transforms_get_pytorchs_operators(name: str) -> None:
    x, residual = torch.randn(3, 4, WIDTH), torch.randn(3, 4, WIDTH)

    def loss(x: Tensor, residual: Tensor, implementation: str | None = None) -> Tensor:
        y, h = add_norm(name, x, residual, None, implementation=implementation)
        return (y * h).sum()

    found = torch.vmap(torch.func.grad(loss, argnums=(0, 1)))(x, residual)
    expected = torch.func.grad(loss, argnums=(0, 1))(x, residual)
    torch.testing.assert_close(found, expected)
    with pytest.raises(fastattn.NotSupported, match=r"within torch.func transforms"):
        torch.func.grad(lambda x: loss(x, residual, "triton"))(x)


@pytest.mark.parametrize("implementation", FAST)
def test_empty_and_flat(implementation: str, device: torch.device) -> None:
    """No rows, and one row without a leading dimension."""
    weight = torch.ones(WIDTH, device=device)
    for shape in ((0, WIDTH), (WIDTH,)):
        x = torch.ones(shape, device=device, requires_grad=True)
        rowscale = torch.full(shape[:-1], 2.0, device=device)
        y, h, rstd = add_norm(
            "add_rms_norm", x, x, weight, rowscale=rowscale, return_statistics=True, implementation=implementation
        )  # fmt: skip
        assert y.shape == h.shape == shape and rstd.shape == shape[:-1]
        assert torch.equal(h, 3 * x)
        (dx,) = torch.autograd.grad(h.sum() + y.sum(), x)
        torch.testing.assert_close(dx, torch.full_like(x, 3.0), atol=1e-5, rtol=1e-5)
