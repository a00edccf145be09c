"""The modules of losses: torch.nn's arguments and results, and every option handed on."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F

import fastattn

X, WEIGHT = torch.randn(5, 4), torch.randn(7, 4)
TARGET = torch.tensor([0, 3, 2, 6, 1])


def test_cross_entropy_loss_has_torchs_arguments_and_state() -> None:
    theirs = inspect.signature(torch.nn.CrossEntropyLoss).parameters
    ours = inspect.signature(fastattn.nn.CrossEntropyLoss).parameters
    assert [(p.name, p.default) for p in list(ours.values())[: len(theirs)]] == [
        (p.name, p.default) for p in theirs.values()
    ]
    assert list(ours)[len(theirs) :] == ["z_loss", "softcap", "implementation"]
    weight = torch.rand(7)
    module = fastattn.nn.CrossEntropyLoss(weight)
    assert module.state_dict().keys() == torch.nn.CrossEntropyLoss(weight).state_dict().keys()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight": torch.linspace(0.3, 1.0, 7)},
        {"ignore_index": 3},
        {"reduction": "sum", "label_smoothing": 0.2},
        {"reduction": "none"},
    ],
    ids=str,
)
def test_cross_entropy_loss_is_torchs(options: dict[str, object]) -> None:
    logits = F.linear(X, WEIGHT)
    expected = torch.nn.CrossEntropyLoss(**options)(logits, TARGET)
    torch.testing.assert_close(fastattn.nn.CrossEntropyLoss(**options)(logits, TARGET), expected)


def test_options_are_handed_on() -> None:
    options = {
        "ignore_index": 3, "reduction": "sum", "label_smoothing": 0.2, "z_loss": 0.1, "softcap": 2.0,
        "implementation": "torch",
    }  # fmt: skip
    bias = torch.randn(7)
    logits = F.linear(X, WEIGHT, bias)
    expected = fastattn.cross_entropy(logits, TARGET, **options)
    torch.testing.assert_close(fastattn.nn.CrossEntropyLoss(**options)(logits, TARGET), expected)
    fused = fastattn.nn.LinearCrossEntropyLoss(**options, memory_budget=1)
    torch.testing.assert_close(fused(X, WEIGHT, TARGET, bias), expected)
    with pytest.raises(ValueError, match="memory_budget=0 must be at least 1"):
        fastattn.nn.LinearCrossEntropyLoss(memory_budget=0)(X, WEIGHT, TARGET)
    with pytest.raises(ValueError, match="implementation='foo' is unknown"):
        fastattn.nn.LinearCrossEntropyLoss(implementation="foo")(X, WEIGHT, TARGET)
