"""The options of `python -m benchmarks run`, checked before anything is timed."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.demo_options import IMPLEMENTATIONS
from benchmarks.measure import first_line
from benchmarks.providers import PROVIDERS
from benchmarks.report import is_row, results_folder, writable
from benchmarks.suites import SUITES, TRAINING_STEPS

# Every name that --suite takes, in the order in which "all" runs them.
NAMES = (*SUITES, "train", "host")
OUTPUTS = ("rows.jsonl", "rows.csv", "results.json", "report.html")


@dataclass(frozen=True)
class RunOptions:
    """What to measure and where to.

    Attributes:
        suites: of `NAMES`.
        cases, providers: keep those whose names contain one of these; all where empty.
        resume: keep the rows that the folder holds already.
        minutes: start no further case after so long.
        commit: recorded where the checkout has no git history.
        old: the content of another run's results.json, to compare with.
    """

    out: Path
    device: torch.device
    suites: tuple[str, ...] = NAMES
    rounds: int = 20
    cases: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    resume: bool = False
    minutes: float = float("inf")
    commit: str | None = None
    old: dict[str, Any] | None = None


class RunError(Exception):
    """What was asked for cannot be measured; the message says why in one line."""


def make_options(chosen: argparse.Namespace) -> RunOptions:
    """The command's arguments, checked before anything is timed.

    Raises:
        RunError: a name is unknown, a value out of its range, or a file cannot be read.
        FolderError: the results cannot be written.
    """
    names = NAMES if "all" in chosen.suite else tuple(chosen.suite)
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise RunError(f"suite {unknown[0]!r} is unknown; there are {', '.join(NAMES)}, and all")
    if chosen.rounds < 1:
        raise RunError(f"--rounds {chosen.rounds} must be at least 1")
    if not chosen.minutes > 0:
        raise RunError(f"--minutes {chosen.minutes:g} must be above 0")
    if chosen.resume and not chosen.out:
        raise RunError("--resume needs --out DIR, the folder of the run that it goes on with")
    device = _device(chosen.device)
    for path in chosen.files:
        _load_providers(Path(path))
    _check_names(chosen, names, device)
    old = _read_old(Path(chosen.compare)) if chosen.compare else None
    out = Path(chosen.out or Path("run-results") / datetime.now().strftime("%Y-%m-%d-%H%M%S"))
    if (out / "rows.jsonl").is_file() and (out / "rows.jsonl").stat().st_size and not chosen.resume:
        raise RunError(f"{out} holds the rows of a run: give --resume to go on with it, or another --out")
    results_folder(out)
    for name in OUTPUTS:
        writable(out / name)
    return RunOptions(
        out,
        device,
        names,
        chosen.rounds,
        tuple(chosen.cases),
        tuple(chosen.providers),
        chosen.resume,
        chosen.minutes,
        chosen.commit,
        old,
    )


def _check_names(chosen: argparse.Namespace, suites: Sequence[str], device: torch.device) -> None:
    """Every part of a name that was given is in the name of something that these suites measure."""
    cases = [c for name in suites if name in SUITES for c in SUITES[name].cases(device)]
    steps = TRAINING_STEPS[device.type] if "train" in suites else ()
    providers = {name for case in cases for name in PROVIDERS[case.operation]}
    known = {
        "provider": sorted(providers.union(IMPLEMENTATIONS if steps else ())),
        "case": [case.name for case in (*cases, *steps)],
    }
    for kind, texts in (("provider", chosen.providers), ("case", chosen.cases)):
        for text in texts:
            if not any(text in name for name in known[kind]):
                there = ", ".join(known[kind]) or "none"
                raise RunError(f"no {kind} has {text!r} in its name; there are {there}")


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise RunError(f"--device {name} must be cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise RunError(f"--device {name} must be cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RunError(f"--device {name}: PyTorch finds no GPU here")
    if device.type == "cuda" and device.index is not None:
        count = torch.cuda.device_count()
        if device.index >= count:
            raise RunError(f"--device {name}: there {'is' if count == 1 else 'are'} {count}, counted from 0")
        torch.cuda.set_device(device)  # Triton launches, and events are recorded, on the current one
    return device


def _load_providers(path: Path) -> None:
    """Runs a file of the user's own, whose decorated functions become providers."""
    described = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or described is None or described.loader is None:
        raise RunError(f"--with {path}: there is no such Python file")
    module = importlib.util.module_from_spec(described)
    sys.modules[path.stem] = module  # Triton reads a kernel's source through its module
    try:
        described.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a script without its guard leaves at its end
        raise RunError(f"--with {path}: {type(error).__name__}: {first_line(error)}") from error


def _read_old(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"--compare {path}: {error}") from None
    found = content if isinstance(content, dict) else {}
    rows = found.get("rows")
    if (
        not isinstance(rows, list)
        or not all(map(is_row, rows))
        or not isinstance(found.get("environment"), dict)
    ):
        raise RunError(f"--compare {path} is no results.json of a run")
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m benchmarks run`."""
    forever = float("inf")
    add = parser.add_argument
    add("--suite", nargs="+", default=["all"], metavar="NAME", help=f"{' '.join(NAMES)}, or all (default)")
    add("--out", metavar="DIR", help="results folder (default: a new one in run-results)")
    add("--device", help="cpu or cuda; the GPU where there is one otherwise")
    add("--rounds", type=int, default=20, metavar="N", help="timed rounds (default 20)")
    add("--cases", nargs="+", default=[], metavar="TEXT", help="only cases with this in their name")
    add("--providers", nargs="+", default=[], metavar="TEXT", help="only providers with this in their name")
    add(
        "--with",
        dest="files",
        nargs="+",
        default=[],
        metavar="FILE",
        help="Python files with your own providers",
    )
    add("--compare", metavar="JSON", help="another run's results.json: what got faster, and what slower")
    add("--resume", action="store_true", help="keep the rows that the folder holds already")
    add("--minutes", type=float, default=forever, metavar="N", help="start no further case after so long")
    add("--commit", help="recorded where the checkout has no git history")


def kept(name: str, wanted: Sequence[str]) -> bool:
    """Whether a name is among those asked for by a part of it; without any, all are."""
    return not wanted or any(part in name for part in wanted)
