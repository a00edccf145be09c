"""The options of `python -m benchmarks tune`, checked before anything is compiled."""

from __future__ import annotations

import argparse

import torch

from benchmarks.tuning.compiling import MOST_CANDIDATES
from fastattn.kernels._target import KNOWN_TARGETS, Target, target_of


class TuneError(Exception):
    """What was asked for cannot be tuned; the message says why in one line."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m benchmarks tune`."""
    forever = float("inf")
    add = parser.add_argument
    add(
        "--kernels", nargs="+", default=[], metavar="NAME",
        help="what configs are of, or beginnings of it: norm_forward, gelu, attention, ... (default: all)",
    )  # fmt: skip
    add("--out", metavar="DIR", help="results folder (default: a new one in tune-results)")
    add(
        "--rounds", type=int, default=40, metavar="N", help="timed rounds of the last comparison (default 40)"
    )
    add("--minutes", type=float, default=forever, metavar="N", help="start nothing further after so long")
    add(
        "--candidates",
        type=int,
        default=MOST_CANDIDATES,
        metavar="N",
        help=f"how many to try of each part of a config, the nearest first (default {MOST_CANDIDATES})",
    )
    add("--resume", action="store_true", help="keep what the folder holds already")
    add(
        "--write",
        action="store_true",
        help="write kernels/_measured.py; without it its diff is printed alone",
    )
    add(
        "--dry-run",
        action="store_true",
        help="list candidates and what the compiler says of them; needs no GPU",
    )
    add("--arch", metavar="ARCH", help=f"with --dry-run, one of {', '.join(KNOWN_TARGETS)} (default sm_90)")
    add(
        "--jobs",
        type=int,
        metavar="N",
        help="how many candidates to compile at a time (default: as many as there are cores)",
    )
    add("--commit", help="recorded where the checkout has no git history")


def check(chosen: argparse.Namespace) -> Target:
    """The target that is tuned for.

    Raises:
        TuneError: an argument is out of its range, or there is no GPU to time on.
    """
    for name, least in (("rounds", 5), ("jobs", 1), ("candidates", 1)):
        value = getattr(chosen, name)
        if value is not None and value < least:
            raise TuneError(f"--{name} {value} must be at least {least}")
    if not chosen.minutes > 0:
        raise TuneError(f"--minutes {chosen.minutes:g} must be above 0")
    if chosen.resume and not chosen.out:
        raise TuneError("--resume needs --out DIR, the folder of the run that it goes on with")
    if chosen.dry_run:
        arch = chosen.arch or "sm_90"
        if arch not in KNOWN_TARGETS:
            raise TuneError(f"--arch {arch!r} is unknown; there are {', '.join(KNOWN_TARGETS)}")
        if chosen.write or chosen.resume:
            raise TuneError(
                f"--dry-run times nothing: there is nothing to {'write' if chosen.write else 'resume'}"
            )
        return KNOWN_TARGETS[arch]
    if chosen.arch:
        raise TuneError(f"--arch {chosen.arch} is for --dry-run; otherwise the GPU at hand is tuned for")
    if not torch.cuda.is_available():
        raise TuneError(
            "PyTorch finds no GPU here, and timing needs one; --dry-run --arch sm_90 compiles without"
        )
    target = target_of(torch.device("cuda"))
    if target.name not in KNOWN_TARGETS:
        raise TuneError(f"{target.name} is unknown here; there are {', '.join(KNOWN_TARGETS)}")
    return target
