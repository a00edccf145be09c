"""Decides between the launch config of now and its candidates.

The rule. Candidates that fail to compile, spill, or compute something wrong are dropped. The others are timed in turn
with the config of now in a few rounds; those that look fastest are timed once more, in rounds of their own, so that
what was lucky in the first is not chosen for its luck. The fastest of these takes the place of the config of now only
where the upper end of the 95 % interval of its time over that one's is below 1 by more than the larger of 1 % and of
the distance that the config of now, timed twice in those rounds, shows from itself.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from benchmarks.inspection import InspectionRow
from benchmarks.measure import first_line
from benchmarks.timing import Ratio, summarize, time_ratio
from benchmarks.tuning import spaces
from benchmarks.tuning.bench import Bench
from benchmarks.tuning.compiling import MOST_CANDIDATES, Compilation, distinct, why_dropped
from benchmarks.tuning.plan import Task
from fastattn.kernels._target import Target

# A smaller gain is not worth an entry, whatever its interval.
LEAST_GAIN = 0.01
SCREENING_ROUNDS = 8
_FINALISTS = 3

Compile = Callable[[Sequence[Compilation]], list[list[InspectionRow]]]


@dataclass(frozen=True)
class Duel:
    """A config beside the one of now, in the same rounds.

    Attributes:
        ms, current_ms: medians.
        ratio: time over time, with its 95 % interval.
        noise: how far the config of now, timed twice, lies from itself: the far end of that interval.
        samples: of the config of now, of the same again, then of the others.
    """

    ms: float
    current_ms: float
    ratio: Ratio
    noise: float
    samples: tuple[tuple[float, ...], ...]

    @property
    def won(self) -> bool:
        return self.ratio.high < 1 - max(LEAST_GAIN, self.noise)


@dataclass(frozen=True)
class Candidate:
    """What became of one candidate: why it was dropped, or its time over that of the config of now.

    Attributes:
        samples, current_samples: milliseconds in each round of the first comparison.
        rows: what the compiler said.
    """

    label: str
    dropped: str = ""
    ratio: Ratio | None = None
    samples: tuple[float, ...] = ()
    current_samples: tuple[float, ...] = ()
    rows: tuple[InspectionRow, ...] = ()


@dataclass(frozen=True)
class PartResult:
    """Of one part of a config: what was tried, and what was chosen."""

    part: str
    current: str
    chosen: str
    candidates: tuple[Candidate, ...] = ()
    duel: Duel | None = None


@dataclass(frozen=True)
class TaskResult:
    """Of one key: the parts, then all that was chosen beside all that was there before.

    Attributes:
        config: the fields of the chosen config, or None where the one of now stays.
        unfinished: the parts that time did not reach, which a run that goes on begins again with.
    """

    select: str
    key: tuple[Any, ...]
    cases: tuple[str, ...]
    parts: tuple[PartResult, ...]
    config: dict[str, Any] | None = None
    duel: Duel | None = None
    why: str = ""
    unfinished: tuple[str, ...] = ()


@dataclass
class Search:
    """Tunes tasks on a bench.

    Attributes:
        compile: a row for each kernel that a candidate changes, by candidate.
        rounds: of the last comparison.
        advance: told what goes on.
        end: when no further part is started, by `time.monotonic`; the first one of a task always is.
        most: candidates of a part.
    """

    target: Target
    compile: Compile
    rounds: int
    advance: Callable[[str], None] = field(default=lambda text: None)
    end: float = float("inf")
    most: int = MOST_CANDIDATES

    def task(self, task: Task, bench: Bench) -> TaskResult:
        """Each part in turn, beside the best of those before."""
        config = task.config
        results: list[PartResult] = []
        kernels: set[str] = set()
        parts = spaces.parts(config)
        late: tuple[str, ...] = ()
        for place, part in enumerate(parts):
            if place and time.monotonic() > self.end:
                late = tuple(parts[place:])
                break
            result, config, changed = self._part(task, config, part, bench)
            results.append(result)
            kernels |= changed if result.chosen != result.current else set()
        found = TaskResult(task.select, task.key, task.case_names, tuple(results), unfinished=late)
        if config == task.config:
            return replace(found, why="no candidate was faster beyond the noise")
        try:
            bench.check(config)
            duel, _ = self._duel(task.config, [config], kernels, bench)
        except Exception as error:
            return replace(found, why=f"all together: {_reason(error)}")
        if not duel.won:
            return replace(found, duel=duel, why="all together not faster beyond the noise")
        return replace(found, config=asdict(config), duel=duel)

    def _part(self, task: Task, config: Any, part: str, bench: Bench) -> tuple[PartResult, Any, set[str]]:
        tried = spaces.candidates(config, part, self.target, task.columns, task.starts)
        jobs, kernels = distinct(
            (Compilation(self.target.name, task.select, config, new, task.cases, task.key) for new in tried),
            self.most,
        )
        now = spaces.label(config, part)
        self.advance(f"{task.label} {part}: {len(jobs)} candidates")
        seen: list[Candidate] = []
        left: list[tuple[int, Any]] = []
        for job, rows in zip(jobs, self.compile(jobs), strict=True):
            dropped = why_dropped(rows) or _wrong(bench, job.candidate)
            if not dropped:
                left.append((len(seen), job.candidate))
            seen.append(Candidate(spaces.label(job.candidate, part), dropped, rows=tuple(rows)))
        duel, best = None, None
        try:
            ratios = self._screen(config, left, kernels, bench, seen)
            faster = [place for place in ratios if ratios[place].value < 1]
            finalists = sorted(faster, key=lambda place: ratios[place].value)
            finalists = finalists[: max(1, min(_FINALISTS, bench.most_at_a_time(config) - 2))]
            by_place = dict(left)
            if finalists:
                duel, best = self._duel(config, [by_place[place] for place in finalists], kernels, bench)
        except Exception as error:  # of the config of now: nothing can be said of the others
            return PartResult(part, now, now, (*seen, Candidate(now, _reason(error)))), config, kernels
        chosen = best if duel is not None and duel.won else config
        return PartResult(part, now, spaces.label(chosen, part), tuple(seen), duel), chosen, kernels

    def _screen(
        self,
        config: Any,
        left: Sequence[tuple[int, Any]],
        kernels: Collection[str],
        bench: Bench,
        seen: list[Candidate],
    ) -> dict[int, Ratio]:
        """Ratios by place in `seen`, which is told them, in batches that each hold the config of now."""
        ratios: dict[int, Ratio] = {}
        size = bench.most_at_a_time(config) - 1 if left else 1
        for start in range(0, len(left), size):
            batch = left[start : start + size]

            def dropped(index: int, why: str, batch: Sequence[tuple[int, Any]] = batch) -> None:
                if index == 0:
                    raise RuntimeError(why)
                place = batch[index - 1][0]
                seen[place] = replace(seen[place], dropped=why)

            configs = [config, *(new for _, new in batch)]
            now, *others = bench.samples(configs, kernels, SCREENING_ROUNDS, dropped)
            for (place, _), times in zip(batch, others, strict=True):
                if not now:
                    seen[place] = replace(seen[place], dropped="no call launches its kernels")
                elif times:
                    ratios[place] = time_ratio(times, now)
                    seen[place] = replace(
                        seen[place], ratio=ratios[place], samples=tuple(times), current_samples=tuple(now)
                    )
        return ratios

    def _duel(
        self, config: Any, others: Sequence[Any], kernels: Collection[str], bench: Bench
    ) -> tuple[Duel, Any]:
        """The fastest of the others beside the config of now, which is timed twice."""

        def dropped(index: int, why: str) -> None:
            raise RuntimeError(why)

        now, again, *rest = bench.samples([config, config, *others], kernels, self.rounds, dropped)
        itself = time_ratio(again, now)
        ratios = [time_ratio(times, now) for times in rest]
        best = min(range(len(rest)), key=lambda index: ratios[index].value)
        return Duel(
            summarize(rest[best]).median,
            statistics.median(now),
            ratios[best],
            max(itself.high - 1, 1 - itself.low),
            tuple(map(tuple, (now, again, *rest))),
        ), others[best]


def _wrong(bench: Bench, config: Any) -> str:
    try:
        bench.check(config)
    except Exception as error:
        return _reason(error)
    return ""


def _reason(error: Exception) -> str:
    what = "wrong" if isinstance(error, AssertionError) else type(error).__name__
    return f"{what}: {first_line(error)}"
