"""What a run of `tune` leaves behind: a table, why candidates were dropped, every sample, and the diff."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.report import write_json
from benchmarks.tuning import table
from benchmarks.tuning.plan import short_name
from benchmarks.tuning.search import Duel, TaskResult
from fastattn.kernels._measured import MEASURED, RUNS


def report(
    results: Sequence[TaskResult],
    late: Sequence[str],
    described: dict[str, Any],
    out: Path,
    console: Console,
    write: bool,
) -> None:
    """Prints the table and the diff, and writes tuning.json, tuning.diff and, where asked to, kernels/_measured.py."""
    write_json(
        out / "tuning.json", {"environment": described, "results": [asdict(result) for result in results]}
    )
    console.print(results_table(results))
    for line in (*dropped_lines(results), *(f"not tuned, as time was over: {label}" for label in late)):
        console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)
    new = table.render(*table.merged(MEASURED, RUNS, results, described))
    changes = table.diff(table.PATH.read_text(encoding="utf-8"), new)
    (out / "tuning.diff").write_text(changes, encoding="utf-8")
    if write and changes:
        table.write(new)
    print(changes or "kernels/_measured.py stays as it is", end="" if changes else "\n")
    print(out)


def results_table(results: Iterable[TaskResult]) -> Table:
    """A line for each part, and one for all parts of a key together."""
    found = Table(title="time of a launch config over that of the one before it", title_justify="left")
    for header in ("kernel", "key", "part", "now", "best", "ms", "time [95 %]", "noise", "dropped"):
        found.add_column(
            header, justify="right" if header in ("ms", "time [95 %]", "noise", "dropped") else "left"
        )
    for result in results:
        name = short_name(result.select)
        labels = (name, " ".join(map(str, result.key)))
        for part in result.parts:
            dropped = sum(bool(candidate.dropped) for candidate in part.candidates)
            best = part.chosen if part.chosen != part.current else "-"
            counts = f"{dropped} of {len(part.candidates)}"
            found.add_row(*labels, part.part, part.current, best, *_duel_cells(part.duel), counts)
            labels = ("", "")
        outcome = "entered" if result.config is not None else result.why
        found.add_row(*labels, "all", "", outcome, *_duel_cells(result.duel), "")
        found.add_section()
    return found


def _duel_cells(duel: Duel | None) -> tuple[str, str, str]:
    if duel is None:
        return "", "", ""
    ratio = duel.ratio
    return f"{duel.ms:.4g}", f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]", f"{duel.noise:.1%}"


def dropped_lines(results: Iterable[TaskResult]) -> list[str]:
    """Why candidates were dropped, each reason once a part."""
    found = []
    for result in results:
        for part in result.parts:
            reasons: dict[str, list[str]] = {}
            for candidate in part.candidates:
                if candidate.dropped:
                    reasons.setdefault(candidate.dropped, []).append(candidate.label)
            name = short_name(result.select)
            found += [
                f"dropped: {name} {part.part} {'; '.join(labels)}: {why}" for why, labels in reasons.items()
            ]
    return found
