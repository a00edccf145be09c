"""Commands in processes without Triton's interpreter, which would take the compiler's place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_compiling(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, where kernels are compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def run_inspect(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """`python -m benchmarks inspect`, one kernel at a time: the tests have the other cores."""
    return run_compiling("-m", "benchmarks", "inspect", "--jobs", 1, *arguments, cwd=cwd)
