"""What a launcher launches, recorded instead of run, and compiled for a GPU that is not there.

A launcher is called with meta tensors while its launches are recorded; each recorded launch is then compiled with
the very argument types, constants and options that a GPU would have been given.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch.utils._pytree import tree_leaves
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, create_function_from_signature

from fastattn.kernels import _target
from fastattn.kernels._launch import nothing_kept
from fastattn.kernels._target import KNOWN_TARGETS

_SCALARS = ("fp16", "bf16", "fp32", "fp64", "i1", "i8", "i16", "i32", "i64", "u8", "u16", "u32", "u64")
_OPTIONS = ("num_warps", "num_stages", "maxnreg")


class LaunchError(Exception):
    """A kernel or its signature cannot be used; the message says why in one line."""


@dataclass(frozen=True)
class Argument:
    """A run-time argument known by its type alone, such as "*bf16" or "i32", and whether 16 divides it."""

    type: str
    divisible_by_16: bool = False


@dataclass(frozen=True)
class Launch:
    """A `kernel[grid](...)` that is not run: the values of its parameters and its options, by name."""

    kernel: JITFunction
    arguments: dict[str, Any]
    grid: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The kernel's name as tables show it."""
        return str(self.kernel.__name__).strip("_").removesuffix("_kernel")

    @property
    def tile(self) -> str:
        """The constants that shape a tile, as in "128x64x64"."""
        tiles = (v for n, v in self.arguments.items() if n.startswith("BLOCK") and isinstance(v, int))
        return "x".join(map(str, tiles))


@contextmanager
def record_launches(arch: str) -> Iterator[list[Launch]]:
    """Within the block, kernels are not run: their launches are collected, as if on a device of this arch."""
    launches: list[Launch] = []

    def record(kernel: JITFunction, *positional: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        if positional:
            raise LaunchError(f"{kernel.__name__} is launched with positional arguments; use keywords")
        launches.append(Launch(kernel, keywords, tuple(grid(keywords) if callable(grid) else grid)))

    target = KNOWN_TARGETS[arch]
    with (
        nothing_kept(),
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(InterpretedFunction, "run", record),
        mock.patch.object(_target, "target_of", lambda device: target),
    ):
        yield launches


def user_launch(spec: str, signature: Sequence[str], num_warps: int = 4, num_stages: int = 3) -> Launch:
    """A kernel of the user's own.

    Args:
        spec: "module:function", or "path/to/file.py:function", of a `triton.jit` function.
        signature: NAME=TYPE for each run-time parameter, with the types of Triton's own ahead-of-time compiler
            ("*bf16", "i32", "fp32"; ":16" behind one says that 16 divides it), and NAME=VALUE for each constant.
        num_warps, num_stages: as the kernel is launched.

    Raises:
        LaunchError: the kernel is not there, or the signature does not fit its parameters.
    """
    kernel = _find_kernel(spec)
    given: dict[str, str] = {}
    for part in signature:
        name, equals, value = part.partition("=")
        if not equals or not name or not value:
            raise LaunchError(f"--signature takes NAME=TYPE or NAME=VALUE, not {part!r}")
        given[name] = value
    arguments: dict[str, Any] = {}
    names = [parameter.name for parameter in kernel.params]
    for parameter in kernel.params:
        if parameter.name in given:
            arguments[parameter.name] = _given_argument(parameter, given[parameter.name])
        elif parameter.has_default:
            arguments[parameter.name] = parameter.default
        else:
            raise LaunchError(f"{spec} needs {parameter.name} in --signature; it takes {', '.join(names)}")
    unknown = [name for name in given if name not in names]
    if unknown:
        raise LaunchError(f"{spec} has no parameter {unknown[0]!r}; it takes {', '.join(names)}")
    return Launch(kernel, {**arguments, "num_warps": num_warps, "num_stages": num_stages})


def _find_kernel(spec: str) -> JITFunction:
    module_name, _, function = spec.rpartition(":")
    try:
        if module_name.endswith(".py"):
            path = Path(module_name)
            if not path.is_file():
                raise LaunchError(f"there is no file {module_name}")
            described = importlib.util.spec_from_file_location(path.stem, path)
            assert described is not None and described.loader is not None
            module = importlib.util.module_from_spec(described)
            sys.modules[path.stem] = module  # Triton reads a kernel's source through its module
            described.loader.exec_module(module)
        else:
            sys.path.insert(0, "")
            module = importlib.import_module(module_name)
    except ImportError as error:
        raise LaunchError(f"cannot import {module_name}: {error}") from error
    kernels = [name for name, value in vars(module).items() if isinstance(value, JITFunction)]
    if function not in kernels:
        raise LaunchError(
            f"{module_name} has no triton.jit function {function!r}; it has {', '.join(kernels) or 'none'}"
        )
    kernel: JITFunction = getattr(module, function)
    return kernel


def _given_argument(parameter: Any, text: str) -> Any:
    kind, _, divisor = text.partition(":")
    if kind.lstrip("*") in _SCALARS:
        if parameter.is_constexpr:
            raise LaunchError(f"{parameter.name} is a constant: give its value, not the type {text}")
        if divisor not in ("", "16"):
            raise LaunchError(f"{parameter.name}={text}: only :16 can stand behind a type")
        # As at run time: what comes from an allocator is known to be divisible by 16.
        return Argument(kind, divisor == "16" or kind.startswith("*"))
    if not parameter.is_constexpr:
        known = ", ".join(_SCALARS)
        raise LaunchError(f"{parameter.name}={text} is no type; types are {known}, with * for a pointer")
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            pass
    return {"True": True, "False": False, "None": None}.get(text, text)


def compile_launch(arch: str, launch: Launch) -> Any:
    """Triton's compiled kernel for a launch."""
    target = KNOWN_TARGETS[arch]
    gpu = GPUTarget(target.backend, target.arch, 64 if target.backend == "hip" else 32)
    options = {name: launch.arguments[name] for name in _OPTIONS if name in launch.arguments}
    if any(isinstance(value, Argument) for value in launch.arguments.values()):
        source = _typed_source(launch)
    else:
        source = _bound_source(launch, make_backend(gpu), options)
    return triton.compile(source, target=gpu, options=options)


def _bound_source(launch: Launch, backend: Any, options: dict[str, Any]) -> ASTSource:
    """What Triton's own launcher makes of the arguments, tuples among them."""
    kernel = launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    names = [parameter.name for parameter in kernel.params]
    given = {name: launch.arguments[name] for name in names if name in launch.arguments}
    bound, specialization, _ = bind(**given, **options)
    _, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, options)
    return _source_type(kernel)(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def _source_type(kernel: JITFunction) -> type[ASTSource]:
    """Of a kernel in Triton's own language, or in Gluon, which is loaded for its kernels alone."""
    if not kernel.is_gluon():
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def _typed_source(launch: Launch) -> ASTSource:
    """Of a launch whose run-time arguments are known by their types."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if isinstance(value, Argument):
            signature[parameter.name] = value.type
            if value.divisible_by_16:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def tensors_of(arguments: Mapping[str, Any]) -> list[torch.Tensor]:
    """The distinct tensors among a launch's arguments, also those in tuples and behind descriptors."""
    found: dict[int, torch.Tensor] = {}
    for value in tree_leaves(list(arguments.values())):
        if not isinstance(value, torch.Tensor):
            value = getattr(value, "base", value)  # of a descriptor, Triton's or Gluon's
        if isinstance(value, torch.Tensor):
            found.setdefault(id(value), value)
    return list(found.values())
