"""Writes kernels/_measured.py: the entries that are there with those of a run, as the formatter would have them."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.environment import REPOSITORY
from benchmarks.tuning.search import TaskResult
from fastattn.kernels._config import Key
from fastattn.kernels._measurement import Measured, Run

PATH = REPOSITORY / "kernels" / "_measured.py"

_HEAD = '''"""Measured launch configs, by function and key. Written by `python -m benchmarks tune`."""

from __future__ import annotations

from typing import Any

from fastattn.kernels._measurement import Measured, Run

'''
_WIDTH = 110  # ruff's line length in pyproject.toml
_DIGITS = 4

Table = dict[str, dict[Key, Measured]]


def merged(
    table: Mapping[str, Mapping[Key, Measured]],
    runs: Mapping[str, Run],
    results: Iterable[TaskResult],
    described: Mapping[str, Any],
) -> tuple[Table, dict[str, Run]]:
    """The table with what a run has found, and the runs that it still names.

    Args:
        described: of `benchmarks.environment.environment`.
    """
    new: Table = {select: dict(entries) for select, entries in table.items()}
    run = Run(
        str(described["device"]),
        int(described["multiprocessors"]),
        str(described["torch"]),
        str(described["triton"]),
        str(described["commit"]) + (" with changes" if described.get("dirty") else ""),
        str(described["date"])[:10],
    )
    name = f"{run.device}, {run.date}, {run.commit}"
    for result in results:
        if result.config is not None and result.duel is not None:
            ms, before = (float(f"{t:.{_DIGITS}g}") for t in (result.duel.ms, result.duel.current_ms))
            entry = Measured(result.config, ms, before, result.cases, name)
            new.setdefault(result.select, {})[result.key] = entry
    ordered = {select: dict(sorted(new[select].items(), key=_order)) for select in sorted(new)}
    named = {entry.run for entries in new.values() for entry in entries.values()}
    return ordered, {key: value for key, value in {**runs, name: run}.items() if key in named}


def render(table: Mapping[str, Mapping[Key, Measured]], runs: Mapping[str, Run]) -> str:
    """The file's text."""
    lines = _value("RUNS: dict[str, Run] = ", runs, 0, "")
    lines += ["", *_value("MEASURED: dict[str, dict[tuple[Any, ...], Measured]] = ", table, 0, "")]
    return _HEAD + "\n".join(lines) + "\n"


def diff(old: str, new: str) -> str:
    """Unified, as git shows it; empty where nothing changes."""
    lines = difflib.unified_diff(
        old.splitlines(keepends=True),
        new.splitlines(keepends=True),
        "a/kernels/_measured.py",
        "b/kernels/_measured.py",
    )
    return "".join(lines)


def write(text: str, path: Path = PATH) -> None:
    """Puts the text in the file's place at once: an interruption leaves the old one."""
    fresh = path.with_name(path.name + ".new")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, path)


def _order(entry: tuple[Key, Measured]) -> list[tuple[str, Any]]:
    """Keys in order, also where their values are of different types."""
    return [(type(value).__name__, value) for value in entry[0]]


def _value(before: str, value: Any, indent: int, after: str) -> list[str]:
    """Lines of a value between two texts: one where it fits, else an item a line, which is ruff's rule."""
    pad = " " * indent
    line = f"{pad}{before}{_one_line(value)}{after}"
    items = _items(value)
    if len(line) <= _WIDTH or not items:
        return [line]
    opening, closing = _brackets(value)
    lines = [f"{pad}{before}{opening}"]
    for name, item in items:
        lines += _value(name, item, indent + 4, ",")
    return [*lines, f"{pad}{closing}{after}"]


def _items(value: Any) -> list[tuple[str, Any]]:
    """What stands before each item of a dictionary, a named tuple or a tuple, and the item."""
    if isinstance(value, Mapping):
        return [(f"{_one_line(key)}: ", item) for key, item in value.items()]
    if isinstance(value, (Measured, Run)):
        return [(f"{name}=", item) for name, item in value._asdict().items()]
    return [("", item) for item in value] if isinstance(value, tuple) else []


def _brackets(value: Any) -> tuple[str, str]:
    if isinstance(value, Mapping):
        return "{", "}"
    return (f"{type(value).__name__}(" if isinstance(value, (Measured, Run)) else "("), ")"


def _one_line(value: Any) -> str:
    if isinstance(value, str):
        return repr(value) if '"' in value else json.dumps(value, ensure_ascii=False)
    if not isinstance(value, (Mapping, tuple)):
        return repr(value)
    opening, closing = _brackets(value)
    inner = ", ".join(f"{name}{_one_line(item)}" for name, item in _items(value))
    return f"{opening}{inner}{',' if type(value) is tuple and len(value) == 1 else ''}{closing}"
