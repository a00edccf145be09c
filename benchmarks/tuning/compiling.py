"""Compiles candidates without running them, and says which are not worth a run."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map

from benchmarks.cases import OpCase
from benchmarks.inspection import InspectionRow, Launch, launches_of
from benchmarks.inspection.rows import Compiled, compile_row, faults, read_rows
from benchmarks.measure import first_line
from fastattn.kernels._config import Key, forced_config

# Of one part; the nearest to the config of now are kept.
MOST_CANDIDATES = 24


@dataclass(frozen=True)
class Compilation:
    """The kernels that a candidate for a key changes, beside the config of now, in a call of each case."""

    arch: str
    select: str
    current: Any
    candidate: Any
    cases: tuple[OpCase, ...]
    key: Key | None = None

    def changed(self) -> dict[str, tuple[str, Launch]]:
        """What the candidate launches and the config of now does not: the case's name and the launch, by identity."""
        found: dict[str, tuple[str, Launch]] = {}
        for case in self.cases:
            before, after = (self._launches(case, config) for config in (self.current, self.candidate))
            name = f"{case.operation} {case.name}"
            found |= {key: (name, launch) for key, launch in after.items() if key not in before}
        return found

    def run(self) -> list[Compiled]:
        """A row for each changed kernel, to be read; a launcher's own error is a row too."""
        try:
            changed = self.changed()
        except Exception as error:
            return [Compiled(_error_row(self.arch, error))]
        return [compile_row(case, self.arch, launch) for case, launch in changed.values()]

    def _launches(self, case: OpCase, config: Any) -> dict[str, Launch]:
        with forced_config(self.select, config, self.key):
            return {identity_of(launch): launch for launch in launches_of(case, self.arch)}


def _error_row(arch: str, error: Exception) -> InspectionRow:
    return InspectionRow("", arch, "", "", 0, 0, error=f"{type(error).__name__}: {first_line(error)}")


def identity_of(launch: Launch) -> str:
    """What a launch compiles and runs, without the values of its tensors."""

    def described(value: Any) -> Any:
        return (value.dtype, tuple(value.shape), value.stride()) if isinstance(value, torch.Tensor) else value

    return f"{launch.name} {launch.grid} {tree_map(described, launch.arguments)}"


def distinct(
    compilations: Iterable[Compilation], most: int = MOST_CANDIDATES
) -> tuple[list[Compilation], set[str]]:
    """`most` of them: the first of those that launch the same, and none that launches as now; and what they change."""
    found: list[Compilation] = []
    seen: set[frozenset[str]] = set()
    kernels: set[str] = set()
    for compilation in compilations:
        try:
            changed = compilation.changed()
        except Exception:  # compiling it says why
            found.append(compilation)
            continue
        identity = frozenset(changed)
        if identity and identity not in seen:
            seen.add(identity)
            found.append(compilation)
            kernels |= {launch.name for _, launch in changed.values()}
        if len(found) == most:
            break
    return found, kernels


def why_dropped(rows: Iterable[InspectionRow]) -> str:
    """Why a candidate is not timed, or nothing: it does what no shipped kernel may do (`inspect --check`)."""
    return next((f"{row.kernel}: {fault}".removeprefix(": ") for row in rows for fault in faults(row)), "")


class Compiler:
    """Runs compilations, as many at a time as there are processes; with one, in this process."""

    def __init__(self, processes: int | None = None) -> None:
        self.processes = processes or os.cpu_count() or 1
        self._pool: Any = None

    def __enter__(self) -> Compiler:
        if self.processes > 1:
            self._pool = multiprocessing.get_context("spawn").Pool(self.processes)
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self._pool.terminate()
            self._pool.join()

    def __call__(
        self, jobs: Sequence[Compilation], advance: Callable[[int], None] = lambda place: None
    ) -> list[list[InspectionRow]]:
        """The rows of each job, in order; all are read at the end.

        Args:
            advance: told the place of each job that is compiled.
        """
        run = map if self._pool is None else self._pool.imap
        compiled: list[list[Compiled]] = []
        for place, found in enumerate(run(Compilation.run, jobs)):
            compiled.append(found)
            advance(place)
        rows = iter(read_rows([one for found in compiled for one in found]))
        return [[next(rows) for _ in found] for found in compiled]
