"""Where rows go: JSON lines as they come, then CSV, JSON and a table on the terminal."""

from __future__ import annotations

import csv
import json
import math
import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.measure import Row


class FolderError(Exception):
    """A results folder cannot be written; the message says why in one line."""


def results_folder(path: Path) -> Path:
    """Makes a folder and proves that files can be written there.

    Raises:
        FolderError: it cannot be made or written.
    """
    probe = path / ".writable"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise FolderError(f"cannot write results to {path}: {error.strerror or error}") from error
    return path


def writable(path: Path) -> None:
    """Proves that a file can be written, and leaves what it holds.

    Raises:
        FolderError: it cannot.
    """
    there = path.exists()
    try:
        with path.open("a"):
            pass
        if not there:
            path.unlink()
    except OSError as error:
        raise FolderError(f"cannot write results to {path}: {error.strerror or error}") from error


def is_row(value: Any) -> bool:
    """Whether a value read from a file has what every row has."""
    return (
        isinstance(value, dict) and {"operation", "case", "direction", "provider", "status"} <= value.keys()
    )


class RowWriter:
    """Appends rows to a file of JSON lines, each on disk before the next is measured."""

    def __init__(self, path: Path, common: dict[str, Any] | None = None, rows: Iterable[Row] = ()) -> None:
        """`rows` are in the file already."""
        self.path = path
        self.common = common or {}
        self.rows: list[Row] = list(rows)

    def write(self, row: Row) -> Row:
        complete = {**row, **self.common}
        self._append(complete)
        self.rows.append(complete)
        return complete

    def complete(self, suite: str, label: str, conditions: dict[str, Any]) -> None:
        """Writes that all rows of a case are there, and under which conditions they were measured."""
        self._append({"suite": suite, "complete": label, **conditions})

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(line), allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; a last line cut short by an interruption is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def read_rows(path: Path) -> list[Row]:
    """The rows that a `RowWriter` wrote, without its lines about complete cases."""
    return [line for line in read_lines(path) if "complete" not in line]


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """One column for every key that occurs, in the order of first occurrence."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(finite(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def finite(value: Any) -> Any:
    """The same structure with null for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def significant(value: float | None, digits: int = 3) -> str:
    """A figure with so many significant digits and no exponent; empty for None."""
    if value is None:
        return ""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(decimals, 9)}f}"


def spread(row: Row, unit: str) -> str:
    """The quartiles beside a median, as in "1.20-1.35"."""
    return f"{significant(row[f'low_{unit}'])}-{significant(row[f'high_{unit}'])}"


def ratio(row: Row, key: str) -> str:
    """A ratio with its interval, as in "0.98 [0.96, 1.01]"."""
    if row.get(key) is None:
        return ""
    return f"{row[key]:.2f} [{row[key + '_low']:.2f}, {row[key + '_high']:.2f}]"


def noise(rows: Iterable[Row]) -> str:
    """How far the two times of what was timed twice lie apart, over all cases; empty where nothing was."""
    ratios = [row["time_vs_itself"] for row in rows if row.get("time_vs_itself")]
    if not ratios:
        return ""
    typical = statistics.median(abs(ratio - 1) for ratio in ratios)
    return (
        f"the same provider timed twice differs by {typical:.1%} (median of {len(ratios)} measurements; "
        f"ratios {min(ratios):.3f} to {max(ratios):.3f})"
    )


def operation_table(operation: str, rows: Iterable[Row]) -> Table:
    """Times, rates, memory and ratios of one operation; what did not run is listed with its reason."""
    rows = list(rows)
    with_options = any(row.get("time_vs_plain") is not None for row in rows)
    table = Table(
        title=f"{operation}: median of interleaved rounds, quartiles beside it", title_justify="left"
    )
    for header, justify in (
        ("case", "left"),
        ("direction", "left"),
        ("provider", "left"),
        ("ms", "right"),
        ("quartiles", "right"),
        ("TFLOP/s", "right"),
        ("GB/s", "right"),
        ("peak MiB", "right"),
        ("time / torch", "right"),
        ("time / naive", "right"),
        *((("time / plain", "right"),) if with_options else ()),
    ):
        table.add_column(header, justify=justify, overflow="fold")
    previous: tuple[str, str] | None = None
    for row in rows:
        group = (row["case"], row["direction"])
        if previous is not None and group != previous:
            table.add_section()
        labels = group if group != previous else ("", "")
        previous = group
        if row["status"] != "ok":
            table.add_row(*labels, row["provider"], row["status"], style="dim")
            continue
        table.add_row(
            *labels,
            row["provider"],
            significant(row["median_ms"]),
            spread(row, "ms"),
            significant(row.get("tflops")),
            significant(row.get("gbytes_per_s")),
            significant(row.get("peak_mib")),
            ratio(row, "time_vs_torch"),
            ratio(row, "time_vs_naive"),
            *((ratio(row, "time_vs_plain"),) if with_options else ()),
        )
    return table


