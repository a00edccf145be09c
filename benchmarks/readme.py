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
from benchmarks.suites import BOTH, FORWARD

README = REPOSITORY / "README.md"
RESULTS = REPOSITORY / "benchmarks" / "results"
_BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


class ReadmeError(Exception):
    """README.md names figures that there are none of; the message says which, in one line."""


def render(text: str, results: Path = RESULTS) -> str:
    """The text with every block of figures made anew.

    Raises:
        ReadmeError: a block's name is unknown, or its results are not there.
    """

    def block(found: re.Match[str]) -> str:
        begin, name, end = found.groups()
        if name not in _FIGURES:
            raise ReadmeError(f"figures: {name} is unknown; there are {', '.join(_FIGURES)}")
        write, part, file = _FIGURES[name]
        sections = "\n\n".join(write(*one) for one in _read(results, part, file))
        return f"{begin}{sections}\n{end}"

    return _BLOCK.sub(block, text)


def _read(results: Path, part: str, name: str) -> list[tuple[dict[str, Any], str]]:
    """Every device's file with its folder's path from the repository, GPUs first.

    Raises:
        ReadmeError: no device has the file, or one cannot be read.
    """
    found = []
    for path in sorted(results.glob(f"*/{part}/{name}")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ReadmeError(f"cannot read {path}: {error}") from error
        found.append((content, f"benchmarks/results/{path.parent.relative_to(results)}"))
    if not found:
        raise ReadmeError(f"no device has {part}/{name} in {results}")
    return sorted(found, key=lambda one: one[0].get("environment", {}).get("device_type") != "cuda")


def _cell(row: dict[str, Any] | None, key: str) -> str:
    """A ratio, or why there is none."""
    if row is None or row["status"] == "ok":
        return ratio(row or {}, key)
    return str(row["status"])


def demo_figures(content: dict[str, Any], folder: str) -> str:
    """The main job's table and plot, and on what it ran."""
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


def host_figures(content: dict[str, Any], folder: str) -> str:
    """What an eager call and the import cost on the host."""
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


def run_figures(content: dict[str, Any], folder: str) -> str:
    """Every case of the suites: PyTorch's time, and how many times that naive PyTorch and fastattn take."""
    cases: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in content["rows"]:
        if row.get("suite") != "options":
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
        naive, pytorch, ours = (rows.get(name) for name in ("naive", "torch", "fastattn"))
        if pytorch is not None and ours is not None and _ran(ours):
            times = f"{significant(pytorch['median_ms'])} ({spread(pytorch, 'ms')})" if _ran(pytorch) else ""
            peaks = ", ".join(significant((row or {}).get("peak_mib")) for row in (naive, pytorch, ours))
            lines.append(
                f"| {operation} | {case} | {direction} | {times or pytorch['status']} "
                f"| {_cell(naive, 'time_vs_torch')} | {_cell(ours, 'time_vs_torch')} | {peaks} |"
            )
    return "\n".join(lines)


def options_figures(content: dict[str, Any], folder: str) -> str:
    """What each of attention's options costs over the same call without it."""
    cases: dict[str, dict[str, dict[str, Any]]] = {}
    for row in content["rows"]:
        if row.get("suite") == "options" and row["provider"] == "fastattn" and _ran(row):
            cases.setdefault(row["shape"]["options"], {})[row["direction"]] = row
    first = next(iter(cases.values()), {}).get(FORWARD)
    shape = first["case"].removesuffix(f"-{first['shape']['options']}") if first else "no case was measured"
    lines = [
        f"What each option costs over the same call without it, in the same rounds ({shape}, in `{folder}/`):",
        "",
        "| option | forward: time / plain [95 %] | with backward: time / plain [95 %] | with backward: time / naive's "
        "[95 %] | peak MiB, forward: plain, with it | peak MiB, with backward: plain, with it |",
        "|---|---|---|---|---|---|",
    ]
    for name, directions in cases.items():
        forward, both = (directions.get(direction, {}) for direction in (FORWARD, BOTH))
        cells = [ratio(forward, "time_vs_plain"), ratio(both, "time_vs_plain"), ratio(both, "time_vs_naive")]
        cells += [
            f"{significant(row.get('plain_peak_mib'))}, {significant(row.get('peak_mib'))}"
            for row in (forward, both)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _ran(row: dict[str, Any]) -> bool:
    return row["status"] == "ok" and "median_ms" in row


# name -> what writes a device's figures, and from which file of its folder
_FIGURES: dict[str, tuple[Callable[[dict[str, Any], str], str], str, str]] = {
    "demo": (demo_figures, "demo", "demo.json"),
    "host": (host_figures, "host", "results.json"),
    "run": (run_figures, "run", "results.json"),
    "options": (options_figures, "run", "results.json"),
}
