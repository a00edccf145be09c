"""Runs a Gluon kernel for Hopper on a CPU, from its own source, as adversely as its synchronization permits.

Gluon has no interpreter, and a race seldom shows on the device that wins it. Here every function of a kernel is run as
Python against a language of PyTorch tensors, and what the device does at the same time is a matter of a schedule:

- a partition of `warp_specialize` is a thread; one runs at a time, and at every barrier, copy and product another may
  be chosen. A seed gives the choices: at random, or by a random order of precedence that starves somebody throughout.
- a bulk copy fills its slot with NaN when it is issued and with the rows when the schedule has it complete.
- an asynchronous product reads its operands when it is waited for; a slot that is filled, or still to be filled,
  meanwhile is an error, as is a result that is read before.
- a barrier counts arrivals and bytes, and has phases: a wait for a phase of the wrong parity returns at once or never.
- when nobody can go on, the error says who waits for what.

Not simulated: layouts, registers, what a compiler makes of it, and barriers within a warp group.
"""

from __future__ import annotations

import inspect
import math
import random
import textwrap
import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class SimulationError(Exception):
    """The kernel raced, deadlocked or left its memory."""


class _Cancelled(BaseException):
    """Ends the threads of a failed simulation."""


class Value(torch.Tensor):
    """A tile in registers, or one number: a tensor that is never changed in place."""

    @property
    def type(self) -> Any:  # type: ignore[override]
        return SimpleNamespace(layout=None)

    def __iadd__(self, other: Any) -> Any:
        return self + other


def _value(number: Any) -> Value:
    return torch.as_tensor(number).as_subclass(Value)


