"""What fastattn.cross_entropy and linear_cross_entropy refuse, and why an implementation does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastattn
from fastattn.testing import make_tensor
from tests.ops.test_cross_entropy import ALL


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
CROSS_ENTROPY: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "ignore-index": ({"ignore_index": None}, TypeError, r"ignore_index=None must be an int"),
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


@pytest.mark.parametrize("change, error, message", CROSS_ENTROPY.values(), ids=CROSS_ENTROPY.keys())
def test_cross_entropy_names_the_value(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastattn.cross_entropy(**({"input": X, "target": T} | change))


INPUT, WEIGHT, TARGET = torch.randn(2, 3, 4), torch.randn(5, 4), torch.zeros(2, 3, dtype=torch.long)
LINEAR: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
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


@pytest.mark.parametrize("change, error, message", LINEAR.values(), ids=LINEAR.keys())
def test_linear_cross_entropy_names_the_value(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fastattn.linear_cross_entropy(
            **({"input": INPUT, "linear_weight": WEIGHT, "target": TARGET} | change)
        )
