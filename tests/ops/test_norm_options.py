"""fastattn.rms_norm, and what layer_norm and rms_norm take beyond PyTorch's arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastattn
from fastattn.testing import assert_accurate, make_tensor

FAST = ("triton", "torch")
ALL = (*FAST, "reference")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MIXTURES = [("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp32"), ("fp32", "bf16")]


def leaves(
    *shape: int, dtype: str = "fp32", parameters: str = "fp32", device: torch.device
) -> tuple[Tensor, Tensor]:
    """x and weight that require gradients, weights away from 0."""
    x = make_tensor(*shape, dtype=DTYPES[dtype], device=device, requires_grad=True)
    weight = make_tensor(shape[-1], device=device, seed=1).abs() + 0.5
    return x, weight.to(DTYPES[parameters]).requires_grad_()


def gradients(function: Any, inputs: tuple[Tensor, ...], dtype: torch.dtype | None = None) -> list[Tensor]:
    """y and the gradients of the inputs, computed in their dtypes or in `dtype`."""
    dy = make_tensor(*inputs[0].shape, dtype=inputs[0].dtype, device=inputs[0].device, seed=9)
    inputs = tuple(t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs)
    y = function(*inputs)
    dy = dy.to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("dtype, parameters", MIXTURES, ids=["-".join(pair) for pair in MIXTURES])
def test_rms_norm_matches_reference(
    dtype: str, parameters: str, implementation: str, device: torch.device
) -> None:
    """The peer is PyTorch's own function, in float32 where the dtypes differ."""
    inputs = leaves(2, 3, 63, dtype=dtype, parameters=parameters, device=device)
    found = gradients(lambda x, w: fastattn.rms_norm(x, 63, w, implementation=implementation), inputs)
    wide = torch.float32 if dtype != parameters else None
    peer = gradients(lambda x, w: F.rms_norm(x, (63,), w, 1.2e-7), inputs, wide)
    truth = gradients(
        lambda x, w: fastattn.reference.rms_norm(x, 63, w, 1.1920929e-07), inputs, torch.float64
    )
    for name, ours, theirs, true in zip(("y", "dx", "dweight"), found, peer, truth, strict=True):
        expected = DTYPES[parameters if name == "dweight" else dtype]
        assert_accurate(
            ours, theirs.to(expected), true, name=name, growth=6**0.5 if name == "dweight" else 1.0
        )


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norms_default_eps_is_that_of_the_dtype_computed_in(
    dtype: str, implementation: str, device: torch.device
) -> None:
    """float32's also of 16-bit x: with x as small as its root, that of float16 would give a thirtieth."""
    x = torch.full((1, 8), 1e-3, dtype=DTYPES[dtype], device=device)
    torch.testing.assert_close(fastattn.rms_norm(x, 8, implementation=implementation), F.rms_norm(x, (8,)))


def test_rms_norm_of_float64_is_pytorchs() -> None:
    x, weight = torch.randn(3, 5, dtype=torch.float64) * 1e-8, torch.ones(5, dtype=torch.float64)
    assert torch.equal(fastattn.rms_norm(x, 5, weight), F.rms_norm(x, (5,), weight))
    torch.testing.assert_close(
        fastattn.rms_norm(x, 5, weight, implementation="reference"), F.rms_norm(x, (5,))
    )


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0)], ids=str)
def test_rms_norm_of_nothing(shape: tuple[int, int], implementation: str, device: torch.device) -> None:
    x, weight = (
        torch.empty(shape, device=device, requires_grad=True),
        torch.ones(shape[1], device=device, requires_grad=True),
    )
    y, rstd = fastattn.rms_norm(x, shape[1], weight, return_statistics=True, implementation=implementation)
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    assert y.shape == dx.shape == shape and rstd.shape == shape[:1]
    assert torch.equal(dweight, torch.zeros_like(weight))


def norm(name: str, x: Tensor, weight: Tensor | None, **options: Any) -> Any:
    return getattr(fastattn, name)(x, x.size(-1), weight, **options)


