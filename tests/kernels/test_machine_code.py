"""The machine code of every shipped kernel, compiled without a GPU: no spills, tensor cores, memory in bounds.

Compiled in processes without the interpreter, which would take the compiler's place.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
ARCHS = ("sm_80", "sm_90", "gfx942")


def _compiling(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module", params=ARCHS)
def inspected(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[subprocess.CompletedProcess[str], list[dict[str, Any]]]:
    """The finished command and its rows, one a kernel."""
    path = tmp_path_factory.mktemp("machine_code") / "rows.json"
    done = _compiling("-m", "benchmarks", "inspect", "--check", "--arch", request.param, "--json", str(path))
    assert path.exists(), done.stderr
    return done, json.loads(path.read_text())


def test_nothing_spills_misses_its_tensor_cores_or_has_grown(inspected: Any) -> None:
    done, _ = inspected
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr


def test_every_kernel_is_compiled(inspected: Any) -> None:
    _, rows = inspected
    kernels = {row["kernel"] for row in rows}
    assert {"attention_forward", "attention_delta", "attention_dq", "attention_dk_dv"} <= kernels
    assert {"norm_forward", "norm_backward", "norm_row_means", "sum_partials"} <= kernels
    assert {"gelu_forward", "gelu_backward", "rotary"} <= kernels
    assert {"gated_forward", "gated_backward"} <= kernels
    assert {"bias_activation_forward", "bias_activation_backward"} <= kernels
    assert {"linear_activation", "linear_activation#2"} <= kernels
    assert not [row for row in rows if row["error"] or row["registers"] == 0 or row["programs"] == 0]


def test_16_bit_products_run_on_tensor_cores(inspected: Any) -> None:
    """Hopper's own instruction on sm_90: HMMA there is the slow path."""
    _, rows = inspected
    kernels = ("attention_forward", "attention_dq", "attention_dk_dv", "attention_dk_dv#2")
    kernels += ("linear_activation", "linear_activation#2")
    products = [row for row in rows if row["kernel"] in kernels and "bf16" in row["case"]]
    kinds = {kind for row in products for kind in row["tensor_cores"]}
    assert kinds == {"sm_80": {"HMMA"}, "sm_90": {"HGMMA"}, "gfx942": {"MFMA"}}[rows[0]["arch"]]
    assert all(row["loop_tensor_cores"] for row in products)


def test_a_planted_spill_fails_the_check() -> None:
    """The check can fail: a tile far too large for its registers is reported as spilling."""
    script = (
        "from benchmarks.inspection import launches_of, inspect_launch, shipped_cases\n"
        "from benchmarks.inspection.rows import failures\n"
        "case = next(c for c in shipped_cases() if c.operation == 'attention' and c.head_dim == 128)\n"
        "launch = launches_of(case, 'sm_90')[0]\n"
        "launch.arguments.update(BLOCK_M=256, BLOCK_N=128, num_warps=4)\n"
        "print(*failures([inspect_launch('planted', 'sm_90', launch)]))\n"
    )
    done = _compiling("-c", script)
    assert "sm_90 planted attention_forward: spills, " in done.stdout, done.stderr
