"""Launches that are kept: the same code on the same arguments as Triton's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="what is launched is Triton's")

import fastattn
from fastattn.kernels import _launch, _target
from fastattn.kernels._launch import launch
from fastattn.kernels._plan import Constants, constants_of, forget_plans
from fastattn.kernels._target import INTERPRETER, KNOWN_TARGETS
from fastattn.kernels.gelu import _plan
from tests.compiling import run_compiling


def test_kept_launches_are_those_of_triton() -> None:
    """Of kernels of all kinds, with other addresses, strides, dtypes, tensors left out, on constants that are kept."""
    done = run_compiling("-m", "tests.kernels.launch_twice")
    assert done.returncode == 0, done.stderr[-2000:]
    compared, kept = map(int, done.stdout.split())
    assert compared > 700 and kept > 0.75 * compared


class _Kernel:
    """Stands for a kernel of two arguments, and keeps what Triton would be given."""

    def __init__(self) -> None:
        self.arg_names = ["x", "WIDTH"]
        self.params = [SimpleNamespace(name=n, is_constexpr=n.isupper()) for n in self.arg_names]
        self.pre_run_hooks: list[Any] = []
        self.given: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda **arguments: self.given.append(arguments)


def _keep(kernel: _Kernel, constants: Constants, x: Any) -> list[tuple[Any, ...]]:
    """As if x had been launched with; what is launched from then on."""
    launched: list[tuple[Any, ...]] = []
    key = _launch._key(kernel, (1,), None, None, {"x": x})
    constants.launched[key] = (
        lambda *values: launched.append(values),
        lambda found: (found["x"], found["WIDTH"]),
    )
    return launched


def test_what_other_arguments_were_compiled_for_is_not_launched() -> None:
    kernel, constants = _Kernel(), Constants(WIDTH=3)
    launched = _keep(kernel, constants, 32)
    for x in (64, 33, 1, 1 << 40):
        launch(kernel, (1,), constants, x=x)
    launch(kernel, (2,), constants, x=64)
    launch(_Kernel(), (1,), constants, x=64)
    assert launched == [(64, 3)]
    assert kernel.given == [{"WIDTH": 3, "x": x} for x in (33, 1, 1 << 40, 64)]


def test_hooks_before_a_launch_are_triton_s_to_call() -> None:
    kernel, constants = _Kernel(), Constants(WIDTH=3)
    launched = _keep(kernel, constants, 32)
    kernel.pre_run_hooks.append(print)
    launch(kernel, (1,), constants, x=32)
    assert launched == [] and len(kernel.given) == 1


def test_who_listens_to_triton_s_launches_hears_all() -> None:
    kernel, constants = _Kernel(), Constants(WIDTH=3)
    launched = _keep(kernel, constants, 32)
    with _launch.nothing_kept():
        launch(kernel, (1,), constants, x=32)
    assert launched == [] and len(kernel.given) == 1
    launch(kernel, (1,), constants, x=32)
    assert launched == [(32, 3)] and len(kernel.given) == 1


LISTENED = """
import torch, fastattn
from benchmarks.inspection.launches import record_launches
from benchmarks.launch_cost import without_device
from benchmarks.tuning.bench import running_launches

x, weight, target = torch.ones(16, 32), torch.ones(24, 32), torch.arange(16)
with without_device(), torch.no_grad():
    def call():
        fastattn.gelu(x)
        fastattn.linear_cross_entropy(x, weight, target, memory_budget=1)
    call()
    call()
    with running_launches() as launches:
        call()
    print([launch.name for launch in launches])
    with record_launches("sm_90") as launches:
        call()
    print([launch.name for launch in launches])
"""


def test_tuner_and_inspector_hear_launches_that_are_kept() -> None:
    """They listen to Triton's, and heard the first of 16 chunks alone, or of a shape that came before none."""
    done = run_compiling("-c", LISTENED)
    assert done.returncode == 0, done.stderr[-2000:]
    expected = ["gelu_forward", *16 * ["cross_entropy_forward"], "reduce_losses"]
    assert done.stdout.splitlines() == 2 * [str(expected)]


def test_arguments_go_before_constants() -> None:
    kernel = _Kernel()
    launch(kernel, (1,), Constants(WIDTH=3), x=1, WIDTH=4)
    assert kernel.given == [{"x": 1, "WIDTH": 4}]


def test_without_triton_s_function_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later Triton may have another: then its own launches are what there is."""
    assert _launch._find_kind_of() is not None
    monkeypatch.setattr("triton._C.libtriton.native_specialize_impl", lambda *arguments: ("i32", "16"))
    assert _launch._find_kind_of() is None
    monkeypatch.setattr("triton._C.libtriton.native_specialize_impl", lambda argument: ("i32", "D"))
    assert _launch._find_kind_of() is None
    monkeypatch.delattr("triton._C.libtriton.native_specialize_impl")
    assert _launch._find_kind_of() is None


def test_constants_live_as_long_as_their_plans() -> None:
    target = KNOWN_TARGETS["sm_90"]
    found = constants_of(target, WIDTH=3)
    assert (
        constants_of(target, WIDTH=3) is found and constants_of(KNOWN_TARGETS["sm_80"], WIDTH=3) is not found
    )
    assert found.only(("WIDTH",)) is found.only(("WIDTH",)) and found.only(()) == {}
    forget_plans()
    assert constants_of(target, WIDTH=3) is not found


def test_the_interpreter_keeps_nothing(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("the interpreter's")
    x = torch.ones(5)
    fastattn.gelu(x, implementation="triton")
    _, constants = _plan(5, x.dtype, 1, "none", INTERPRETER)
    assert constants["SIZE"] == 5 and constants.launched == {}


@pytest.mark.gpu
def test_a_gpu_s_launches_are_kept() -> None:
    x = torch.randn(37, device="cuda")
    expected = torch.nn.functional.gelu(x)
    for _ in range(3):
        torch.testing.assert_close(fastattn.gelu(x), expected)
        torch.testing.assert_close(
            fastattn.gelu(x.roll(1)[1:]), expected[:-1]
        )  # whose address 16 bytes do not divide
    _, constants = _plan(37, x.dtype, 1, "none", _target.target_of(x.device))
    assert len(constants.launched) == 1
    _, constants = _plan(36, x.dtype, 1, "none", _target.target_of(x.device))
    assert len(constants.launched) == 1


def test_the_allocator_of_the_caller_stays() -> None:
    """A kernel that makes descriptors finds an allocator during its launch; nobody else does."""
    from triton.runtime import _allocation

    before, seen = _allocation._allocator.get(), []

    def kernel(**arguments: object) -> None:
        seen.append((arguments, _allocation._allocator.get()))

    launch({(1,): kernel}, (1,), Constants(), scratch=torch.device("cpu"), x=3)
    launch({(1,): kernel}, (1,), Constants(), x=4)
    (found, allocator), (others, unset) = seen
    assert found == {"x": 3} and allocator(256, 128, None).numel() == 256
    assert others == {"x": 4} and unset is before is _allocation._allocator.get()
