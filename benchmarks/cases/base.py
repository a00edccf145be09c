"""What every case has, and how its values are drawn and compared."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from fastattn.testing import make_tensor

DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}

# Results are compared on this many rows: enough to see an error, little enough to move to the host.
_CHECKED_ROWS = 256


class Case(Protocol):
    """What `benchmarks.measure` needs of a case."""

    operation: ClassVar[str]

    @property
    def name(self) -> str: ...

    def inputs(self, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
        """The tensors that every provider is called with, with gradients required where there are any."""

    def reference(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The operation by its formula, in the dtype of the tensors: one output or several."""

    def part(self, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What is compared of (*outputs, *gradients): little, and telling."""

    def samples(self, given: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        """Of (*outputs' gradients, *inputs), pieces from which that part can be computed, one piece at a time."""


def shape_of(case: Any) -> dict[str, Any]:
    """A case's fields, for a row: numbers and strings."""
    return {name: DTYPE_NAMES.get(value, value) for name, value in asdict(case).items()}


def draw(
    *shape: int,
    dtype: torch.dtype,
    device: torch.device | str,
    requires_grad: bool = False,
    seed: int = 0,
) -> Tensor:
    """Standard normal values, the same for a seed on every call.

    On a GPU they are drawn there and so are others than on a CPU: the largest inputs take seconds on the host.
    """
    if torch.device(device).type != "cuda":
        return make_tensor(*shape, dtype=dtype, device=device, requires_grad=requires_grad, seed=seed)
    generator = torch.Generator(device).manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=dtype, device=device)
    return values.requires_grad_(requires_grad)


def spread_rows(results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Rows at equal distances, the first and the last among them; all of what has one dimension."""
    return tuple(_rows_of(t) if t.dim() > 1 else t for t in results)


def _rows_of(tensor: Tensor) -> Tensor:
    rows = tensor.flatten(0, -2)
    count = min(_CHECKED_ROWS, len(rows))
    chosen = [index * (len(rows) - 1) // max(1, count - 1) for index in range(count)]
    return rows[torch.tensor(chosen, dtype=torch.long, device=rows.device)]


def everything(given: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    return [given]
