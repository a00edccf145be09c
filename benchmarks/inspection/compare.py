"""What changed between two inspections: against a committed baseline, or against another revision's kernels."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import triton

from benchmarks.environment import REPOSITORY
from benchmarks.inspection.rows import InspectionRow

BASELINE = REPOSITORY / "benchmarks" / "results" / "inspection" / "baseline.json"
# What must not grow at all, and by how much the rest may: a compiler moves a few instructions about.
_FIXED = ("spill_loads", "spill_stores", "stack", "shared")
_GROWTH = {"registers": 1.05, "instructions": 1.05, "loop_instructions": 1.05}
_NAMES = tuple(f.name for f in fields(InspectionRow))


class ComparisonError(Exception):
    """There is nothing to compare with; the message says why in one line."""


def write_rows(path: Path, rows: Iterable[InspectionRow]) -> None:
    """A list of rows, with the names of `InspectionRow`."""
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


def read_rows(path: Path) -> list[InspectionRow]:
    """Rows that `write_rows` wrote; what another version does not know is left out."""
    return [_row(values) for values in json.loads(path.read_text(encoding="utf-8"))]


def _row(values: dict[str, Any]) -> InspectionRow:
    return InspectionRow(**{name: value for name, value in values.items() if name in _NAMES})


def write_baseline(rows: Sequence[InspectionRow]) -> None:
    """Keeps what later compilations are compared with, and the compiler that it came from."""
    BASELINE.parent.mkdir(parents=True, exist_ok=True)
    kept = (*_FIXED, *_GROWTH)
    content = {
        "triton": triton.__version__,
        "rows": {"/".join(_key(row)): {name: getattr(row, name) for name in kept} for row in rows},
    }
    BASELINE.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def why_unchecked(baseline: Path | None = None) -> str | None:
    """That `growth` finds nothing, as another Triton compiled the baseline; None where it compares.

    Raises:
        ComparisonError: there is no baseline.
    """
    try:
        content = json.loads((baseline or BASELINE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ComparisonError(f"cannot read the baseline, which --update-baseline writes: {error}") from error
    same = content["triton"] == triton.__version__
    return None if same else f"growth not checked: the baseline is of Triton {content['triton']}"


def growth(rows: Iterable[InspectionRow], baseline: Path = BASELINE) -> list[str]:
    """A line for each count that grew past the baseline; none where `why_unchecked` says why."""
    content = json.loads(baseline.read_text(encoding="utf-8"))
    if content["triton"] != triton.__version__:
        return []
    found = []
    for row in rows:
        label = "/".join(_key(row))
        old = content["rows"].get(label)
        if old is None:
            found.append(f"{label} is not in the baseline; --update-baseline adds it")
            continue
        for name in (*_FIXED, *_GROWTH):
            new = getattr(row, name)
            if new > old[name] * _GROWTH.get(name, 1):
                found.append(f"{label}: {name} grew from {old[name]} to {new}")
    return found


def _key(row: InspectionRow) -> tuple[str, str, str]:
    return row.arch, row.case, row.kernel


def changes(old: Iterable[InspectionRow], new: Iterable[InspectionRow]) -> list[str]:
    """A line for each kernel that is new, gone, or whose figures differ."""
    before, after = {_key(row): row for row in old}, {_key(row): row for row in new}
    lines = []
    for key in dict.fromkeys((*before, *after)):
        label = " ".join(key)
        if key not in after:
            lines.append(f"{label}: gone")
        elif key not in before:
            lines.append(f"{label}: new")
        else:
            parts = [
                f"{name} {getattr(before[key], name)} -> {getattr(after[key], name)}"
                for name in _NAMES
                if getattr(before[key], name) != getattr(after[key], name)
            ]
            if parts:
                lines.append(f"{label}: {', '.join(parts)}")
    return lines


def check_revision(revision: str) -> None:
    """Raises `ComparisonError` where git knows no such revision."""
    command = ["git", "-C", str(REPOSITORY), "rev-parse", "--verify", "--quiet", f"{revision}^{{tree}}"]
    try:
        known = subprocess.run(command, capture_output=True).returncode == 0
    except OSError as error:
        raise ComparisonError(f"cannot read revision {revision}: {error}") from error
    if not known:
        raise ComparisonError(f"cannot read revision {revision}: git knows none of this name here")


def rows_of_revision(revision: str, arguments: Sequence[str]) -> list[InspectionRow]:
    """Inspects another revision's kernels with this checkout's benchmarks, in a process of its own.

    Raises:
        ComparisonError: there is no such revision, or it cannot be inspected.
    """
    with tempfile.TemporaryDirectory(prefix="fastattn-inspect-") as scratch:
        tree, found = Path(scratch) / "tree", Path(scratch) / "rows.json"
        archive = Path(scratch) / "tree.tar"
        command = ["git", "-C", str(REPOSITORY), "archive", "-o", str(archive), revision, "--"]
        done = subprocess.run([*command, "fastattn", "kernels"], capture_output=True, text=True)
        if done.returncode != 0:
            raise ComparisonError(f"cannot read revision {revision}: {done.stderr.strip().splitlines()[-1]}")
        with tarfile.open(archive) as content:
            content.extractall(tree, filter="data")
        shutil.copytree(
            REPOSITORY / "benchmarks", tree / "benchmarks", ignore=shutil.ignore_patterns("results")
        )
        inspect = [sys.executable, "-m", "benchmarks", "inspect", *arguments, "--json", str(found), "--quiet"]
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        ran = subprocess.run(inspect, cwd=tree, env=environment, capture_output=True, text=True)
        if not found.exists():
            raise ComparisonError(
                f"revision {revision} cannot be inspected: {ran.stderr.strip().splitlines()[-1]}"
            )
        return read_rows(found)
