"""`python -m benchmarks gpu`: the tests marked gpu, the suites and the main job, on the GPU at hand.

Works from a bare checkout with PYTHONPATH=. and nothing installed but PyTorch, Triton, pytest, rich, matplotlib
and Jinja2; with pytest-xdist the tests share the GPU. Every row is on disk as soon as it is measured.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from benchmarks.environment import REPOSITORY, environment
from benchmarks.processes import worker_environment
from benchmarks.report import make_console, results_folder, write_json

# With the tests before and the demo after, all of it takes less than ten minutes; what is left comes with the next
# call, as the rows that are there are kept.
_SUITE_MINUTES = 5
# Not among the default parts; what is left comes with the next call here too.
TUNING_MINUTES = 20.0

_TESTS_AT_A_TIME = 8
# The largest tests take a few times 2^31 elements.
_BYTES_OF_A_TEST = 16 << 30


class NoGpuError(Exception):
    """There is no GPU to run on."""


def run_gpu(
    out: Path,
    parts: tuple[str, ...],
    rounds: int,
    commit: str | None,
    say: Callable[[str], None],
    tuning_minutes: float = TUNING_MINUTES,
) -> int:
    """Runs the parts in order; a part that fails does not keep the next from running, and one that is done is left.

    Returns:
        0, or 1 where a part failed.

    Raises:
        NoGpuError: PyTorch finds no GPU.
        FolderError: the folder cannot be written.
    """
    if not torch.cuda.is_available():
        raise NoGpuError("PyTorch finds no GPU here, and this needs one (`make test` and `make demo` do not)")
    folder = results_folder(out.resolve())
    here = environment("cuda", commit)
    if not _same(_read(folder / "environment.json"), here):
        (folder / "gpu-tests.xml").unlink(
            missing_ok=True
        )  # it was of something else, which it does not say itself
    write_json(folder / "environment.json", here)
    done = _done(folder, here)
    recorded = ["--commit", commit] if commit else []
    failed = []
    for part in parts:
        if part in done:
            say(f"{part}: done in an earlier call")
    if "tests" in parts and "tests" not in done:
        say("the tests marked gpu")
        if _tests(folder, "gpu-tests", "gpu") != 0:
            failed.append("tests")
    if "more-tests" in parts:
        say("the tests that other machines run in Triton's interpreter")
        if _tests(folder, "gpu-more-tests", "not gpu") != 0:
            failed.append("more-tests")
    if "run" in parts:
        say("the suites")
        command = ["run", "--device", "cuda", "--out", str(folder), "--rounds", str(rounds), "--resume"]
        command += ["--minutes", str(_SUITE_MINUTES)]
        if _benchmarks([*command, *recorded], folder / "run.log") != 0:
            failed.append("run")
    if "demo" in parts and "demo" not in done:
        say("the main job")
        command = ["demo", "--device", "cuda", "--out", str(folder / "demo")]
        if _benchmarks([*command, *recorded], folder / "demo.log") != 0:
            failed.append("demo")
    if "tune" in parts:
        say("launch configs")
        command = ["tune", "--out", str(folder / "tune"), "--resume", "--minutes", f"{tuning_minutes:g}"]
        if _benchmarks([*command, *recorded], folder / "tune.log") != 0:
            failed.append("tune")
    for part in failed:
        say(f"{part} failed; see the log in {out}")
    make_console().print(f"results: {out}", highlight=False)
    return 1 if failed else 0


def _done(folder: Path, here: dict[str, Any]) -> set[str]:
    """The parts that an earlier call has finished, on the same device, commit and versions."""
    green = _green(folder / "gpu-tests.xml", folder / "gpu-tests.log")
    reported = _same(_read(folder / "demo" / "demo.json").get("environment", {}), here)
    return {part for part, done in (("tests", green), ("demo", reported)) if done}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _same(before: dict[str, Any], here: dict[str, Any]) -> bool:
    """Whether what was measured there can stand beside what is measured here."""
    names = ("commit", "dirty", "device", "torch", "triton")
    return bool(before) and all(before.get(name) == here.get(name) for name in names)


def _green(junit: Path, log: Path) -> bool:
    """Whether tests ran to their end, and all passed. An interrupted pytest writes its file too, and only logs it."""
    try:
        suites = list(ElementTree.parse(junit).iter("testsuite"))
        interrupted = "KeyboardInterrupt" in log.read_text(encoding="utf-8")
    except (OSError, ElementTree.ParseError):
        return False
    total, bad, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites for name in names)
        for names in (("tests",), ("failures", "errors"), ("skipped",))
    )
    return not interrupted and not bad and total > skipped


def _tests(folder: Path, name: str, marked: str) -> int:
    # Those of the peers' providers last, so that an interrupted run has seen what matters most.
    tests = REPOSITORY / "tests"
    folders = {path.parent for path in tests.glob("*/test_*.py")}
    places = [*tests.glob("test_*.py"), *sorted(folders, key=lambda folder: folder.name == "benchmarks")]
    command = [sys.executable, "-m", "pytest", *map(str, places), "-m", marked, "-p", "no:cacheprovider"]
    command += ["--durations=15"]
    workers = _workers()
    if workers > 1:
        command += ["-n", str(workers), "--dist", "load", "--maxschedchunk", "4"]
    return _logged([*command, f"--junitxml={folder / name}.xml"], folder / f"{name}.log")


def _workers() -> int:
    """How many processes test at a time: most of the time of each goes to compiling, on one core."""
    if importlib.util.find_spec("xdist") is None:
        return 1
    memory = torch.cuda.get_device_properties(0).total_memory
    return max(1, min(_TESTS_AT_A_TIME, os.cpu_count() or 1, memory // _BYTES_OF_A_TEST))


def _benchmarks(arguments: list[str], log: Path) -> int:
    return _logged([sys.executable, "-m", "benchmarks", *arguments], log)


def _logged(command: list[str], log: Path) -> int:
    """Runs a command in the checkout, its output on the terminal and in a file at the same time."""
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=worker_environment({"PYTHONUNBUFFERED": "1"}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None
    with log.open("w", encoding="utf-8") as file:
        for line in process.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            file.write(line)
            file.flush()
    return process.wait()
