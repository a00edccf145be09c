"""`python -m benchmarks demo|run|inspect|tune|gpu|readme`: the main job, suites, machine code, launch configs, GPU."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

USAGE_ERROR = 2
INTERRUPTED = 130
_NEEDED = ("jinja2", "matplotlib", "rich")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; its exit code is 0, 1 (something failed), 2 (could not start) or 130 (interrupted)."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:  # before the commands' own modules are imported, which import these
        return _refuse(f"the benchmarks need {' and '.join(missing)}: pip install {' '.join(missing)}")
    chosen = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = chosen.run
    return command(chosen)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    from benchmarks import demo_options

    demo = commands.add_parser("demo", help="train a GPT on real text with every implementation")
    demo_options.add_arguments(demo)
    demo.set_defaults(run=_demo)

    from benchmarks import run_options

    run = commands.add_parser("run", help="time suites of operations with every provider, and write a report")
    run_options.add_arguments(run)
    run.set_defaults(run=_run)

    from benchmarks.inspection import command as inspection

    inspect = commands.add_parser(
        "inspect", help="compile kernels for GPUs that are not there, and read the code"
    )
    inspection.add_arguments(inspect)
    inspect.set_defaults(run=_inspect)

    from benchmarks.tuning import options as tuning

    tune = commands.add_parser("tune", help="on a GPU: launch configs compared, for kernels/_measured.py")
    tuning.add_arguments(tune)
    tune.set_defaults(run=_tune)

    readme = commands.add_parser("readme", help="write README.md's figures from benchmarks/results/")
    readme.set_defaults(run=_readme)

    gpu = commands.add_parser(
        "gpu", help="on a GPU: the tests marked gpu, then the benchmarks, into a folder"
    )
    gpu.add_argument("--out", required=True, metavar="DIR", help="results folder")
    gpu.add_argument(
        "--parts",
        nargs="+",
        choices=("tests", "more-tests", "run", "demo", "tune"),
        default=["tests", "run", "demo"],
        help="tests, run, demo (these by default), more-tests (those not marked gpu), tune",
    )
    gpu.add_argument("--rounds", type=int, default=20, metavar="N", help="timed rounds (default 20)")
    gpu.add_argument(
        "--tuning-minutes", type=float, default=20.0, metavar="N", help="for the part tune (default 20)"
    )
    gpu.add_argument("--commit", help="recorded where the checkout has no git history")
    gpu.set_defaults(run=_gpu)
    return parser


def _demo(chosen: argparse.Namespace) -> int:
    from benchmarks.demo import run_demo
    from benchmarks.demo_options import DemoError, make_options
    from benchmarks.demo_report import write_report
    from benchmarks.progress import progress_bar
    from benchmarks.report import FolderError, make_console

    try:
        folder, result, options = run_demo(make_options(chosen), progress_bar)
    except (DemoError, FolderError) as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        _refuse("interrupted; demo.jsonl in the results folder keeps what was measured")
        return INTERRUPTED
    rows = write_report(folder, result, options, make_console())
    print(folder)
    return 0 if any(row["status"] == "ok" for row in rows) else 1


def _run(chosen: argparse.Namespace) -> int:
    from benchmarks.report import FolderError, make_console
    from benchmarks.run import run_suites
    from benchmarks.run_options import RunError, make_options
    from fastattn import dispatch

    if dispatch.INTERPRETING:
        return _refuse("TRITON_INTERPRET is set, and the interpreter's time says nothing: unset it")
    try:
        options = make_options(chosen)
        rows = run_suites(options, make_console(), _say)
    except (RunError, FolderError) as error:
        return _refuse(str(error))
    print(options.out)
    return 1 if any(row["status"] in ("wrong", "failed") for row in rows) else 0


def _inspect(chosen: argparse.Namespace) -> int:
    from benchmarks.inspection import command
    from benchmarks.inspection.compare import ComparisonError
    from benchmarks.progress import progress_bar
    from benchmarks.report import FolderError, make_console, results_folder, writable
    from fastattn import dispatch

    if dispatch.INTERPRETING:
        return _refuse("TRITON_INTERPRET is set, and the interpreter takes the compiler's place: unset it")
    try:
        if chosen.json:
            results_folder(chosen.json.absolute().parent)
            writable(chosen.json)
        return command.inspect(chosen, command.plan(chosen), make_console(), progress_bar)
    except (command.InspectError, ComparisonError, FolderError) as error:
        return _refuse(str(error))


def _tune(chosen: argparse.Namespace) -> int:
    from benchmarks.progress import progress_bar
    from benchmarks.report import FolderError, make_console
    from benchmarks.tuning import command
    from benchmarks.tuning.options import TuneError
    from benchmarks.tuning.plan import PlanError
    from fastattn import dispatch

    if dispatch.INTERPRETING:
        return _refuse("TRITON_INTERPRET is set, and the interpreter takes the compiler's place: unset it")
    try:
        return command.tune(chosen, make_console(), progress_bar)
    except (TuneError, PlanError, FolderError) as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        _refuse("interrupted; tuning.jsonl in the results folder keeps what was measured")
        return INTERRUPTED


def _readme(chosen: argparse.Namespace) -> int:
    from benchmarks import readme

    try:
        text = readme.render(readme.README.read_text(encoding="utf-8"))
    except readme.ReadmeError as error:
        return _refuse(str(error))
    readme.README.write_text(text, encoding="utf-8")
    return 0


def _gpu(chosen: argparse.Namespace) -> int:
    from benchmarks.gpu import NoGpuError, run_gpu
    from benchmarks.report import FolderError

    try:
        return run_gpu(
            Path(chosen.out), tuple(chosen.parts), chosen.rounds, chosen.commit, _say, chosen.tuning_minutes
        )
    except (NoGpuError, FolderError) as error:
        return _refuse(str(error))


def _say(line: str) -> None:
    print(f"{datetime.now():%H:%M:%S} {line}", file=sys.stderr, flush=True)


def _refuse(message: str) -> int:
    print(f"python -m benchmarks: {message}", file=sys.stderr)
    return USAGE_ERROR


if __name__ == "__main__":
    sys.exit(main())
