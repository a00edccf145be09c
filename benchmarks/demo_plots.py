"""The main job's plots: loss over steps, and time and memory of a step over sequence length."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from benchmarks.measure import Row
from benchmarks.plots import MARKERS, STYLE, colour, device_line, label_ends, plain_log_axis, save

if TYPE_CHECKING:
    from benchmarks.demo import DemoResult

# A difference below this is drawn as this: a log axis has no zero, and float32 losses agree to about 1e-7.
_LEAST_DIFFERENCE = 1e-8


def loss_plot(result: DemoResult, heading: str, described: dict[str, Any], path: Path) -> bool:
    """Loss over steps above; below, how far each implementation's loss is from naive's. False if none ran."""
    outcomes = [o for o in result.outcomes.values() if o.steps and o.reason is None]
    if not outcomes:
        return False
    naive = next((o for o in outcomes if o.name == "naive"), None)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            2 if naive and len(outcomes) > 1 else 1,
            1,
            figsize=(9, 6.4),
            sharex=True,
            squeeze=False,
            layout="constrained",
            height_ratios=(3, 2) if naive and len(outcomes) > 1 else (1,),
        )
        top = axes[0, 0]
        for index, outcome in enumerate(outcomes):
            steps = [s["step"] + 1 for s in outcome.steps]
            # The curves lie on each other: the first is drawn widest, so that every one shows at its edges.
            top.plot(
                steps,
                [s["loss"] for s in outcome.steps],
                color=colour(outcome.name),
                linewidth=2 + 2.2 * (len(outcomes) - 1 - index),
                solid_capstyle="round",
                label=outcome.name,
            )
        top.legend(frameon=False, title="drawn on top of each other", title_fontsize=9)
        top.set_ylabel("training loss, nats a token")
        top.set_title(heading)
        bottom = axes[-1, 0]
        if bottom is not top and naive is not None:
            for outcome in outcomes:
                if outcome is not naive:
                    _difference(bottom, outcome.name, outcome.steps, naive.steps)
            bottom.set_yscale("log")
            bottom.set_ylabel(f"|loss - naive's|, at least {_LEAST_DIFFERENCE:g}")
            bottom.legend(frameon=False, fontsize=9, ncols=2)
        bottom.set_xlabel("step\n" + device_line(described))
        bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
        bottom.set_xlim(left=1 if len(outcomes[0].steps) > 1 else 0)
        save(figure, path)
    return True


def _difference(axis: Axes, name: str, mine: list[dict[str, Any]], naive: list[dict[str, Any]]) -> None:
    differences = [abs(m["loss"] - n["loss"]) for m, n in zip(mine, naive, strict=True)]
    axis.plot(
        [s["step"] + 1 for s in mine],
        [max(d, _LEAST_DIFFERENCE) for d in differences],
        color=colour(name),
        marker=MARKERS.get(name, "o"),
        markersize=3,
        linestyle="--" if name.endswith("compile") else "-",
        label=f"{name} (largest {max(differences):.1e})",
    )


def length_plot(rows: list[Row], heading: str, described: dict[str, Any], path: Path) -> bool:
    """Time (left) and peak memory (right) of one training step over sequence length, on log axes."""
    done = [row for row in rows if row["status"] == "ok"]
    if not done:
        return False
    with plt.rc_context(STYLE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.2), layout="constrained")
        lengths = sorted({row["seq_len"] for row in rows})
        names = list(dict.fromkeys(row["implementation"] for row in done))
        for axis, key in ((left, "median_ms"), (right, "peak_mib")):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            for name in names:
                _line(axis, [row for row in done if row["implementation"] == name], key)
            axis.xaxis.set_major_locator(FixedLocator(lengths))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.set_xlabel("sequence length, tokens")
            # Room for the names at the right ends.
            axis.set_xlim(lengths[0] / 1.15, lengths[-1] * (lengths[-1] / lengths[0] * 2) ** 0.22)
            values = [row[k] for row in done for k in ("low_ms", "high_ms")] if axis is left else []
            values += [row[key] for row in done]
            axis.set_ylim(min(values) / 1.3, max(values) * 1.3)
            plain_log_axis(axis, "y")
        left.set_title("time of one training step")
        left.set_ylabel("ms (median; bar: quartiles)")
        right.set_title("peak memory of one training step")
        right.set_ylabel("MiB of tensors, weights and optimizer included")
        figure.suptitle(heading, x=0.01, ha="left", fontsize=11)
        figure.supxlabel(device_line(described), fontsize=8, x=0.01, ha="left")
        figure.canvas.draw()  # labels are placed in pixels, which the layout decides
        for axis, key in ((left, "median_ms"), (right, "peak_mib")):
            ends = [[r for r in done if r["implementation"] == name][-1] for name in names]
            label_ends(
                axis,
                [(r["seq_len"], r[key], r["implementation"], colour(r["implementation"])) for r in ends],
            )
        save(figure, path)
    return True


def _line(axis: Axes, rows: list[Row], key: str) -> None:
    name = rows[0]["implementation"]
    x, y = [row["seq_len"] for row in rows], [row[key] for row in rows]
    style = "--" if name.endswith("compile") else "-"
    axis.plot(x, y, linestyle=style, color=colour(name), marker=MARKERS.get(name, "o"), markersize=5)
    if key == "median_ms":
        low = [max(0.0, row[key] - row["low_ms"]) for row in rows]
        high = [max(0.0, row["high_ms"] - row[key]) for row in rows]
        axis.errorbar(x, y, yerr=[low, high], fmt="none", ecolor=colour(name), capsize=3, linewidth=1)
