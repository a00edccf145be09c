"""Plots of a suite as SVG that takes its text colour from the page, so that it works in light and dark.

Every plot is small and shows one thing, so that a phone shows it at full width and a desk shows two side by side.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.measure import Row
from benchmarks.plots import COLOURS, MARKERS, STYLE, plain_log_axis
from benchmarks.report import significant
from benchmarks.suite_panels import MEMORY, Panel, Unit, intensity, short_size

# Stand-ins that no palette has; `to_svg` replaces them by the page's own colours.
TEXT, GRID = "#010203", "#d0d1d3"
# The other providers take the next of these and the next marker, so that two curves differ in both.
_KEPT = ("torch", "torch-compile", "fastattn", "fastattn-triton", "fastattn-torch")
_PALETTE = ("#009E73", "#7B61B0", "#8C6D31", "#2FA8B8", "#B2455E", "#7A8793", "#8DB600")
_GLYPHS = {"o": "●", "^": "▲", "s": "■", "D": "◆", "v": "▼", "P": "✚", "*": "★", "X": "✖", "<": "◀", ">": "▶"}
_SIZE = (5.2, 3.5)  # inches


@dataclass(frozen=True)
class Style:
    """How a provider is drawn, and its sign in the legend."""

    colour: str
    marker: str

    @property
    def glyph(self) -> str:
        return _GLYPHS[self.marker]

    @property
    def page_colour(self) -> str:
        return "currentColor" if self.colour == TEXT else self.colour


@dataclass(frozen=True)
class Ceilings:
    """Measured in the same run: FLOP rates by name, and the rate of a copy in GB/s."""

    tflops: tuple[tuple[str, float], ...] = ()
    gbytes_per_s: float | None = None


def provider_styles(providers: Iterable[str]) -> dict[str, Style]:
    """A colour and marker for each; no two providers share both."""
    styles: dict[str, Style] = {}
    others, markers = 0, list(_GLYPHS)
    for name in dict.fromkeys(providers):
        if name == "naive" or name in _KEPT:
            styles[name] = Style(COLOURS[name] if name in _KEPT else TEXT, MARKERS.get(name, "o"))
        else:
            styles[name] = Style(_PALETTE[others % len(_PALETTE)], markers[others % len(markers)])
            others += 1
    return styles


def line_plot(panel: Panel, unit: Unit, styles: dict[str, Style]) -> str | None:
    """A line for each provider, named at its end, with the quartiles as bars; None where nothing was measured."""
    drawn = [(size, row) for size, row in panel.values if row["status"] == "ok" and row.get(unit.key)]
    if not drawn:
        return None
    with matplotlib.rc_context(_rc(panel, unit)):
        figure = Figure(figsize=_SIZE)
        axis = figure.add_axes((0.115, 0.135, 0.575, 0.765))
        ends = []
        for name, style in styles.items():
            line = [(size, row) for size, row in drawn if row["provider"] == name]
            if line:
                values = [row[unit.key] for _, row in line]
                _line(axis, name, [size for size, _ in line], values, _bars(line, unit), style)
                ends.append((line[-1][0], values[-1], name))
        _line_axes(axis, panel, unit, sorted({size for size, _ in drawn}))
        _name_ends(axis, ends, styles)
        return to_svg(figure)


def _line(
    axis: Axes, name: str, x: list[float], y: list[float], bars: list[list[float]] | None, style: Style
) -> None:
    ours = name == "fastattn"
    axis.errorbar(
        x,
        y,
        yerr=bars,
        fmt=style.marker + "-",
        color=style.colour,
        lw=2.4 if ours else 1.3,
        ms=6 if ours else 4.5,
        elinewidth=1,
        zorder=3 if ours else 2,
    )


def _bars(line: list[tuple[float, Row]], unit: Unit) -> list[list[float]] | None:
    """Below and above each point: the quartiles of the time, carried over to the rate."""
    if unit.key == MEMORY.key or not all(row.get("low_ms") and row.get("high_ms") for _, row in line):
        return None
    below, above = [], []
    for _, row in line:
        value, median, low, high = row[unit.key], row["median_ms"], row["low_ms"], row["high_ms"]
        down, up = (low / median, high / median) if unit.key == "median_ms" else (median / high, median / low)
        below.append(max(0.0, value * (1 - down)))
        above.append(max(0.0, value * (up - 1)))
    return [below, above]


def _line_axes(axis: Axes, panel: Panel, unit: Unit, sizes: list[float]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [short_size(size) for size in sizes])
    axis.xaxis.minorticks_off()
    axis.margins(x=0.06)
    axis.set_xlabel(panel.axis)
    axis.set_title(unit.label)
    if unit.log:
        axis.set_yscale("log")
        axis.margins(y=0.1)
        plain_log_axis(axis, "y")
    else:
        axis.set_ylim(0, axis.get_ylim()[1] * 1.02)


def spread_apart(positions: Sequence[float], gap: float, low: float = 0.0, high: float = 1.0) -> list[float]:
    """Ascending positions moved as little as keeps them `gap` apart: a crowd is centred on where it was.

    Least squares under the order (pool adjacent violators), then pushed to within `low` and `high` if that fits.
    """
    crowds: list[tuple[float, int]] = []  # mean of (position - index * gap), how many
    for index, position in enumerate(positions):
        mean, count = position - index * gap, 1
        while crowds and crowds[-1][0] >= mean:
            before, number = crowds.pop()
            mean, count = (before * number + mean * count) / (number + count), number + count
        crowds.append((mean, count))
    means = [mean for mean, count in crowds for _ in range(count)]
    top = high - (len(means) - 1) * gap
    return [max(low, min(mean, top)) + index * gap for index, mean in enumerate(means)]


def _name_ends(axis: Axes, ends: list[tuple[float, float, str]], styles: dict[str, Style]) -> None:
    """Each provider's name right of the plot at the height of its last point; after the limits are final."""
    points = [axis.transAxes.inverted().transform(axis.transData.transform((x, y))) for x, y, _ in ends]
    order = sorted(range(len(ends)), key=lambda index: float(points[index][1]))
    height = axis.get_position().height * _SIZE[1] * 72
    heights = spread_apart([float(points[index][1]) for index in order], gap=10.5 / height, high=1.04)
    for index, y in zip(order, heights, strict=True):
        style, name = styles[ends[index][2]], ends[index][2]
        x_end, y_end = points[index]
        place: dict[str, Any] = {"transform": axis.transAxes, "clip_on": False, "color": style.colour}
        axis.plot([x_end, 1.0, 1.03], [y_end, y, y], lw=0.8, ls=(0, (1, 2)), **place)
        axis.plot([1.045], [y], style.marker, ms=4.5, **place)
        weight = "bold" if name == "fastattn" else "normal"
        axis.text(1.07, y, name, transform=axis.transAxes, va="center", fontsize=8, weight=weight)


