"""One HTML page for a run of the suite: plots, heat maps and every row, readable without a network."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from benchmarks import suite_panels, suite_plots
from benchmarks.measure import DIRECTIONS, Row
from benchmarks.report import finite, noise, remark, significant
from benchmarks.suite_panels import MEMORY
from benchmarks.suite_plots import Ceilings, Style

OURS = "fastattn"
_TEMPLATES = Path(__file__).with_name("templates")
# Blue where ours is faster, orange where the peer is: Okabe and Ito's pair, told apart by every kind of eye.
_FASTER, _SLOWER = "0, 114, 178", "213, 94, 0"
_FULL_COLOUR_AT = 4.0  # times as fast; beyond, the colour says no more and the number does
_SHORT = {"forward": "fwd", "forward+backward": "fwd+bwd", "out of memory": "no memory"}


@dataclass(frozen=True)
class PlotFigure:
    """A plot with what it shows."""

    svg: Markup
    title: str
    note: str = ""


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, what a column is sorted by, and how it looks."""

    text: str
    value: str | float = ""
    background: str = ""
    title: str = ""


def write_html(path: Path, content: dict[str, Any]) -> None:
    """Writes the report of one run.

    Args:
        path: the file; its folder exists.
        content: "environment" as `benchmarks.environment.environment` gives it, where known with "clocks_before" and
            "clocks_after", and "rows"; rows of the operation "ceiling" are the measured limits of the device.
    """
    path.write_text(render_html(content), encoding="utf-8")


def render_html(content: dict[str, Any]) -> str:
    """The page as text; see `write_html`."""
    described: dict[str, Any] = finite(content.get("environment") or {})
    every: list[Row] = [_complete(row) for row in finite(content.get("rows") or [])]
    rows = [row for row in every if row["operation"] != "ceiling"]
    ceilings = find_ceilings(every)
    styles = suite_plots.provider_styles(row["provider"] for row in rows if row["status"] == "ok")
    suites = dict.fromkeys(row["suite"] for row in rows)
    engine = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return engine.get_template("report.html").render(
        device=described.get("device", "unknown device"),
        date=_date(described.get("date")),
        facts=_facts(described, ceilings, noise(rows)),
        suites=[_suite(name, [r for r in rows if r["suite"] == name], ceilings, styles) for name in suites],
        **_table([row for row in rows if row["status"] == "ok"]),
        failures=failures(every),
        ours=OURS,
        heat_colour=heat_colour,
    )


def _complete(row: Row) -> Row:
    """The row with the keys that everything here relies on."""
    names = {key: str(row.get(key) or "") for key in ("operation", "case", "direction", "provider")}
    suite = str(row.get("suite") or names["operation"])
    return {**row, **names, "suite": suite, "status": str(row.get("status") or "ok")}


def find_ceilings(rows: Sequence[Row]) -> Ceilings:
    """The measured limits: every matrix product, the fastest first, and the fastest copy."""
    measured = [row for row in rows if row["operation"] == "ceiling" and row["status"] == "ok"]
    products: dict[str, float] = {}
    for row in measured:
        if row["case"].startswith("matmul") and row.get("tflops"):
            shape = row.get("shape")
            dtype = shape.get("dtype", "") if isinstance(shape, dict) else ""
            name = row["case"] if not dtype or dtype in row["case"] else f"{row['case']} {dtype}"
            products[name] = max(row["tflops"], products.get(name, 0.0))
    copies = [r["gbytes_per_s"] for r in measured if r["case"].startswith("copy") and r.get("gbytes_per_s")]
    ordered = sorted(products.items(), key=lambda item: -item[1])
    return Ceilings(tuple(ordered), max(copies, default=None))


