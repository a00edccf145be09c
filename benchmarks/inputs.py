"""A case's tensors, and the check that every provider's results pass before they are timed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.cases import OpCase, draw
from benchmarks.providers import Function
from fastattn.testing import assert_accurate

# Of the first output's gradient; inputs are drawn with the seeds below.
_GRADIENT_SEED = 9


@dataclass
class Inputs:
    """A case's tensors, and what every result is checked against; made once, shared by all providers."""

    case: OpCase
    device: torch.device
    tensors: tuple[Tensor, ...] = field(init=False)
    grad_outputs: tuple[Tensor, ...] = field(init=False)

    def __post_init__(self) -> None:
        # Each case compiles anew: without this the ninth would silently run eagerly, and with it in a provider, the
        # provider before would lose its code.
        torch._dynamo.reset()
        self.tensors = self.case.inputs(self.device)
        with torch.no_grad():
            outputs = as_tuple(
                self.case.reference(*(torch.empty_like(t, device="meta") for t in self.tensors))
            )
        self.grad_outputs = tuple(
            self._grad_output(out, seed) for seed, out in enumerate(outputs, start=_GRADIENT_SEED)
        )
        self._kept = [t.detach().clone() for t in (*self.tensors, *self.grad_outputs)]
        self._truth = self._expected(torch.float64)
        self._peer = self._expected(None)

    def _grad_output(self, out: Tensor, seed: int) -> Tensor:
        if out.dim() == 0:  # a loss, whose backward() begins with 1; kernels may take that for granted
            return torch.ones((), dtype=out.dtype, device=self.device)
        return draw(*out.shape, dtype=out.dtype, device=self.device, seed=seed).detach()

    def _expected(self, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
        """What is compared of the formula's results and gradients, in this dtype or the case's own."""
        given, outputs = (*self.grad_outputs, *(t.detach() for t in self.tensors)), len(self.grad_outputs)
        pieces = []
        for piece in self.case.samples(given):
            tensors = [t.to(dtype or t.dtype) for t in piece]
            pieces.append(_run_both(self.case.reference, tensors[outputs:], tensors[:outputs]))
        whole = pieces[0] if len(pieces) == 1 else tuple(torch.cat(t) for t in zip(*pieces, strict=True))
        # A view would keep all of a large float64 tensor alive while providers are timed.
        return tuple(t.clone() for t in self.case.part(whole))

    def call(self, function: Function, direction: str) -> Callable[[], tuple[Tensor, ...]]:
        """The function on these inputs, without a graph, or with the gradients of every input."""
        if direction == "forward":

            def forward() -> tuple[Tensor, ...]:
                with torch.no_grad():
                    return as_tuple(function(*self.tensors))

            return forward

        def forward_backward() -> tuple[Tensor, ...]:
            outputs = as_tuple(function(*self.tensors))
            return (*outputs, *torch.autograd.grad(outputs, self.tensors, self.grad_outputs))

        return forward_backward

    def check(self, function: Function, direction: str) -> None:
        """Asserts that the result, and the gradients where asked for, are as exact as the naive formula's."""
        try:
            results = self.call(function, direction)()
        finally:
            overwritten = self._restore_overwritten()
        assert not overwritten, f"it overwrote {overwritten[0]}"
        names = (*self._output_names(), *(f"gradient {index}" for index in range(len(self.tensors))))
        for name, result, like in zip(names, results, (*self.grad_outputs, *self.tensors), strict=False):
            _check_whole(name, result, like)
        rows = math.prod(self.tensors[0].shape[:-1])
        compared = zip(names, self.case.part(results), self._peer, self._truth, results, strict=False)
        for name, actual, peer, truth, whole in compared:
            # A parameter's gradient is a sum over all rows, and its rounding grows with their root.
            of_parameter = 1 <= whole.dim() <= 2 and name.startswith("gradient") and name != "gradient 0"
            assert_accurate(actual, peer, truth, name=name, growth=math.sqrt(rows) if of_parameter else 1.0)

    def _output_names(self) -> list[str]:
        count = len(self.grad_outputs)
        return ["output"] if count == 1 else [f"output {index}" for index in range(count)]

    def without_options(self) -> Inputs | None:
        """The same tensors for the case without its options, which is not checked; None where it has none."""
        plain = getattr(self.case, "plain", None)
        if plain is None:
            return None
        inputs = copy.copy(self)
        inputs.case = plain
        inputs.tensors, inputs.grad_outputs = self.tensors[: plain.operands], self.grad_outputs[:1]
        return inputs

    def _restore_overwritten(self) -> list[str]:
        """Makes what every provider is given what it was again, and names what was not."""
        inputs = (f"input {index}" for index in range(len(self.tensors)))
        names = (*inputs, *(f"the {name}'s gradient" for name in self._output_names()))
        changed = []
        for name, tensor, kept in zip(names, (*self.tensors, *self.grad_outputs), self._kept, strict=True):
            if not tensor.equal(kept):
                tensor.data.copy_(kept)
                changed.append(name)
        return changed


def _check_whole(name: str, result: Tensor, like: Tensor) -> None:
    """Asserts of a whole result what can be seen without its truth, of which only a part is computed."""
    assert result.shape == like.shape, f"{name} has shape {tuple(result.shape)}, not {tuple(like.shape)}"
    assert result.dtype == like.dtype, f"{name} has {result.dtype}, not {like.dtype}"
    assert result.isfinite().all(), f"{name} holds infinities or NaN"


def as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The outputs of a function that has one or several."""
    return (result,) if isinstance(result, Tensor) else result


def _run_both(function: Function, tensors: list[Tensor], grads: list[Tensor]) -> tuple[Tensor, ...]:
    leaves = tuple(t.detach().requires_grad_() for t in tensors)
    outputs = as_tuple(function(*leaves))
    return (*(out.detach() for out in outputs), *torch.autograd.grad(outputs, leaves, grads))
