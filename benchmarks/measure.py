"""One case, every provider: checked against the reference, then timed in interleaved rounds; one row each."""

from __future__ import annotations

import gc
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import OpCase, draw, shape_of
from benchmarks.costs import operation_cost
from benchmarks.environment import clocks
from benchmarks.memory import peak_memory
from benchmarks.providers import BASELINES, NOTES, PROVIDERS, Absent, Function
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
from fastattn.testing import assert_accurate

Row = dict[str, Any]

DIRECTIONS = ("forward", "forward+backward")

# A baseline's call that is timed a second time in the same rounds: how far its two times lie apart is noise.
_AGAIN = " again"
# Clocks are read while this much work is queued: the tool that reads them takes a few tens of milliseconds.
_LOAD_MS = 250.0


@dataclass
class Inputs:
    """A case's tensors, and what every result is checked against; made once, shared by all providers."""

    case: OpCase
    device: torch.device
    tensors: tuple[Tensor, ...] = field(init=False)
    grad_output: Tensor = field(init=False)

    def __post_init__(self) -> None:
        # Each case compiles anew: without this the ninth would silently run eagerly, and with it in a provider, the
        # provider before would lose its code.
        torch._dynamo.reset()
        self.tensors = self.case.inputs(self.device)
        with torch.no_grad():
            out = self.case.reference(*(torch.empty_like(t, device="meta") for t in self.tensors))
        if out.dim() == 0:  # a loss, whose backward() begins with 1; kernels may take that for granted
            self.grad_output = torch.ones((), dtype=out.dtype, device=self.device)
        else:
            self.grad_output = draw(*out.shape, dtype=out.dtype, device=self.device, seed=9).detach()
        self._kept = [t.detach().clone() for t in (*self.tensors, self.grad_output)]
        self._truth = self._expected(torch.float64)
        self._peer = self._expected(None)

    def _expected(self, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
        """What is compared of the formula's result and gradients, in this dtype or the case's own."""
        given = (self.grad_output, *(t.detach() for t in self.tensors))
        pieces = [
            _run_both(
                self.case.reference, [t.to(dtype or t.dtype) for t in tensors], grad.to(dtype or grad.dtype)
            )
            for grad, *tensors in self.case.samples(given)
        ]
        whole = pieces[0] if len(pieces) == 1 else tuple(torch.cat(t) for t in zip(*pieces, strict=True))
        # A view would keep all of a large float64 tensor alive while providers are timed.
        return tuple(t.clone() for t in self.case.part(whole))

    def call(self, function: Function, direction: str) -> Callable[[], tuple[Tensor, ...]]:
        """The function on these inputs, without a graph, or with the gradients of every input."""
        if direction == "forward":

            def forward() -> tuple[Tensor, ...]:
                with torch.no_grad():
                    return (function(*self.tensors),)

            return forward

        def forward_backward() -> tuple[Tensor, ...]:
            out = function(*self.tensors)
            return (out, *torch.autograd.grad(out, self.tensors, self.grad_output))

        return forward_backward

    def check(self, function: Function, direction: str) -> None:
        """Asserts that the result, and the gradients where asked for, are as exact as the naive formula's."""
        try:
            results = self.call(function, direction)()
        finally:
            overwritten = self._restore_overwritten()
        assert not overwritten, f"it overwrote {overwritten[0]}"
        names = ("output", *(f"gradient {index}" for index in range(len(self.tensors))))
        for name, result, like in zip(names, results, (self.grad_output, *self.tensors), strict=False):
            _check_whole(name, result, like)
        rows = math.prod(self.tensors[0].shape[:-1])
        compared = self.case.part(results)
        for name, actual, peer, truth in zip(names, compared, self._peer, self._truth, strict=False):
            # A parameter's gradient is a sum over all rows, and its rounding grows with their root.
            of_parameter = 1 <= actual.dim() <= 2 and name not in ("output", "gradient 0")
            assert_accurate(actual, peer, truth, name=name, growth=math.sqrt(rows) if of_parameter else 1.0)

    def _restore_overwritten(self) -> list[str]:
        """Makes what every provider is given what it was again, and names what was not."""
        names = (*(f"input {index}" for index in range(len(self.tensors))), "the output's gradient")
        changed = []
        for name, tensor, kept in zip(names, (*self.tensors, self.grad_output), self._kept, strict=True):
            if not tensor.equal(kept):
                tensor.data.copy_(kept)
                changed.append(name)
        return changed


def _check_whole(name: str, result: Tensor, like: Tensor) -> None:
    """Asserts of a whole result what can be seen without its truth, of which only a part is computed."""
    assert result.shape == like.shape, f"{name} has shape {tuple(result.shape)}, not {tuple(like.shape)}"
    assert result.dtype == like.dtype, f"{name} has {result.dtype}, not {like.dtype}"
    assert result.isfinite().all(), f"{name} holds infinities or NaN"


class Failed(Exception):
    """A provider ran and did not do its work: "wrong", "out of memory" or "failed", and why."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(f"{status}: {reason}")
        self.status, self.reason = status, reason


# How PyTorch says that a forced back end does not take a call, and that there is no compiler.
_REFUSED = re.compile(r"No available kernel|C\+\+ compiler|InvalidCxxCompiler")


def _run_both(function: Function, tensors: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    leaves = tuple(t.detach().requires_grad_() for t in tensors)
    out = function(*leaves)
    return (out.detach(), *torch.autograd.grad(out, leaves, grad))


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
        samples = timed(calls, rows, timer, rounds)
        for name, call in calls.items():
            if rows[name]["status"] == "ok":
                with failing(rows[name]):
                    rows[name] |= _measured(case, direction, call, figures(name, samples), timer, device)
        _record_clocks(calls, rows, device)
        yield from rows.values()


def _empty_row(case: OpCase, direction: str, name: str) -> Row:
    row = {"operation": case.operation, "case": case.name, "shape": shape_of(case), "direction": direction}
    note = NOTES.get((case.operation, name, direction))
    return {**row, "provider": name, "status": "ok", **({"note": note} if note else {})}


def timed(
    calls: Mapping[str, Callable[[], Any]], rows: Mapping[str, Row], timer: Timer, rounds: int
) -> dict[str, list[float]]:
    """Samples of the calls in interleaved rounds; an error is the result of that provider's row."""

    def dropped(name: str, error: Exception) -> None:
        record_failure(rows[name.removesuffix(_AGAIN)], error)

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

    `time_vs_itself` is there for the provider that was timed twice: any distance from 1 is noise.
    """
    summary = summarize(samples[name])
    row: Row = {
        "median_ms": summary.median,
        "low_ms": summary.low,
        "high_ms": summary.high,
        "rounds": summary.count,
    }
    others = {baseline: baseline for baseline in BASELINES} | {"itself": name + _AGAIN}
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
