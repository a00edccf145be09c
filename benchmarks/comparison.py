"""What got faster or slower between two runs, and by how much of their noise."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.markup import escape
from rich.table import Table

from benchmarks.measure import Row
from benchmarks.report import significant

# Clocks drift by about this much between two runs, which the spread within one run does not show.
NOISE_FLOOR = 0.01
# A change counts from twice the noise on: below, two runs of the same code differ as often.
NOISES_THAT_COUNT = 2.0
# The order of the table: what needs a look first.
VERDICTS = ("now fails", "slower", "faster", "now runs", "new", "gone", "same", "not measured in this run")
_STYLES = {"now fails": "bold red", "slower": "red", "faster": "green", "now runs": "green", "same": "dim"}
# A difference in one of these changes times without any change of the code.
_CONDITIONS = ("device", "driver", "cuda", "torch", "triton", "python", "threads")

Key = tuple[str, str, str, str, str]


@dataclass(frozen=True)
class Change:
    """One measurement in two runs; `ratio` is new time over old, `noise` relative, None where one is missing."""

    suite: str
    operation: str
    case: str
    direction: str
    provider: str
    verdict: str
    old_ms: float | None = None
    new_ms: float | None = None
    ratio: float | None = None
    noise: float | None = None
    reason: str = ""

    @property
    def noises(self) -> float | None:
        """How many times the noise the change is; negative is faster."""
        if self.ratio is None or self.noise is None:
            return None
        return (self.ratio - 1) / self.noise


def compare(old_rows: Iterable[Row], new_rows: Iterable[Row]) -> list[Change]:
    """The changes between two runs, in the order of the new one, then what is gone or was not measured again.

    A change is "faster" or "slower" when the ratio of the medians is away from 1 by `NOISES_THAT_COUNT` times the
    noise: half the quartile distance of both, relative to their medians, in quadrature, `NOISE_FLOOR` at least.
    What could not run in either run, or is absent in the only run that has it, is no change and is left out. A
    provider is "gone" where the new run has others of the same suite, case and direction.
    """
    old, new = _by_key(old_rows), _by_key(new_rows)
    measured = {key[:4] for key in new}
    changes = []
    for key in dict.fromkeys([*new, *old]):
        change = _change(key, old.get(key), new.get(key))
        if change is not None and change.verdict == "gone" and key[:4] not in measured:
            change = replace(change, verdict=VERDICTS[-1])
        if change is not None:
            changes.append(change)
    return changes


def _by_key(rows: Iterable[Row]) -> dict[Key, Row]:
    """Rows by what they measure; of a case measured twice, as a resumed run may, the later."""
    found = {}
    for row in rows:
        operation = str(row.get("operation", ""))
        names = (row.get(name, "") for name in ("case", "direction", "provider"))
        case, direction, provider = map(str, names)
        found[(str(row.get("suite") or operation), operation, case, direction, provider)] = row
    return found


def _change(key: Key, old: Row | None, new: Row | None) -> Change | None:
    old_time, new_time = _time(old), _time(new)
    old_ms, new_ms = (time[0] if time else None for time in (old_time, new_time))
    if old is None or new is None:
        only = new or old or {}
        if only.get("status") == "absent" or (_runs(only) and _time(only) is None):
            return None
        verdict = "gone" if new is None else "new"
        return Change(*key, verdict, old_ms, new_ms, reason=_reason(only))
    if _runs(old) and not _runs(new):
        return Change(*key, "now fails", old_ms, reason=_reason(new))
    if not _runs(old):
        if _runs(new):
            return Change(*key, "now runs", new_ms=new_ms)
        worse = old.get("status") == "absent" and new.get("status") != "absent"
        return Change(*key, "now fails", reason=_reason(new)) if worse else None
    if old_time is None or new_time is None:
        return None
    ratio = new_time[0] / old_time[0]
    noise = max(NOISE_FLOOR, math.hypot(old_time[1], new_time[1]))
    if abs(ratio - 1) < NOISES_THAT_COUNT * noise:
        verdict = "same"
    else:
        verdict = "faster" if ratio < 1 else "slower"
    return Change(*key, verdict, old_ms, new_ms, ratio, noise)


def _runs(row: Row) -> bool:
    return row.get("status", "ok") == "ok"


def _reason(row: Row) -> str:
    return "" if _runs(row) else ": ".join(str(row[k]) for k in ("status", "reason") if row.get(k))


def _time(row: Row | None) -> tuple[float, float] | None:
    """(median in ms, half the quartile distance relative to it), or None where nothing was timed."""
    for unit, factor in (("ms", 1.0), ("us", 1e-3), ("s", 1e3)):
        median = (row or {}).get(f"median_{unit}")
        if row is not None and median and _runs(row):
            low, high = row.get(f"low_{unit}"), row.get(f"high_{unit}")
            spread = 0.0 if low is None or high is None else (high - low) / 2 / median
            return median * factor, spread
    return None


def environment_warning(old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """One line naming the conditions that differ between two runs, or None where none does."""
    differing = [
        f"{name} was {old.get(name, 'not recorded')}, is {new.get(name, 'not recorded')}"
        for name in _CONDITIONS
        if old.get(name) != new.get(name)
    ]
    if not differing:
        return None
    return f"The two runs differ in more than the code: {'; '.join(differing)}."


def comparison_table(changes: Sequence[Change]) -> Table:
    """Every change, what needs a look first and the largest first; the caption counts the verdicts.

    What was not measured in the new run is counted alone: a run of one suite has no lines for all others.
    """
    counts = Counter(change.verdict for change in changes)
    caption = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])
    table = Table(
        title="new run against old: medians, and the change in units of the noise of both",
        caption=caption or "nothing to compare",
        title_justify="left",
        caption_justify="left",
    )
    for header in ("operation", "case", "direction", "provider"):
        table.add_column(header, overflow="fold")
    for header in ("old ms", "new ms", "new / old", "noise", "change / noise"):
        table.add_column(header, justify="right")
    table.add_column("verdict", overflow="fold")
    for change in sorted((c for c in changes if c.verdict != VERDICTS[-1]), key=_urgency):
        ratio, noise, noises = change.ratio, change.noise, change.noises
        verdict = f"{change.verdict}: {change.reason}" if change.reason else change.verdict
        table.add_row(
            *map(escape, (change.operation, change.case, change.direction, change.provider)),
            significant(change.old_ms),
            significant(change.new_ms),
            "" if ratio is None else f"{ratio:.3f}",
            "" if noise is None else f"{noise:.1%}",
            "" if noises is None else f"{noises:+.1f}",
            escape(verdict),
            style=_STYLES.get(change.verdict),
        )
    return table


def _urgency(change: Change) -> tuple[int, float]:
    return VERDICTS.index(change.verdict), -abs(change.noises or 0.0)
