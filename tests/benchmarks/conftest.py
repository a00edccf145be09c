"""What the tests of the benchmarks share."""

import gc
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks.cases import GeluCase, OpCase
from benchmarks.host import measure_import
from benchmarks.measure import DIRECTIONS, Inputs, prepare
from benchmarks.providers import PROVIDERS, provider, registry
from benchmarks.suites import SUITES, Suite
from fastattn import dispatch


@pytest.fixture(autouse=True)
def only_own_garbage() -> Iterator[None]:
    """A measurement collects garbage before each call: among what its test has made, not in all of PyTorch."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the benchmarks run on a CPU: without Triton's interpreter, which the other tests need."""
    monkeypatch.setattr(dispatch, "INTERPRETING", False)


@pytest.fixture
def small_suites(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cases that cost nothing, ceilings nobody measures, one import instead of five, no kernels compiled."""
    suite = Suite("mlp", "small", cpu=(GeluCase(3, 8), GeluCase(4, 8)), gpu=())
    monkeypatch.setitem(SUITES, "mlp", suite)
    ceiling = {
        "operation": "ceiling",
        "direction": "forward",
        "provider": "torch",
        "status": "ok",
        "median_ms": 1.0,
    }
    ceiling |= {"low_ms": 1.0, "high_ms": 1.0, "rounds": 1}
    ceilings = [ceiling | {"case": "copy", "gbytes_per_s": 4.0}, ceiling | {"case": "matmul", "tflops": 2.0}]
    monkeypatch.setattr("benchmarks.run.measure_ceilings", lambda device, rounds: iter(ceilings))
    monkeypatch.setattr("benchmarks.run.measure_import", lambda: measure_import(rounds=1))
    monkeypatch.setattr("benchmarks.run.launch_rows", lambda rounds: iter(()))


@pytest.fixture
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """For runs whose rows are looked at: the page's plots take seconds, and an error in them fails no run."""
    monkeypatch.setattr("benchmarks.html_report.write_html", lambda path, content: None)


@pytest.fixture
def extra_provider():
    """Registers a provider for one test."""
    added = []

    def add(operation, name, function):
        provider(operation, name)(function)
        added.append((operation, name))

    yield add
    for operation, name in added:
        del PROVIDERS[operation][name]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a module with these members where an import finds it, and lets peers run without a GPU."""

    class Gpu:
        type = "cuda"

    real = registry.import_peer
    monkeypatch.setattr(registry, "import_peer", lambda module, device: real(module, Gpu))  # type: ignore[arg-type]

    def put(name: str, **members: Any) -> None:
        module = ModuleType(name)
        vars(module).update(members)
        parts = name.split(".")
        for end in range(1, len(parts)):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(parts[end - 1]))
        monkeypatch.setitem(sys.modules, name, module)

    return put


def agrees(case: OpCase, name: str) -> None:
    """Asserts that a provider's results and gradients are the case's."""
    inputs = Inputs(case, torch.device("cpu"))
    for direction in DIRECTIONS:
        prepare(inputs, name, direction)