def dot_plot(rows: Sequence[Row], unit: Unit, styles: dict[str, Style]) -> str | None:
    """A line for each case with a dot for each provider: for cases that are on no curve."""
    drawn = [row for row in rows if row["status"] == "ok" and row.get(unit.key)]
    cases = list(dict.fromkeys(row["case"] for row in drawn))[::-1]
    if not cases:
        return None
    with matplotlib.rc_context(_rc(rows[0]["operation"], rows[0]["direction"], unit)):
        height = 0.75 + 0.42 * len(cases)
        figure = Figure(figsize=(_SIZE[0], height))
        axis = figure.add_axes((0.03, 0.3 / height, 0.94, 1 - 0.62 / height))
        smallest, largest = (bound(row[unit.key] for row in drawn) for bound in (min, max))
        for row in sorted(drawn, key=lambda row: row["provider"] == "fastattn"):
            style = styles[row["provider"]]
            axis.plot(row[unit.key], cases.index(row["case"]), style.marker, color=style.colour, ms=6)
        if unit.log and largest > 30 * smallest:
            axis.set_xscale("log")
            plain_log_axis(axis, "x")
        else:
            axis.set_xlim(0, 1.06 * largest)
        for index, case in enumerate(cases):
            axis.text(0, index + 0.32, case, transform=axis.get_yaxis_transform(), fontsize=8, va="center")
        axis.set_yticks(range(len(cases)), [""] * len(cases))
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
        axis.set_ylim(-0.45, len(cases) - 0.45)
        axis.set_title(unit.label)
        return to_svg(figure)


