"""The machine code of dk and dv by warp groups, compiled for sm_90 without a GPU."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.compiling import run_compiling

# Of each kernel: which gradients it computes, a row of the inspector, its faults, and of the loop the operations and
# how many products may be unfinished behind a wait. To 256 features dk and dv have a launch each.
SCRIPT = """
import json
from dataclasses import asdict
import torch
from benchmarks.cases import AttentionCase
from benchmarks.inspection.machine_code import _disassemble, _main_loop, _sass_tensor
from benchmarks.inspection.cases import launches_of
from benchmarks.inspection.rows import compile_row, failures, read_rows
found, needs, others = [], [], set()
for head_dim, causal, dtype in ((64, "top_left", "bfloat16"), (128, "top_left", "float16"), (128, False, "bfloat16"),
                                (256, "top_left", "bfloat16"), (256, False, "bfloat16")):
    case = AttentionCase(2, 8, 4096, head_dim, kv_heads=2, causal=causal, dtype=getattr(torch, dtype))
    for launch in launches_of(case, "sm_90", form="warp_groups"):
        if launch.name == "attention_dk_dv_warp_groups":
            found.append(compile_row(str(head_dim) + ("-causal" if causal else ""), "sm_90", launch))
            needs.append([launch.arguments["NEEDS_DK"], launch.arguments["NEEDS_DV"]])
        else:
            others.add(launch.name)
rows = read_rows(found)
loops = []
for kernel in _disassemble("SM90", [one.binary.code for one in found]):
    loop = _main_loop(kernel, _sass_tensor)
    loops.append([i.operation + i.operands.strip()[-1:] * i.operation.startswith("WARPGROUP.DEPBAR") for i in loop])
print(json.dumps([sorted(others), [asdict(row) for row in rows], failures(rows), needs, loops]))
"""


@pytest.fixture(scope="module")
def compiled() -> Any:
    done = run_compiling("-c", SCRIPT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_dk_dv_compile_within_the_limits(compiled: Any) -> None:
    """No spills, products on the tensor cores, registers for who computes, shared memory; and no other dk and dv."""
    others, rows, failures, needs, loops = compiled
    assert failures == [] and "attention_statistics" in others and "attention_dk_dv" not in others
    assert needs == [[True, True]] * 3 + [[True, False], [False, True]] * 2
    for row, loop in zip(rows, loops, strict=True):
        assert row["spill_loads"] == row["spill_stores"] == row["stack"] == 0
        assert row["warp_specialized"] and row["shared"] <= 232_448 and row["programs"] == 1
        assert any(one.startswith("HGMMA") for one in loop) and not any(
            one.startswith("HMMA") for one in loop
        )


def test_exponentials_run_beside_a_product(compiled: Any) -> None:
    """All of them, in the loop, while v dO^T is not waited for; dv alone has no such product."""
    for (needs_dk, _), loop in zip(compiled[3], compiled[4], strict=True):
        beside, left = 0, 0
        for operation in loop:
            if operation.startswith("WARPGROUP.DEPBAR"):
                left = int(operation[-1])
            beside += left > 0 and operation.startswith("MUFU.EX2")
        exponentials = sum(operation.startswith("MUFU.EX2") for operation in loop)
        assert exponentials > 0 and beside == (exponentials if needs_dk else 0)


def test_dk_dv_take_few_instructions_a_score(compiled: Any) -> None:
    """Of the loop with what it skips: under a causal mask also the mask. kernels/README.md has the other forms'."""
    for row, most in zip(compiled[1], (9.8, 12.3, 9.2, 13.9, 9.7, 10.5, 6.4), strict=True):
        queries = int(row["tile"].split("x")[0])
        assert row["loop_instructions"] * 128 / (64 * queries) < most, row["case"]
