"""The machine code of every shipped kernel, compiled without a GPU: no spills, tensor cores, memory in bounds."""

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


@pytest.fixture(scope="module", params=ARCHS)
def rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """One row a kernel, from a process without the interpreter, which would replace the compiler."""
    path = tmp_path_factory.mktemp("machine_code") / "rows.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.inspection", "--arch", request.param, "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text())


def test_every_kernel_compiles(rows: list[dict[str, Any]]) -> None:
    assert not [(row["case"], row["kernel"], row["error"]) for row in rows if row["error"]]
    kernels = {row["kernel"] for row in rows}
    for family in ("attention_forward", "attention_dq", "attention_dk_dv", "gelu_forward", "gelu_backward"):
        assert family in kernels
    assert any(kernel.startswith("layer_norm_forward") for kernel in kernels)
    assert any(kernel.startswith("layer_norm_backward") for kernel in kernels)


def test_nothing_spills(rows: list[dict[str, Any]]) -> None:
    spilling = [row for row in rows if row["spill_loads"] or row["spill_stores"]]
    assert not [(row["case"], row["kernel"], row["spill_loads"], row["spill_stores"]) for row in spilling]


def test_shared_memory_is_within_the_limit(rows: list[dict[str, Any]]) -> None:
    assert not [
        (row["case"], row["kernel"], row["shared"]) for row in rows if row["shared"] > row["shared_limit"]
    ]
    assert any(row["shared"] > 0 for row in rows)


def test_16_bit_products_run_on_tensor_cores(rows: list[dict[str, Any]]) -> None:
    """Hopper's own instruction on sm_90: HMMA there is the slow path."""
    products = [
        row for row in rows if row["kernel"] in ("attention_forward", "attention_dq", "attention_dk_dv")
    ]
    sixteen_bit = [row for row in products if "bf16" in row["case"]]
    assert sixteen_bit
    for row in sixteen_bit:
        if row["arch"] == "sm_90":
            assert row["hgmma"] > 0 and row["hmma"] == 0, row
        else:
            assert row["hmma"] > 0, row


def test_a_planted_spill_is_seen() -> None:
    """The check above can fail: a tile far too large for its registers is reported as spilling."""
    script = (
        "import dataclasses, torch\n"
        "from benchmarks import inspection\n"
        "with inspection.record_launches('sm_90') as launches:\n"
        "    inspection.shipped_cases()['attention-bf16-top_left-d128']()\n"
        "launch = launches[0]\n"
        "launch.arguments.update(BLOCK_M=256, BLOCK_N=128, num_warps=4)\n"
        "print(inspection.inspect_launch('planted', 'sm_90', launch).spill_loads)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) > 100
