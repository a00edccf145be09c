"""`python -m benchmarks demo|ops|inspect|gpu|readme`: the main job, the operations, machine code, all on a GPU."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

USAGE_ERROR = 2
INTERRUPTED = 130
_NEEDED = ("matplotlib", "rich")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; its exit code is 0, 1 (something failed), 2 (could not start) or 130 (interrupted)."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return _refuse(f"the benchmarks need {' and '.join(missing)}: pip install {' '.join(missing)}")
    command: Callable[[argparse.Namespace], int] = chosen.run
    return command(chosen)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    from benchmarks import demo_options

    demo = commands.add_parser("demo", help="train a GPT on real text with every implementation")
    demo_options.add_arguments(demo)
    demo.set_defaults(run=_demo)

    ops = commands.add_parser("ops", help="time attention, LayerNorm, GELU, host cost and import")
    ops.add_argument("parts", nargs="*", metavar="PART", help="of attention layer_norm gelu host import")
    ops.add_argument("--out", metavar="DIR", help="results folder (default: a new one in ops-results)")
    ops.add_argument("--device", help="cpu or cuda; the GPU where there is one otherwise")
    ops.add_argument("--rounds", type=int, default=20, metavar="N", help="timed rounds (default 20)")
    ops.add_argument(
        "--cases", nargs="+", default=[], metavar="TEXT", help="only cases with this in their name"
    )
    ops.add_argument("--providers", nargs="+", default=[], metavar="TEXT", help="only providers so named")
    ops.add_argument("--commit", help="recorded where the checkout has no git history")
    ops.set_defaults(run=_ops)

    from benchmarks.inspection import command as inspection

    inspect = commands.add_parser(
        "inspect", help="compile kernels for GPUs that are not there, and read the code"
    )
    inspection.add_arguments(inspect)
    inspect.set_defaults(run=_inspect)

    readme = commands.add_parser("readme", help="write README.md's figures from benchmarks/results/")
    readme.set_defaults(run=_readme)

    gpu = commands.add_parser(
        "gpu", help="on a GPU: the tests marked gpu, then the benchmarks, into a folder"
    )
    gpu.add_argument("--out", required=True, metavar="DIR", help="results folder")
    gpu.add_argument("--parts", nargs="+", choices=("tests", "ops", "demo"), default=["tests", "ops", "demo"])
    gpu.add_argument("--rounds", type=int, default=20, metavar="N", help="timed rounds (default 20)")
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


def _ops(chosen: argparse.Namespace) -> int:
    import torch

    from benchmarks.ops import PARTS, OpsOptions, run_ops
    from benchmarks.report import FolderError, make_console, results_folder
    from fastattn import dispatch

    if dispatch.INTERPRETING:
        return _refuse("TRITON_INTERPRET is set, and the interpreter's time says nothing: unset it")
    unknown = [part for part in chosen.parts if part not in PARTS]
    if unknown:
        return _refuse(f"part {unknown[0]!r} is unknown; there are {', '.join(PARTS)}")
    if chosen.rounds < 1:
        return _refuse(f"--rounds {chosen.rounds} must be at least 1")
    device = chosen.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        return _refuse(f"--device {device} must be cpu or cuda")
    if device.startswith("cuda") and not torch.cuda.is_available():
        return _refuse(f"--device {device}: PyTorch finds no GPU here")
    out = chosen.out or os.path.join("ops-results", datetime.now().strftime("%Y-%m-%d-%H%M%S"))
    try:
        folder = results_folder(Path(out))
    except FolderError as error:
        return _refuse(str(error))
    options = OpsOptions(
        folder,
        torch.device(device),
        tuple(chosen.parts) or PARTS,
        chosen.rounds,
        tuple(chosen.cases),
        tuple(chosen.providers),
        chosen.commit,
    )
    rows = run_ops(options, make_console(), _say)
    print(folder)
    if not rows:
        return _refuse("nothing was measured: no case and provider has a name that was asked for")
    return 1 if any(row["status"] in ("wrong", "failed") for row in rows) else 0


def _inspect(chosen: argparse.Namespace) -> int:
    from benchmarks.inspection import command
    from benchmarks.inspection.compare import ComparisonError
    from benchmarks.progress import progress_bar
    from benchmarks.report import FolderError, make_console, results_folder
    from fastattn import dispatch

    if dispatch.INTERPRETING:
        return _refuse("TRITON_INTERPRET is set, and the interpreter takes the compiler's place: unset it")
    try:
        if chosen.json:
            results_folder(chosen.json.absolute().parent)
        return command.inspect(chosen, command.plan(chosen), make_console(), progress_bar)
    except (command.InspectError, ComparisonError, FolderError) as error:
        return _refuse(str(error))


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
        return run_gpu(Path(chosen.out), tuple(chosen.parts), chosen.rounds, chosen.commit, _say)
    except (NoGpuError, FolderError) as error:
        return _refuse(str(error))


def _say(line: str) -> None:
    print(f"{datetime.now():%H:%M:%S} {line}", file=sys.stderr, flush=True)


def _refuse(message: str) -> int:
    print(f"python -m benchmarks: {message}", file=sys.stderr)
    return USAGE_ERROR


if __name__ == "__main__":
    sys.exit(main())
