"""`python -m benchmarks inspect`: kernels compiled without a GPU, one row each."""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.cases import DTYPES, AttentionCase, OpCase
from benchmarks.cases.attention_options import split_options
from benchmarks.inspection import compare
from benchmarks.inspection.cases import DEFAULT_ARCHS, is_telling, launches_of, shipped_cases
from benchmarks.inspection.launches import LaunchError, user_launch
from benchmarks.inspection.rows import (
    Compiled,
    InspectionRow,
    compile_case,
    compile_row,
    failures,
    read_rows,
)
from benchmarks.measure import first_line
from fastattn.kernels._target import KNOWN_TARGETS

# As fastattn's attention has it. Not imported from there, as --diff runs this with other revisions of fastattn.
_MOST_HEAD_DIM = 256  # with a backward
_FLAGS = {"false": False, "true": True}
# What a part of a shape can be that is no number.
_WORDS: dict[str, dict[str, Any]] = {
    "dtype": dict(DTYPES),
    "causal": {**_FLAGS, "top_left": "top_left", "bottom_right": "bottom_right"},
    "affine": _FLAGS,
    "all_options": _FLAGS,
    "approximate": {"none": "none", "tanh": "tanh"},
}


class InspectError(Exception):
    """The arguments name what is not there; the message says what is."""


