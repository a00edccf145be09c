"""How long a call takes: interleaved rounds, medians with their spread, ratios with their interval.

Providers are timed in turn, round after round, each round in another order, so that a slow drift of the
machine (heat, neighbours) falls on all of them alike. A CPU is timed by the wall clock; a GPU by its own
events, with the L2 cache cleared before every call.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]
Timer = Callable[[Call], float]

# One sample on a CPU covers at least this long, so that the clock and a context switch stay below a percent.
_CPU_SAMPLE_MS = 10.0
# The host needs this head start so that a GPU's queue never runs dry while a small kernel is timed: an eager
# forward and backward costs up to half a millisecond of host time. 2e6 cycles are about 1 ms at 2 GHz.
_GPU_HEAD_START_CYCLES = 2_000_000
# A call that is not in time with this one either is taken to wait for the device itself, as `.item()` does.
_MOST_HEAD_START_CYCLES = 64 * _GPU_HEAD_START_CYCLES


@dataclass(frozen=True)
class Summary:
    """Median and quartiles of samples, in the samples' unit."""

    median: float
    low: float
    high: float
    count: int

    @property
    def spread(self) -> float:
        """Distance between the quartiles over the median."""
        return (self.high - self.low) / self.median if self.median else 0.0


def summarize(samples: Sequence[float]) -> Summary:
    """Median and quartiles (linear interpolation between order statistics)."""
    if not samples:
        raise ValueError("samples must hold at least one value")
    if len(samples) == 1:
        return Summary(samples[0], samples[0], samples[0], 1)
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Summary(median, low, high, len(samples))


@dataclass(frozen=True)
class Ratio:
    """Ratio of two medians with a 95 % interval."""

    value: float
    low: float
    high: float


def time_ratio(
    samples: Sequence[float], baseline: Sequence[float], resamples: int = 1000, seed: int = 0
) -> Ratio:
    """How many times the baseline's time, with a bootstrap interval over rounds.

    Where both were measured in the same rounds (equal counts), it is the median of the rounds' ratios, so that what
    a round did to both cancels; else the ratio of the medians, each side drawn on its own.
    """
    generator = random.Random(seed)
    if len(samples) == len(baseline):
        rounds = [a / b for a, b in zip(samples, baseline, strict=True)]
        value = statistics.median(rounds)
        drawn = [_median_of_draw(rounds, generator) for _ in range(resamples)]
    else:
        value = statistics.median(samples) / statistics.median(baseline)
        drawn = [
            _median_of_draw(samples, generator) / _median_of_draw(baseline, generator)
            for _ in range(resamples)
        ]
    drawn.sort()
    return Ratio(value, drawn[int(0.025 * resamples)], drawn[int(0.975 * resamples)])


def _median_of_draw(values: Sequence[float], generator: random.Random) -> float:
    return statistics.median(generator.choices(values, k=len(values)))


def round_order(names: Sequence[str], round_index: int) -> list[str]:
    """The order of one round, by the design of Williams (1949).

    In 2n rounds of n names each has every place and directly follows every other equally often, so that what one
    leaves behind (a cache, a heap, heat) falls on all others alike.
    """
    n = len(names)
    zigzag = [index // 2 if index % 2 == 0 else n - 1 - index // 2 for index in range(n)]
    order = [names[(place + round_index) % n] for place in zigzag]
    return order[::-1] if (round_index // n) % 2 else order


def interleave(
    calls: Mapping[str, Call],
    timer: Timer,
    rounds: int,
    warmup: int = 2,
    dropped: Callable[[str, Exception], None] | None = None,
) -> dict[str, list[float]]:
    """Milliseconds of each call in each round, by `timer`, after `warmup` untimed rounds.

    Args:
        dropped: told of a call that raises, which then has no samples; without it the error is raised.
    """
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    orders = [names] * warmup + [round_order(names, index) for index in range(rounds if names else 0)]
    for place, order in enumerate(orders):
        for name in order:
            if name not in samples:
                continue
            try:
                if place < warmup:
                    calls[name]()
                else:
                    samples[name].append(timer(calls[name]))
            except Exception as error:
                if dropped is None:
                    raise
                del samples[name]
                dropped(name, error)
    return samples


class CpuTimer:
    """Milliseconds a call by the wall clock; short calls are repeated within one sample."""

    def __init__(
        self, sample_ms: float = _CPU_SAMPLE_MS, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.sample_ms = sample_ms
        self.clock = clock
        self._repeats: dict[int, tuple[Call, int]] = {}

    def __call__(self, call: Call) -> float:
        # The call is kept beside its count, so that its id cannot come back as another call's.
        _, repeats = self._repeats.get(id(call), (call, 0))
        if repeats == 0:
            once = self._measure(call, 1)
            repeats = max(1, min(100_000, round(self.sample_ms / max(once, 1e-6))))
            self._repeats[id(call)] = (call, repeats)
        return self._measure(call, repeats) / repeats

    def _measure(self, call: Call, repeats: int) -> float:
        start = self.clock()
        for _ in range(repeats):
            call()
        return (self.clock() - start) * 1e3


class CudaTimer:
    """Milliseconds of device time a call, from a cold L2 cache, by CUDA events.

    The time of a call that waits for the device holds the host's work after that wait.
    """

    def __init__(self, device: torch.device | str = "cuda") -> None:
        self.device = torch.device(device)
        # Writing twice the L2 evicts all of it, whatever its replacement policy keeps back.
        size = 2 * getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 128 << 20)
        self._flush = torch.empty(max(size, 64 << 20), dtype=torch.int8, device=self.device)
        # Each call has its own head start, so that one that is never in time does not slow down the others. The call
        # is kept beside it, so that its id cannot come back as another call's.
        self._head_starts: dict[int, tuple[Call, int]] = {}
        self._waiting: set[int] = set()

    def waits(self, call: Call) -> bool:
        """Whether a call that was timed waits for the device, so that no head start keeps the queue full."""
        return id(call) in self._waiting

    def __call__(self, call: Call) -> float:
        while True:
            _, cycles = self._head_starts.setdefault(id(call), (call, _GPU_HEAD_START_CYCLES))
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(cycles)
            self._flush.zero_()
            start.record()
            call()
            late = start.query()  # the device is here already, and has waited for the host in between
            end.record()
            torch.cuda.synchronize(self.device)
            if not late or self.waits(call):
                return start.elapsed_time(end)
            if cycles >= _MOST_HEAD_START_CYCLES:
                self._waiting.add(id(call))
                cycles = _GPU_HEAD_START_CYCLES // 2  # more does not help it, and takes time
            self._head_starts[id(call)] = (call, 2 * cycles)


def waits_for_device(timer: Timer, call: Call) -> bool:
    """Whether a timer saw that a call waits for the device; a CPU has none to wait for."""
    return isinstance(timer, CudaTimer) and timer.waits(call)


def make_timer(device: torch.device | str) -> Timer:
    return CudaTimer(device) if torch.device(device).type == "cuda" else CpuTimer()


def synchronize(device: torch.device | str) -> None:
    """Waits for a GPU's queue; nothing on a CPU."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def host_cost(
    calls: Mapping[str, Call],
    rounds: int = 30,
    repeats: int = 200,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Microseconds of host time a call in each round: on tiny tensors, what dispatch and checks cost."""
    timer = CpuTimer(clock=clock)

    def microseconds(call: Call) -> float:
        return timer._measure(call, repeats) / repeats * 1e3

    return interleave(calls, microseconds, rounds, warmup=repeats)
