"""What the main job writes: the table, CSV, JSON and the two plots."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import demo_plots
from benchmarks.demo import DemoResult, Outcome
from benchmarks.demo_options import DemoOptions
from benchmarks.environment import environment, row_environment
from benchmarks.measure import Row
from benchmarks.report import ratio, significant, spread, write_csv, write_json
from benchmarks.timing import summarize, time_ratio


def summary_rows(result: DemoResult, options: DemoOptions) -> list[Row]:
    """One row an implementation, in the order asked for."""
    return [_summary(outcome, result, options) for outcome in result.outcomes.values()]


def _summary(outcome: Outcome, result: DemoResult, options: DemoOptions) -> Row:
    row: Row = {"implementation": outcome.name, "status": "ok"}
    if outcome.reason is not None:
        return row | {"status": "failed", "reason": outcome.reason}
    times = timed(outcome)
    step = summarize(times)
    row |= {
        "median_ms": step.median,
        "low_ms": step.low,
        "high_ms": step.high,
        "timed_steps": step.count,
        "tokens_per_s": options.batch_size * options.seq_len / step.median * 1e3,
        "peak_mib": _mib(outcome.peak_bytes),
        "held_mib": _mib(outcome.held_bytes),
        "first_step_s": outcome.first_step_s,
        "final_loss": outcome.steps[-1]["loss"],
        "largest_loss_difference": _loss_difference(outcome, result.outcomes.get("naive")),
        "parameters": outcome.parameters,
    }
    for baseline in ("torch", "naive"):
        other = result.outcomes.get(baseline)
        if other is not None and other.reason is None:
            found = time_ratio(times, timed(other))
            key = f"time_vs_{baseline}"
            row |= {key: found.value, f"{key}_low": found.low, f"{key}_high": found.high}
    return row


def timed(outcome: Outcome) -> list[float]:
    """Milliseconds of the steps that count; all of them where a run is too short to leave any out."""
    return [s["ms"] for s in outcome.steps if s["timed"]] or [s["ms"] for s in outcome.steps]


def _mib(size: int | None) -> float | None:
    return None if size is None else size / 2**20


def _loss_difference(outcome: Outcome, naive: Outcome | None) -> float | None:
    """Largest difference of the loss at any step from naive's at the same step."""
    if naive is None or naive.reason is not None:
        return None
    pairs = zip(outcome.steps, naive.steps, strict=True)
    return max(abs(mine["loss"] - other["loss"]) for mine, other in pairs)


def point_rows(result: DemoResult) -> list[Row]:
    """One row an implementation and length of the speed and memory plot."""
    rows = []
    for point in result.points:
        row: Row = {"implementation": point.name, "seq_len": point.seq_len, "status": "ok"}
        if point.reason is not None or not point.ms:
            rows.append(row | {"status": "failed", "reason": point.reason})
            continue
        step = summarize(point.ms)
        figures = {
            "median_ms": step.median,
            "low_ms": step.low,
            "high_ms": step.high,
            "timed_steps": step.count,
        }
        rows.append(row | figures | {"peak_mib": _mib(point.peak_bytes)})
    return rows


def step_rows(result: DemoResult) -> list[Row]:
    """Loss and time of every training step."""
    return [{"implementation": o.name, **step} for o in result.outcomes.values() for step in o.steps]


def title(options: DemoOptions, lengths: str) -> str:
    """What was trained, in one line."""
    return (
        f"GPT with {options.layers} layers of width {options.width}, {options.heads} heads; batch "
        f"{options.batch_size} x {lengths} tokens ({options.tokenizer}), {options.dtype}"
        f"{' autocast' if options.dtype == 'bf16' else ''}"
    )


