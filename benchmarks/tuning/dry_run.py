"""What is tried, and what the compiler says of it, without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.inspection import InspectionRow
from benchmarks.report import results_folder, write_json
from benchmarks.tuning import spaces
from benchmarks.tuning.compiling import MOST_CANDIDATES, Compilation, Compiler, distinct, why_dropped
from benchmarks.tuning.plan import Task
from fastattn.kernels._target import Target

Progress = Callable[[float], Any]


def dry_run(
    tasks: Sequence[Task],
    target: Target,
    processes: int | None,
    console: Console,
    progress: Progress,
    out: str | None,
    most: int = MOST_CANDIDATES,
) -> int:
    """Prints what the compiler says of every candidate, the config of now first; rows go to OUT/candidates.json."""
    jobs: list[tuple[Task, str, Compilation]] = []
    for task in tasks:
        for part in spaces.parts(task.config):
            tried = spaces.candidates(task.config, part, target, task.columns, task.starts)
            found, _ = distinct(
                (
                    Compilation(target.name, task.select, task.config, new, task.cases, task.key)
                    for new in tried
                ),
                most,
            )
            if found:  # the config of now is what the first candidate is not
                now = replace(found[0], current=found[0].candidate, candidate=task.config)
                jobs += [(task, part, job) for job in (now, *found)]
    with progress(float(len(jobs))) as advance, Compiler(processes) as compiler:
        rows = compiler(
            [job for *_, job in jobs],
            lambda place: advance(" ".join((jobs[place][0].label, jobs[place][1])), 1),
        )
    console.print(_candidates_table(jobs, rows, target))
    if out:
        content = [
            {
                "task": task.label,
                "part": part,
                "config": asdict(job.candidate),
                "rows": [asdict(row) for row in found],
            }
            for (task, part, job), found in zip(jobs, rows, strict=True)
        ]
        write_json(
            results_folder(Path(out)) / "candidates.json", {"arch": target.name, "candidates": content}
        )
    return 0


def _candidates_table(
    jobs: Sequence[tuple[Task, str, Compilation]], rows: Sequence[Sequence[InspectionRow]], target: Target
) -> Table:
    found = Table(
        title=f"candidates as compiled for {target.name}; the config of now comes first", title_justify="left"
    )
    left = ("kernel", "part", "config", "verdict")
    for header in (*left[:3], *_COUNTS, left[3]):
        found.add_column(header, justify="left" if header in left else "right")
    before = None
    for (task, part, job), compiled in zip(jobs, rows, strict=True):
        labels = (task.label, part)
        first = labels != before
        if first and before is not None:
            found.add_section()
        before = labels
        good = [row for row in compiled if not row.error]
        why = why_dropped(compiled)
        cells = _counts(good) if good else ("",) * len(_COUNTS)
        verdict = f"dropped: {why}" if why else "now" if first else "would be timed"
        found.add_row(*(labels if first else ("", "")), spaces.label(job.candidate, part), *cells, verdict)
    return found


# Of a candidate's kernels the worst of each: programs and the share of warps on a multiprocessor, bytes of loads in
# flight there over what the bandwidth needs, instructions an element, and the time to start them over the memory's.
_COUNTS = ("regs", "spills", "shared", "progs", "occup.", "in flight", "/ elem.", "issue")


def _counts(rows: Sequence[InspectionRow]) -> tuple[str, ...]:
    in_flight = [row.in_flight for row in rows if row.in_flight]
    an_element = max(row.an_element for row in rows)
    return (
        str(max(row.registers for row in rows)),
        str(sum(row.spill_loads + row.spill_stores for row in rows)),
        f"{max(row.shared for row in rows):,}",
        str(min(row.programs for row in rows)),
        f"{min(row.occupancy for row in rows):.0%}",
        f"{min(in_flight):.1f}" if in_flight else "",
        f"{an_element:.1f}" if an_element else "",
        f"{max(row.issue for row in rows):.2f}" if an_element else "",
    )
