"""Compiles what a launcher launches, for a GPU that is not there, and reads the machine code.

A launcher is called with meta tensors while its launches are recorded instead of run; each recorded launch is then
compiled with the very argument types, constants and options that a GPU would have been given. Run as a program
(`python -m benchmarks.inspection`) it inspects every shipped kernel, one row each.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from fastattn.kernels import _target
from fastattn.kernels._target import KNOWN_TARGETS

_TRITON_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}
_OPTIONS = ("num_warps", "num_stages")


@dataclass(frozen=True)
class Launch:
    """A recorded `kernel[grid](...)`."""

    kernel: JITFunction
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """What a compiled kernel uses. Bytes for memory, counts for instructions.

    On AMD, `hgmma` and `hmma` count its matrix instructions (v_mfma) under `hmma`.
    """

    case: str
    arch: str
    kernel: str
    tile: str
    num_warps: int
    registers: int
    spill_loads: int
    spill_stores: int
    stack: int
    shared: int
    shared_limit: int
    hgmma: int
    hmma: int
    instructions: int
    error: str = ""


def main(arguments: list[str] | None = None) -> int:
    """Inspects the shipped kernels and prints or writes one row each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inspection", description=main.__doc__)
    parser.add_argument(
        "--arch", nargs="+", default=["sm_80", "sm_90", "gfx942"], choices=list(KNOWN_TARGETS)
    )
    parser.add_argument("--case", default="", help="a regular expression that a case's name must match")
    parser.add_argument("--all", action="store_true", help="every head dimension and dtype, not a selection")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args(arguments)
    names = [name for name in shipped_cases(options.all) if re.search(options.case, name)]
    jobs = [(name, arch) for name in names for arch in options.arch]
    rows: list[Row] = []
    with multiprocessing.get_context("spawn").Pool() as pool:
        for found in pool.imap(_inspect_job, jobs):
            rows += found
            for row in found:
                print(
                    f"{row.arch:7} {row.case:34} {row.kernel:28} {row.tile:12} {row.num_warps:2} warps "
                    f"{row.registers:4} registers, spills {row.spill_loads}/{row.spill_stores}, "
                    f"shared {row.shared}/{row.shared_limit}, HGMMA {row.hgmma}, HMMA {row.hmma} {row.error}",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return 0


def _inspect_job(job: tuple[str, str]) -> list[Row]:
    name, arch = job
    with record_launches(arch) as launches:
        shipped_cases(everything=True)[name]()
    return [inspect_launch(name, arch, launch) for launch in launches]


def shipped_cases(everything: bool = False) -> dict[str, Callable[[], None]]:
    """Calls that between them launch every shipped kernel, by name."""
    cases: dict[str, Callable[[], None]] = {}
    head_dims = (16, 32, 64, 80, 96, 112, 128, 160, 192, 256) if everything else (64, 80, 128, 256)
    for dtype in (
        (torch.bfloat16, torch.float16, torch.float32) if everything else (torch.bfloat16, torch.float32)
    ):
        name = _TRITON_TYPES[dtype]
        for head_dim in head_dims:
            for causal in ("none", "top_left") if everything or head_dim == 128 else ("top_left",):
                cases[f"attention-{name}-{causal}-d{head_dim}"] = _attention_case(dtype, head_dim, causal)
        for width in (64, 768, 4096, 65_536):
            cases[f"layer_norm-{name}-{width}"] = _layer_norm_case(dtype, width)
        for approximate in ("none", "tanh"):
            cases[f"gelu-{name}-{approximate}"] = _gelu_case(dtype, approximate)
    return cases


def _attention_case(dtype: torch.dtype, head_dim: int, causal: str) -> Callable[[], None]:
    def call() -> None:
        from fastattn.kernels.attention_backward import attention_backward
        from fastattn.kernels.attention_forward import attention_forward

        q = torch.empty(2, 8, 4096, head_dim, dtype=dtype, device="meta")
        k = torch.empty(2, 2, 4096, head_dim, dtype=dtype, device="meta")
        out, lse = attention_forward(q, k, k, 1.0, causal)
        attention_backward(out, None, q, k, k, out, lse, 1.0, causal, True, True, True)

    return call


def _layer_norm_case(dtype: torch.dtype, width: int) -> Callable[[], None]:
    def call() -> None:
        from fastattn.kernels.layer_norm_backward import layer_norm_backward
        from fastattn.kernels.layer_norm_forward import layer_norm_forward

        x = torch.empty(8192, width, dtype=dtype, device="meta")
        weight = torch.empty(width, device="meta")
        y, mean, rstd = layer_norm_forward(x, weight, weight, 1, 1e-5)
        layer_norm_backward(y, x, weight, mean, rstd, 1, True, weight.dtype, weight.dtype)

    return call


def _gelu_case(dtype: torch.dtype, approximate: str) -> Callable[[], None]:
    def call() -> None:
        from fastattn.kernels.gelu import gelu_backward, gelu_forward

        x = torch.empty(8192, 4096, dtype=dtype, device="meta")
        gelu_backward(gelu_forward(x, approximate), x, approximate)

    return call


@contextmanager
def record_launches(arch: str) -> Iterator[list[Launch]]:
    """Within the block, kernels are not run: their launches are collected, as if on a device of this arch."""
    launches: list[Launch] = []

    def record(kernel: JITFunction, *positional: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        if positional:
            raise ValueError(f"{kernel.__name__} is launched with positional arguments; use keywords")
        launches.append(Launch(kernel, keywords))

    target = KNOWN_TARGETS[arch]
    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(_target, "target_of", lambda device: target),
    ):
        yield launches


def compile_launch(arch: str, launch: Launch) -> Any:
    """Triton's compiled kernel for a recorded launch."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        kind = "constexpr" if parameter.is_constexpr else _argument_type(value, parameter.do_not_specialize)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[parameter.name] = value
        # As at run time: addresses from the allocator and multiples of 16 are known to be divisible by 16.
        elif isinstance(value, torch.Tensor) or (
            isinstance(value, int) and value % 16 == 0 and not parameter.do_not_specialize
        ):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {name: launch.arguments[name] for name in _OPTIONS if name in launch.arguments}
    target = KNOWN_TARGETS[arch]
    gpu = GPUTarget(target.backend, target.arch, 64 if target.backend == "hip" else 32)
    return triton.compile(source, target=gpu, options=options)


def _argument_type(value: Any, do_not_specialize: bool) -> str:
    """A run-time argument's type in a Triton signature."""
    if isinstance(value, torch.Tensor):
        return "*" + _TRITON_TYPES[value.dtype]
    if value is None or (value == 1 and isinstance(value, int) and not do_not_specialize):
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def inspect_launch(case: str, arch: str, launch: Launch) -> Row:
    """Compiles a launch and counts; a compiler's error becomes a row that says so."""
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_D", "BLOCK", "BLOCK_ROWS", "BLOCK_COLS")
    tile = "x".join(str(launch.arguments[name]) for name in names if name in launch.arguments)
    head: dict[str, Any] = dict(
        case=case,
        arch=arch,
        kernel=launch.kernel.__name__.strip("_").removesuffix("_kernel"),
        tile=tile,
        num_warps=launch.arguments.get("num_warps", 4),
        shared_limit=KNOWN_TARGETS[arch].shared_memory,
    )
    empty: dict[str, Any] = dict.fromkeys(
        ("registers", "spill_loads", "spill_stores", "stack", "shared", "hgmma", "hmma", "instructions"), 0
    )
    try:
        compiled = compile_launch(arch, launch)
    except Exception as error:  # any failure to compile is this row's result
        return Row(**head, **empty, error=f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}")
    counts: dict[str, Any] = _count_amd(compiled) if "amdgcn" in compiled.asm else _count_nvidia(compiled)
    return Row(**head, **counts, shared=compiled.metadata.shared)


def _count_nvidia(compiled: Any) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _cuobjdump("-res-usage", cubin.name)
        sass = _cuobjdump("-sass", cubin.name)
    operations = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass, re.MULTILINE)
    return dict(
        registers=_number(r"REG:(\d+)", usage),
        stack=_number(r"STACK:(\d+)", usage),
        spill_loads=sum(o.startswith("LDL") for o in operations),
        spill_stores=sum(o.startswith("STL") for o in operations),
        hgmma=sum(o.startswith("HGMMA") for o in operations),
        hmma=sum(o.startswith("HMMA") for o in operations),
        instructions=len(operations),
    )


def _cuobjdump(option: str, path: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, path], check=True, capture_output=True, text=True).stdout


def _count_amd(compiled: Any) -> dict[str, int]:
    text = compiled.asm["amdgcn"]
    spills = _number(r"\.vgpr_spill_count:\s*(\d+)", text)
    return dict(
        registers=_number(r"\.vgpr_count:\s*(\d+)", text),
        stack=_number(r"\.private_segment_fixed_size:\s*(\d+)", text),
        spill_loads=spills,
        spill_stores=spills,
        hgmma=0,
        hmma=len(re.findall(r"\bv_mfma", text)),
        instructions=len(re.findall(r"^\s+[vs]_\w+", text, re.MULTILINE)),
    )


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern} in what the compiler printed")
    return int(found.group(1))


if __name__ == "__main__":
    sys.exit(main())
