"""What a run of `tune` takes over from an interrupted one: its results, measured under the same conditions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.inspection import InspectionRow
from benchmarks.report import read_lines
from benchmarks.timing import Ratio
from benchmarks.tuning.options import TuneError
from benchmarks.tuning.search import Candidate, Duel, PartResult, TaskResult


def read_results(path: Path, conditions: dict[str, Any]) -> list[TaskResult]:
    """The results in a file; none where there is no file.

    Raises:
        TuneError: one was measured under other conditions.
    """
    results = []
    for line in read_lines(path) if path.is_file() else []:
        for name, value in conditions.items():
            if line.get(name) != value:
                raise TuneError(
                    f"--resume: {path.parent} was measured with {name} {line.get(name)}, and this is {value}"
                )
        results.append(result_of(line))
    return results


def result_of(line: dict[str, Any]) -> TaskResult:
    """What `asdict` and JSON have made plain, as it was."""

    def duel(plain: dict[str, Any] | None) -> Duel | None:
        if plain is None:
            return None
        samples = tuple(tuple(times) for times in plain["samples"])
        return Duel(**{**plain, "ratio": Ratio(**plain["ratio"]), "samples": samples})

    def candidate(plain: dict[str, Any]) -> Candidate:
        ratio = None if plain["ratio"] is None else Ratio(**plain["ratio"])
        return Candidate(
            **{
                **plain,
                "ratio": ratio,
                "samples": tuple(plain["samples"]),
                "current_samples": tuple(plain["current_samples"]),
                "rows": tuple(InspectionRow(**row) for row in plain["rows"]),
            }
        )

    parts = tuple(
        PartResult(
            **{**part, "candidates": tuple(map(candidate, part["candidates"])), "duel": duel(part["duel"])}
        )
        for part in line["parts"]
    )
    return TaskResult(
        line["select"],
        _hashable(line["key"]),
        tuple(line["cases"]),
        parts,
        line["config"],
        duel(line["duel"]),
        line["why"],
        tuple(line.get("unfinished", ())),
    )


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list) else value
