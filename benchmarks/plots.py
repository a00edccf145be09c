"""Plots of the results: colours that colour-blind readers can tell apart, units on every axis."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

# Okabe and Ito's palette; a compiled variant is the lighter neighbour of its eager colour, and dashed.
COLOURS = {
    "naive": "#000000",
    "torch": "#0072B2",
    "torch-compile": "#56B4E9",
    "fastattn": "#D55E00",
    "fastattn-compile": "#E69F00",
    "fastattn-triton": "#E69F00",
    "fastattn-torch": "#CC79A7",
    "sdpa-flash": "#009E73",
    "sdpa-efficient": "#009E73",
    "sdpa-cudnn": "#009E73",
}
_OTHER = "#777777"
MARKERS = {
    "naive": "s",
    "torch": "o",
    "torch-compile": "D",
    "fastattn": "^",
    "fastattn-compile": "v",
    "sdpa-efficient": "D",
    "sdpa-cudnn": "P",
}

STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "figure.dpi": 130,
}


def colour(name: str) -> str:
    return COLOURS.get(name, _OTHER)


def plain_log_axis(axis: Axes, which: str) -> None:
    """Decimal numbers on a log axis, with the 2 and 5 of each decade where there are few decades."""
    chosen = axis.xaxis if which == "x" else axis.yaxis
    low, high = chosen.get_view_interval()
    if high / low < 300:
        chosen.set_major_locator(matplotlib.ticker.LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    chosen.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    chosen.set_minor_formatter(NullFormatter())


def device_line(described: dict[str, Any]) -> str:
    """Device, versions and commit in one line under a plot's title."""
    commit = described["commit"] + ("+changes" if described.get("dirty") else "")
    return f"{described['device']}; torch {described['torch']}, triton {described['triton']}; commit {commit}"


def label_ends(axis: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Names lines at their right ends, (x, y, text, colour) each, pushed apart where they would overlap.

    Called after the axis limits are final.
    """
    transform = axis.transData
    placed: list[float] = []
    gap = 13 * axis.figure.dpi / 100  # one line of small text, in pixels
    spots = sorted(((transform.transform((x, y))[1], x, y, text, tint) for x, y, text, tint in ends))
    for pixel, x, y, text, tint in spots:
        target = max([pixel, *(p + gap for p in placed[-1:])])
        placed.append(target)
        shift = (target - pixel) * 72 / axis.figure.dpi
        axis.annotate(
            text,
            (x, y),
            xytext=(8, shift),
            textcoords="offset points",
            va="center",
            color=tint,
            fontsize=9,
            annotation_clip=False,
        )


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path)
    plt.close(figure)
