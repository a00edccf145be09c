"""What is tried, and what the compiler says of it, without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.inspection import InspectionRow
from benchmarks.report import results_folder, write_json
from benchmarks.tuning import spaces
from benchmarks.tuning.compiling import Compilation, Compiler, distinct, why_dropped
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
) -> int:
    """Prints what the compiler says of every candidate, the config of now first; rows go to OUT/candidates.json."""
    jobs: list[tuple[Task, str, Compilation]] = []
    for task in tasks:
        for part in spaces.parts(task.config):
            tried = spaces.candidates(task.config, part, target, task.columns)
            found, _ = distinct(
                Compilation(target.name, task.select, task.config, new, task.cases) for new in tried
            )
            if found:  # the config of now is what the first candidate is not
                now = Compilation(target.name, task.select, found[0].candidate, task.config, task.cases)
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
    for header in ("kernel", "part", "config", "regs", "spills", "shared", "occup.", "verdict"):
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
        cells = ("", "", "", "")
        if good:
            worst = max(good, key=lambda row: row.registers)
            spills = sum(row.spill_loads + row.spill_stores for row in good)
            shared = max(row.shared for row in good)
            cells = (
                str(worst.registers),
                str(spills),
                f"{shared:,}",
                f"{min(r.occupancy for r in good):.0%}",
            )
        verdict = f"dropped: {why}" if why else "now" if first else "would be timed"
        found.add_row(*(labels if first else ("", "")), spaces.label(job.candidate, part), *cells, verdict)
    return found