def host_table(rows: Iterable[Row]) -> Table:
    table = Table(
        title="host cost of one eager call on tiny tensors, without gradients", title_justify="left"
    )
    for header in (
        "fastattn function",
        "us a call",
        "quartiles",
        "PyTorch us",
        "above PyTorch us",
        "bound us",
    ):
        table.add_column(header, justify="left" if header.startswith("fastattn") else "right")
    for row in rows:
        bound = row["bound_us"]
        table.add_row(
            row["case"],
            f"{row['median_us']:.2f}",
            f"{row['low_us']:.2f}-{row['high_us']:.2f}",
            f"{row['torch_us']:.2f}",
            f"{row['above_torch_us']:.2f} ({row['above_torch_low_us']:.1f}-{row['above_torch_high_us']:.1f})"
            + (" over" if row["above_torch_us"] > (bound or math.inf) else ""),
            "" if bound is None else f"{bound:g}",
        )
    return table


def remark(row: Row) -> str:
    """What a reader of a row's time must know beside it; mostly nothing."""
    waits = "it waits for the device, so that its time holds host work" if row.get("waits_for_device") else ""
    return "; ".join(filter(None, (str(row.get("note") or ""), waits)))


def remarks(rows: Iterable[Row]) -> list[str]:
    """One line for each provider and direction whose time needs a remark."""
    found = {
        f"{row['operation']} {row['provider']}, {row['direction']}: {remark(row)}": None
        for row in rows
        if row["status"] == "ok" and remark(row)
    }
    return list(found)


def launch_table(rows: Iterable[Row]) -> Table:
    title = "without a GPU: host cost of an eager call, and of its launches alone by Triton, us"
    table = Table(title=title, title_justify="left")
    headers = (
        "fastattn function",
        "direction",
        "least",
        "quartiles",
        "Triton's launches",
        "an allocation",
        "bound above those",
    )
    for header in headers:
        table.add_column(header, justify="left" if header in headers[:2] else "right")
    for row in rows:
        bound = row["bound_us"]
        above = row["least_us"] - row["triton_us"]
        table.add_row(
            row["case"],
            row["direction"],
            f"{row['least_us']:.1f}" + (" over" if above > (bound or math.inf) else ""),
            f"{row['low_us']:.1f}-{row['high_us']:.1f}",
            f"{row['triton_us']:.1f}",
            f"{row['empty_us']:.2f}",
            "" if bound is None else f"{bound:g}",
        )
    return table


def absences(rows: Iterable[Row]) -> list[str]:
    """One line for each provider and reason that kept it from running, with how many cases it concerns."""
    counts: dict[tuple[str, str, str, str], int] = {}
    for row in rows:
        if row["status"] != "ok":
            key = (row["operation"], row["provider"], row["status"], row.get("reason", ""))
            counts[key] = counts.get(key, 0) + 1
    return [
        f"{operation} {provider}: {status} in {count} row{'s' if count > 1 else ''}: {reason}"
        for (operation, provider, status, reason), count in counts.items()
    ]


def print_rows(rows: Sequence[Row], console: Console) -> None:
    """The tables of every kind of row there is, then what is absent and why."""
    for operation in dict.fromkeys(row["operation"] for row in rows):
        chosen = [row for row in rows if row["operation"] == operation]
        if operation == "host":
            console.print(host_table(row for row in chosen if row["status"] == "ok"))
        elif operation == "launch":
            console.print(launch_table(row for row in chosen if row["status"] == "ok"))
        elif operation == "import":
            for row in chosen:
                if row["status"] != "ok":
                    continue
                console.print(
                    f"import fastattn adds {row['median_s']:.3f} s (quartiles {spread(row, 's')}) to import "
                    f"torch ({row['torch_s']:.2f} s); bound {row['bound_s']} s; "
                    f"Triton is {'imported' if row['imports_triton'] else 'not imported'}"
                )
        else:
            console.print(operation_table(operation, chosen))
    for line in filter(None, [noise(rows), *remarks(rows), *absences(rows)]):
        console.print(line, style="dim", highlight=False, markup=False)


def make_console(stderr: bool = False) -> Console:
    """A console that does not fold tables to 80 columns where there is no terminal."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=170)
