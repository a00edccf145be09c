"""What a launch takes beside its tensors, found once for each shape, layout, dtype and target.

Plans are kept, so that a repeated call costs the host a look-up, allocations and the launch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from fastattn.kernels._target import Target

# For how many shapes a launcher keeps its plan: those of a training whose sequences all have lengths of their own.
_PLANS = 4096

_F = TypeVar("_F", bound=Callable[..., Any])
_kept: list[Any] = []


class Constants(dict[str, Any]):
    """The arguments of a kernel that a plan fixes; with what `launch` keeps, and so for the plan's device alone.

    Attributes:
        launched: the launches that were made with them, by what of the other arguments they were compiled for.
        backend: Triton's, once there are any.
    """

    __slots__ = ("_parts", "backend", "launched")

    def __init__(self, *constants: Any, **more: Any) -> None:
        super().__init__(*constants, **more)
        self.launched: dict[tuple[Any, ...], Any] = {}
        self.backend: Any = None
        self._parts: dict[tuple[str, ...], Constants] = {}

    def only(self, names: tuple[str, ...]) -> Constants:
        """Those of these names, the same object each time, for a kernel that has no others."""
        found = self._parts.get(names)
        if found is None:
            found = self._parts[names] = Constants({name: self[name] for name in names})
        return found


def planned(make: _F) -> _F:
    """Decorator of a pure function that makes a plan: the plans are kept, by its arguments."""
    cached: Any = lru_cache(maxsize=_PLANS)(make)
    _kept.append(cached)
    return cached


def forget_plans() -> None:
    """For whoever changes what the functions return that choose launch configs."""
    for cached in _kept:
        cached.cache_clear()


@planned
def constants_of(target: Target, **constants: Any) -> Constants:
    """The same arguments of a launch on the same device, for launches that have no other plan."""
    return Constants(constants)


class RowsPlan(NamedTuple):
    """The launch of a kernel that reads tensors of one shape as rows.

    Attributes:
        in_place: for each of the tensors, whether its rows are read where they lie, or in a contiguous copy.
        distances: for each, how far apart the rows that are read lie, in elements.
        grid: of the kernel.
        constants: the kernel's arguments that are no tensors.
    """

    in_place: tuple[bool, ...]
    distances: tuple[int, ...]
    grid: tuple[int, ...]
    constants: Constants

    def read(self, place: int, tensor: Tensor) -> Tensor:
        """What the kernel reads of the tensor at this place."""
        return tensor if self.in_place[place] else tensor.contiguous()


def row_distance(shape: Sequence[int], strides: Sequence[int], dims: int = 1) -> int | None:
    """The distance in elements between neighbouring rows, each the last `dims` dimensions in one piece.

    None where a row is not in one piece, or rows lie at unequal distances: a kernel then reads a contiguous copy.
    """
    width, distance, reach = 1, None, 0
    for place, (size, stride) in enumerate(zip(reversed(shape), reversed(strides), strict=True)):
        if place < dims:
            if size != 1 and stride != width:
                return None
            width *= size
        elif size != 1:
            if distance is None:
                distance = stride
            elif stride != reach:
                return None
            reach = stride * size
    return width if distance is None else distance


def rows_read(
    shape: Sequence[int], strides: Sequence[Sequence[int] | None], dims: int
) -> tuple[tuple[bool, ...], tuple[int, ...]]:
    """For each tensor of a shape, of which strides are given: whether a kernel reads its rows in place, and how far
    apart they lie there, or in the copy that it reads. None stands for a tensor that is not there.
    """
    found = [None if of is None else row_distance(shape, of, dims) for of in strides]
    width = math.prod(shape[len(shape) - dims :])
    return tuple(d is not None for d in found), tuple(width if d is None else d for d in found)
