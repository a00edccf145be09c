"""The machine code of dq by warp groups, compiled for sm_90 without a GPU."""

from __future__ import annotations

import json

from tests.compiling import run_compiling

# Rows of the inspector for dq at each width, and the operations of the loop without a mask.
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
    launches = [one for one in launches_of(case, "sm_90", form="warp_groups") if one.name.startswith("attention_dq")]
    assert [one.name for one in launches] == ["attention_dq_warp_groups"]
    found.append(compile_row(str(head_dim), "sm_90", launches[0]))
rows = read_rows(found)
kernels = _disassemble("SM90", [one.binary.code for one in found])
loops = [[i.operation for i in _main_loop(kernel, _sass_tensor)] for kernel in kernels]
whole = [sorted(i.operation for i in kernel) for kernel in kernels]
print(json.dumps([[asdict(row) for row in rows], failures(rows), loops, whole]))
"""


def test_dq_compiles_without_spills_and_overlaps() -> None:
    """Bulk loads, products on the tensor cores alone, in fewer instructions a score than other forms take.

    Each exponential stands behind the last HGMMA of dO v^T and before its wait, the second of the loop.
    """
    done = run_compiling("-c", SCRIPT)
    assert done.returncode == 0, done.stderr[-3000:]
    rows, failures, loops, whole = json.loads(done.stdout.splitlines()[-1])
    assert failures == []
    for row, loop, operations, most in zip(rows, loops, whole, (6.2, 6.8, 10.4), strict=True):
        assert row["warp_specialized"] and row["shared"] <= 232_448 and row["programs"] == 1
        names = [operation.partition(".")[0] for operation in operations]
        assert {"HGMMA", "UTMALDG", "USETMAXREG"} <= set(names) and "HMMA" not in names
        # Three a tile, of two groups with two loops: no product waits for another.
        assert sum(operation.startswith("WARPGROUP.DEPBAR") for operation in operations) == 12
        keys = int(row["tile"].split("x")[1])
        assert row["loop_instructions"] * 128 / (64 * keys) < most, row["case"]
        waits = [place for place, operation in enumerate(loop) if operation.startswith("WARPGROUP.DEPBAR")]
        assert len(waits) == 3
        exponentials = [place for place, operation in enumerate(loop) if operation.startswith("MUFU.EX2")]
        assert len(exponentials) == keys // 2 and waits[0] < exponentials[0] < exponentials[-1] < waits[1]
        assert not any(operation.startswith("HGMMA") for operation in loop[waits[0] : waits[1]])
