"""What the pytest-benchmark files share: one measurement of a provider on a case, checked before it is timed.

python -m pytest benchmarks                 # every case for this machine's device
python -m pytest benchmarks -k "gelu and not compile" --benchmark-json=out.json
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.cases import OpCase
from benchmarks.costs import operation_cost
from benchmarks.environment import environment
from benchmarks.measure import DIRECTIONS, Failed, Inputs, prepare, release
from benchmarks.memory import peak_memory
from benchmarks.providers import PROVIDERS, Absent
from benchmarks.suites import operation_cases
from benchmarks.timing import CudaTimer, summarize, synchronize

_ROUNDS = 7
_WARMUP_ROUNDS = 2
# Cold-cache device times taken beside pytest-benchmark's wall-clock ones.
_DEVICE_SAMPLES = 20


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["fastattn"] = environment(_device())


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def device() -> torch.device:
    """The GPU where there is one."""
    return _device()


@pytest.fixture(scope="module")
def inputs_of() -> Callable[[OpCase], Inputs]:
    """The inputs of a case and the truth about it, kept until the next case."""
    last: list[Inputs] = []

    def inputs(case: OpCase) -> Inputs:
        if not last or last[0].case != case:
            last.clear()
            release(_device())
            last.append(Inputs(case, _device()))
        return last[0]

    return inputs


@pytest.fixture
def measure(benchmark: Any, inputs_of: Callable[[OpCase], Inputs]) -> Callable[[OpCase, str, str], None]:
    """Times a provider on a case in a direction; skips with the reason where it cannot run."""

    def run(case: OpCase, name: str, direction: str) -> None:
        inputs = inputs_of(case)
        try:
            call = prepare(inputs, name, direction)
        except Absent as absence:
            pytest.skip(f"absent: {absence}")
        except Failed as failure:
            if failure.status == "out of memory":
                pytest.skip("out of memory")
            raise
        time_call(benchmark, call, inputs.device)
        cost = operation_cost(case, direction)
        median_ms = benchmark.extra_info.get("device_ms", 0.0) or median_of(benchmark)
        benchmark.extra_info |= {
            "flops": cost.flops,
            "bytes": cost.bytes,
            "tflops": cost.tflops(median_ms),
            "gbytes_per_s": cost.gbytes(median_ms),
            "peak_bytes": peak_memory(call, inputs.device),
        }

    return run


def time_call(benchmark: Any, call: Callable[[], Any], device: torch.device) -> None:
    """pytest-benchmark's rounds of one call; on a GPU also device time from a cold L2, in extra_info."""

    def finished() -> None:
        call()
        synchronize(device)

    benchmark.pedantic(finished, rounds=_ROUNDS, warmup_rounds=_WARMUP_ROUNDS)
    if device.type == "cuda":
        timer = CudaTimer(device)
        summary = summarize([timer(call) for _ in range(_DEVICE_SAMPLES)])
        benchmark.extra_info |= {"device_ms": summary.median, "device_spread": summary.spread}


def median_of(benchmark: Any) -> float:
    """Milliseconds; 1 where --benchmark-disable left nothing to read."""
    return benchmark.stats.stats.median * 1e3 if benchmark.stats else 1.0


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Crosses the cases, directions and providers of a module's OPERATION."""
    operation = getattr(metafunc.module, "OPERATION", None)
    if operation not in PROVIDERS or "provider" not in metafunc.fixturenames:
        return
    cases = operation_cases(operation, _device())
    # The last one varies fastest: a case's providers follow each other and share its inputs.
    metafunc.parametrize("case", cases, ids=[case.name for case in cases])
    metafunc.parametrize("direction", DIRECTIONS)
    metafunc.parametrize("provider", list(PROVIDERS[operation]))
