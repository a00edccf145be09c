"""How many bytes of loads a thread waits for at a time, read from the order of SASS instructions.

A load into registers is on its way until an instruction names one of these; a copy to shared memory until a
DEPBAR that lets no more groups wait than have come after it. Read from the first instruction to the last, loops once:
what a pipeline starts before its loop stands in the code before it. Predicates and masks are taken to hold.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_REGISTER = re.compile(r"\bR(\d+)\b")
_BITS = re.compile(r"\.(?:[US]?(8|16)|(64|128))\b")
_DEPBAR = re.compile(r"SB0, 0x([0-9a-f]+)")


def bytes_in_flight(instructions: Iterable[tuple[str, str]]) -> int:
    """The most bytes that are on their way to one thread at a time.

    Args:
        instructions: operations with their operands, as the disassembler prints them.
    """
    waiting: dict[int, int] = {}  # the load, by its first register: bytes
    registers: dict[int, int] = {}  # the first register of its load, by register
    groups: list[int] = []
    group = most = 0
    for operation, operands in instructions:
        if operation == "LDGDEPBAR":
            groups.append(group)
            group = 0
        elif operation.startswith("DEPBAR"):
            found = _DEPBAR.search(operands)
            left = int(found.group(1), 16) if found else 0
            groups = groups[len(groups) - left :] if left else []
        else:
            _arrive(operands, waiting, registers)
            if operation.startswith("LDGSTS"):
                group += _width(operation)
            elif operation.startswith("LDG"):
                found = _REGISTER.search(operands)
                first, size = int(found.group(1)) if found else -1, _width(operation)
                waiting[first] = size
                registers |= dict.fromkeys(range(first, first + max(1, size // 4)), first)
        most = max(most, sum(waiting.values()) + sum(groups) + group)
    return most


def _arrive(operands: str, waiting: dict[int, int], registers: dict[int, int]) -> None:
    """What is named has come, and with it what was asked for before: loads come in their order."""
    named = {registers[r] for r in map(int, _REGISTER.findall(operands)) if r in registers}
    if not named:
        return
    order = list(waiting)
    for first in order[: 1 + max(map(order.index, named))]:
        del waiting[first]
    for register in [r for r, first in registers.items() if first not in waiting]:
        del registers[register]


def _width(operation: str) -> int:
    found = _BITS.search(operation)
    return int(found.group(1) or found.group(2)) // 8 if found else 4
