"""The machine code of dk and dv by warp groups, compiled for sm_90 without a GPU."""

from __future__ import annotations

import json

from tests.compiling import run_compiling

# Rows of the inspector for the kernels of a call, and the operations of the loop without a mask.
SCRIPT = """
import json
from dataclasses import asdict
import torch
from benchmarks.cases import AttentionCase
from benchmarks.inspection.machine_code import _disassemble, _main_loop, _sass_tensor
from benchmarks.inspection.cases import launches_of
from benchmarks.inspection.rows import compile_row, failures, read_rows
case = AttentionCase(2, 8, 4096, 64, kv_heads=2, causal="top_left", dtype=torch.bfloat16)
launches = launches_of(case, "sm_90", form="warp_groups")
found = [compile_row("64", "sm_90", one) for one in launches if one.name == "attention_dk_dv_warp_groups"]
rows = read_rows(found)
loop = [i.operation for i in _main_loop(_disassemble("SM90", [found[0].binary.code])[0], _sass_tensor)]
print(json.dumps([[one.name for one in launches], [asdict(row) for row in rows], failures(rows), loop]))
"""


def test_dk_dv_compile_without_spills_in_half_of_the_instructions() -> None:
    """Bulk loads, products on the tensor cores alone, and the exponentials beside a product that is not waited for."""
    done = run_compiling("-c", SCRIPT)
    assert done.returncode == 0, done.stderr[-3000:]
    names, (row,), failures, loop = json.loads(done.stdout.splitlines()[-1])
    assert failures == [] and "attention_statistics" in names and "attention_dk_dv" not in names
    assert row["warp_specialized"] and row["shared"] <= 232_448 and row["programs"] == 1
    assert row["loop_instructions"] * 128 / (64 * 128) < 7.2
    beside, waits = 0, 0
    for operation in loop:
        waits += operation.startswith("WARPGROUP.DEPBAR")
        beside += waits == 1 and operation.startswith("MUFU.EX2")
    assert beside == sum(operation.startswith("MUFU.EX2") for operation in loop) > 0
