"""The machine code of attention's forward by warp groups, compiled for sm_90 without a GPU."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.compiling import run_compiling

# A row of the inspector's and the operations of the loop without a mask, for each kernel.
SCRIPT = """
import json
from dataclasses import asdict
import torch
from benchmarks.cases import AttentionCase
from benchmarks.inspection.machine_code import _disassemble, _main_loop, _sass_tensor
from benchmarks.inspection.cases import launches_of
from benchmarks.inspection.rows import compile_row, failures, read_rows
found = []
for head_dim, causal, dtype in ((64, "top_left", "float16"), (128, "top_left", "bfloat16"), (256, False, "bfloat16")):
    case = AttentionCase(2, 8, 4096, head_dim, kv_heads=2, causal=causal, dtype=getattr(torch, dtype))
    launch = launches_of(case, "sm_90", form="warp_groups")[0]
    found.append(compile_row(str(head_dim), "sm_90", launch))
rows = read_rows(found)
kernels = _disassemble("SM90", [one.binary.code for one in found])
loops = [[i.operation for i in _main_loop(kernel, _sass_tensor)] for kernel in kernels]
whole = [sorted({i.operation.partition(".")[0] for i in kernel}) for kernel in kernels]
print(json.dumps([[asdict(row) for row in rows], failures(rows), loops, whole]))
"""


@pytest.fixture(scope="module")
def compiled() -> Any:
    done = run_compiling("-c", SCRIPT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_warp_groups_compile_within_the_limits(compiled: Any) -> None:
    """No spills, no product off the tensor cores, bulk loads, registers moved to who computes, shared memory."""
    rows, failures, _, whole = compiled
    assert failures == []
    for row, operations in zip(rows, whole, strict=True):
        assert row["kernel"] == "attention_forward_warp_groups" and row["warp_specialized"]
        assert row["shared"] <= 232_448 and row["programs"] == 1
        assert {"HGMMA", "UTMALDG", "USETMAXREG"} <= set(operations) and "HMMA" not in operations


def test_the_softmax_runs_beside_the_next_product(compiled: Any) -> None:
    """The form's reason: most exponentials stand between a product q k^T's first HGMMA and its wait, in the loop."""
    for loop in compiled[2]:
        beside, running, seen = 0, False, 0
        for operation in loop:
            running = running or operation.startswith("HGMMA")
            if operation.startswith("WARPGROUP.DEPBAR"):
                beside, running, seen = beside + seen, False, 0
            seen += running and operation.startswith("MUFU.EX2")
        assert beside > 0.5 * sum(operation.startswith("MUFU.EX2") for operation in loop)


def test_warp_groups_take_fewer_instructions_a_score(compiled: Any) -> None:
    """Of a loop over two tiles of 64 rows by 128 threads; kernels/README.md has those of the other forms."""
    for row, most in zip(compiled[0], (6.8, 7.4, 12.8), strict=True):
        keys = int(row["tile"].split("x")[1])
        assert row["loop_instructions"] * 128 / (2 * 64 * keys) < most, row["case"]
