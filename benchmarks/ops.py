"""`python -m benchmarks ops`: every operation, case and provider; a table, CSV, JSON and plots."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import plots
from benchmarks.cases import operation_cases
from benchmarks.environment import environment, row_environment
from benchmarks.host import measure_host, measure_import
from benchmarks.measure import Row, measure_case, measure_copy
from benchmarks.providers import PROVIDERS
from benchmarks.report import RowWriter, print_rows, write_csv, write_json

PARTS = ("attention", "layer_norm", "gelu", "host", "import")


@dataclass(frozen=True)
class OpsOptions:
    """What to measure and where to."""

    out: Path
    device: torch.device
    parts: tuple[str, ...] = PARTS
    rounds: int = 20
    cases: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    commit: str | None = None


def run_ops(options: OpsOptions, console: Console, say: Callable[[str], None]) -> list[Row]:
    """Measures the parts in order, each row on disk as it comes, then writes the report.

    Args:
        options: `cases` and `providers` keep those whose names contain one of the given strings.
        console: where the tables go.
        say: called with a line before each case.
    """
    described = environment(options.device, options.commit)
    (options.out / "ops.jsonl").unlink(missing_ok=True)
    writer = RowWriter(options.out / "ops.jsonl", row_environment(described))
    if options.device.type == "cuda" and any(part in PROVIDERS for part in options.parts):
        writer.write(measure_copy(options.device, options.rounds))
    for part in options.parts:
        if part == "host":
            say("host cost a call")
            for device in dict.fromkeys(("cpu", options.device.type)):
                for row in measure_host(device, options.rounds):
                    writer.write(row)
        elif part == "import":
            say("import")
            writer.write(measure_import())
        else:
            _measure_operation(part, options, writer, say)
    _report(options, described, writer.rows, console)
    return writer.rows


def _report(options: OpsOptions, described: dict[str, Any], rows: list[Row], console: Console) -> None:
    write_csv(options.out / "ops.csv", rows)
    write_json(options.out / "ops.json", {"environment": described, "rows": rows})
    for part in options.parts:
        if part in PROVIDERS:
            plots.operation_plot(part, rows, described, options.out / f"{part}.png")
    print_rows(rows, console)


def _measure_operation(
    operation: str, options: OpsOptions, writer: RowWriter, say: Callable[[str], None]
) -> None:
    names = tuple(n for n in PROVIDERS[operation] if _kept(n, options.providers))
    for case in operation_cases(operation, options.device):
        if _kept(case.name, options.cases):
            say(f"{operation} {case.name}")
            for row in measure_case(case, options.device, options.rounds, names=names):
                writer.write(row)


def _kept(name: str, wanted: tuple[str, ...]) -> bool:
    return not wanted or any(part in name for part in wanted)
