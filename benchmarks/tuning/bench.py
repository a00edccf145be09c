"""Checks configs against the reference, and times the kernels that they are of alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol
from unittest import mock

import torch
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from benchmarks.cases import OpCase
from benchmarks.inputs import Inputs
from benchmarks.inspection import Launch
from benchmarks.inspection.launches import tensors_of
from benchmarks.measure import first_line, release
from benchmarks.providers import PROVIDERS, Function
from benchmarks.timing import Timer, interleave, make_timer
from fastattn.kernels._config import Key, forced_config
from fastattn.kernels._launch import nothing_kept

# Which provider runs our kernels, whatever dispatch would choose: the first of these that an operation has.
_OURS = ("fastattn-fused", "fastattn-triton", "fastattn")
# Each config keeps the tensors that its kernels wrote: together not more than this share of the free memory.
_MEMORY_SHARE = 0.5
_MOST_AT_A_TIME = 8

Dropped = Callable[[int, str], None]


class Bench(Protocol):
    """What the search needs of a device."""

    def check(self, config: Any) -> None:
        """Raises where the operation with this config is not as exact as the formula in its own dtype."""

    def samples(
        self, configs: Sequence[Any], kernels: Collection[str], rounds: int, dropped: Dropped
    ) -> list[list[float]]:
        """Milliseconds of these kernels in interleaved rounds, by config: the geometric mean over the cases.

        Of a config that cannot run, `dropped` is told its place and why, and there are no samples.
        """

    def most_at_a_time(self, config: Any) -> int:
        """How many configs' tensors fit into memory beside each other."""


class CaseBench:
    """A function's cases on a device; each is forward and backward through the public function, or what it has of them.

    A timer keeps the calls that it has timed, and these their tensors: each comparison makes one of its own.
    """

    def __init__(
        self,
        select: str,
        cases: Sequence[OpCase],
        device: torch.device,
        new_timer: Callable[[torch.device], Timer] = make_timer,
        key: Key | None = None,
    ) -> None:
        self.select, self.device, self.new_timer, self.key = select, device, new_timer, key
        self.inputs = [Inputs(case, device) for case in cases]
        self._functions = [_ours(case, device) for case in cases]

    def check(self, config: Any) -> None:
        with forced_config(self.select, config, self.key):
            for inputs, function in zip(self.inputs, self._functions, strict=True):
                inputs.check(function, _direction(inputs))

    def samples(
        self, configs: Sequence[Any], kernels: Collection[str], rounds: int, dropped: Dropped
    ) -> list[list[float]]:
        of_cases: list[dict[str, list[float]]] = []
        bad: set[int] = set()

        def drop(name: str, error: Exception) -> None:
            if int(name) not in bad:
                bad.add(int(name))
                dropped(int(name), f"{type(error).__name__}: {first_line(error)}")

        for inputs, function in zip(self.inputs, self._functions, strict=True):
            calls: dict[str, Callable[[], None]] = {}
            for place, config in enumerate(configs):
                try:
                    launches = [
                        one for one in self._launches(inputs, function, config) if one.name in kernels
                    ]
                    if launches:
                        calls[str(place)] = _replay(launches)
                except Exception as error:
                    drop(str(place), error)
            if calls:
                of_cases.append(interleave(calls, self.new_timer(self.device), rounds, dropped=drop))
            calls.clear()
            release(self.device)
        return [
            [] if place in bad else _mean_of_cases([case.get(str(place), []) for case in of_cases])
            for place in range(len(configs))
        ]

    def most_at_a_time(self, config: Any) -> int:
        if self.device.type != "cuda":
            return _MOST_AT_A_TIME
        needed = 1
        for inputs, function in zip(self.inputs, self._functions, strict=True):
            launches = self._launches(inputs, function, config)
            tensors = {id(t): t for launch in launches for t in tensors_of(launch.arguments)}.values()
            needed = max(needed, sum(t.numel() * t.itemsize for t in tensors))
        release(self.device)
        free, _ = torch.cuda.mem_get_info(self.device)
        return int(max(2, min(_MOST_AT_A_TIME, _MEMORY_SHARE * free // needed)))

    def _launches(self, inputs: Inputs, function: Function, config: Any) -> list[Launch]:
        """What a call launches, with the tensors that it launched it on."""
        with forced_config(self.select, config, self.key), running_launches() as launches:
            inputs.call(function, _direction(inputs))()
        return launches


def _ours(case: OpCase, device: torch.device) -> Function:
    providers = PROVIDERS[case.operation]
    return next(providers[name] for name in _OURS if name in providers)(case, device)


def _direction(inputs: Inputs) -> str:
    """Attention on e4m3 operands is a forward alone."""
    return "forward+backward" if any(t.requires_grad for t in inputs.tensors) else "forward"


def _replay(launches: Sequence[Launch]) -> Callable[[], None]:
    def run() -> None:
        for launch in launches:
            launch.kernel.run(grid=launch.grid, warmup=False, **launch.arguments)

    return run


def _mean_of_cases(samples: Sequence[list[float]]) -> list[float]:
    """The geometric mean of each round; nothing where a case has no samples."""
    return [math.exp(sum(map(math.log, times)) / len(times)) for times in zip(*samples, strict=False)]


@contextmanager
def running_launches() -> Iterator[list[Launch]]:
    """Within the block, kernels run, and their launches are collected."""
    launches: list[Launch] = []

    def recorded(run: Callable[..., Any]) -> Callable[..., Any]:
        def record(kernel: Any, *positional: Any, grid: Any, warmup: bool, **keywords: Any) -> Any:
            assert not positional, f"{kernel.__name__} is launched with positional arguments"
            launches.append(Launch(kernel, keywords, tuple(grid(keywords) if callable(grid) else grid)))
            return run(kernel, grid=grid, warmup=warmup, **keywords)

        return record

    with (
        nothing_kept(),
        mock.patch.object(JITFunction, "run", recorded(JITFunction.run)),
        mock.patch.object(InterpretedFunction, "run", recorded(InterpretedFunction.run)),
    ):
        yield launches
