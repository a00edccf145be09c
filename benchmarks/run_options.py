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

from benchmarks import peers
from benchmarks.providers import PROVIDERS
from benchmarks.report import results_folder
from benchmarks.suites import SUITES, TRAINING_STEPS

assert peers  # its import registers the peers' providers

# Every name that --suite takes, in the order in which "all" runs them.
NAMES = (*SUITES, "train", "host")


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
    device = _device(chosen.device)
    for path in chosen.files:
        _load_providers(Path(path))
    known = {name for providers in PROVIDERS.values() for name in providers}
    for text in chosen.providers:
        if not any(text in name for name in known):
            raise RunError(f"no provider has {text!r} in its name; there are {', '.join(sorted(known))}")
    cases = [c.name for name in names if name in SUITES for c in SUITES[name].cases(device)]
    cases += [c.name for c in TRAINING_STEPS[device.type]] if "train" in names else []
    for text in chosen.cases:
        if not any(text in name for name in cases):
            raise RunError(f"no case has {text!r} in its name; there are {', '.join(cases) or 'none'}")
    old = _read_old(Path(chosen.compare)) if chosen.compare else None
    out = chosen.out or Path("run-results") / datetime.now().strftime("%Y-%m-%d-%H%M%S")
    return RunOptions(
        results_folder(Path(out)),
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


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise RunError(f"--device {name} must be cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise RunError(f"--device {name} must be cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RunError(f"--device {name}: PyTorch finds no GPU here")
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
    except Exception as error:
        raise RunError(f"--with {path}: {type(error).__name__}: {error}") from error


def _read_old(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"--compare {path}: {error}") from None
    if not isinstance(content, dict) or not {"rows", "environment"} <= content.keys():
        raise RunError(f"--compare {path} is no results.json of a run")
    return content


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
