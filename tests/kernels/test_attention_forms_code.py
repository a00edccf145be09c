"""The machine code of attention's forms for sm_90, compiled without a GPU: see `fastattn.kernels._attention_forms`."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.compiling import run_compiling

# Causal and of 16 bits, the kernels of all forms: a row of the inspector's for each.
SCRIPT = """
import json, sys
from dataclasses import asdict
import torch
from benchmarks.cases import AttentionCase
from benchmarks.inspection.cases import launches_of
from benchmarks.inspection.rows import compile_row, failures, read_rows
found = []
for form, head_dim, kernels in json.loads(sys.argv[1]):
    case = AttentionCase(2, 8, 4096, head_dim, kv_heads=2, causal="top_left", dtype=torch.bfloat16)
    for launch in launches_of(case, "sm_90", form=form):
        if launch.name in kernels:
            found.append(compile_row(f"{form}-{head_dim}", "sm_90", launch))
rows = read_rows(found)
print(json.dumps([[asdict(row) for row in rows], failures(rows)]))
"""
# Of each form and padded head_dim what differs most, since each takes the assembler seconds. head_dim 96 is one of 128.
ASKED = [
    ("descriptors", 64, ["attention_forward"]),
    ("descriptors", 96, ["attention_forward", "attention_dq", "attention_dk_dv"]),
    ("descriptors", 256, ["attention_dq"]),
    ("specialized", 64, ["attention_dk_dv"]),
    ("specialized", 128, ["attention_forward", "attention_dk_dv"]),
    ("specialized", 256, ["attention_forward"]),
    ("reduction", 64, ["attention_dk_dv"]),
    ("reduction", 128, ["attention_dk_dv"]),
]


@pytest.fixture(scope="module")
def inspected() -> tuple[list[dict[str, Any]], list[str]]:
    """The rows, and what the check of shipped kernels says of them."""
    done = run_compiling("-c", SCRIPT, json.dumps(ASKED))
    assert done.returncode == 0, done.stderr[-3000:]
    rows, failures = json.loads(done.stdout.splitlines()[-1])
    return rows, failures


def test_no_form_spills_or_misses_its_tensor_cores(inspected: Any) -> None:
    rows, failures = inspected
    assert failures == []
    # At 128 dk and dv take a launch each of "reduction".
    assert len(rows) == sum(len(kernels) for _, _, kernels in ASKED) + 1
    assert all(set(row["loop_tensor_cores"]) == {"HGMMA"} for row in rows)
    assert all(row["shared"] <= 232_448 and row["programs"] >= 1 for row in rows)


def test_rows_are_loaded_in_bulk(inspected: Any) -> None:
    """By UTMALDG: a descriptor that the compiler turned back into pointers would be the slower of both."""
    rows, _ = inspected
    assert all(row["tma_loads"] >= 3 for row in rows), [row["tma_loads"] for row in rows]


def test_dq_is_added_up_in_bulk(inspected: Any) -> None:
    """By UTMAREDG, in the launch that computes dk and in no other form: by pointers each element would be an atomic."""
    rows, _ = inspected
    found = {(row["case"], row["tma_reductions"] > 0) for row in rows if row["kernel"] == "attention_dk_dv"}
    assert {("reduction-64", True), ("reduction-128", True), ("descriptors-96", False)} <= found
    reducing = [row for row in rows if row["tma_reductions"]]
    assert len(reducing) == 2
    # Two loops that add, and one.
    assert [row["tma_reductions"] for row in reducing] == [2, 1]


def test_a_reduction_saves_instructions(inspected: Any) -> None:
    """Of all of a score's products, against 21.6 and 33.4 in "descriptors"' two kernels (kernels/README.md)."""
    rows, _ = inspected
    sums: dict[str, float] = {}
    for row in rows:
        if row["case"].startswith("reduction"):
            block_m, block_n = map(int, row["tile"].split("x")[:2])
            score = row["loop_instructions"] * 32 * row["num_warps"] / (block_m * block_n)
            sums[row["case"]] = sums.get(row["case"], 0.0) + score
    assert sums["reduction-64"] < 17 and sums["reduction-128"] < 30


def test_warps_are_specialized_where_asked(inspected: Any) -> None:
    """The compiler declines without a word, as it does with 8 warps: a producer of one group beside two consumers'."""
    rows, _ = inspected
    for row in rows:
        assert row["warp_specialized"] == row["case"].startswith("specialized"), row["case"]


def test_descriptors_save_instructions_or_registers(inspected: Any) -> None:
    """What the forms are for: instructions a score of the inner loop, against those of pointers (kernels/README.md)."""
    rows, _ = inspected
    found = {}
    for row in rows:
        block_m, block_n = map(int, row["tile"].split("x")[:2])
        # The loop of one of two warp groups is half of a tile's.
        threads = 32 * row["num_warps"] * (2 if row["warp_specialized"] else 1)
        found.setdefault(
            (row["case"], row["kernel"]), row["loop_instructions"] * threads / (block_m * block_n)
        )
    assert found["descriptors-96", "attention_forward"] < 9.5  # 11.9 by pointers
    assert found["descriptors-96", "attention_dk_dv"] < 26  # 32.8 in two launches by pointers
    assert found["descriptors-256", "attention_dq"] < 21
    assert found["specialized-128", "attention_forward"] < 12
