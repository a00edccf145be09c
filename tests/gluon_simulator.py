"""Runs a Gluon kernel for Hopper on a CPU, from its own source, as adversely as its synchronization permits.

Gluon has no interpreter, and a race seldom shows on the device that wins it. Here every function of a kernel is run as
Python against a language of PyTorch tensors, and what the device does at the same time is a matter of a schedule: see
`tests.gluon_device`.

Not simulated: layouts, registers, what a compiler makes of it, and barriers within a warp group.
"""

from __future__ import annotations

import inspect
import math
import textwrap
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.gluon_device import (
    Barrier,
    Copy,
    Product,
    Schedule,
    Shared,
    SimulationError,
    Slot,
    SlotView,
    Value,
    as_value,
)


class Descriptor:
    """A host's tensor descriptor: tiles of a tensor, zeros beyond it."""

    def __init__(self, tensor: Tensor, block: Sequence[int]) -> None:
        self.tensor, self.dtype, self.layout = tensor, tensor.dtype, None
        self.block_type = SimpleNamespace(shape=list(block), nbytes=math.prod(block) * tensor.element_size())

    def rows(self, corner: Sequence[Any]) -> Tensor:
        tile = torch.zeros(self.block_type.shape, dtype=self.dtype)
        places = [
            slice(int(first), int(first) + size)
            for first, size in zip(corner, self.block_type.shape, strict=True)
        ]
        inside = self.tensor[tuple(places)]
        tile[tuple(slice(size) for size in inside.shape)] = inside
        return tile


class Pointer:
    """Elements of a tensor's memory."""

    def __init__(self, memory: Tensor, offset: Any) -> None:
        self.memory, self.offset = memory, offset

    @staticmethod
    def to(tensor: Tensor) -> Pointer:
        memory = tensor.new_empty(0).set_(tensor.untyped_storage())  # type: ignore[call-overload]
        return Pointer(memory, tensor.storage_offset())

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.offset + offset)


def _within(memory: Tensor, places: Tensor, what: str) -> Tensor:
    """The places, all of which are the memory's."""
    places = places.long()
    if places.numel() and not (places.min() >= 0 and places.max() < memory.numel()):
        raise SimulationError(f"a {what} leaves its tensor's memory")
    return places


class _Language:
    """What the kernel finds as `gl`, and as `tl` in helpers that it shares with Triton's kernels."""

    constexpr = object
    int32, int64, float32 = torch.int32, torch.int64, torch.float32
    uint32 = torch.int64  # of which PyTorch has more operators
    static_range = range

    def __init__(self, schedule: Schedule, program: int) -> None:
        self.schedule, self.program, self.allocations = schedule, program, 0
        # Of layouts nothing is kept.
        self.SliceLayout = self.NVMMADistributedLayout = self.DotOperandLayout = lambda *_arguments: None

    def static_assert(self, condition: bool, message: str) -> None:
        if not condition:
            raise SimulationError(message)

    def program_id(self, axis: int) -> Value:
        return as_value(self.program if axis == 0 else 0)

    def allocate_shared_memory(self, dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Shared:
        self.allocations += 1
        names = [f"allocation {self.allocations}[{index}]" for index in range(shape[0])]
        if dtype == torch.int64:
            return Shared([Barrier(self.schedule, name) for name in names], shape, dtype)
        return Shared([Slot(name, shape[1:], dtype) for name in names], shape, dtype)

    def warp_specialize(self, partitions: Any, warps: Sequence[int], registers: Sequence[int]) -> None:
        assert len(partitions) - 1 == len(warps) == len(registers)
        self.schedule.run(partitions)

    def arange(self, start: int, end: int, layout: Any = None) -> Value:
        return as_value(torch.arange(start, end, dtype=torch.int32))

    def full(self, shape: Sequence[int], number: Any, dtype: torch.dtype, layout: Any) -> Value:
        return as_value(torch.full(shape, float(number), dtype=dtype))

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, layout: Any) -> Value:
        return self.full(shape, 0, dtype, layout)

    def where(self, condition: Any, one: Any, other: Any) -> Value:
        return as_value(torch.where(as_value(condition), one, other))

    def maximum(self, one: Any, other: Any) -> Value:
        return as_value(torch.maximum(*torch.broadcast_tensors(as_value(one), as_value(other))))

    def minimum(self, one: Any, other: Any) -> Value:
        return as_value(torch.minimum(*torch.broadcast_tensors(as_value(one), as_value(other))))

    def max(self, x: Tensor, axis: int) -> Value:
        return as_value(x.amax(axis))

    def sum(self, x: Tensor, axis: int) -> Value:
        return as_value(x.sum(axis))

    def fma(self, x: Tensor, y: Any, z: Tensor) -> Value:
        return as_value((x.double() * y + z.double()).float())

    def exp2(self, x: Tensor) -> Value:
        return as_value(torch.exp2(x))

    def log2(self, x: Tensor) -> Value:
        return as_value(torch.log2(x))

    def expand_dims(self, x: Tensor, axis: int) -> Value:
        return as_value(x.unsqueeze(axis))

    def convert_layout(self, x: Any, layout: Any) -> Any:
        return x

    def to_tensor(self, number: float) -> Value:
        return as_value(number)

    def cast(self, x: Any, dtype: torch.dtype) -> Value:
        return as_value(x).to(dtype)

    def cdiv(self, x: Any, y: int) -> Any:
        return (x + y - 1) // y

    def load(self, pointer: Pointer, mask: Any = True, other: float = 0.0) -> Value:
        places, kept = torch.broadcast_tensors(as_value(pointer.offset), as_value(mask))
        places, kept = places.as_subclass(Tensor), kept.as_subclass(Tensor)
        found = torch.full(places.shape, other, dtype=pointer.memory.dtype)
        found[kept] = pointer.memory[_within(pointer.memory, places[kept], "load")]
        return as_value(found)

    def store(self, pointer: Pointer, tile: Tensor, mask: Tensor) -> None:
        places, kept = torch.broadcast_tensors(pointer.offset, mask)
        places = _within(pointer.memory, places[kept].as_subclass(Tensor), "store")
        pointer.memory[places] = tile[kept].as_subclass(Tensor).to(pointer.memory.dtype)