@dataclass(frozen=True)
class UserKernel:
    """A kernel of the user's own; see `user_launch`."""

    spec: str
    signature: tuple[str, ...]
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Job:
    """One case on one architecture, and which of its kernels are wanted (as prefixes; none means all)."""

    what: OpCase | UserKernel
    arch: str
    kernels: tuple[str, ...] = ()

    def run(self) -> list[Compiled]:
        if isinstance(self.what, UserKernel):
            own = self.what
            launch = user_launch(own.spec, own.signature, own.num_warps, own.num_stages)
            return [compile_row("user", self.arch, launch)]
        return compile_case(
            self.what, self.arch, lambda name: not self.kernels or name.startswith(self.kernels)
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m benchmarks inspect`."""
    parser.add_argument(
        "kernels", nargs="*", metavar="KERNEL",
        help="names or their beginnings (attention, attention_dq, layer_norm, gelu, ...), or your own kernel as "
        "module:function or file.py:function; all shipped ones by default",
    )  # fmt: skip
    parser.add_argument(
        "--arch", nargs="+", default=list(DEFAULT_ARCHS), metavar="ARCH", help=", ".join(KNOWN_TARGETS)
    )
    parser.add_argument(
        "--every-case", action="store_true",
        help="also cases that another one stands for on sm_90, sm_80 and gfx942, as most of float32",
    )  # fmt: skip
    parser.add_argument(
        "--shape", nargs="+", default=[], metavar="NAME=VALUE",
        help="one shape instead of the shipped ones, e.g. seq_q=8192 head_dim=96 dtype=bf16 causal=top_left "
        "options=bias+softcap",
    )  # fmt: skip
    parser.add_argument(
        "--signature", nargs="+", default=[], metavar="NAME=TYPE",
        help="of your own kernel: x_ptr=*bf16 n=i32 stride=i32:16 BLOCK=1024",
    )  # fmt: skip
    parser.add_argument(
        "--num-warps", type=int, default=4, metavar="N", help="of your own kernel (default 4)"
    )
    parser.add_argument(
        "--num-stages", type=int, default=3, metavar="N", help="of your own kernel (default 3)"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, metavar="N",
        help="how many kernels to compile at a time (default: as many as there are cores)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--diff", metavar="REV", help="what changed since another revision's kernels")
    parser.add_argument(
        "--check", action="store_true", help="fail on spills, missing HGMMA and growth past the baseline"
    )
    parser.add_argument("--update-baseline", action="store_true", help="make these rows the baseline")
    parser.add_argument("--quiet", action="store_true", help="no table and no progress")


def plan(chosen: argparse.Namespace) -> list[Job]:
    """The compilations asked for.

    Raises:
        InspectError: an architecture, kernel or part of a shape is unknown.
    """
    for arch in chosen.arch:
        if arch not in KNOWN_TARGETS:
            raise InspectError(f"arch {arch!r} is unknown; there are {', '.join(KNOWN_TARGETS)}")
    if chosen.jobs < 1:
        raise InspectError(f"--jobs {chosen.jobs} must be at least 1")
    own = [name for name in chosen.kernels if ":" in name]
    named = tuple(name for name in chosen.kernels if ":" not in name)
    known = known_kernels() if named else []
    for name in named:
        if not any(kernel.startswith(name) for kernel in known):
            raise InspectError(
                f"kernel {name!r} is unknown; there are {', '.join(known)}, or module:function"
            )
    whats: list[OpCase | UserKernel] = []
    for spec in own:
        whats.append(UserKernel(spec, tuple(chosen.signature), chosen.num_warps, chosen.num_stages))
        _check_own(spec, tuple(chosen.signature))
    if named or not own:
        cases = _cases(named, chosen.shape)
        for case in cases if chosen.shape else ():
            _check_case(case, chosen.arch)
        whats += cases
    every = chosen.every_case or bool(chosen.shape)
    return [
        Job(what, arch, named)
        for arch in chosen.arch
        for what in whats
        if every or isinstance(what, UserKernel) or is_telling(what, arch)
    ]


def _check_own(spec: str, signature: tuple[str, ...]) -> None:
    """Finds a kernel of the user's own and fits the signature to it."""
    if spec.startswith(":"):
        raise InspectError(f"kernel {spec!r} names no module; give module:function or file.py:function")
    try:
        user_launch(spec, signature)
    except LaunchError as error:
        raise InspectError(str(error)) from error
    except (Exception, SystemExit) as error:  # whatever the user's own file does
        raise InspectError(f"cannot import {spec}: {type(error).__name__}: {first_line(error)}") from error


def _check_case(case: OpCase, archs: Sequence[str]) -> None:
    """Refuses a shape that the operation refuses, or that cannot be launched."""
    if isinstance(case, AttentionCase):
        _, heads, kv_heads, *_, head_dim = case.shape
        if head_dim > _MOST_HEAD_DIM:
            raise InspectError(f"--shape head_dim={head_dim} must be at most {_MOST_HEAD_DIM}")
        if heads % kv_heads:
            raise InspectError(f"--shape kv_heads={kv_heads} must divide heads={heads}")
    for arch in archs:
        try:
            launches_of(case, arch)
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise InspectError(f"{case.operation} {case.name} on {arch}: {reason}") from error


def known_kernels() -> list[str]:
    """The names of all kernels that are shipped."""
    return list(
        dict.fromkeys(launch.name for case in shipped_cases() for launch in launches_of(case, "sm_90"))
    )


def _cases(named: tuple[str, ...], shape: Sequence[str]) -> list[OpCase]:
    """The shipped cases that launch one of the named kernels, or one case an operation with this shape."""
    cases = [
        case
        for case in shipped_cases()
        if not named or any(launch.name.startswith(named) for launch in launches_of(case, "sm_90"))
    ]
    if not shape:
        return cases
    first = {case.operation: case for case in reversed(cases)}
    known = {f.name for case in first.values() for f in fields(case)}
    given = dict(_shape_part(part, known) for part in shape)
    return [
        replace(
            case, **{name: value for name, value in given.items() if name in {f.name for f in fields(case)}}
        )
        for case in first.values()
    ]


def _shape_part(part: str, known: Collection[str]) -> tuple[str, Any]:
    name, equals, text = part.partition("=")
    if not equals:
        raise InspectError(f"--shape takes NAME=VALUE, not {part!r}")
    if name not in known:
        raise InspectError(f"--shape has no {name!r} here; there are {', '.join(sorted(known))}")
    if name == "options":
        try:
            split_options(text)
        except ValueError as error:
            raise InspectError(f"--shape {error}") from None
        return name, text
    if name in _WORDS:
        words = _WORDS[name]
        if text.lower() not in words:
            raise InspectError(f"{name}={text} is unknown; there are {', '.join(words)}")
        return name, words[text.lower()]
    try:
        size = int(text)
    except ValueError:
        raise InspectError(f"--shape {part} must be a whole number") from None
    if size < 1:
        raise InspectError(f"--shape {part} must be at least 1")
    return name, size


def run_jobs(
    jobs: Sequence[Job], processes: int, advance: Callable[[str, float], None] | None = None
) -> list[InspectionRow]:
    """Compiles the jobs, some at a time, then reads them; rows come in the jobs' order."""
    compiled: list[Compiled] = []
    for job, found in zip(jobs, _mapped(jobs, min(len(jobs), processes)), strict=True):
        compiled += found
        if advance is not None:
            advance(f"{job.arch} {found[0].row.case if found else ''}", 1)
    return read_rows(compiled)


def _mapped(jobs: Sequence[Job], processes: int) -> Iterator[list[Compiled]]:
    if processes <= 1:
        yield from map(Job.run, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap(Job.run, jobs)


def inspect(chosen: argparse.Namespace, jobs: Sequence[Job], console: Console, progress: Any) -> int:
    """Compiles, prints, writes and compares; 1 where a check failed, else 0.

    Raises:
        ComparisonError: there is nothing to compare with.
    """
    if chosen.diff:
        compare.check_revision(chosen.diff)
    unchecked = compare.why_unchecked() if chosen.check and not chosen.update_baseline else None
    if chosen.quiet:
        rows = run_jobs(jobs, chosen.jobs)
    else:
        with progress(float(len(jobs))) as advance:
            rows = run_jobs(jobs, chosen.jobs, advance)
        console.print(inspection_table(rows))
        for line in notes(rows):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
    if chosen.json:
        compare.write_rows(chosen.json, rows)
    if chosen.diff:
        old = compare.rows_of_revision(chosen.diff, _repeated(chosen))
        lines = compare.changes(old, rows) or [f"nothing changed since {chosen.diff}"]
        console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
    if chosen.update_baseline:
        compare.write_baseline(rows)
    failed = [*failures(rows), *compare.growth(rows)] if chosen.check else []
    if unchecked:
        console.print(unchecked, style="yellow", highlight=False)
    for line in failed:
        console.print(line, style="red", highlight=False, markup=False, soft_wrap=True)
    return 1 if failed or any(row.error for row in rows) else 0


def _repeated(chosen: argparse.Namespace) -> list[str]:
    """The arguments that say what to compile, for another process."""
    options = [
        "--arch",
        *chosen.arch,
        "--num-warps",
        str(chosen.num_warps),
        "--num-stages",
        str(chosen.num_stages),
        "--jobs",
        str(chosen.jobs),
    ]
    options += ["--shape", *chosen.shape] if chosen.shape else []
    options += ["--signature", *chosen.signature] if chosen.signature else []
    return [*chosen.kernels, *options]


def inspection_table(rows: Sequence[InspectionRow]) -> Table:
    """Everything but the bound's formula, which `notes` prints."""
    table = Table(title="compiled without a GPU", title_justify="left")
    headers = (
        "arch", "case", "kernel", "tile", "warps", "regs", "spills", "shared", "programs\n/ SM", "occup.",
        "matrix instr.\n(loop)", "special\n(loop)", "TMA\nl/s/r", "instr.\n(loop)", "bound ms", "by",
    )  # fmt: skip
    left = ("arch", "case", "kernel", "tile", "by")
    for header in headers:
        table.add_column(header, justify="left" if header in left else "right", overflow="fold")
    previous = None
    for row in rows:
        if previous is not None and (row.arch, row.case) != previous:
            table.add_section()
        labels = (row.arch, row.case) if (row.arch, row.case) != previous else ("", "")
        previous = (row.arch, row.case)
        if row.error:
            table.add_row(*labels, row.kernel, row.tile, str(row.num_warps), "error", style="red")
            continue
        spills = f"{row.spill_loads}/{row.spill_stores}" if row.spill_loads or row.spill_stores else "0"
        table.add_row(
            *labels, row.kernel, row.tile, f"{row.num_warps}{' ws' if row.warp_specialized else ''}",
            str(row.registers), spills, f"{row.shared:,}\nof {row.shared_limit:,}", str(row.programs),
            f"{row.occupancy:.0%}", _kinds(row.tensor_cores, row.loop_tensor_cores),
            f"{row.special_functions} ({row.loop_special_functions})",
            f"{row.tma_loads}/{row.tma_stores}/{row.tma_reductions}",
            f"{row.instructions} ({row.loop_instructions})",
            f"{row.bound_ms:.3g}" if row.bound else "", row.bound_by,
            style="red" if row.spill_loads or row.shared > row.shared_limit else None,
        )  # fmt: skip
    return table


def _kinds(whole: dict[str, int], loop: dict[str, int]) -> str:
    return " ".join(f"{kind} {count} ({loop.get(kind, 0)})" for kind, count in whole.items())


def notes(rows: Sequence[InspectionRow]) -> list[str]:
    """Errors, then where each bound comes from, once for kernels that share it."""
    lines = [f"{row.arch} {row.case} {row.kernel}: {row.error}" for row in rows if row.error]
    bounds: dict[str, None] = {}
    for row in rows:
        if row.bound:
            bounds.setdefault(f"{row.case} {row.kernel}: {row.bound}")
    return [*lines, "bounds, the largest of:", *(f"  {line}" for line in bounds)] if bounds else lines
