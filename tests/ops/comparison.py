"""What the tests of operations with several tensors share: results with every gradient, held against the truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.testing import assert_accurate, make_tensor

# The checks of `torch.library.opcheck` that go by the arguments. The last one takes ten times as long and traces the
# operator with symbols for sizes, for which one call of each operator is enough.
CHECKS_OF_ARGUMENTS = ("test_schema", "test_autograd_registration", "test_faketensor")
ALL_CHECKS = (*CHECKS_OF_ARGUMENTS, "test_aot_dispatch_dynamic")


def results(
    function: Callable[..., Tensor], tensors: Sequence[Tensor | None], **options: Any
) -> list[Tensor]:
    """The output and the gradient of every tensor, for one incoming gradient."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    y = function(*leaves, **options)
    # The same values in every dtype: bfloat16's are those of the others too.
    dy = make_tensor(*y.shape, dtype=torch.bfloat16, device=y.device, seed=9).to(y.dtype)
    return [y, *torch.autograd.grad(y, [t for t in leaves if t is not None], dy)]


def assert_as_accurate(
    found: Sequence[Tensor], peers: Sequence[Tensor], truths: Sequence[Tensor], growth: float = 1.0
) -> None:
    """Each result has at most twice the error of PyTorch's in the same dtype."""
    for index, (actual, peer, truth) in enumerate(zip(found, peers, truths, strict=True)):
        name = f"gradient {index - 1}" if index else "y"
        assert_accurate(actual, peer, truth, name=name, growth=growth)


def assert_second_derivatives_agree(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], tensors: Sequence[Tensor]
) -> None:
    """Of the gradients' squares with respect to every tensor and the incoming gradient."""
    found = []
    for function in (ours, theirs):
        leaves = [t.detach().requires_grad_() for t in tensors]
        y = function(*leaves)
        dy = make_tensor(*y.shape, device=y.device, seed=9, requires_grad=True)
        first = torch.autograd.grad(y, leaves, dy, create_graph=True)
        found.append(
            torch.autograd.grad(sum(g.square().sum() for g in first), (*leaves, dy), materialize_grads=True)
        )
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def assert_compiles_whole(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], inputs: Sequence[Sequence[Tensor]]
) -> str:
    """Traced once, without a break, for inputs of several sizes; the graph, as text."""
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        graphs.append(graph.print_readable(print_output=False))
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend=backend, dynamic=True)
    for tensors in inputs:
        for actual, expected in zip(results(compiled, tensors), results(theirs, tensors), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1
    return graphs[0]