def _hopper(schedule: Schedule) -> dict[str, Any]:
    """Barriers, copies and products by the names that a kernel's module has for them."""
    mbarrier = SimpleNamespace(
        MBarrierLayout=lambda: None,
        init=lambda barrier, count: barrier.init(count),
        wait=lambda barrier, phase: barrier.wait(phase),
        arrive=lambda barrier, count: barrier.arrive(count),
        expect=lambda barrier, nbytes: barrier.expect(nbytes),
    )

    def copy(source: Descriptor, corner: Sequence[Any], barrier: Barrier, place: SlotView) -> None:
        schedule.pause()
        schedule.copies.append(Copy(place.slot, source.rows(corner), barrier))

    def warpgroup_mma(
        a: Any, b: SlotView, accumulator: Tensor, use_acc: bool = True, is_async: bool = False
    ) -> Any:
        schedule.pause()
        product = Product(a, b, accumulator if use_acc else None)
        schedule.now.agent.running.append(product)
        return product if is_async else warpgroup_mma_wait(0, [product])

    def warpgroup_mma_wait(outstanding: int, deps: Sequence[Any]) -> Any:
        schedule.pause()
        running = schedule.now.agent.running
        while len(running) > outstanding:
            running.pop(0).finish()
        results = [dep.result if isinstance(dep, Product) else dep for dep in deps]
        if any(result is None for result in results):
            raise SimulationError("a product's result is read before the product is waited for")
        return results[0] if len(results) == 1 else tuple(results)

    return {
        "mbarrier": mbarrier,
        "_copy": copy,
        "warpgroup_mma": warpgroup_mma,
        "warpgroup_mma_wait": warpgroup_mma_wait,
    }


def simulate(
    kernel: Any, grid: int, seed: int, change: tuple[str, str] | None = None, **arguments: Any
) -> None:
    """Runs every program of a grid, one after the other.

    Args:
        kernel: a function of `gluon.jit`.
        grid: how many programs.
        seed: of the schedule.
        change: text in the source of the kernel's functions and what to put in its place, to see that it is needed.
        arguments: the kernel's; descriptors are `Descriptor`, pointers `Pointer.to(tensor)`.

    Raises:
        SimulationError: a race, a deadlock, or memory that is not the kernel's.
    """
    names = vars(inspect.getmodule(kernel.fn))
    # With what its helpers find in their own modules.
    for function in [value for value in names.values() if callable(getattr(value, "fn", None))]:
        names = {**vars(inspect.getmodule(function.fn)), **names}
    functions = {name: value for name, value in names.items() if callable(getattr(value, "fn", None))}
    sources = {name: _source(function.fn) for name, function in functions.items()}
    if change is not None:
        old, new = change
        if sum(source.count(old) for source in sources.values()) == 0:
            raise ValueError(f"there is no {old!r} to change")
        sources = {name: source.replace(old, new) for name, source in sources.items()}
    constants = {name: value.value for name, value in names.items() if type(value).__name__ == "constexpr"}
    for program in range(grid):
        schedule = Schedule(seed * grid + program)
        language = _Language(schedule, program)
        space = {"gl": language, "tl": language, **constants, **_hopper(schedule)}
        for name, source in sources.items():
            lazily = "from __future__ import annotations\n" + source
            exec(compile(lazily, f"<{name}>", "exec", dont_inherit=True), space)
        space[kernel.fn.__name__](**arguments)


def _source(function: Any) -> str:
    """A function without its decorators."""
    source = textwrap.dedent(inspect.getsource(function))
    return source[source.index("def ") :]
