"""The modules of losses: torch.nn's arguments and results, and every option handed on."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F

import fastattn
from fastattn import NotSupported

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
    fused = fastattn.nn.LinearCrossEntropyLoss(4, 7, bias=True, **options, memory_budget=1)
    fused.load_state_dict({"linear.weight": WEIGHT, "linear.bias": bias})
    torch.testing.assert_close(fused(X, TARGET), expected)
    with pytest.raises(ValueError, match="memory_budget=0 must be at least 1"):
        fastattn.nn.LinearCrossEntropyLoss(4, 7, memory_budget=0)(X, TARGET)
    with pytest.raises(ValueError, match="implementation='foo' is unknown"):
        fastattn.nn.LinearCrossEntropyLoss(4, 7, implementation="foo")(X, TARGET)


def test_linear_cross_entropy_loss_is_torchs() -> None:
    """Names, initial values and result; a head tied to an embedding gets the gradients of both."""
    if not hasattr(torch.nn, "LinearCrossEntropyLoss"):
        pytest.skip("PyTorch has no LinearCrossEntropyLoss before 2.13")
    for options in ({}, {"bias": True, "reduction": "sum", "ignore_index": 3, "label_smoothing": 0.1}):
        torch.manual_seed(1)
        module = fastattn.nn.LinearCrossEntropyLoss(4, 7, **options)
        torch.manual_seed(1)
        peer = torch.nn.LinearCrossEntropyLoss(4, 7, **options)
        assert module.state_dict().keys() == peer.state_dict().keys()
        for ours, theirs in zip(module.parameters(), peer.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        torch.testing.assert_close(module(X, TARGET), peer(X, TARGET))
    embedding = torch.nn.Embedding(7, 4)
    module = fastattn.nn.LinearCrossEntropyLoss(4, 7)
    module.linear.weight = embedding.weight
    module(embedding(TARGET.clamp(min=0)), TARGET).backward()
    weight = embedding.weight.detach().requires_grad_()
    F.cross_entropy(F.embedding(TARGET.clamp(min=0), weight) @ weight.T, TARGET).backward()
    torch.testing.assert_close(embedding.weight.grad, weight.grad)


@pytest.mark.parametrize(
    "refused",
    [{"out_features": (2,)}, {"weight": torch.ones(7)}, {"options": object()}],
    ids=["out_features", "weight", "options"],
)
def test_what_the_linear_loss_does_not_take_is_refused(refused: dict[str, object]) -> None:
    with pytest.raises(NotSupported, match=f"{next(iter(refused))} is not supported by fastattn.linear"):
        fastattn.nn.LinearCrossEntropyLoss(4, 7, **refused)


def test_repr_says_what_is_not_at_its_default() -> None:
    assert repr(fastattn.nn.CrossEntropyLoss(label_smoothing=0.1)) == "CrossEntropyLoss()"  # as torch.nn's
    assert repr(fastattn.nn.CrossEntropyLoss(z_loss=0.1)) == "CrossEntropyLoss(z_loss=0.1)"
    assert repr(fastattn.nn.CrossEntropyLoss(softcap=2.0)) == "CrossEntropyLoss(softcap=2.0)"
    plain = fastattn.nn.LinearCrossEntropyLoss(4, 7)
    assert plain.extra_repr() == "in_features=4, num_classes=7, bias=False"
    options = {"reduction": "sum", "ignore_index": 3, "label_smoothing": 0.2, "z_loss": 0.1, "softcap": 2.0}
    said = fastattn.nn.LinearCrossEntropyLoss(4, 7, bias=True, **options, memory_budget=9).extra_repr()
    assert said == (
        "in_features=4, num_classes=7, bias=True, reduction='sum', ignore_index=3, label_smoothing=0.2, z_loss=0.1, "
        "softcap=2.0, memory_budget=9"
    )
