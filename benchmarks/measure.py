"""One case, every provider: checked against the reference, then timed in interleaved rounds; one row each."""

from __future__ import annotations

import gc
import math
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import OpCase, shape_of
from benchmarks.costs import operation_cost
from benchmarks.environment import clocks
from benchmarks.inputs import Inputs
from benchmarks.memory import peak_memory
from benchmarks.providers import BASELINES, NOTES, PROVIDERS, Absent
from benchmarks.timing import (
    Timer,
    interleave,
    make_timer,
    summarize,
    synchronize,
    time_ratio,
    waits_for_device,
)
from fastattn import NotSupported

Row = dict[str, Any]

DIRECTIONS = ("forward", "forward+backward")

# A baseline's call that is timed a second time in the same rounds: how far its two times lie apart is noise.
_AGAIN = " again"
# A provider's call of the same case without its options, in the same rounds: what the options cost.
_PLAIN = " plain"
# Clocks are read while this much work is queued: the tool that reads them takes a few tens of milliseconds.
_LOAD_MS = 250.0


class Failed(Exception):
    """A provider ran and did not do its work: "wrong", "out of memory" or "failed", and why."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(f"{status}: {reason}")
        self.status, self.reason = status, reason


# How PyTorch says that a forced back end does not take a call, and that there is no compiler.
_REFUSED = re.compile(r"No available kernel|C\+\+ compiler|InvalidCxxCompiler")


def prepare(inputs: Inputs, name: str, direction: str) -> Callable[[], tuple[Tensor, ...]]:
    """A provider's call on these inputs, run once and checked.

    Raises:
        Absent: the provider cannot run here.
        Failed: it should have run; the row's status is the error's.
    """
    try:
        function = PROVIDERS[inputs.case.operation][name](inputs.case, inputs.device)
        inputs.check(function, direction)
    except Exception as error:  # whatever a kernel raises is that row's result, and the next row runs
        raise failure_of(error) from error
    return inputs.call(function, direction)


def failure_of(error: Exception) -> Absent | Failed:
    """What an error says of the provider that raised it."""
    if isinstance(error, (Absent, Failed)):
        return error
    refused = isinstance(error, RuntimeError) and _REFUSED.search(str(error))
    if refused or isinstance(error, (NotSupported, ImportError)):
        return Absent(first_line(error))
    if isinstance(error, AssertionError):
        return Failed("wrong", first_line(error))
    if isinstance(error, torch.OutOfMemoryError):
        return Failed("out of memory", "out of memory")
    return Failed("failed", f"{type(error).__name__}: {first_line(error)}")


def record_failure(row: Row, error: Exception) -> None:
    """Makes an error the row's result."""
    failure = failure_of(error)
    if isinstance(failure, Failed):
        row |= {"status": failure.status, "reason": failure.reason}
    else:
        row |= {"status": "absent", "reason": str(failure)}


@contextmanager
def failing(row: Row) -> Iterator[None]:
    """Within the block, an error is this row's result and keeps no other row from being measured."""
    try:
        yield
    except Exception as error:
        record_failure(row, error)


def first_line(error: BaseException) -> str:
    """The first line of an error that says something, short enough for a table."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def measure_case(
    case: OpCase,
    device: torch.device,
    rounds: int,
    *,
    directions: tuple[str, ...] = DIRECTIONS,
    names: tuple[str, ...] | None = None,
    timer: Timer | None = None,
) -> Iterator[Row]:
    """Rows of all providers of a case's operation (or those named), a direction at a time."""
    names = tuple(PROVIDERS[case.operation]) if names is None else names
    yield from _measure_directions(case, device, rounds, directions, names, timer or make_timer(device))
    release(device)  # once all that holds the inputs is gone


def _measure_directions(
    case: OpCase,
    device: torch.device,
    rounds: int,
    directions: tuple[str, ...],
    names: tuple[str, ...],
    timer: Timer,
) -> Iterator[Row]:
    inputs = Inputs(case, device)
    for direction in directions:
        rows = {name: _empty_row(case, direction, name) for name in names}
        calls: dict[str, Callable[[], Any]] = {}
        for name in names:
            with failing(rows[name]):
                calls[name] = prepare(inputs, name, direction)
        plain = _plain_calls(inputs, calls, direction)
        samples = timed(calls | plain, rows, timer, rounds)
        for name, call in calls.items():
            if rows[name]["status"] == "ok":
                with failing(rows[name]):
                    rows[name] |= _measured(case, direction, call, figures(name, samples), timer, device)
                    if name + _PLAIN in samples:
                        rows[name]["plain_peak_mib"] = peak_memory(plain[name + _PLAIN], device) / 2**20
        _record_clocks(calls, rows, device)
        yield from rows.values()


