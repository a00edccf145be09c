"""Norms whose like was made before: the results that all checks and plans give, and none where those would differ."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="what is called again is a kernel")

import fastattn
from fastattn.ops import _norm_call
from fastattn.testing import make_tensor
from tests.again import taken_again


@pytest.fixture
def again() -> Iterator[list[Tensor]]:
    """The inputs of calls that went past the checks."""
    with taken_again(_norm_call._again) as taken:
        yield taken


# Of each: the shape that is normalized, whether there is a weight, a bias, and options.
CASES: dict[str, tuple[tuple[int, ...], bool, bool, dict[str, Any]]] = {
    "layer_norm": ((24,), True, True, {}),
    "layer_norm-no-bias": ((24,), True, False, {}),
    "layer_norm-nothing": ((24,), False, False, {}),
    "layer_norm-two-dims": ((6, 24), True, True, {}),
    "layer_norm-eps": ((24,), True, True, {"eps": 0.3}),
    "layer_norm-no-bias-eps": ((24,), True, False, {"eps": 0.3}),
    "layer_norm-eps-int": ((24,), True, True, {"eps": 1}),
    "rms_norm": ((24,), True, False, {}),
    "rms_norm-nothing": ((24,), False, False, {}),
    "rms_norm-eps": ((24,), True, False, {"eps": 0.3}),
    "add_layer_norm": ((24,), True, True, {}),
    "add_layer_norm-two-dims": ((6, 24), True, True, {}),
    "add_rms_norm": ((24,), True, False, {}),
    "add_rms_norm-eps": ((24,), True, False, {"eps": 0.3}),
}


def _call(name: str, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, **more: Any) -> list[Tensor]:
    function = name.partition("-")[0]
    shape, has_weight, has_bias, options = CASES[name]
    parameters = [
        t[: shape[0]] if len(shape) == 2 else t[0] if needed else None
        for t, needed in ((weight, has_weight), (bias, has_bias))
    ]
    if function.endswith("rms_norm"):
        parameters.pop()
    inputs = (x, residual) if function.startswith("add") else (x,)
    found = getattr(fastattn, function)(*inputs, shape, *parameters, **options, **more)
    return list(found) if isinstance(found, tuple) else [found]


def _tensors(device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = ((3, 6, 24), (3, 6, 24), (6, 24), (6, 24))
    return [make_tensor(*s, device=device, dtype=dtype, seed=n) for n, s in enumerate(shapes)]


@pytest.mark.parametrize("name", CASES)
def test_the_same_bits_and_layout(name: str, device: torch.device, again: list[Tensor]) -> None:
    for _ in range(4):
        tensors = _tensors(device)
        expected = _call(name, *tensors, implementation="triton")
        for one, other in zip(_call(name, *tensors), expected, strict=True):
            assert torch.equal(one, other) and one.stride() == other.stride() and one.dtype == other.dtype
    assert len(again) == 2


def test_calls_that_differ_are_not_mistaken(device: torch.device, again: list[Tensor]) -> None:
    """By anything in the key: all cases on several layouts and dtypes, twice in turn, and right both times."""
    x, residual, weight, bias = _tensors(device)
    gaps = make_tensor(3, 6, 48, device=device)[..., :24]
    half = _tensors(device, torch.float16)
    layouts = [
        (x, residual, weight, bias),
        (gaps, residual, weight, bias),
        (x, gaps, weight, bias),
        (half[0], residual, weight, bias),
        (x, half[1], weight, bias),
        (x, residual, half[2], bias),
        (x, residual, weight, half[3]),
    ]
    calls = [(name, tensors) for name in CASES for tensors in layouts]
    expected = [_call(name, *tensors, implementation="triton") for name, tensors in calls]
    for _ in range(3):
        for (name, tensors), right in zip(calls, expected, strict=True):
            assert all(map(torch.equal, _call(name, *tensors), right)), name
    assert len(again) >= len(calls)


def test_errors_are_those_of_the_first_call(device: torch.device, again: list[Tensor]) -> None:
    x, residual, weight, bias = _tensors(device)
    w, b = weight[0], bias[0]
    for _ in range(2):
        fastattn.layer_norm(x, (24,), w, b), fastattn.add_layer_norm(x, residual, (24,), w, b)
        fastattn.layer_norm(x[..., :1], (1,), w[:1], b[:1]), fastattn.layer_norm(x, (24,), w, b, 0.5)
    for _ in range(3):  # what launches a call is learned the second time
        with pytest.raises(TypeError, match="which is not an int"):
            fastattn.layer_norm(x[..., :1], (True,), w[:1], b[:1])
        with pytest.raises(ValueError, match="must be the last"):
            fastattn.layer_norm(x, (25,), w, b)
        with pytest.raises(ValueError, match="weight has shape"):
            fastattn.layer_norm(x, (24,), w[:1], b)
        with pytest.raises(ValueError, match="bias has shape"):
            fastattn.layer_norm(x, (24,), w, bias)
        with pytest.raises(ValueError, match="residual has shape"):
            fastattn.add_layer_norm(x, residual[:1], (24,), w, b)
        with pytest.raises(TypeError, match="eps must be a float"):
            fastattn.layer_norm(x, (24,), w, b, None)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="eps must be a float"):
            fastattn.layer_norm(x, (24,), w, b, Fraction(1, 2))  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="weight must be a torch"):
            fastattn.layer_norm(x, (24,), w.tolist(), b)
        with pytest.raises(TypeError, match="x must be a torch"):
            fastattn.layer_norm(None, (24,), w, b)  # type: ignore[arg-type]
    assert again == []


def test_what_goes_the_usual_way(device: torch.device, again: list[Tensor]) -> None:
    x, residual, weight, bias = _tensors(device)
    w, b = weight[0], bias[0]
    column = make_tensor(24, 2, device=device)[:, 0]
    for _ in range(3):
        fastattn.layer_norm(x[:0], (24,), w, b)
        fastattn.layer_norm(x.transpose(0, 1), (24,), w, b)  # whose rows are copied
        fastattn.layer_norm(x, (24,), column, b)  # which is copied
        fastattn.layer_norm(x, (24,), w, b, out_dtype=torch.float16)
        fastattn.layer_norm(x, (24,), w, b, zero_centered_weight=True)
        fastattn.layer_norm(x.double(), (24,), w.double(), b.double())
        assert fastattn.layer_norm(x, (24,), w.clone().requires_grad_(), b).requires_grad
        assert fastattn.add_layer_norm(x, None, (24,), w, b)[1] is x
        fastattn.add_layer_norm(x, residual, (24,), w, b, dropout_p=0.5)
    assert again == []


def test_gradients_are_recorded(device: torch.device, again: list[Tensor]) -> None:
    for before, name in enumerate(CASES):
        tensors = _tensors(device)
        for _ in range(2):
            _call(name, *tensors)
        assert len(again) == before
        tensors[0].requires_grad_()
        assert all(t.requires_grad for t in _call(name, *tensors))
        with torch.no_grad():
            assert not any(t.requires_grad for t in _call(name, *tensors))
    assert len(again) == len(CASES)