def _facts(described: dict[str, Any], ceilings: Ceilings, seen_noise: str) -> list[tuple[str, str]]:
    """Name and value of what a reader needs to judge or repeat the run."""
    commit = str(described.get("commit") or "unknown") + (" with changes" if described.get("dirty") else "")
    facts = [("commit", commit)]
    for key in ("fastattn", "torch", "triton", "cuda", "driver", "python", "platform", "cpu", "threads"):
        if described.get(key) is not None:
            facts.append((key, str(described[key])))
    if described.get("memory_gib"):
        facts.append(("memory", f"{significant(described['memory_gib'])} GiB"))
    clocks = [_clock(described[key]) for key in ("clocks_before", "clocks_after") if described.get(key)]
    if not clocks and described.get("clock_mhz"):
        clocks = [f"{described['clock_mhz']} MHz"]
    if clocks:
        facts.append(("clocks", ", then ".join(clocks)))
    facts += [(f"measured {name}", f"{significant(rate)} TFLOP/s") for name, rate in ceilings.tflops]
    if ceilings.gbytes_per_s:
        facts.append(("measured copy", f"{significant(ceilings.gbytes_per_s)} GB/s"))
    if seen_noise:
        facts.append(("noise", seen_noise))
    return facts


def _clock(value: Any) -> str:
    if isinstance(value, dict):
        return " / ".join(f"{key.replace('_', ' ')} {item}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return " / ".join(map(str, value))
    return f"{value} MHz" if isinstance(value, (int, float)) or str(value).isdigit() else str(value)


def _date(text: Any) -> str:
    try:
        return datetime.fromisoformat(str(text)).strftime("%d %B %Y, %H:%M UTC").lstrip("0")
    except ValueError:
        return str(text or "date unknown")


def _suite(name: str, rows: list[Row], ceilings: Ceilings, styles: dict[str, Style]) -> dict[str, Any]:
    """What the template shows of one suite."""
    used = {row["provider"] for row in rows if row["status"] == "ok"}
    figures = []
    for operation in dict.fromkeys(row["operation"] for row in rows):
        chosen = [row for row in rows if row["operation"] == operation]
        label = "" if operation == name else f"{operation}: "
        figures += _curves(chosen, label, styles) + _dots(chosen, label, styles)
    roofline = suite_plots.roofline_plot(rows, ceilings, styles)
    if roofline:
        known = bool(ceilings.tflops or ceilings.gbytes_per_s)
        note = "Filled: forward; hollow: forward and backward. " + (
            "The lines are what a large matrix product and a copy reached in the same run; a CPU's are of data beyond "
            "its caches, so that small cases may pass 100 %."
            if known
            else "No ceilings were measured in this run."
        )
        figures.append(PlotFigure(Markup(roofline), "roofline", note))
    return {
        "name": name,
        "summary": summary(rows),
        "legend": [(key, style) for key, style in styles.items() if key in used],
        "figures": figures,
        "heat": heat_map(rows),
    }


def _curves(rows: list[Row], label: str, styles: dict[str, Style]) -> list[PlotFigure]:
    """Speed and memory over the size, a figure each, for every family of cases."""
    unit, found = suite_panels.speed_unit(rows), []
    for panel in suite_panels.panels(rows)[0]:
        title = f"{label}{panel.direction}, {panel.family}".rstrip(", ")
        for what, drawn in (("speed", unit), ("memory", MEMORY)):
            svg = suite_plots.line_plot(panel, drawn, styles)
            if svg:
                found.append(PlotFigure(Markup(svg), f"{what}, {title}", _missing(panel)))
    return found


def _missing(panel: suite_panels.Panel) -> str:
    """Who ran out of memory or failed on a curve, and at which sizes."""
    sizes: dict[tuple[str, str], list[str]] = {}
    for size, row in panel.values:
        if row["status"] not in ("ok", "absent"):
            key = (row["provider"], row["status"])
            sizes.setdefault(key, []).append(suite_panels.short_size(size))
    providers: dict[tuple[str, str], list[str]] = {}
    for (provider, status), where in sizes.items():
        providers.setdefault((status, ", ".join(where)), []).append(provider)
    words = {"out of memory": "out of memory at"}
    return "; ".join(
        f"{words.get(status, f'{status} at')} {where}: {', '.join(names)}"
        for (status, where), names in providers.items()
    ).capitalize()


def _dots(rows: list[Row], label: str, styles: dict[str, Style]) -> list[PlotFigure]:
    """Cases that are on no curve: their speeds, and their memory."""
    unit, rest, found = suite_panels.speed_unit(rows), suite_panels.panels(rows)[1], []
    for what, drawn in (("speed", unit), ("memory", MEMORY)):
        for direction in dict.fromkeys(row["direction"] for row in rest):
            chosen = [row for row in rest if row["direction"] == direction]
            svg = suite_plots.dot_plot(chosen, drawn, styles)
            if svg:
                found.append(PlotFigure(Markup(svg), f"{what}, {label}{direction}, single cases"))
    return found


def _groups(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """(case, direction) -> provider -> row."""
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row["case"], row["direction"]), {})[row["provider"]] = row
    return groups


