"""`python -m benchmarks run`: suites of cases, every provider in interleaved rounds, each row on disk as it comes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console

from benchmarks import comparison, html_report
from benchmarks.ceilings import measure_ceilings
from benchmarks.demo_options import IMPLEMENTATIONS
from benchmarks.environment import clocks, environment, row_environment
from benchmarks.host import measure_host, measure_import
from benchmarks.launch_cost import launch_rows
from benchmarks.measure import Row, first_line, measure_case, record_failure
from benchmarks.providers import PROVIDERS
from benchmarks.report import RowWriter, print_rows, write_csv, write_json
from benchmarks.resume import conditions, read_complete, rewrite
from benchmarks.run_options import RunOptions, kept
from benchmarks.suites import SUITES, TRAINING_STEPS, Suite
from benchmarks.training_step import measure_gpt

# Of each suite so many cases come before any suite's others: when time is short, every suite has its most telling.
_FIRST_CASES = 3


class Run:
    """One pass over the suites: what is done, what is left, and where its rows go."""

    def __init__(self, options: RunOptions, say: Callable[[str], None]) -> None:
        self.options, self.say = options, say
        self.described = environment(options.device, options.commit)
        path = options.out / "rows.jsonl"
        self._conditions = conditions(self.described, options)
        rows, self._done = read_complete(path, self._conditions) if path.exists() else ([], set())
        rewrite(path, rows, self._done, self._conditions)
        self.writer = RowWriter(path, row_environment(self.described), rows)
        self._end = time.monotonic() + 60 * options.minutes
        self.late: list[str] = []

    def measure(self) -> list[Row]:
        options = self.options
        self._case("ceiling", "ceilings", measure_ceilings(options.device, options.rounds))
        planned = [
            (place >= _FIRST_CASES, name, *case)
            for name in options.suites
            for place, case in enumerate(self._cases(name))
        ]
        for _, name, label, measured in sorted(planned, key=lambda case: case[0]):
            self._case(name, label, measured)
        self.described["clocks_after"] = clocks(options.device)
        return self.writer.rows

    def _cases(self, name: str) -> list[tuple[str, Iterator[Row]]]:
        """Labels of a suite's cases, and what measures each once it is asked for rows."""
        if name == "host":
            return [("host", self._host())]
        return self._training() if name == "train" else self._suite(SUITES[name])

    def _suite(self, suite: Suite) -> list[tuple[str, Iterator[Row]]]:
        options, found = self.options, []
        for case in suite.cases(options.device):
            names = tuple(n for n in PROVIDERS[case.operation] if kept(n, options.providers))
            if names and kept(case.name, options.cases):
                rows = measure_case(
                    case, options.device, options.rounds, directions=suite.directions, names=names
                )
                found.append((f"{case.operation} {case.name}", rows))
        return found

    def _training(self) -> list[tuple[str, Iterator[Row]]]:
        options = self.options
        on_gpu = options.device.type == "cuda"
        # On a CPU a compiled step takes half a minute to build; `python -m benchmarks demo` times those.
        names = tuple(
            n for n in IMPLEMENTATIONS if kept(n, options.providers) and (on_gpu or not IMPLEMENTATIONS[n][1])
        )
        return [
            (f"gpt {case.name}", measure_gpt(case, options.device, options.rounds, names))
            for case in TRAINING_STEPS["cuda" if on_gpu else "cpu"]
            if names and kept(case.name, options.cases)
        ]

    def _host(self) -> Iterator[Row]:
        for device in dict.fromkeys(("cpu", self.options.device.type)):
            yield from measure_host(device, self.options.rounds)
        yield from launch_rows(rounds=self.options.rounds)
        yield measure_import()

    def _case(self, suite: str, label: str, measured: Iterator[Row]) -> None:
        """Measures a case and writes its rows, unless they are there already or time is up."""
        if (suite, label) in self._done:
            return
        if time.monotonic() > self._end:
            self.late.append(f"{suite} {label}")
            return
        self.say(f"{suite} {label}")
        try:
            for row in measured:
                self.writer.write({"suite": suite, **row, **self._share(row), "label": label})
            self.writer.complete(suite, label, self._conditions)
        except Exception as error:
            # Of no provider's making, such as inputs that do not fit: the next case may. It is not complete, as after
            # an error of the device all cases fail until another process takes them up.
            self.writer.write({"suite": suite, **_failed(suite, label, error), "label": label})

    def _share(self, row: Row) -> Row:
        """How near a row is to the measured ceilings: the least time of its work over its own time."""
        if row.get("status") != "ok" or "tflops" not in row or row["operation"] == "ceiling":
            return {}
        ceilings = {r["case"]: r for r in self.writer.rows if r["suite"] == "ceiling" and r["status"] == "ok"}
        exact = row.get("shape", {}).get("dtype") == "fp32" and "matmul-fp32" in ceilings
        pairs = (("matmul-fp32" if exact else "matmul", "tflops"), ("copy", "gbytes_per_s"))
        shares = [row[key] / ceilings[case][key] for case, key in pairs if case in ceilings and key in row]
        return {"roofline_share": max(shares), "bound_ms": max(shares) * row["median_ms"]} if shares else {}


def _failed(suite: str, label: str, error: Exception) -> Row:
    """The row of a case that came to its end by an error outside of all providers."""
    operation, _, case = label.partition(" ") if " " in label else (suite, "", label)
    row: Row = {"operation": operation, "case": case, "direction": "", "provider": "every"}
    record_failure(row, error)
    return row


def run_suites(options: RunOptions, console: Console, say: Callable[[str], None]) -> list[Row]:
    """Measures, then writes rows.csv, results.json and report.html, whatever interrupts the measuring.

    Args:
        console: where the tables go.
        say: called with a line before each case.
    """
    run = Run(options, say)
    try:
        run.measure()
    finally:
        _report(run, console)
    return run.writer.rows


def _report(run: Run, console: Console) -> None:
    options, rows = run.options, run.writer.rows
    content: dict[str, Any] = {"environment": run.described, "rows": rows}
    write_csv(options.out / "rows.csv", rows)
    write_json(options.out / "results.json", content)
    print_rows(rows, console)
    for label in run.late:
        console.print(
            f"not measured, as {options.minutes:g} minutes were over: {label}", style="dim", highlight=False
        )
    if options.old is not None:
        warning = comparison.environment_warning(options.old["environment"], run.described)
        if warning:
            console.print(warning, style="yellow", highlight=False)
        console.print(comparison.comparison_table(comparison.compare(options.old["rows"], rows)))
    try:
        html_report.write_html(options.out / "report.html", content)
    except Exception as error:  # the figures are printed and on disk already
        console.print(
            f"report.html is not written: {type(error).__name__}: {first_line(error)}",
            style="red",
            highlight=False,
            markup=False,
        )
