"""Compiles kernels for GPUs that are not there, and reads what the machine code uses.

from benchmarks.inspection import inspect_case, inspect_launch, record_launches
"""

from benchmarks.inspection.cases import launches_of, shipped_cases
from benchmarks.inspection.launches import Launch, compile_launch, record_launches, user_launch
from benchmarks.inspection.rows import InspectionRow, inspect_case, inspect_launch

__all__ = [
    "InspectionRow",
    "Launch",
    "compile_launch",
    "inspect_case",
    "inspect_launch",
    "launches_of",
    "record_launches",
    "shipped_cases",
    "user_launch",
]