def summary_table(rows: list[Row], heading: str) -> Table:
    table = Table(title=heading, title_justify="left")
    headers = (
        "implementation",
        "step ms",
        "quartiles",
        "tokens/s",
        "peak MiB",
        "first step s",
        "final loss",
        "max loss diff\nto naive",
        "time / torch",
        "time / naive",
    )
    for header in headers:
        table.add_column(header, justify="left" if header == "implementation" else "right")
    for row in rows:
        if row["status"] != "ok":
            table.add_row(row["implementation"], row["status"], style="dim")
            continue
        difference = row["largest_loss_difference"]
        table.add_row(
            row["implementation"],
            significant(row["median_ms"], 4),
            spread(row, "ms"),
            f"{row['tokens_per_s']:,.0f}",
            "" if row["peak_mib"] is None else f"{row['peak_mib']:,.1f}",
            f"{row['first_step_s']:.1f}",
            f"{row['final_loss']:.4f}",
            "" if difference is None else f"{difference:.1e}",
            ratio(row, "time_vs_torch"),
            ratio(row, "time_vs_naive"),
        )
    return table


def point_table(rows: list[Row], options: DemoOptions) -> Table:
    """Time and memory at each length, an implementation a row."""
    heading = f"one training step over sequence length, batch {options.batch_size}: median ms / peak MiB"
    table = Table(title=heading, title_justify="left")
    table.add_column("implementation")
    lengths = sorted({row["seq_len"] for row in rows})
    for length in lengths:
        table.add_column(f"{length:,} tokens", justify="right")
    cells = {(row["implementation"], row["seq_len"]): row for row in rows}
    for name in dict.fromkeys(row["implementation"] for row in rows):
        table.add_row(name, *(_cell(cells.get((name, length))) for length in lengths))
    return table


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    if row["status"] != "ok":
        return "failed"
    return f"{significant(row['median_ms'])} / {row['peak_mib']:,.0f}"


def reasons(summary: list[Row], points: list[Row]) -> list[str]:
    """A line for each implementation, or length of one, that could not run."""
    lines = [f"{r['implementation']} did not run: {r['reason']}" for r in summary if r["status"] != "ok"]
    failed = [r for r in points if r["status"] != "ok"]
    for name, reason in dict.fromkeys((r["implementation"], r["reason"]) for r in failed):
        lengths = [
            f"{r['seq_len']:,}" for r in failed if (r["implementation"], r["reason"]) == (name, reason)
        ]
        lines.append(f"{name} did not run at {', '.join(lengths)} tokens: {reason}")
    return lines


def write_report(folder: Path, result: DemoResult, options: DemoOptions, console: Console) -> list[Row]:
    """Writes every file of the results and prints the tables; returns the summary's rows."""
    described = environment(options.device, options.commit)
    summary, points = summary_rows(result, options), point_rows(result)
    heading = title(options, f"{options.seq_len:,}")
    tables: list[Any] = [summary_table(summary, f"{heading}; {described['device']}")]
    if points:
        tables.append(point_table(points, options))
    lines = reasons(summary, points)
    scope = "each block" if options.compile_scope == "block" else "the whole model"
    scope += ", once for all lengths" if options.compile_dynamic else ""
    lines.append(
        "first step: forward and backward with all compiling, not in the step times; compilations run side by "
        f"side; peak: weights, optimizer and the most that one step adds; [..]: 95 % interval; compile: of {scope}"
    )
    text = io.StringIO()
    for target in (console, Console(file=text, width=170)):
        for table in tables:
            target.print(table)
        for line in lines:
            target.print(line, highlight=False, markup=False, soft_wrap=True)
    (folder / "table.txt").write_text(text.getvalue(), encoding="utf-8")
    common = row_environment(described)
    write_csv(folder / "summary.csv", [row | common for row in summary])
    write_csv(folder / "steps.csv", step_rows(result))
    if points:
        write_csv(folder / "lengths.csv", [row | common for row in points])
    content = {
        "environment": described,
        "options": options.to_json(),
        "text_tokens": result.tokens,
        "summary": summary,
        "lengths": points,
        "steps": step_rows(result),
    }
    write_json(folder / "demo.json", content)
    demo_plots.loss_plot(result, heading, described, folder / "loss.png")
    demo_plots.length_plot(points, title(options, "n"), described, folder / "speed-memory.png")
    return summary
