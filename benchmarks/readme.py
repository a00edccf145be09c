"""`python -m benchmarks readme`: writes the measured figures of README.md from the files in benchmarks/results/.

Each block of README.md between `<!-- figures: NAME -->` and `<!-- end -->` is made by one function here, so that no
figure there is typed by hand. tests/benchmarks/test_readme.py holds README.md against what this gives.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.environment import REPOSITORY
from benchmarks.report import noise, ratio, significant, spread

README = REPOSITORY / "README.md"
RESULTS = REPOSITORY / "benchmarks" / "results"
_BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


class ReadmeError(Exception):
    """README.md names figures that there are none of; the message says which there are."""


def render(text: str, results: Path = RESULTS) -> str:
    """The text with every block of figures made anew.

    Raises:
        ReadmeError: a block's name is unknown.
    """

    def block(found: re.Match[str]) -> str:
        begin, name, end = found.groups()
        if name not in _FIGURES:
            raise ReadmeError(f"figures: {name} is unknown; there are {', '.join(_FIGURES)}")
        return f"{begin}{_FIGURES[name](results)}\n{end}"

    return _BLOCK.sub(block, text)


def _read(results: Path, part: str, name: str) -> tuple[dict[str, Any], str]:
    """The first device's file, and the folder's path from the repository."""
    (path, *_) = sorted(results.glob(f"*/{part}/{name}"))
    return json.loads(
        path.read_text(encoding="utf-8")
    ), f"benchmarks/results/{path.parent.relative_to(results)}"


def demo_figures(results: Path) -> str:
    """The main job's table and plot, and on what it ran."""
    content, folder = _read(results, "demo", "demo.json")
    environment, options = content["environment"], content["options"]
    lines = [
        f"{environment['device']}, PyTorch {environment['torch']}, commit {environment['commit']}, in `{folder}/`:",
        f"a GPT with {options['layers']} layers of width {options['width']} on {options['seq_len']:,} byte tokens, "
        f"{options['dtype']}.",
        "",
        "| implementation | step, ms (quartiles) | tokens/s | peak MiB | final loss | largest loss difference to naive "
        "| time / torch [95 %] |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in content["summary"]:
        lines.append(
            f"| {row['implementation']} | {row['median_ms']:.1f} ({spread(row, 'ms')}) | {row['tokens_per_s']:,.0f} "
            f"| {row['peak_mib']:.1f} | {row['final_loss']:.4f} | {row['largest_loss_difference']:.1e} "
            f"| {ratio(row, 'time_vs_torch')} |"
        )
    return "\n".join([*lines, "", f"![a training step over sequence length]({folder}/speed-memory.png)"])


def host_figures(results: Path) -> str:
    """What an eager call and the import cost on the host."""
    content, folder = _read(results, "host", "results.json")
    rows = content["rows"]
    calls = [
        f"| `{row['case'].partition(',')[0]}` | {row['above_torch_us']:.1f} "
        f"({row['above_torch_low_us']:.1f}-{row['above_torch_high_us']:.1f}) | {row['torch_us']:.1f} |"
        for row in rows
        if row["operation"] == "host"
    ]
    added = next(row for row in rows if row["operation"] == "import")
    return "\n".join(
        [
            f"Host cost of an eager call on tiny CPU tensors, without gradients, in `{folder}/`:",
            "",
            "| function | us above PyTorch's own (quartiles) | PyTorch's own, us |",
            "|---|---|---|",
            *calls,
            "",
            f"`import fastattn` adds {added['median_s']:.2f} s to `import torch` and does "
            f"{'' if added['imports_triton'] else 'not '}import Triton.",
        ]
    )


def run_figures(results: Path) -> str:
    """Every case of the suites: PyTorch's time, and how many times that naive PyTorch and fastattn take."""
    content, folder = _read(results, "run", "results.json")
    cases: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in content["rows"]:
        if row["status"] == "ok" and "time_vs_torch" in row:
            cases.setdefault((row["operation"], row["case"], row["direction"]), {})[row["provider"]] = row
    lines = [
        f"The suites, commit {content['environment']['commit']}, in `{folder}/` (its `report.html` has plots and",
        f"every provider); {noise(content['rows'])}:",
        "",
        "| operation | case | timed | PyTorch, ms (quartiles) | naive / PyTorch [95 %] | fastattn / PyTorch [95 %] "
        "| peak MiB: naive, PyTorch, fastattn |",
        "|---|---|---|---|---|---|---|",
    ]
    for (operation, case, direction), rows in cases.items():
        if "fastattn" in rows:
            peaks = ", ".join(
                significant(rows[name].get("peak_mib")) for name in ("naive", "torch", "fastattn")
            )
            lines.append(
                f"| {operation} | {case} | {direction} | {significant(rows['torch']['median_ms'])} "
                f"({spread(rows['torch'], 'ms')}) | {ratio(rows['naive'], 'time_vs_torch')} "
                f"| {ratio(rows['fastattn'], 'time_vs_torch')} | {peaks} |"
            )
    return "\n".join(lines)


_FIGURES: dict[str, Callable[[Path], str]] = {
    "demo": demo_figures,
    "host": host_figures,
    "run": run_figures,
}
