"""The host's cost above the launch: the stand-in for a device, in a process without Triton's interpreter."""

import io
import os
import subprocess
import sys

import pytest
from rich.console import Console

from benchmarks import launch_cost, report
from benchmarks.environment import REPOSITORY

pytest.importorskip("triton")


def test_rows_of_an_operation_without_a_device():
    rows = list(launch_cost.launch_rows(("gelu",), rounds=3))
    assert [(row["case"], row["direction"], row["status"]) for row in rows] == [
        ("gelu", "forward", "ok"),
        ("gelu", "forward+backward", "ok"),
    ]
    forward, both = rows
    # An operator's call and an allocation are some microseconds; milliseconds would be a compilation, or a kernel run.
    assert 1 < forward["least_us"] < both["least_us"] < 2000
    assert forward["empty_us"] < forward["least_us"] <= forward["median_us"]
    assert forward["triton_us"] > 0 and both["triton_us"] > 0
    console = Console(width=200, file=io.StringIO())
    report.print_rows(rows, console)
    assert "without a GPU" in console.file.getvalue() and "gelu" in console.file.getvalue()


NOTHING_LEFT = """
import torch, fastattn
from benchmarks import launch_cost
from fastattn import dispatch
from fastattn.kernels import _target
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from fastattn.ops import _loss, _norm_call, _rotary_call

def state():
    checks = [module.checking for module in (_loss, _norm_call, _rotary_call)]
    return [driver._active, dispatch.INTERPRETING, dispatch.interpreter_multiplies_bfloat16, _target.target_of,
            JITFunction.__getitem__, JITFunction.run, *checks]

before = state()
x = torch.ones(4)
with launch_cost.without_device():
    assert fastattn.explain(fastattn.gelu, x).implementation == "triton"
    with launch_cost.without_launches():
        assert fastattn.gelu(x).shape == x.shape
    assert JITFunction.__getitem__ is before[4]
assert state() == before, "something is left patched"
assert fastattn.explain(fastattn.gelu, x).implementation == "torch"
"""


def test_nothing_is_left_patched():
    subprocess.run(
        [sys.executable, "-c", NOTHING_LEFT],
        cwd=REPOSITORY,
        env=os.environ | {"TRITON_INTERPRET": "0"},
        check=True,
    )


def test_a_machine_that_cannot_compile_is_a_row():
    (row,) = launch_cost.launch_rows(("gelu",), rounds=1, timeout=0.01)
    assert (row["status"], row["reason"]) == ("absent", "not measured within 0.01 s")
