"""The form of `_measured.py`: what a measured launch config and the run that measured it consist of."""

from __future__ import annotations

from typing import Any, NamedTuple


class Run(NamedTuple):
    """Where figures come from.

    Attributes:
        device: the name of the GPU; `multiprocessors` is how many it has.
        torch, triton: versions.
        commit: of the kernels that were timed.
        date: of the run, in UTC.
    """

    device: str
    multiprocessors: int
    torch: str
    triton: str
    commit: str
    date: str


class Measured(NamedTuple):
    """A launch config that was faster than the one it replaced.

    Attributes:
        config: every field of the config by its name; of configs in configs likewise.
        ms: device time of the kernels that the config is of, from a cold L2 cache: the median over rounds, the
            geometric mean over cases.
        replaced_ms: that of the config that was chosen before, in the same rounds.
        cases: what was timed.
        run: a name in `RUNS`.
    """

    config: dict[str, Any]
    ms: float
    replaced_ms: float
    cases: tuple[str, ...]
    run: str