NAMES = ("layer_norm", "rms_norm")


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("parameters", ["fp32", "bf16"])
def test_zero_centered_weight_is_added_to_one_in_float32(
    parameters: str, name: str, implementation: str, device: torch.device
) -> None:
    """A weight of 0.003 is beyond bfloat16's digits beside 1."""
    x, _ = leaves(5, 33, device=device)
    weight = torch.full((33,), 0.003, dtype=DTYPES[parameters], device=device, requires_grad=True)
    found = gradients(
        lambda x, w: norm(name, x, w, zero_centered_weight=True, implementation=implementation), (x, weight)
    )
    truth = gradients(lambda x, w: norm(name, x, 1 + w), (x, weight), torch.float64)
    torch.testing.assert_close(found[0], truth[0].float())
    torch.testing.assert_close(found[1], truth[1].float())
    torch.testing.assert_close(found[2], truth[2].to(weight.dtype))


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("name", NAMES)
def test_out_dtype_and_statistics(name: str, implementation: str, device: torch.device) -> None:
    x, weight = leaves(2, 5, 33, dtype="bf16", device=device)
    y, *found = norm(
        name, x, weight, out_dtype=torch.float32, return_statistics=True, implementation=implementation
    )
    truth = norm(name, x.double(), weight.double(), implementation="reference").float()
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, truth)
    wide = x.detach().double()
    squares = (
        wide.var(-1, correction=0) + 1e-5
        if name == "layer_norm"
        else wide.square().mean(-1) + torch.finfo(torch.float32).eps
    )
    expected = ([wide.mean(-1)] if name == "layer_norm" else []) + [squares.rsqrt()]
    assert [(t.dtype, t.shape, t.requires_grad) for t in found] == [(torch.float32, (2, 5), False)] * len(
        expected
    )
    for ours, true in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, true.float(), atol=1e-6, rtol=1e-5)
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    assert (dx.dtype, dweight.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_statistics_of_float64_are_float64(name: str) -> None:
    found = norm(name, torch.randn(3, 5, dtype=torch.float64), None, return_statistics=True)
    assert {t.dtype for t in found} == {torch.float64}


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("name", NAMES)
def test_saving_the_output_gives_the_same_gradients(
    name: str, implementation: str, device: torch.device
) -> None:
    inputs = leaves(7, 33, device=device)
    bias = make_tensor(33, device=device, seed=5, requires_grad=True)
    if name == "layer_norm":
        inputs = (*inputs, bias)

    def call(save: str) -> Any:
        return lambda x, *parameters: getattr(fastattn, name)(
            x, 33, *parameters, save=save, implementation=implementation
        )

    for ours, theirs in zip(gradients(call("output"), inputs), gradients(call("input"), inputs), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_saving_the_output_does_not_keep_x(device: torch.device) -> None:
    x, weight = leaves(7, 33, device=device)
    y = fastattn.layer_norm(x, 33, weight, save="output", implementation="triton")
    saved = [t.data_ptr() for t in y.grad_fn.saved_tensors if t is not None]
    assert y.data_ptr() in saved and x.data_ptr() not in saved


def test_writing_over_a_saved_output_is_an_error(device: torch.device) -> None:
    x, weight = leaves(7, 33, device=device)
    y = fastattn.layer_norm(x * 1, 33, weight, save="output", implementation="triton")
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_no_second_derivative_where_the_output_is_saved(device: torch.device) -> None:
    x, weight = leaves(3, 9, device=device)
    y = fastattn.layer_norm(x, 9, weight, save="output", implementation="triton")
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(
        fastattn.NotSupported, match=r"save='output' has no second derivative; save='input' has one"
    ):
        dx.sum().backward()


@pytest.mark.parametrize("implementation", FAST)
def test_second_derivatives_of_rms_norm(implementation: str, device: torch.device) -> None:
    x, weight = leaves(4, 9, device=device)

    def second(function: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(function(x, weight).pow(3).sum(), (x, weight), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight))

    found = second(lambda x, w: fastattn.rms_norm(x, 9, w, 1e-6, implementation=implementation), x, weight)
    wide = tuple(t.detach().double().requires_grad_() for t in (x, weight))
    truth = second(lambda x, w: fastattn.reference.rms_norm(x, 9, w, 1e-6), *wide)
    for ours, true in zip(found, truth, strict=True):
        torch.testing.assert_close(ours.double(), true, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    ({"weight": torch.ones(16).double()}, {"out_dtype": torch.float64}),
    ids=["weight", "out_dtype"],
)
def test_a_wide_parameter_leaves_rms_norms_eps_alone(options: dict[str, Any]) -> None:
    """Beside a float64 weight the epsilon was float64's: four times too large where x is as small as its root."""
    x = 1e-4 * torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.rms_norm(x, (16,))
    torch.testing.assert_close(fastattn.rms_norm(x, 16, **options).float(), expected)
