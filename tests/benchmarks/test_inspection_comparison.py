"""Inspections compared: with each other, with the baseline, and with what no kernel may do."""

import argparse
from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="there is nothing to compile with")

from benchmarks.inspection import command, compare
from benchmarks.inspection.rows import InspectionRow, failures
from benchmarks.report import make_console

ROW = InspectionRow(
    "case", "sm_90", "kernel", "64", 4, 2, registers=100, shared=1000, shared_limit=9999, instructions=200
)


def test_changes_name_what_differs():
    new = replace(ROW, registers=120, tensor_cores={"HMMA": 4})
    assert compare.changes([ROW], [new]) == [
        "sm_90 case kernel: registers 100 -> 120, tensor_cores {} -> {'HMMA': 4}"
    ]
    assert compare.changes([ROW], [replace(ROW, case="other")]) == [
        "sm_90 case kernel: gone",
        "sm_90 other kernel: new",
    ]
    assert compare.changes([ROW], [ROW]) == []


def test_rows_survive_a_file(tmp_path):
    compare.write_rows(tmp_path / "rows.json", [ROW])
    assert compare.read_rows(tmp_path / "rows.json") == [ROW]


@pytest.mark.parametrize(
    ("change", "grown"),
    (
        ({}, []),
        ({"registers": 105, "instructions": 210}, []),  # a compiler moves a few instructions about
        ({"registers": 106}, ["sm_90/case/kernel: registers grew from 100 to 106"]),
        ({"spill_loads": 1}, ["sm_90/case/kernel: spill_loads grew from 0 to 1"]),
        ({"shared": 1001}, ["sm_90/case/kernel: shared grew from 1000 to 1001"]),
        ({"case": "new"}, ["sm_90/new/kernel is not in the baseline; --update-baseline adds it"]),
    ),
)
def test_growth_past_the_baseline(change, grown, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "BASELINE", tmp_path / "baseline.json")
    compare.write_baseline([ROW])
    assert compare.growth([replace(ROW, **change)], compare.BASELINE) == grown


def test_another_compilers_baseline_is_no_measure(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "BASELINE", tmp_path / "baseline.json")
    compare.write_baseline([ROW])
    assert compare.why_unchecked() is None
    of = compare.triton.__version__
    monkeypatch.setattr(compare.triton, "__version__", "9.9.9")
    assert compare.growth([replace(ROW, registers=255)], compare.BASELINE) == []
    assert compare.why_unchecked() == f"growth not checked: the baseline is of Triton {of}"
    compare.BASELINE.unlink()
    with pytest.raises(
        compare.ComparisonError, match="cannot read the baseline, which --update-baseline writes"
    ):
        compare.why_unchecked()


def test_the_check_says_when_growth_was_not_checked(tmp_path, monkeypatch, capsys):
    """With another Triton `--check` passed whatever had grown, and nothing said so."""
    monkeypatch.setattr(compare, "BASELINE", tmp_path / "baseline.json")
    compare.write_baseline([ROW])
    monkeypatch.setattr(compare.triton, "__version__", "9.9.9")
    monkeypatch.setattr(command, "run_jobs", lambda jobs, processes: [ROW])
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.inspect(parser.parse_args(["--check", "--quiet"]), [], make_console(), None) == 0
    assert "growth not checked: the baseline is of Triton" in capsys.readouterr().out


def test_failures_of_a_shipped_kernel():
    rows = [
        ROW,
        replace(ROW, spill_stores=2),
        replace(ROW, shared_limit=999),
        replace(ROW, tensor_cores={"HMMA": 1}, bound="tensor 1 TFLOP"),
        replace(ROW, bound="H200: tensor 1 TFLOP", bound_by="tensor"),
        replace(ROW, error="OutOfResources: shared"),
    ]
    found = [line.removeprefix("sm_90 case kernel: ") for line in failures(rows)]
    assert found == [
        "spills, 0 loads and 2 stores",
        "shared memory 1000 is above 999 bytes",
        "HMMA on sm_90, whose fast matrix instruction is HGMMA",
        "16-bit products without tensor cores",
        "OutOfResources: shared",
    ]
