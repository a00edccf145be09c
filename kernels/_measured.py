"""Measured launch configs, by function and key. Written by `python -m benchmarks tune`."""

from __future__ import annotations

from typing import Any

from fastattn.kernels._measurement import Measured, Run

RUNS: dict[str, Run] = {}

MEASURED: dict[str, dict[tuple[Any, ...], Measured]] = {}