class Schedule:
    """Who goes on next, and what is still to happen."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.precedence: dict[str, float] = {}
        self.uniform, self.newest_first = seed % 3 == 0, seed % 2 == 1
        self.agents: list[_Agent] = []
        self.copies: list[_Copy] = []
        self.now = threading.local()
        self.idle = threading.Semaphore(0)

    def pause(self, ready: Callable[[], bool] = lambda: True, why: str = "") -> None:
        """Lets others go on, at least until `ready`."""
        agent = getattr(self.now, "agent", None)
        if agent is None:  # before the partitions start
            if not ready():
                raise SimulationError(f"nobody is there to end the wait for {why}")
            return
        agent.ready, agent.why = ready, why
        self.idle.release()
        agent.turn.acquire()
        if agent.cancelled:
            raise _Cancelled

    def run(self, partitions: Sequence[tuple[Callable[..., None], Sequence[Any]]]) -> None:
        """Runs partitions to their end."""
        names = [f"{function.__name__}#{index}" for index, (function, _) in enumerate(partitions)]
        self.agents = [
            _Agent(self, name, function, arguments)
            for name, (function, arguments) in zip(names, partitions, strict=True)
        ]
        self.precedence = {name: self.random.random() for name in [*names, "copies"]}
        for agent in self.agents:
            agent.thread.start()
        try:
            while self._step():
                pass
        finally:
            for agent in self.agents:
                agent.cancelled = True
                agent.turn.release()
                agent.thread.join()
        if self.copies:
            raise SimulationError(f"the program ends before {len(self.copies)} of its copies")

    def _step(self) -> bool:
        """One choice; whether anybody is left to go on."""
        able: list[Any] = [agent for agent in self.agents if not agent.done and agent.ready()]
        waiting = [agent for agent in self.agents if not agent.done and agent not in able]
        if self.copies:
            able.append(None)
        if not able:
            if waiting:
                raise SimulationError(
                    "deadlock: " + "; ".join(f"{a.name} waits for {a.why}" for a in waiting)
                )
            return False
        if self.uniform or self.random.random() < 0.1:
            chosen = self.random.choice(able)
        else:
            chosen = min(able, key=lambda agent: self.precedence[agent.name if agent else "copies"])
        if chosen is None:
            # In some schedules the oldest copy is the last to complete.
            oldest = self.random.randrange(len(self.copies))
            self.copies.pop(-1 if self.newest_first else oldest).complete()
            return True
        chosen.turn.release()
        self.idle.acquire()
        if chosen.error is not None:
            raise chosen.error
        return True


class _Agent:
    """One partition."""

    def __init__(
        self, schedule: Schedule, name: str, function: Callable[..., None], arguments: Sequence[Any]
    ) -> None:
        self.schedule, self.name, self.function, self.arguments = schedule, name, function, arguments
        self.turn = threading.Semaphore(0)
        self.ready: Callable[[], bool] = lambda: True
        self.why = ""
        self.done = self.cancelled = False
        self.error: Exception | None = None
        self.running: list[Product] = []
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        self.turn.acquire()
        self.schedule.now.agent = self
        try:
            if not self.cancelled:
                self.function(*self.arguments)
                if self.running:
                    raise SimulationError(f"{self.name} ends before its products")
        except _Cancelled:
            return
        except Exception as error:
            self.error = error
        self.done = True
        self.schedule.idle.release()


class Barrier:
    """An mbarrier: a phase is complete when `count` have arrived and no byte is outstanding."""

    def __init__(self, schedule: Schedule, name: str) -> None:
        self.schedule, self.name = schedule, name
        self.count = self.pending = self.bytes = self.phase = 0

    def init(self, count: int) -> None:
        self.count = self.pending = count

    def wait(self, phase: Any) -> None:
        parity = int(phase)
        if parity not in (0, 1) or not self.count:
            raise SimulationError(f"{self.name} has no phase {parity} to wait for, or was not made")
        self.schedule.pause(lambda: self.phase & 1 != parity, f"phase {parity} of {self.name}")

    def arrive(self, count: int) -> None:
        self.schedule.pause()
        self.pending -= count
        if self.pending < 0:
            raise SimulationError(f"{self.name} has more arrivals in a phase than its {self.count}")
        self._turn()
        self.schedule.pause()  # what follows may be late

    def expect(self, nbytes: int) -> None:
        self.bytes += nbytes
        self.arrive(1)

    def delivered(self, nbytes: int) -> None:
        self.bytes -= nbytes
        self._turn()

    def _turn(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.count


class Slot:
    """One tile in shared memory."""

    def __init__(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.name, self.data = name, torch.full(tuple(shape), math.nan, dtype=dtype)
        self.filled = 0  # how many times
        self.filling = False


class SlotView:
    """A slot in another shape, or transposed."""

    def __init__(self, slot: Slot, view: Callable[[Tensor], Tensor]) -> None:
        self.slot, self.view = slot, view
        self.shape, self.dtype = view(slot.data).shape, slot.data.dtype

    def load(self, layout: Any) -> Value:
        if self.slot.filling or not self.slot.filled:
            raise SimulationError(f"{self.slot.name} is read before its copy is there")
        return _value(self.view(self.slot.data).clone())

    def reshape(self, shape: Sequence[int]) -> SlotView:
        return SlotView(self.slot, lambda data: self.view(data).reshape(shape))

    def permute(self, order: Sequence[int]) -> SlotView:
        return SlotView(self.slot, lambda data: self.view(data).permute(order))


class Shared:
    """An allocation: slots, or barriers."""

    def __init__(self, members: Sequence[Any], shape: Sequence[int], dtype: torch.dtype) -> None:
        self.members, self.shape, self.dtype = members, shape, dtype

    def index(self, index: Any) -> Any:
        place = int(index)
        if not 0 <= place < len(self.members):
            raise SimulationError(f"{place} is none of {len(self.members)} slots")
        member = self.members[place]
        return SlotView(member, lambda data: data) if isinstance(member, Slot) else member


class _Copy:
    """A bulk copy on its way."""

    def __init__(self, slot: Slot, rows: Tensor, barrier: Barrier) -> None:
        if slot.filling:
            raise SimulationError(f"{slot.name} is filled by two copies at a time")
        self.slot, self.rows, self.barrier = slot, rows, barrier
        slot.filling = True
        slot.filled += 1
        slot.data.fill_(math.nan)

    def complete(self) -> None:
        self.slot.data.copy_(self.rows)
        self.slot.filling = False
        self.barrier.delivered(self.rows.numel() * self.rows.element_size())


class Product:
    """A warp group's asynchronous product, whose result is there once it is waited for."""

    def __init__(self, a: Any, b: Any, accumulator: Tensor | None) -> None:
        self.a, self.b, self.accumulator = a, b, accumulator
        self.seen = [self._filled(operand) for operand in (a, b)]
        self.result: Value | None = None

    @staticmethod
    def _filled(operand: Any) -> int:
        if not isinstance(operand, SlotView):
            return 0
        if operand.slot.filling or not operand.slot.filled:
            raise SimulationError(f"a product reads {operand.slot.name} before its copy is there")
        return operand.slot.filled

    def finish(self) -> None:
        if [self._filled(operand) for operand in (self.a, self.b)] != self.seen:
            raise SimulationError("an operand was filled again while a product ran")
        a, b = (
            operand.view(operand.slot.data) if isinstance(operand, SlotView) else operand
            for operand in (self.a, self.b)
        )
        product = a.float() @ b.float()
        self.result = _value(product if self.accumulator is None else self.accumulator + product)


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
        return _value(self.program if axis == 0 else 0)

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
        return _value(torch.arange(start, end, dtype=torch.int32))

    def full(self, shape: Sequence[int], number: Any, dtype: torch.dtype, layout: Any) -> Value:
        return _value(torch.full(shape, float(number), dtype=dtype))

    def zeros(self, shape: Sequence[int], dtype: torch.dtype, layout: Any) -> Value:
        return self.full(shape, 0, dtype, layout)

    def where(self, condition: Any, one: Any, other: Any) -> Value:
        return _value(torch.where(_value(condition), one, other))

    def maximum(self, one: Any, other: Any) -> Value:
        return _value(torch.maximum(*torch.broadcast_tensors(_value(one), _value(other))))

    def minimum(self, one: Any, other: Any) -> Value:
        return _value(torch.minimum(*torch.broadcast_tensors(_value(one), _value(other))))

    def max(self, x: Tensor, axis: int) -> Value:
        return _value(x.amax(axis))

    def sum(self, x: Tensor, axis: int) -> Value:
        return _value(x.sum(axis))

    def fma(self, x: Tensor, y: Any, z: Tensor) -> Value:
        return _value((x.double() * y + z.double()).float())

    def exp2(self, x: Tensor) -> Value:
        return _value(torch.exp2(x))

    def log2(self, x: Tensor) -> Value:
        return _value(torch.log2(x))

    def expand_dims(self, x: Tensor, axis: int) -> Value:
        return _value(x.unsqueeze(axis))

    def convert_layout(self, x: Any, layout: Any) -> Any:
        return x

    def to_tensor(self, number: float) -> Value:
        return _value(number)

    def cast(self, x: Any, dtype: torch.dtype) -> Value:
        return _value(x).to(dtype)

    def cdiv(self, x: Any, y: int) -> Any:
        return (x + y - 1) // y

    def load(self, pointer: Pointer, mask: Any = True, other: float = 0.0) -> Value:
        places, kept = torch.broadcast_tensors(_value(pointer.offset), _value(mask))
        places, kept = places.as_subclass(Tensor), kept.as_subclass(Tensor)
        found = torch.full(places.shape, other, dtype=pointer.memory.dtype)
        found[kept] = pointer.memory[_within(pointer.memory, places[kept], "load")]
        return _value(found)

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
        schedule.copies.append(_Copy(place.slot, source.rows(corner), barrier))

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
