"""The machine code of attention whose rows lie in two tiles, compiled without a GPU."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.compiling import run_compiling

# Causal and of 16 bits: a row of the inspector's for each kernel.
SCRIPT = """
import json, sys
from dataclasses import asdict
import torch
from benchmarks.inspection.launches import record_launches
from benchmarks.inspection.rows import compile_row, failures, read_rows
from fastattn.kernels._options import AttentionOptions
from fastattn.kernels.attention_backward import attention_backward
from fastattn.kernels.attention_forward import attention_forward
found = []
for arch, head_dim, v_dim in json.loads(sys.argv[1]):
    q, k, v = (
        torch.empty(2, 4096, heads, width, dtype=torch.bfloat16, device="meta").transpose(1, 2)
        for heads, width in ((8, head_dim), (2, head_dim), (2, v_dim))
    )
    options = AttentionOptions(0.1, right=0)
    with record_launches(arch) as launches:
        out, lse = attention_forward(q, k, v, *options)
        attention_backward(out, None, q, k, v, out, lse, [True] * 3 + [False] * 2, *options)
    for launch in launches:
        if launch.name != "attention_delta":
            found.append(compile_row(f"{head_dim}/{v_dim}", arch, launch))
rows = read_rows(found)
print(json.dumps([[asdict(row) for row in rows], failures(rows)]))
"""


def compiled(*asked: tuple[str, int, int]) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows, and what the check of shipped kernels says of them."""
    done = run_compiling("-c", SCRIPT, json.dumps(asked))
    assert done.returncode == 0, done.stderr[-3000:]
    rows, failures = json.loads(done.stdout.splitlines()[-1])
    return rows, failures


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_no_tile_of_the_table_spills(arch: str) -> None:
    """Of each class the widest, and narrower ones; their products are on tensor cores, on sm_90 Hopper's own."""
    widths = [(80, 80), (96, 96), (160, 160), (192, 192), (192, 128), (144, 128), (160, 128)]
    rows, failures = compiled(*((arch, *pair) for pair in widths))
    assert failures == []
    # dk and dv have a launch each at 192 on sm_90 alone.
    assert len(rows) == 3 * len(widths) + (arch == "sm_90")
    assert all(set(row["loop_tensor_cores"]) == {"HGMMA" if arch == "sm_90" else "HMMA"} for row in rows)
