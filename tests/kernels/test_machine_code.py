"""The machine code of every shipped kernel, compiled without a GPU: no spills, tensor cores, memory in bounds.

One test an architecture, so that nothing is compiled twice however the tests are shared out among processes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import triton

from tests.compiling import run_compiling, run_inspect

ARCHS = ("sm_80", "sm_90", "gfx942")
PRODUCTS = ("attention_forward", "attention_dq", "attention_dk_dv", "linear_activation")


@pytest.mark.parametrize("arch", ARCHS)
def test_every_shipped_kernel(arch: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    done = run_inspect("--check", "--arch", arch, "--json", path)
    assert path.exists(), done.stderr
    rows = json.loads(path.read_text())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    check_that_all_are_there(rows)
    check_tensor_cores(rows, arch)


def check_that_all_are_there(rows: list[dict[str, Any]]) -> None:
    kernels = {row["kernel"] for row in rows}
    assert {"attention_forward", "attention_delta", "attention_dq", "attention_dk_dv"} <= kernels
    assert {"attention_combine"} <= kernels
    assert {"attention_dbias", "cross_entropy_forward", "cross_entropy_backward", "reduce_losses"} <= kernels
    assert {"norm_forward", "norm_backward", "norm_row_means", "sum_partials"} <= kernels
    assert {"gelu_forward", "gelu_backward", "rotary"} <= kernels
    assert {"gated_forward", "gated_backward"} <= kernels
    assert {"bias_activation_forward", "bias_activation_backward"} <= kernels
    assert {"linear_activation", "linear_activation#2"} <= kernels
    quantizes = {"quantize_statistics", "quantize_keys", "quantize_queries"}
    assert kernels & quantizes == (quantizes if any(row["arch"] == "sm_90" for row in rows) else set())
    assert not [row for row in rows if row["error"] or row["registers"] == 0 or row["programs"] == 0]


def check_tensor_cores(rows: list[dict[str, Any]], arch: str) -> None:
    """16-bit products run on them; on sm_90 by Hopper's own instruction: HMMA there is the slow path."""
    products = [row for row in rows if row["kernel"].partition("#")[0] in PRODUCTS and "bf16" in row["case"]]
    e4m3 = [row for row in products if "e4m3" in row["case"]]
    assert {kind for row in e4m3 for kind in row["tensor_cores"]} == ({"QGMMA"} if arch == "sm_90" else set())
    products = [row for row in products if row not in e4m3]
    kinds = {kind for row in products for kind in row["tensor_cores"]}
    assert kinds == {"sm_80": {"HMMA"}, "sm_90": {"HGMMA"}, "gfx942": {"MFMA"}}[arch]
    assert all(row["loop_tensor_cores"] for row in products)


def test_the_compiler_is_that_of_the_tests() -> None:
    """`make oldest` puts another Triton before the one that is installed."""
    done = run_compiling("-c", "import triton; print(triton.__version__, triton.__file__)")
    assert done.stdout.split() == [triton.__version__, triton.__file__]


def test_a_planted_spill_fails_the_check() -> None:
    """The check can fail: a tile far too large for its registers is reported as spilling."""
    script = (
        "from benchmarks.inspection import launches_of, inspect_launch, shipped_cases\n"
        "from benchmarks.inspection.rows import failures\n"
        "case = next(c for c in shipped_cases() if c.operation == 'attention' and c.head_dim == 64)\n"
        "launch = launches_of(case, 'sm_80')[0]\n"
        "launch.arguments.update(num_warps=2, num_stages=1)\n"
        "print(*failures([inspect_launch('planted', 'sm_80', launch)]))\n"
    )
    done = run_compiling("-c", script)
    assert "sm_80 planted attention_forward: spills, " in done.stdout, done.stderr


def test_every_tile_of_the_tables_is_compiled() -> None:
    """16 bits on sm_80 and sm_90: a tile that no shipped case takes could spill, and nobody would see it."""
    done = run_compiling("-m", "tests.kernels.uncompiled_tiles", "sm_80", "sm_90")
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr
