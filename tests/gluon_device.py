"""The part of a multiprocessor that `tests.gluon_simulator` has: partitions in turn, barriers, shared memory, copies.

- a partition of `warp_specialize` is a thread; one runs at a time, and at every barrier, copy and product another may
  be chosen. A seed gives the choices: at random, or by a random order of precedence that starves somebody throughout.
- a bulk copy fills its slot with NaN when it is issued and with the rows when the schedule has it complete.
- an asynchronous product reads its operands when it is waited for; a slot that is filled, or still to be filled,
  meanwhile is an error, as is a result that is read before.
- a barrier counts arrivals and bytes, and has phases: a wait for a phase of the wrong parity returns at once or never.
- when nobody can go on, the error says who waits for what.
"""

from __future__ import annotations

import math
import random
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


def as_value(number: Any) -> Value:
    return torch.as_tensor(number).as_subclass(Value)


class Schedule:
    """Who goes on next, and what is still to happen."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.precedence: dict[str, float] = {}
        self.uniform, self.newest_first = seed % 3 == 0, seed % 2 == 1
        self.agents: list[_Agent] = []
        self.copies: list[Copy] = []
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
        return as_value(self.view(self.slot.data).clone())

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


class Copy:
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
        self.result = as_value(product if self.accumulator is None else self.accumulator + product)