def _milliseconds(row: Row | None) -> float | None:
    return row.get("median_ms") if row is not None and row["status"] == "ok" else None


def our_row(providers: dict[str, Row]) -> Row | None:
    """What a user of fastattn gets; the fastest of its implementations where the default was not measured."""
    if _milliseconds(providers.get(OURS)):
        return providers[OURS]
    timed = [row for name, row in providers.items() if name.startswith(OURS) and _milliseconds(row)]
    return min(timed, key=lambda row: row["median_ms"], default=None)


def best_peer(providers: dict[str, Row]) -> Row | None:
    """The fastest provider that is not ours."""
    timed = [row for name, row in providers.items() if not name.startswith(OURS) and _milliseconds(row)]
    return min(timed, key=lambda row: row["median_ms"], default=None)


def summary(rows: Sequence[Row]) -> str:
    """In how many cases ours is faster than the best peer, and by how much over all; empty without both."""
    ratios = []
    for providers in _groups(rows).values():
        ours, peer = our_row(providers), best_peer(providers)
        if ours is not None and peer is not None:
            ratios.append(ours["median_ms"] / peer["median_ms"])
    if not ratios:
        return ""
    faster = sum(ratio < 1 for ratio in ratios)
    mean = statistics.geometric_mean(ratios)
    return (
        f"{OURS} is faster than the fastest peer in {faster} of {len(ratios)} cases; its time is "
        f"{significant(mean)} of that peer's (geometric mean; {significant(min(ratios))} to "
        f"{significant(max(ratios))})."
    )


def heat_map(rows: Sequence[Row]) -> dict[str, Any] | None:
    """Our time over each peer's, a line for each case and direction, the best peer first; None without peers."""
    groups = _groups(rows)
    peers = [
        name
        for name in dict.fromkeys(row["provider"] for row in rows)
        if not name.startswith(OURS) and any(_milliseconds(group.get(name)) for group in groups.values())
    ]
    if not peers or not any(our_row(providers) for providers in groups.values()):
        return None
    lines = []
    for (case, direction), providers in sorted(groups.items(), key=lambda item: _place(item[0], groups)):
        ours, peer = our_row(providers), best_peer(providers)
        cells = [_heat_cell(ours, peer), Cell(peer["provider"] if peer else "none")]
        cells += [_heat_cell(ours, providers.get(name)) for name in peers]
        lines.append({"case": case, "direction": _SHORT.get(direction, direction), "cells": cells})
    return {"peers": peers, "lines": lines}


def _place(key: tuple[str, str], groups: dict[tuple[str, str], Any]) -> tuple[int, int]:
    """All of a direction together, its cases in their order."""
    directions = list(dict.fromkeys([*DIRECTIONS, *(direction for _, direction in groups)]))
    return directions.index(key[1]), list(groups).index(key)


def _heat_cell(ours: Row | None, peer: Row | None) -> Cell:
    if ours is None:
        return Cell("none", title=f"{OURS} did not run")
    if peer is None or not _milliseconds(peer):
        status = "none" if peer is None or peer["status"] == "ok" else peer["status"]
        return Cell(_SHORT.get(status, status), title=str((peer or {}).get("reason") or ""))
    ratio = ours["median_ms"] / peer["median_ms"]
    title = f"{significant(ours['median_ms'])} ms over {significant(peer['median_ms'])} ms"
    return Cell(significant(ratio), ratio, heat_colour(ratio), title)


