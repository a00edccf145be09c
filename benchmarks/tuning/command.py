"""`python -m benchmarks tune`: launch configs compared on a GPU, and the table of measured ones."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.environment import environment
from benchmarks.measure import first_line
from benchmarks.report import RowWriter, finite, results_folder, writable
from benchmarks.tuning.bench import Bench, CaseBench
from benchmarks.tuning.compiling import Compiler
from benchmarks.tuning.dry_run import dry_run
from benchmarks.tuning.options import TuneError, check
from benchmarks.tuning.plan import Task, plan, tuning_cases
from benchmarks.tuning.report import report
from benchmarks.tuning.resume import read_results
from benchmarks.tuning.search import Search, TaskResult
from fastattn.kernels._target import Target

OUTPUTS = ("tuning.jsonl", "tuning.json", "tuning.diff")
# What has to be the same for a run to go on.
_CONDITIONS = ("commit", "dirty", "device", "driver", "torch", "triton")

Progress = Callable[[float], Any]


def tune(chosen: argparse.Namespace, console: Console, progress: Progress) -> int:
    """Runs the command.

    Raises:
        TuneError, PlanError, FolderError: it cannot start.
    """
    target = check(chosen)
    tasks = plan(tuning_cases(), target, chosen.kernels)
    if chosen.dry_run:
        return dry_run(tasks, target, chosen.jobs, console, progress, chosen.out, chosen.candidates)
    described = environment("cuda", chosen.commit)
    out = _folder(chosen)
    device = torch.device("cuda")

    def make_bench(task: Task) -> Bench:
        return CaseBench(task.select, task.cases, device, key=task.key)

    results, late = search_all(tasks, target, described, out, chosen, progress, make_bench)
    report(results, late, described, out, console, chosen.write)
    return 0


def _folder(chosen: argparse.Namespace) -> Path:
    out = Path(chosen.out or Path("tune-results") / datetime.now().strftime("%Y-%m-%d-%H%M%S"))
    path = out / OUTPUTS[0]
    if path.is_file() and path.stat().st_size and not chosen.resume:
        raise TuneError(f"{out} holds a run: give --resume to go on with it, or another --out")
    results_folder(out)
    for name in OUTPUTS:
        writable(out / name)
    return out


def search_all(
    tasks: Sequence[Task],
    target: Target,
    described: dict[str, Any],
    out: Path,
    chosen: argparse.Namespace,
    progress: Progress,
    make_bench: Callable[[Task], Bench],
) -> tuple[list[TaskResult], list[str]]:
    """The results of all tasks, each on disk as it comes, and the labels of those that time did not reach.

    Raises:
        TuneError: what the folder holds was measured under other conditions.
    """
    conditions = finite({name: described.get(name) for name in _CONDITIONS} | {"rounds": chosen.rounds})
    path = out / OUTPUTS[0]
    # Of a key that was searched again, the last one.
    results = {(result.select, result.key): result for result in read_results(path, conditions)}
    writer = RowWriter(path, conditions)
    end = time.monotonic() + 60 * chosen.minutes
    late = []
    with progress(float(len(tasks))) as advance, Compiler(chosen.jobs) as compiler:
        search = Search(
            target, compiler, chosen.rounds, lambda text: advance(text, 0), end, chosen.candidates
        )
        for task in tasks:
            key = (task.select, task.key)
            if key not in results or results[key].unfinished:
                if time.monotonic() > end:
                    late.append(task.label)
                    continue
                result = results[key] = _searched(search, task, make_bench)
                writer.write(asdict(result))
                if result.unfinished:
                    late.append(f"{task.label} {', '.join(result.unfinished)}")
            advance(task.label, 1)
    return list(results.values()), late


def _searched(search: Search, task: Task, make_bench: Callable[[Task], Bench]) -> TaskResult:
    """A task's result, of which an error is one: the next task may run."""
    try:
        return search.task(task, make_bench(task))
    except Exception as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        return TaskResult(task.select, task.key, task.case_names, (), why=why)
