"""What a run takes over from an interrupted one: the rows of complete cases, measured under the same conditions."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.measure import Row
from benchmarks.report import finite, is_row, read_lines
from benchmarks.run_options import RunError, RunOptions

# Rows that differ in one of these cannot stand side by side.
_CONDITIONS = ("commit", "dirty", "device", "driver", "torch", "triton", "threads")

Case = tuple[str, str]


def conditions(described: dict[str, Any], options: RunOptions) -> dict[str, Any]:
    """What has to be the same for a run to go on: written beside each complete case."""
    found = {name: described.get(name) for name in _CONDITIONS}
    kept: dict[str, Any] = finite(found | {"rounds": options.rounds, "providers": options.providers})
    return kept


def read_complete(path: Path, wanted: dict[str, Any]) -> tuple[list[Row], set[Case]]:
    """The rows of the complete cases of an interrupted run, and which cases those are.

    Raises:
        RunError: a case was measured under other conditions, or the file holds something else.
    """
    lines = read_lines(path)
    done: set[Case] = set()
    for line in lines:
        if "complete" in line:
            for name, value in wanted.items():
                if line.get(name) != value:
                    raise RunError(
                        f"--resume: {path.parent} was measured with {name} {line.get(name)}, and this is {value}"
                    )
            done.add((str(line.get("suite")), str(line["complete"])))
    rows = [line for line in lines if (line.get("suite"), line.get("label")) in done]
    if not all(map(is_row, rows)):
        raise RunError(f"--resume: {path} holds what is no row of a run")
    return rows, done


def rewrite(path: Path, rows: Iterable[Row], done: Iterable[Case], wanted: dict[str, Any]) -> None:
    """Puts these in the place of a file; there is no time at which neither the old nor the new is there."""
    lines = [*rows, *({"suite": suite, "complete": label, **wanted} for suite, label in sorted(done))]
    fresh = path.with_name(path.name + ".new")
    with fresh.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)