def _plain_calls(inputs: Inputs, names: Iterable[str], direction: str) -> dict[str, Callable[[], Any]]:
    """The providers' calls of the case without its options, where it has any."""
    without = inputs.without_options()
    if without is None:
        return {}
    providers = PROVIDERS[without.case.operation]
    return {
        name + _PLAIN: without.call(providers[name](without.case, inputs.device), direction) for name in names
    }


def _empty_row(case: OpCase, direction: str, name: str) -> Row:
    row = {"operation": case.operation, "case": case.name, "shape": shape_of(case), "direction": direction}
    note = NOTES.get((case.operation, name, direction))
    return {**row, "provider": name, "status": "ok", **({"note": note} if note else {})}


def timed(
    calls: Mapping[str, Callable[[], Any]], rows: Mapping[str, Row], timer: Timer, rounds: int
) -> dict[str, list[float]]:
    """Samples of the calls in interleaved rounds; an error is the result of that provider's row."""

    def dropped(name: str, error: Exception) -> None:
        record_failure(rows[name.removesuffix(_AGAIN).removesuffix(_PLAIN)], error)

    return interleave(with_repeat(calls), timer, rounds, dropped=dropped)


def _measured(
    case: OpCase, direction: str, call: Callable[[], Any], found: Row, timer: Timer, device: torch.device
) -> Row:
    """A row's figures with what a call needs beside its time."""
    found = found | rates(case, direction, found["median_ms"])
    if waits_for_device(timer, call):
        found["waits_for_device"] = True
    found["host_us"] = host_time(call, device)
    found["peak_mib"] = peak_memory(call, device) / 2**20
    return found


def _record_clocks(
    calls: Mapping[str, Callable[[], Any]], rows: Mapping[str, Row], device: torch.device
) -> None:
    """Clocks under load into all rows, read once, as reading takes longer than timing: under the fastest call."""
    ran = [name for name in calls if rows[name]["status"] == "ok"]
    if ran:
        fastest = min(ran, key=lambda name: float(rows[name]["median_ms"]))
        with failing(rows[fastest]):
            found = clocks_under_load(calls[fastest], rows[fastest]["median_ms"], device)
            for name in ran:
                rows[name] |= found


def with_repeat(calls: Mapping[str, Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    """The calls, and PyTorch's once more (the naive one's where it is not there), which shows the noise."""
    for baseline in reversed(BASELINES):
        if baseline in calls:
            return {**calls, baseline + _AGAIN: calls[baseline]}
    return dict(calls)


def figures(name: str, samples: dict[str, list[float]]) -> Row:
    """Median, quartiles and the ratio to each baseline that was timed in the same rounds.

    `time_vs_itself` is there for the provider that was timed twice: any distance from 1 is noise. `time_vs_plain` is
    there for a case with options: the time over that without them.
    """
    summary = summarize(samples[name])
    row: Row = {
        "median_ms": summary.median,
        "low_ms": summary.low,
        "high_ms": summary.high,
        "rounds": summary.count,
    }
    others = {baseline: baseline for baseline in BASELINES}
    others |= {"itself": name + _AGAIN, "plain": name + _PLAIN}
    for label, other in others.items():
        if other in samples:
            ratio = time_ratio(samples[name], samples[other])
            row |= {
                f"time_vs_{label}": ratio.value,
                f"time_vs_{label}_low": ratio.low,
                f"time_vs_{label}_high": ratio.high,
            }
    return row


def clocks_under_load(call: Callable[[], Any], milliseconds: float, device: torch.device) -> Row:
    """MHz of the multiprocessors and of the memory while a GPU runs the call; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    for _ in range(max(1, min(1000, math.ceil(_LOAD_MS / milliseconds)))):
        call()
    found = clocks(device)
    synchronize(device)
    return found


def rates(case: OpCase, direction: str, milliseconds: float) -> Row:
    """TFLOP/s and GB/s by the operation's formulas."""
    cost = operation_cost(case, direction)
    return {"tflops": cost.tflops(milliseconds), "gbytes_per_s": cost.gbytes(milliseconds)}


def host_time(call: Callable[[], Any], device: torch.device, repeats: int = 5) -> float | None:
    """Microseconds until a call returns to the host with its work queued; None where the host does the work."""
    if device.type != "cuda":
        return None
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e6)
    synchronize(device)
    return statistics.median(times)


def release(device: torch.device) -> None:
    """Gives memory back before the next case, so that one case's peak is not another's out-of-memory."""
    gc.collect()
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
