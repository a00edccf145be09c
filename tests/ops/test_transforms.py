"""Derivatives that are asked for in other ways than backward(): create_graph, torch.func, forward-mode AD, vmap.

A kernel behind a plain autograd Function is invisible to transforms; what must not happen is a wrong or dropped
derivative without an error.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

import fastattn

# vmap of PyTorch's own attention says that it has no batching rule of its own.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")

X = torch.linspace(-2.0, 2.0, 24).reshape(1, 2, 3, 4)
# Ours beside PyTorch's, as functions of one tensor (1, 2, 3, 4).
PAIRS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "gelu": (fastattn.gelu, F.gelu),
    "layer_norm": (lambda x: fastattn.layer_norm(x, 4), lambda x: F.layer_norm(x, (4,))),
    "rms_norm": (lambda x: fastattn.rms_norm(x, 4), lambda x: F.rms_norm(x, (4,))),
    "attention": (
        lambda x: fastattn.attention(x, x, x, causal=True),
        lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    ),
    "sdpa": (
        lambda x: fastattn.scaled_dot_product_attention(x, x, x),
        lambda x: F.scaled_dot_product_attention(x, x, x),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_gradients_of_vmap_are_not_dropped(name: str) -> None:
    ours, theirs = PAIRS[name]
    batch = torch.stack([X, 2 * X, X.flip(-1)])

    def loss(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda xs: (torch.vmap(function)(xs) + xs).square().sum()

    expected = torch.func.grad(loss(theirs))(batch)
    torch.testing.assert_close(torch.func.grad(loss(ours))(batch), expected)
    leaf = batch.clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(loss(ours)(leaf), leaf)[0], expected)


@pytest.mark.parametrize("name", PAIRS)
def test_per_sample_gradients(name: str) -> None:
    ours, theirs = PAIRS[name]
    batch = torch.stack([X, 2 * X])
    expected = torch.vmap(torch.func.grad(lambda x: theirs(x).square().sum()))(batch)
    torch.testing.assert_close(torch.vmap(torch.func.grad(lambda x: ours(x).square().sum()))(batch), expected)


@pytest.mark.parametrize("name", ["gelu", "layer_norm"])  # PyTorch's own attention has no forward derivative
def test_forward_mode_ad(name: str) -> None:
    ours, theirs = PAIRS[name]
    tangent = torch.ones_like(X)
    _, expected = torch.func.jvp(theirs, (X,), (tangent,))
    torch.testing.assert_close(torch.func.jvp(ours, (X,), (tangent,))[1], expected)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(ours(forward_ad.make_dual(X, tangent))).tangent
    torch.testing.assert_close(found, expected)


def test_blocks_of_operators_are_refused_within_transforms() -> None:
    """With the log-sum-exp PyTorch has no operator, and ours cannot be looked into."""

    def lse(x: Tensor, implementation: str | None = None) -> Tensor:
        return fastattn.attention(x, x, x, return_lse=True, implementation=implementation)[1]

    for implementation in (None, "torch", "triton"):
        with pytest.raises(fastattn.NotSupported, match=r"within torch.func transforms"):
            torch.func.jvp(lambda x, name=implementation: lse(x, name), (X,), (torch.ones_like(X),))
    with forward_ad.dual_level(), pytest.raises(fastattn.NotSupported, match="within forward-mode AD"):
        lse(forward_ad.make_dual(X, torch.ones_like(X)))
    assert torch.func.grad(lambda x: lse(x, "reference").sum())(X).shape == X.shape


CLASSES = torch.tensor([[[0, 3, 1], [2, 1, 3]]])
# Operations as functions of one tensor (1, 2, 3, 4) and of the implementation.
FORCED: dict[str, Callable[[Tensor, str], Tensor]] = {
    "gelu": lambda x, name: fastattn.gelu(x, implementation=name),
    "bias_gelu": lambda x, name: fastattn.bias_gelu(x, x[0, 0, 0], implementation=name),
    "swiglu": lambda x, name: fastattn.swiglu(x, implementation=name),
    "mlp": lambda x, name: fastattn.mlp(
        x, x[0, 0], None, x[0, 0].t(), None, save="input", implementation=name
    ),
    "layer_norm": lambda x, name: fastattn.layer_norm(x, 4, implementation=name),
    "add_rms_norm": lambda x, name: fastattn.add_rms_norm(x, x, 4, implementation=name)[0],
    "rotary_embedding": lambda x, name: fastattn.rotary_embedding(
        x, *fastattn.rotary_tables(3, 4), implementation=name
    ),
    "cross_entropy": lambda x, name: fastattn.cross_entropy(x[0, 0], CLASSES[0, 0], implementation=name),
    "linear_cross_entropy": lambda x, name: fastattn.linear_cross_entropy(
        x, x[0].flatten(0, 1), CLASSES, implementation=name
    ),
    "attention": lambda x, name: fastattn.attention(x, x, x, implementation=name),
}


@pytest.mark.parametrize("name", FORCED)
def test_a_refusal_names_the_way_out_and_it_is_one(name: str) -> None:
    """The error said that transforms are refused, and nothing of what to do instead."""

    def loss(implementation: str) -> Callable[[Tensor], Tensor]:
        return lambda x: FORCED[name](x, implementation).square().sum()

    with pytest.raises(
        fastattn.NotSupported,
        match=r"within torch.func transforms .*; implementation='reference' consists of",
    ):
        torch.func.grad(loss("triton"))(X)
    leaf = X.clone().requires_grad_()
    expected = torch.autograd.grad(loss("triton")(leaf), leaf)[0]
    torch.testing.assert_close(torch.func.grad(loss("reference"))(X), expected, rtol=1e-4, atol=1e-5)


def test_explain_names_the_transform() -> None:
    found = []

    def call(x: Tensor) -> Tensor:
        found.append(fastattn.explain(fastattn.gelu, x))
        return fastattn.gelu(x)

    torch.vmap(call)(X)
    assert found[0].implementation == "torch" and "torch.func transforms" in found[0].refusals["triton"]


@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_create_graph_with_one_weight_for_two_norms(implementation: str) -> None:
    """The first norm's output depends on the weight as well: only the second norm's own part is its backward's."""
    x, weight = X.double().requires_grad_(), torch.linspace(0.5, 1.5, 4).double().requires_grad_()

    def loss(norm: Callable[..., Tensor], x: Tensor, weight: Tensor) -> Tensor:
        return norm(norm(x, (4,), weight), (4,), weight).pow(3).sum()

    def derivatives(norm: Callable[..., Tensor], x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(loss(norm, x, weight), (x, weight), create_graph=True)
        second = torch.autograd.grad(first[1].square().sum() + first[0].sum(), (x, weight))
        return (*first, *second)

    expected = derivatives(F.layer_norm, x, weight)
    ours = lambda *arguments: fastattn.layer_norm(*arguments, implementation=implementation)  # noqa: E731
    found = derivatives(ours, x.detach().float().requires_grad_(), weight.detach().float().requires_grad_())
    for actual, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, truth.float(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_create_graph_with_one_tensor_as_input_and_weight(implementation: str) -> None:
    weight = torch.linspace(0.5, 1.5, 4).requires_grad_()
    (expected,) = torch.autograd.grad(F.layer_norm(weight, (4,), weight).pow(2).sum(), weight)
    out = fastattn.layer_norm(weight, 4, weight, implementation=implementation)
    (found,) = torch.autograd.grad(out.pow(2).sum(), weight, create_graph=True)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["gelu", "layer_norm"])
def test_create_graph_runs_a_hook_once(name: str) -> None:
    ours, theirs = PAIRS[name]
    gradients = []
    for function in (ours, theirs):
        x = X.clone().requires_grad_()
        x.register_hook(lambda gradient: 2 * gradient)
        gradients += torch.autograd.grad(function(x).pow(3).sum(), x, create_graph=True)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-4)
