"""On a CPU the usual call of a normalization is PyTorch's own, without a question that PyTorch asks too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastattn
from fastattn import dispatch
from fastattn.ops import norm
from fastattn.testing import make_tensor

OPERATIONS = {
    "layer_norm": norm._LAYER_NORM,
    "rms_norm": norm._RMS_NORM,
    "add_layer_norm": norm._ADD_LAYER_NORM,
    "add_rms_norm": norm._ADD_RMS_NORM,
}


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETING", False)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the operations whose arguments are checked."""
    seen: list[str] = []

    def counting(name: str, check: Callable[..., None]) -> Callable[..., None]:
        def counted(*arguments: Any) -> None:
            seen.append(name)
            check(*arguments)

        return counted

    for name, operation in OPERATIONS.items():
        monkeypatch.setattr(operation, "check", counting(name, operation.check))
    return seen


def arguments_of(name: str, dtype: torch.dtype = torch.float32) -> list[Any]:
    """Leaves of x, the residual if there is one, weight and, if there is one, bias, with the shape among them."""
    rows = [make_tensor(3, 8, dtype=dtype, seed=seed) for seed in range(1 + name.startswith("add"))]
    parameters = [
        make_tensor(8, dtype=dtype, seed=2 + seed) for seed in range(1 + name.endswith("layer_norm"))
    ]
    return [*(t.requires_grad_() for t in rows), 8, *(t.requires_grad_() for t in parameters)]


def run(name: str, arguments: list[Any], **options: Any) -> tuple[torch.Tensor, ...]:
    """Results and gradients."""
    results = getattr(fastattn, name)(*arguments, **options)
    results = results if isinstance(results, tuple) else (results,)
    leaves = [t for t in arguments if isinstance(t, torch.Tensor)]
    return *results, *torch.autograd.grad(results, leaves, [torch.ones_like(t) for t in results])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_usual_call_is_not_checked_and_gives_the_same(
    name: str, dtype: torch.dtype, checked: list[str]
) -> None:
    arguments = arguments_of(name, dtype)
    found = run(name, arguments)
    assert not checked
    for one, other in zip(found, run(name, arguments, implementation="torch"), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert checked == [name]
    assert fastattn.explain(getattr(fastattn, name), *arguments).implementation == "torch"


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_call_that_asks_for_more_is_checked(name: str, checked: list[str]) -> None:
    function, arguments = getattr(fastattn, name), arguments_of(name)
    with torch.no_grad():
        function(*arguments, return_statistics=True)
        function(*arguments, out_dtype=torch.float64)
        function(*arguments, zero_centered_weight=True)
        function(*arguments, save="output")
        function(*arguments[:-1], arguments[-1].double())
        function(*arguments, implementation="reference")
        with fastattn.use_implementation("reference"):
            function(*arguments)
    assert checked == [name] * 7


@pytest.mark.parametrize("name", ("add_layer_norm", "add_rms_norm"))
def test_a_sum_that_asks_for_more_is_checked(name: str, checked: list[str]) -> None:
    function, (x, residual, *others) = getattr(fastattn, name), arguments_of(name)
    with torch.no_grad():
        function(x, residual, *others, dropout_p=0.5)
        function(x, residual, *others, rowscale=torch.ones(3))
        function(x, residual, *others, residual_dtype=torch.float64)
        function(x, None, *others)
        function(x, residual.double(), *others)
    assert checked == [name] * 5


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(
    ("place", "value", "error", "message"),
    (
        ("x", torch.ones(3, 8, dtype=torch.int64), TypeError, "x has dtype=torch.int64"),
        ("x", torch.ones(3, 8, dtype=torch.complex64), TypeError, "x has dtype=torch.complex64"),
        ("x", [1.0], TypeError, "x must be a torch.Tensor, not list"),
        ("shape", 7, ValueError, r"normalized_shape=\(7,\) must be the last 1 dimensions"),
        ("shape", (), ValueError, r"normalized_shape=\(\) must have at least one dimension"),
        ("shape", "8", TypeError, "holds '8', which is not an int"),
        ("weight", torch.ones(7), ValueError, r"weight has shape \(7,\)"),
        ("weight", torch.ones(1), ValueError, r"weight has shape \(1,\)"),
        ("weight", torch.ones(8, device="meta"), ValueError, "weight is on meta"),
        ("eps", "1e-5", TypeError, "eps must be a float, not str"),
    ),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_are_those_of_the_check(
    name: str, place: str, value: Any, error: type[Exception], message: str
) -> None:
    arguments = arguments_of(name)
    shape = next(index for index, given in enumerate(arguments) if isinstance(given, int))
    options = {}
    if place == "eps":
        options["eps"] = value
    else:
        arguments[{"x": 0, "shape": shape, "weight": shape + 1}[place]] = value
    with pytest.raises(error, match=message):
        getattr(fastattn, name)(*arguments, **options)


@pytest.mark.parametrize("name", ("add_layer_norm", "add_rms_norm"))
@pytest.mark.parametrize("shape", ((8,), (1, 8), (2, 3, 8)), ids=str)
def test_a_residual_is_not_broadcast(name: str, shape: tuple[int, ...]) -> None:
    """PyTorch's sum would do so."""
    x, _, *others = arguments_of(name)
    with pytest.raises(ValueError, match="residual has shape"):
        getattr(fastattn, name)(x, torch.ones(shape), *others)


def test_a_complex_x_is_refused() -> None:
    """PyTorch's RMSNorm takes one."""
    with pytest.raises(TypeError, match=r"x has dtype=torch\.complex64"):
        fastattn.rms_norm(torch.ones(3, 8, dtype=torch.complex64), 8)


@pytest.mark.parametrize("function", [fastattn.layer_norm, fastattn.rms_norm])
def test_a_shape_of_tensors_is_refused_at_once_too(function: Any) -> None:
    with pytest.raises(TypeError, match="which is not an int"):
        function(torch.randn(4, 8), (torch.tensor(8),))