def heat_colour(ratio: float) -> str:
    """A colour over the page's own background: none at 1, full where one is four times as fast."""
    strength = min(1.0, abs(math.log(ratio)) / math.log(_FULL_COLOUR_AT))
    return f"rgba({_FASTER if ratio < 1 else _SLOWER}, {0.72 * strength:.2f})"


def failures(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every status and reason once, what is wrong before what is merely absent, with whom it kept from what."""
    counts = Counter((row["status"], str(row.get("reason") or "")) for row in rows if row["status"] != "ok")
    order = ("wrong", "failed", "out of memory", "absent")
    found = []
    for (status, reason), count in counts.items():
        chosen = [r for r in rows if r["status"] == status and str(r.get("reason") or "") == reason]
        found.append(
            {
                "status": status,
                "reason": reason or "no reason given",
                "count": count,
                "providers": list(dict.fromkeys(f"{r['suite']} {r['provider']}" for r in chosen)),
                "cases": list(dict.fromkeys(f"{r['case']} {r['direction']}".strip() for r in chosen)),
            }
        )
    return sorted(found, key=lambda item: order.index(item["status"]) if item["status"] in order else 0)


def _text(key: str) -> Callable[[Row], Cell]:
    def make(row: Row) -> Cell:
        text = str(row[key])
        return Cell(_SHORT.get(text, text), text)

    return make


def _number(key: str, factor: float = 1.0, suffix: str = "") -> Callable[[Row], Cell]:
    def make(row: Row) -> Cell:
        value = row.get(key)
        return Cell("") if value is None else Cell(significant(value * factor) + suffix, value * factor)

    return make


def _count(key: str) -> Callable[[Row], Cell]:
    return lambda row: Cell("") if row.get(key) is None else Cell(f"{row[key]:,}", row[key])


def _interval(key: str, low: str, high: str) -> Callable[[Row], Cell]:
    """A figure with its interval beside it, where there is one."""

    def make(row: Row) -> Cell:
        value = row.get(key)
        if value is None:
            return Cell("")
        beside = [significant(row.get(name)) for name in (low, high)]
        return Cell(significant(value) + (f" ({beside[0]}-{beside[1]})" if all(beside) else ""), value)

    return make


def _versus(name: str) -> Callable[[Row], Cell]:
    return _interval(f"time_vs_{name}", f"time_vs_{name}_low", f"time_vs_{name}_high")


# header, whether the column holds numbers, what makes its cell
_COLUMNS: tuple[tuple[str, bool, Callable[[Row], Cell]], ...] = (
    ("suite", False, _text("suite")),
    ("case", False, _text("case")),
    ("direction", False, _text("direction")),
    ("provider", False, _text("provider")),
    ("ms (quartiles)", True, _interval("median_ms", "low_ms", "high_ms")),
    ("TFLOP/s", True, _number("tflops")),
    ("GB/s", True, _number("gbytes_per_s")),
    ("tokens/s", True, _number("tokens_per_s")),
    ("bound, ms", True, _number("bound_ms")),
    ("of roofline", True, _number("roofline_share", 100.0, " %")),
    ("host, µs", True, _number("host_us")),
    ("peak MiB", True, _number("peak_mib")),
    ("time / torch", True, _versus("torch")),
    ("time / naive", True, _versus("naive")),
    ("time / plain", True, _versus("plain")),
    ("plain's peak MiB", True, _number("plain_peak_mib")),
    ("time / itself", True, _versus("itself")),
    ("clock, MHz", True, _count("clock_mhz")),
    ("rounds", True, _count("rounds")),
    ("remarks", False, lambda row: Cell(remark(row))),
)


def _table(rows: list[Row]) -> dict[str, Any]:
    """The table of all figures without the columns that no row has."""
    cells = {header: [make(row) for row in rows] for header, _, make in _COLUMNS}
    shown = [(header, numeric) for header, numeric, _ in _COLUMNS if any(cell.text for cell in cells[header])]
    lines = zip(*(cells[header] for header, _ in shown), strict=True)
    ours = [row["provider"] == OURS for row in rows]
    return {"headers": shown, "table": list(zip(ours, lines, strict=False))}
