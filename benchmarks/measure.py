"""One case, every provider: checked against the reference, then timed in interleaved rounds; one row each."""

from __future__ import annotations

import gc
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import OpCase, shape_of
from benchmarks.costs import operation_cost
from benchmarks.environment import clocks
from benchmarks.memory import peak_memory
from benchmarks.providers import BASELINES, PROVIDERS, Absent, Function
from benchmarks.timing import Timer, interleave, make_timer, summarize, synchronize, time_ratio
from fastattn import NotSupported
from fastattn.testing import assert_accurate, make_tensor

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
        self.tensors = self.case.inputs(self.device)
        self._kept = [tensor.detach().clone() for tensor in self.tensors]
        with torch.no_grad():
            out = self.case.reference(*(torch.empty_like(t, device="meta") for t in self.tensors))
        self.grad_output = make_tensor(*out.shape, dtype=out.dtype, device=self.device, seed=9)
        grad, *tensors = self.case.sample((self.grad_output, *(t.detach() for t in self.tensors)))
        reference, part = self.case.reference, self.case.part
        self._truth = part(_run_both(reference, [t.double() for t in tensors], grad.double()))
        self._peer = part(_run_both(reference, tensors, grad))

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
        results = self.case.part(self.call(function, direction)())
        self._restore_overwritten()
        names = ("output", *(f"gradient {index}" for index in range(len(self.tensors))))
        rows = math.prod(self.tensors[0].shape[:-1])
        for name, actual, peer, truth in zip(names, results, self._peer, self._truth, strict=False):
            # A parameter's gradient is a sum over all rows, and its rounding grows with their root.
            of_parameter = 1 <= actual.dim() <= 2 and name not in ("output", "gradient 0")
            assert_accurate(actual, peer, truth, name=name, growth=math.sqrt(rows) if of_parameter else 1.0)

    def _restore_overwritten(self) -> None:
        """Asserts that the inputs are what they were; they are again in any case, for the next provider."""
        changed = [i for i, (t, k) in enumerate(zip(self.tensors, self._kept, strict=True)) if not t.equal(k)]
        for index in changed:
            self.tensors[index].data.copy_(self._kept[index])
        assert not changed, f"it overwrote input {changed[0]}"


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
    except Absent:
        raise
    except (NotSupported, ImportError) as refusal:
        raise Absent(first_line(refusal)) from refusal
    except AssertionError as error:
        raise Failed("wrong", first_line(error)) from error
    except torch.OutOfMemoryError as error:
        raise Failed("out of memory", "out of memory") from error
    except Exception as error:  # whatever a kernel raises is that row's result, and the next row runs
        if isinstance(error, RuntimeError) and _REFUSED.search(str(error)):
            raise Absent(first_line(error)) from error
        raise Failed("failed", f"{type(error).__name__}: {first_line(error)}") from error
    return inputs.call(function, direction)


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
    timer = timer or make_timer(device)
    names = tuple(PROVIDERS[case.operation]) if names is None else names
    inputs = Inputs(case, device)
    for direction in directions:
        rows: dict[str, Row] = {}
        calls: dict[str, Callable[[], Any]] = {}
        for name in names:
            rows[name] = {
                "operation": case.operation,
                "case": case.name,
                "shape": shape_of(case),
                "direction": direction,
                "provider": name,
                "status": "ok",
            }
            try:
                calls[name] = prepare(inputs, name, direction)
            except Absent as absence:
                rows[name] |= {"status": "absent", "reason": str(absence)}
            except Failed as failure:
                rows[name] |= {"status": failure.status, "reason": failure.reason}
        samples = interleave(with_repeat(calls), timer, rounds)
        for name, call in calls.items():
            rows[name] |= figures(name, samples)
            rows[name] |= rates(case, direction, rows[name]["median_ms"])
            rows[name] |= clocks_under_load(call, rows[name]["median_ms"], device)
            rows[name]["host_us"] = host_time(call, device)
            rows[name]["peak_mib"] = peak_memory(call, device) / 2**20
        yield from rows.values()
    del inputs
    release(device)


def with_repeat(calls: dict[str, Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    """The calls, and PyTorch's once more (the naive one's where it is not there), which shows the noise."""
    for baseline in reversed(BASELINES):
        if baseline in calls:
            return {**calls, baseline + _AGAIN: calls[baseline]}
    return calls


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