def roofline_plot(rows: Sequence[Row], ceilings: Ceilings, styles: dict[str, Style]) -> str | None:
    """Speed over FLOPs a byte with the measured ceilings; hollow marks are forward and backward together."""
    drawn = [(x, row) for row in rows if row["status"] == "ok" and (x := intensity(row)) is not None]
    if not drawn:
        return None
    with matplotlib.rc_context(_rc(rows[0].get("suite", rows[0]["operation"]), "roofline")):
        figure = Figure(figsize=_SIZE)
        axis = figure.add_axes((0.115, 0.135, 0.86, 0.765))
        axis.set_xscale("log")
        axis.set_yscale("log")
        for x, row in sorted(drawn, key=lambda item: item[1]["provider"] == "fastattn"):
            style = styles[row["provider"]]
            face = style.colour if row["direction"] == "forward" else "none"
            axis.plot(x, row["tflops"], style.marker, color=style.colour, mfc=face, ms=5.5)
        _roofs(axis, ceilings, [x for x, _ in drawn])
        axis.set_xlabel("FLOPs a byte (least work over least traffic)")
        axis.set_title("TFLOP/s")
        plain_log_axis(axis, "x")
        plain_log_axis(axis, "y")
        return to_svg(figure)


def _roofs(axis: Axes, ceilings: Ceilings, intensities: list[float]) -> None:
    copy, rates = ceilings.gbytes_per_s, ceilings.tflops
    ridges = [1e3 * rate / copy for _, rate in rates] if copy else []
    left, right = min([*intensities, *ridges]) / 8, max([*intensities, *ridges]) * 2.5
    for index, (name, rate) in enumerate(rates):
        start = 1e3 * rate / copy if copy else left
        axis.plot([start, right], [rate, rate], color=TEXT, lw=1.2)
        axis.annotate(f"{name} {significant(rate)} TFLOP/s", (right, rate), (0, 4), **_beside("right"))
        if copy and index == 0:
            place = left * (start / left) ** 0.85  # high on the slope, so that the text has room to its left
            note = f"copy {significant(copy)} GB/s"
            axis.annotate(note, (place, copy * place / 1e3), (-4, 4), **_beside("right"))
    if copy:
        end = max(ridges, default=right)
        axis.plot([left, end], [copy * left / 1e3, copy * end / 1e3], color=TEXT, lw=1.2)
    axis.set_xlim(left, right)
    axis.margins(y=0.12)


def _beside(align: str) -> dict[str, Any]:
    return {"textcoords": "offset points", "ha": align, "fontsize": 8}


def _rc(*salt: object) -> dict[str, Any]:
    """Style of all plots; the salt keeps the ids of two plots on a page apart, and a plot's ids the same."""
    inks = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    return {
        **STYLE,
        **dict.fromkeys(inks, TEXT),
        "font.size": 8.5,
        "axes.titlesize": 9,
        "grid.color": GRID,
        "svg.fonttype": "none",
        "text.parse_math": False,  # a dollar sign in a name is one
        "svg.hashsalt": repr(salt),
    }


def to_svg(figure: Figure) -> str:
    """An <svg> element to put into a page: no prologue, no ids but those it uses, the page's colours and font."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return text.replace(TEXT, "currentColor").replace(GRID, "var(--grid)").strip()
