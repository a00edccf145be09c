"""What a compiled kernel uses, read from its machine code: NVIDIA's SASS, AMD's assembly."""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton

from benchmarks.inspection.in_flight import bytes_in_flight

# One line of SASS: address, predicate, operation, operands.
_SASS = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);", re.MULTILINE)
_AMD_SPECIAL = re.compile(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_")


@dataclass(frozen=True)
class MachineCode:
    """Registers a thread, bytes, and how many instructions of a kind stand in the code.

    Attributes:
        spill_loads, spill_stores: loads and stores of registers that did not fit.
        stack: bytes of a thread's own memory.
        tensor_cores: matrix instructions by kind: HMMA (a warp's), HGMMA (Hopper's, a group of four warps'), UTCHMMA
            (Blackwell's), MFMA (AMD's), ...
        tma_loads, tma_stores, tma_reductions: bulk transfers between shared and device memory.
        warp_specialized: whether warps were given different code (a producer and consumers).
        warps: of a program, those that specialization adds included.
        special_functions: exp2, log2, reciprocals, roots, tanh.
        thread_bytes: of loads that a thread waits for at a time, see in_flight.py; 0 for AMD's, which is not read so.
        loop_*: the same for the main loop, the innermost one with the most matrix instructions, or where there are
            none the longest; the shortest of equals.
    """

    registers: int
    spill_loads: int
    spill_stores: int
    stack: int
    shared: int
    warps: int
    warp_specialized: bool = False
    tma_loads: int = 0
    tma_stores: int = 0
    tma_reductions: int = 0
    special_functions: int = 0
    instructions: int = 0
    tensor_cores: dict[str, int] = field(default_factory=dict)
    loop_instructions: int = 0
    loop_special_functions: int = 0
    loop_tensor_cores: dict[str, int] = field(default_factory=dict)
    thread_bytes: int = 0


@dataclass(frozen=True)
class Binary:
    """A compiled kernel as far as it is read: small, so that it can be handed from process to process.

    Attributes:
        family: how the disassembler names the target ("SM90"), or "amd".
        code: NVIDIA's instructions.
        assembly: AMD's.
        registers, stack, shared, warps, warp_specialized: as in `MachineCode`.
    """

    family: str
    code: bytes
    assembly: str
    registers: int
    stack: int
    shared: int
    warps: int
    warp_specialized: bool = False


@dataclass(frozen=True)
class _Instruction:
    operation: str
    target: int | None  # where a branch jumps to, as a position in the list
    operands: str = ""


def binary_of(compiled: Any) -> Binary:
    """What is read of Triton's compiled kernel."""
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        registers = _number(r"\.vgpr_count:\s*(\d+)", text)
        stack = _number(r"\.private_segment_fixed_size:\s*(\d+)", text)
        return Binary(
            "amd", b"", text, registers, stack, compiled.metadata.shared, compiled.metadata.num_warps
        )
    cubin, ttgir = compiled.asm["cubin"], compiled.asm["ttgir"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
    total = re.search(r'"ttg\.total-num-warps" = (\d+)', ttgir)
    return Binary(
        f"SM{compiled.metadata.target.arch}",
        _code_of(cubin),
        "",
        registers=_number(r"REG:(\d+)", usage),
        stack=_number(r"STACK:(\d+)", usage),
        shared=compiled.metadata.shared,
        warps=int(total.group(1)) if total else compiled.metadata.num_warps,
        warp_specialized="ttg.warp_specialize" in ttgir,
    )


def read_machine_codes(binaries: Sequence[Binary]) -> list[MachineCode]:
    """Counts what is in each of them.

    NVIDIA's disassembler takes half a second to start, ten times as long as most kernels take it: those of one target
    are disassembled at once.
    """
    families = {binary.family for binary in binaries} - {"amd"}
    of_family = {
        family: iter(_disassemble(family, [b.code for b in binaries if b.family == family]))
        for family in families
    }
    return [
        _read_amd(binary) if binary.family == "amd" else _read_sass(binary, next(of_family[binary.family]))
        for binary in binaries
    ]


def _read_sass(binary: Binary, instructions: Sequence[_Instruction]) -> MachineCode:
    operations = [i.operation for i in instructions]
    loop = [i.operation for i in _main_loop(instructions, _sass_tensor)]
    return MachineCode(
        registers=binary.registers,
        stack=binary.stack,
        shared=binary.shared,
        warps=binary.warps,
        warp_specialized=binary.warp_specialized,
        spill_loads=_count(operations, "LDL"),
        spill_stores=_count(operations, "STL"),
        tma_loads=_count(operations, "UTMALDG"),
        tma_stores=_count(operations, "UTMASTG"),
        tma_reductions=_count(operations, "UTMAREDG"),
        special_functions=_count(operations, "MUFU"),
        tensor_cores=_tensor_counts(operations, _sass_tensor),
        instructions=len(operations),
        loop_instructions=len(loop),
        loop_special_functions=_count(loop, "MUFU"),
        loop_tensor_cores=_tensor_counts(loop, _sass_tensor),
        thread_bytes=bytes_in_flight((i.operation, i.operands) for i in instructions),
    )


def _tool(name: str, *arguments: str) -> str:
    """What one of the tools in Triton's wheel prints."""
    command = [str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _code_of(cubin: bytes) -> bytes:
    """The contents of an ELF file's .text sections."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<HHH", cubin, 58)
    # name, type, flags, address, offset, size
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + size * index) for index in range(count)]
    first_name = sections[names][4]
    return b"".join(
        cubin[section[4] : section[4] + section[5]]
        for section in sections
        if cubin.startswith(b".text.", first_name + section[0])
    )


def _disassemble(family: str, codes: Sequence[bytes]) -> list[list[_Instruction]]:
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        found = _SASS.findall(_tool("nvdisasm", "-b", family, file.name))
    addresses = [int(address, 16) for address, _, _ in found]
    instructions, start = [], 0
    for code in codes:
        first, start = bisect_left(addresses, start), start + len(code)
        instructions.append(_parse_sass(found[first : bisect_left(addresses, start)]))
    return instructions


def _parse_sass(found: Sequence[tuple[str, str, str]]) -> list[_Instruction]:
    """Instructions of one kernel, of (address, operation, operands)."""
    position = {int(address, 16): index for index, (address, _, _) in enumerate(found)}
    instructions = []
    for _, operation, operands in found:
        jump = re.search(r"0x([0-9a-f]+)\)?\s*$", operands) if operation.startswith("BRA") else None
        to = position.get(int(jump.group(1), 16)) if jump else None
        instructions.append(_Instruction(operation, to, operands if to is None else ""))
    # The padding behind the last branch to itself is no code.
    while instructions and instructions[-1].operation in ("NOP", "BRA"):
        instructions.pop()
    return instructions


def _sass_tensor(operation: str) -> str | None:
    """HMMA, HGMMA, QGMMA, IMMA, UTCHMMA, ...: the kind of a matrix instruction, or None."""
    base = operation.partition(".")[0]
    return base if base.endswith("MMA") else None


def _amd_tensor(operation: str) -> str | None:
    return "MFMA" if operation.startswith(("v_mfma", "v_smfma", "v_wmma")) else None


def _read_amd(binary: Binary) -> MachineCode:
    text = binary.assembly
    spills = _number(r"\.vgpr_spill_count:\s*(\d+)", text)
    instructions = _parse_amd(text)
    operations = [i.operation for i in instructions]
    loop = [i.operation for i in _main_loop(instructions, _amd_tensor)]
    return MachineCode(
        registers=binary.registers,
        stack=binary.stack,
        shared=binary.shared,
        warps=binary.warps,
        spill_loads=spills,
        spill_stores=spills,
        special_functions=sum(bool(_AMD_SPECIAL.match(o)) for o in operations),
        tensor_cores=_tensor_counts(operations, _amd_tensor),
        instructions=len(operations),
        loop_instructions=len(loop),
        loop_special_functions=sum(bool(_AMD_SPECIAL.match(o)) for o in loop),
        loop_tensor_cores=_tensor_counts(loop, _amd_tensor),
    )


def _parse_amd(text: str) -> list[_Instruction]:
    labels: dict[str, int] = {}
    lines: list[tuple[str, str]] = []
    for line in text.splitlines():
        label = re.match(r"^(\.?\w+):", line)
        if label:
            labels[label.group(1)] = len(lines)
        operation = re.match(r"^\s+((?:v|s|ds|global|buffer|flat)_\w+)\s*(\S*)", line)
        if operation:
            lines.append((operation.group(1), operation.group(2)))
    return [
        _Instruction(operation, labels.get(operand) if "branch" in operation else None)
        for operation, operand in lines
    ]


def _main_loop(instructions: Sequence[_Instruction], tensor: Any) -> Sequence[_Instruction]:
    """The innermost loop with the most matrix instructions; where there are none, the longest."""
    loops = []
    for end, instruction in enumerate(instructions):
        start = instruction.target
        if start is not None and start < end:
            products = sum(tensor(i.operation) is not None for i in instructions[start : end + 1])
            loops.append((start, end, products))
    # A jump into a loop from behind it, as of a wait that is not over, closes no loop of its own.
    loops = [
        (start, end, products)
        for start, end, products in loops
        if not any(first < start <= last < end for first, last, _ in loops)
    ]
    with_products = [loop for loop in loops if loop[2]]
    chosen = with_products or loops
    innermost = [
        (start, end, products)
        for start, end, products in chosen
        if not any((s, e) != (start, end) and start <= s and e <= end for s, e, _ in chosen)
    ]
    if not innermost:
        return ()
    if with_products:
        start, end, _ = max(innermost, key=lambda loop: (loop[2], loop[0] - loop[1]))
    else:
        start, end, _ = max(innermost, key=lambda loop: loop[1] - loop[0])
    return instructions[start : end + 1]


def _tensor_counts(operations: Sequence[str], tensor: Any) -> dict[str, int]:
    return dict(Counter(kind for kind in map(tensor, operations) if kind is not None))


def _count(operations: Sequence[str], prefix: str) -> int:
    return sum(operation.startswith(prefix) for operation in operations)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern} in what the compiler printed")
    return int(found.group(1))
