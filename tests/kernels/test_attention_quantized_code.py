"""The machine code of attention on e4m3 operands, compiled without a GPU."""

from __future__ import annotations

import json

from tests.compiling import run_compiling

SCRIPT = """
import json, torch
from benchmarks.cases import AttentionE4M3Case
from benchmarks.inspection import inspect_launch, launches_of
from benchmarks.inspection.launches import compile_launch
from benchmarks.inspection.rows import faults

case = AttentionE4M3Case(2, 8, 4096, 128, kv_heads=2, causal="top_left", dtype=torch.bfloat16)
rows = [inspect_launch("e4m3", "sm_89", launch) for launch in launches_of(case, "sm_89")]
forward = launches_of(case, "sm_90")[-1]
print(json.dumps({
    "faults": [faults(row) for row in rows],
    "products": [list(row.tensor_cores) for row in rows],
    "bound": rows[-1].bound,
    "exchanges": compile_launch("sm_90", forward).asm["ptx"].count("shfl.sync.idx"),
}))
"""


def test_sm_89_has_its_products_and_sm_90_moves_no_weight_between_threads() -> None:
    """In their natural order the weights of a tile took 48 exchanges between threads on sm_90; see `_in_value_order`.

    The rate of the bound is that of 8-bit products, twice the 16-bit one.
    """
    done = run_compiling("-c", SCRIPT)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["faults"] == [[]] * 4
    assert found["products"] == [[], [], [], ["QMMA"]]
    assert "330.4 TFLOP/s" in found["bound"]
    assert found["exchanges"] <= 2  # the number of the warp, once each
