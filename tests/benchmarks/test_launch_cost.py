"""The host's cost above the launch: the stand-in for a device, in a process without Triton's interpreter."""

import io
import json
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
    # A launch by Triton and two.
    assert 0 < forward["triton_us"] < both["triton_us"]
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


# Forward, and with gradients: what there were with Python 3.11 and PyTorch 2.13 and a tenth, in which other versions
# differ. Each call of Python is about 0.1 us.
MOST_CALLS = {
    "layer_norm": (26, 127),
    "rms_norm": (26, 125),
    "add_layer_norm": (30, 140),
    "attention": (28, 222),
    "attention_step": (85, None),
    "cross_entropy": (46, 100),
    "rotary_embedding": (56, 143),
    "rotary_embedding_qk": (64, 152),
    "swiglu": (32, 87),
    "bias_gelu": (31, 94),
    "gelu": (28, 75),
    "mlp": (37, 102),
    "linear_cross_entropy": (86, 162),
}


def test_calls_of_python_do_not_creep():
    """Host cost without a clock: a new check, or a plan that is not kept, is some calls more."""
    command = [sys.executable, "-m", "benchmarks.launch_cost", "--calls", "--json"]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, check=True, capture_output=True, text=True
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    found = {(row["case"], row["direction"]): row["calls"] for row in rows}
    bounds = {
        (case, direction): most
        for case, both in MOST_CALLS.items()
        for direction, most in zip(("forward", "forward+backward"), both, strict=True)
        if most is not None
    }
    assert found.keys() == bounds.keys()
    assert {key: count for key, count in found.items() if count > bounds[key]} == {}
