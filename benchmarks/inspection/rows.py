"""One row a compiled kernel: what its machine code uses, against the limits, beside the bound of its launch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import prod

from benchmarks.cases import (
    OpCase,
)
from benchmarks.inspection.bounds import (
    DEVICES,
    bound_of,
    issue_ms,
    needed_in_flight,
    occupancy,
    programs_per_multiprocessor,
    tile_of,
    work_of,
)
from benchmarks.inspection.cases import launches_of
from benchmarks.inspection.launches import Launch, compile_launch
from benchmarks.inspection.machine_code import Binary, MachineCode, binary_of, read_machine_codes
from fastattn.kernels._target import KNOWN_TARGETS


@dataclass(frozen=True)
class InspectionRow:
    """A kernel as compiled for one architecture; see `MachineCode` for the counts and `Bound` for the times.

    Attributes:
        in_flight: bytes of loads that a multiprocessor's programs wait for at a time, over what the memory's
            bandwidth needs (`needed_in_flight`); 0 where it is not read.
        an_element: instructions of the loop, or without one of all the code, for each element; 0 for products.
        issue: the time to start these over the launch's bound.
    """

    case: str
    arch: str
    kernel: str
    tile: str
    num_warps: int
    num_stages: int
    registers: int = 0
    spill_loads: int = 0
    spill_stores: int = 0
    stack: int = 0
    shared: int = 0
    shared_limit: int = 0
    programs: int = 0
    occupancy: float = 0.0
    tensor_cores: dict[str, int] = field(default_factory=dict)
    tma_loads: int = 0
    tma_stores: int = 0
    tma_reductions: int = 0
    warp_specialized: bool = False
    special_functions: int = 0
    instructions: int = 0
    loop_instructions: int = 0
    loop_tensor_cores: dict[str, int] = field(default_factory=dict)
    loop_special_functions: int = 0
    bound_ms: float = 0.0
    bound_by: str = ""
    bound: str = ""
    error: str = ""
    thread_bytes: int = 0
    in_flight: float = 0.0
    an_element: float = 0.0
    issue: float = 0.0


@dataclass(frozen=True)
class Compiled:
    """A compiled launch: its row but for what is read from the machine code, which is None where there is an error."""

    row: InspectionRow
    binary: Binary | None = None
    elements: tuple[int, float] = (0, 0.0)
    grid: int = 0


def compile_case(
    case: OpCase, arch: str, wanted: Callable[[str], bool] = lambda kernel: True
) -> list[Compiled]:
    """Each kernel that a call of the case launches, forward and backward."""
    name = f"{case.operation} {case.name}"
    launches = [launch for launch in launches_of(case, arch) if wanted(launch.name)]
    found = [compile_row(name, arch, launch) for launch in launches]
    # A kernel may be launched twice with other flags, for dk and then for dv.
    kernels = [one.row.kernel for one in found]
    before = [kernels[:index].count(kernel) for index, kernel in enumerate(kernels)]
    return [
        replace(one, row=replace(one.row, kernel=f"{one.row.kernel}#{n + 1}")) if n else one
        for one, n in zip(found, before, strict=True)
    ]


def inspect_case(case: OpCase, arch: str) -> list[InspectionRow]:
    """A row for each kernel that a call of the case launches, forward and backward."""
    return read_rows(compile_case(case, arch))


def compile_row(case: str, arch: str, launch: Launch) -> Compiled:
    """Compiles a launch; a compiler's error becomes a row that says so."""
    row = InspectionRow(
        case,
        arch,
        launch.name,
        launch.tile,
        launch.arguments.get("num_warps", 4),
        launch.arguments.get("num_stages", 3),
        shared_limit=KNOWN_TARGETS[arch].shared_memory,
    )
    try:
        binary = binary_of(compile_launch(arch, launch))
    except Exception as error:  # any failure to compile is this row's result
        lines = str(error).strip().splitlines() or [""]
        return Compiled(replace(row, error=f"{type(error).__name__}: {lines[-1]}"))
    work = work_of(launch)
    if work.bytes:
        bound = bound_of(work, arch)
        row = replace(row, bound_ms=bound.ms, bound_by=bound.by, bound=bound.formula)
    return Compiled(row, binary, tile_of(launch), prod(launch.grid))


def read_rows(compiled: Sequence[Compiled]) -> list[InspectionRow]:
    """The rows with what is read from the machine code, in order; all are read at once, which takes little longer."""
    codes = iter(read_machine_codes([one.binary for one in compiled if one.binary is not None]))
    return [one.row if one.binary is None else _with_code(one, next(codes)) for one in compiled]


def _with_code(compiled: Compiled, code: MachineCode) -> InspectionRow:
    row = compiled.row
    counts = asdict(code)
    del counts["warps"]
    programs = programs_per_multiprocessor(code, row.arch)
    threads = code.warps * DEVICES[row.arch].threads_of_a_warp
    elements, of_a_tile = compiled.elements
    # A grid may leave a multiprocessor fewer than it could hold.
    there = min(programs, -(-compiled.grid // KNOWN_TARGETS[row.arch].multiprocessors))
    an_element = (code.loop_instructions or code.instructions) * threads / of_a_tile if of_a_tile else 0.0
    return replace(
        row,
        **counts,
        programs=programs,
        occupancy=occupancy(code, row.arch),
        in_flight=code.thread_bytes * threads * there / needed_in_flight(row.arch),
        an_element=an_element,
        issue=issue_ms(elements, an_element, row.arch) / row.bound_ms if row.bound_ms else 0.0,
    )


def inspect_launch(case: str, arch: str, launch: Launch) -> InspectionRow:
    """Compiles a launch and reads it."""
    return read_rows([compile_row(case, arch, launch)])[0]


def failures(rows: Iterable[InspectionRow]) -> list[str]:
    """What no shipped kernel may do, a line each: fail to compile, spill, ask for too much, miss HGMMA on sm_90."""
    return [f"{row.arch} {row.case} {row.kernel}: {fault}" for row in rows for fault in faults(row)]


def faults(row: InspectionRow) -> list[str]:
    """What of that one kernel does."""
    if row.error:
        return [row.error]
    found = []
    if row.spill_loads or row.spill_stores:
        found.append(f"spills, {row.spill_loads} loads and {row.spill_stores} stores")
    if row.shared > row.shared_limit:
        found.append(f"shared memory {row.shared} is above {row.shared_limit} bytes")
    if "HMMA" in row.tensor_cores and row.arch == "sm_90":
        found.append("HMMA on sm_90, whose fast matrix instruction is HGMMA")
    if not row.tensor_cores and "tensor " in row.bound:
        found.append("16-bit products without tensor cores")
    return found
