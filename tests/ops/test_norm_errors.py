"""What the normalizations refuse, and why an implementation does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastattn

NAMES = ("add_layer_norm", "add_rms_norm")


X = torch.randn(2, 3, 4)
BAD_INPUTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x-not-a-tensor": ({"x": [1.0]}, TypeError, r"x must be a torch.Tensor, not list"),
    "weight-not-a-tensor": ({"weight": 1.0}, TypeError, r"weight must be a torch.Tensor, not float"),
    "integers": ({"x": X.long()}, TypeError, r"x has dtype=torch.int64; a floating-point dtype"),
    "integer-weight": ({"weight": X[0, 0].int()}, TypeError, r"weight has dtype=torch.int32; a floating"),
    "complex": ({"x": X.cfloat()}, TypeError, r"x has dtype=torch.complex64; a floating-point dtype"),
    "no-dimension": ({"normalized_shape": ()}, ValueError, r"normalized_shape=\(\) must have at least one"),
    "scalar": (
        {"x": torch.tensor(1.0), "normalized_shape": 1},
        ValueError,
        r"normalized_shape=\(1,\) must be the last 1 dimensions of x, which has shape \(\)",
    ),
    "width": (
        {"normalized_shape": 3},
        ValueError,
        r"normalized_shape=\(3,\) must be the last 1 dimensions of x, which has shape \(2, 3, 4\)",
    ),
    "rank": (
        {"normalized_shape": [1, 2, 3, 4]},
        ValueError,
        r"normalized_shape=\(1, 2, 3, 4\) must be the last 4 dimensions of x",
    ),
    "float-size": ({"normalized_shape": (4.0,)}, TypeError, r"\(4.0,\) holds 4.0, which is not an int"),
    "bool-size": ({"normalized_shape": True}, TypeError, r"\(True,\) holds True, which is not an int"),
    "tensor-size": (
        {"normalized_shape": torch.tensor([4])},
        TypeError,
        r"normalized_shape must be an int or a sequence of ints, not Tensor",
    ),
    "weight-shape": (
        {"weight": torch.ones(3)},
        ValueError,
        r"weight has shape \(3,\), not normalized_shape=\(4,\)",
    ),
    "flat-weight": (
        {"normalized_shape": (3, 4), "weight": torch.ones(12)},
        ValueError,
        r"weight has shape \(12,\), not normalized_shape=\(3, 4\)",
    ),
    "bias-shape": (
        {"bias": torch.ones(4, 1)},
        ValueError,
        r"bias has shape \(4, 1\), not normalized_shape=\(4,\)",
    ),
    "weight-device": ({"weight": torch.ones(4, device="meta")}, ValueError, r"weight is on meta, but x is"),
    "bias-device": ({"bias": torch.ones(4, device="meta")}, ValueError, r"bias is on meta, but x is on cpu"),
    "implementation": (
        {"implementation": "foo"},
        ValueError,
        r"implementation='foo' is unknown; fastattn.layer_norm has 'triton', 'torch', 'reference'",
    ),
}


@pytest.mark.parametrize("change, error, message", BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_bad_input_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"x": X, "normalized_shape": 4} | change
    with pytest.raises(error, match=message):
        fastattn.layer_norm(**arguments)


OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "eps": ({"eps": "small"}, TypeError, r"eps must be a float, not str"),
    "save": ({"save": "nothing"}, ValueError, r"save='nothing' must be 'input' or 'output'"),
    "out-dtype": ({"out_dtype": torch.int32}, TypeError, r"out_dtype=torch.int32 must be a floating-point"),
    "no-dtype": ({"out_dtype": "bf16"}, TypeError, r"out_dtype=bf16 must be a floating-point dtype"),
}


@pytest.mark.parametrize("change, error, message", OPTIONS.values(), ids=OPTIONS.keys())
def test_a_bad_option_is_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastattn.rms_norm(**{"x": X, "normalized_shape": 4} | change)


SUMS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "residual-shape": (
        {"residual": X[0]},
        ValueError,
        r"residual has shape \(3, 4\), not x's \(2, 3, 4\)",
    ),
    "residual-not-a-tensor": ({"residual": 1.0}, TypeError, r"residual must be a torch.Tensor, not float"),
    "integer-residual": ({"residual": X.int()}, TypeError, r"residual has dtype=torch.int32; a floating"),
    "residual-device": ({"residual": X.to("meta")}, ValueError, r"residual is on meta, but x is on cpu"),
    "rowscale-shape": (
        {"rowscale": X},
        ValueError,
        r"rowscale has shape \(2, 3, 4\), not \(2, 3\), one factor a row",
    ),
    "rowscale-gradient": (
        {"rowscale": torch.ones(2, 3, requires_grad=True)},
        fastattn.NotSupported,
        r"rowscale has no gradient: detach it",
    ),
    "dropout": ({"dropout_p": 1.5}, ValueError, r"dropout_p=1.5 must be a number from 0 to 1"),
    "dropout-type": ({"dropout_p": "much"}, ValueError, r"dropout_p='much' must be a number"),
    "residual-dtype": ({"residual_dtype": torch.int8}, TypeError, r"residual_dtype=torch.int8 must be a fl"),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change, error, message", SUMS.values(), ids=SUMS.keys())
def test_a_bad_sum_is_named(change: dict[str, Any], error: type[Exception], message: str, name: str) -> None:
    with pytest.raises(error, match=message):
        getattr(fastattn, name)(**{"x": X, "residual": X, "normalized_shape": 4} | change)


def test_layer_norm_needs_an_eps() -> None:
    with pytest.raises(TypeError, match="eps must be a float, not NoneType"):
        fastattn.layer_norm(torch.randn(2, 4), 4, eps=None)  # type: ignore[arg-type]


def test_a_zero_weight_is_refused_where_the_output_is_saved() -> None:
    x, weight = torch.randn(3, 5), torch.ones(5)
    weight[2] = 0.0
    with pytest.raises(ValueError, match=r"save='output' recomputes x .* a scale is 0 \(weight=0.0\)"):
        fastattn.layer_norm(x, 5, weight, save="output")
    with pytest.raises(ValueError, match=r"a scale is 0 \(weight=-1.0\)"):
        fastattn.rms_norm(x, 5, weight - 1, zero_centered_weight=True, save="output")
    with pytest.raises(ValueError, match=r"\(weight=-1.0\)"):
        fastattn.rms_norm(x, 5, -torch.ones(5), zero_centered_weight=True, save="output")
    fastattn.rms_norm(x, 5, weight, zero_centered_weight=True, save="output")


def test_forced_implementation_that_cannot_says_why() -> None:
    x = torch.randn(2, 4, dtype=torch.float64)
    with pytest.raises(fastattn.NotSupported, match=r"implementation='triton': dtype=torch.float64 is not"):
        fastattn.layer_norm(x, 4, implementation="triton")
    with pytest.raises(fastattn.NotSupported, match=r"torch: dtype=torch.float8_e5m2 is not one of"):
        fastattn.layer_norm(x.to(torch.float8_e5m2), 4)


def test_explain_names_every_refusal(device: torch.device) -> None:
    explanation = fastattn.explain(fastattn.layer_norm, torch.randn(2, 4, device=device), 4)
    assert explanation.implementation == "triton"
    assert explanation.refusals["torch"] == "'triton' comes first"
    double = fastattn.explain(fastattn.layer_norm, torch.randn(2, 4, dtype=torch.float64), 4)
    assert double.implementation == "torch"
    assert "float64 is not one of" in double.refusals["triton"]
    parameter = fastattn.explain(
        fastattn.layer_norm, torch.randn(2, 4, device=device), 4, None, torch.zeros(4, device=device).double()
    )
    assert "float64 is not one of" in parameter.refusals["triton"]


def test_explain_says_what_is_kept(device: torch.device) -> None:
    x = torch.randn(2, 4, device=device)
    explanation = fastattn.explain(fastattn.rms_norm, x, 4, save="output")
    assert explanation.description == "Triton kernels each way, saving y and float32 rstd"
    wide = fastattn.explain(fastattn.layer_norm, x, 4, out_dtype=torch.float64)
    assert "float64 is not one of" in wide.refusals["triton"]
    with fastattn.use_implementation("torch"):
        assert fastattn.explain(fastattn.rms_norm, x, 4).description == "torch.nn.functional.rms_norm"


def test_explain_of_sums(device: torch.device) -> None:
    x = torch.randn(2, 4, device=device)
    found = fastattn.explain(fastattn.add_layer_norm, x, x, 4, dropout_p=0.1)
    assert (found.operation, found.implementation) == ("add_layer_norm", "triton")
    double = fastattn.explain(fastattn.add_rms_norm, x, x.double(), 4)
    assert double.implementation == "torch" and "float64 is not one of" in double.refusals["triton"]
    assert double.description == "torch.nn.functional.rms_norm of a sum by PyTorch's operators"
