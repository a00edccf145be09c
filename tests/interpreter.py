"""Mends Triton's interpreter for tests, where it computes something else than a GPU would, or the same for nothing.

The interpreter keeps bfloat16 as 16-bit integers (Triton 3.6 to 3.9). Its `tl.dot` multiplies those integers, and
its conversion from float32 truncates where a GPU rounds to nearest even. So does that to e4m3, whose NaN it does not
know either.
"""

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import torch


def mend_bfloat16() -> None:
    """Makes `tl.dot` on bfloat16 operands and conversions to bfloat16 what a GPU computes."""
    import triton.language as tl
    from triton.runtime import interpreter

    from fastattn import dispatch

    plain_dot = interpreter.InterpreterBuilder.create_dot
    plain_convert = interpreter._convert_float

    def create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return plain_dot(self, widened(a), widened(b), *others)

    def widened(handle: Any) -> Any:
        # Exact, and what tensor cores do: they multiply bfloat16 and accumulate in float32.
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle(_to_float32(handle.data), tl.float32)

    def convert_float(data: np.ndarray, source: Any, target: Any, rounding_mode: Any) -> np.ndarray:
        if source == tl.float32 and target == tl.bfloat16:
            return _to_bfloat16(data)
        if source == tl.bfloat16 and target == tl.float32:
            return _to_float32(data)
        if tl.float8e4nv in (source, target) and {source, target} <= _TORCH_FLOATS.keys():
            return _between(data, _TORCH_FLOATS[source], _TORCH_FLOATS[target])
        return plain_convert(data, source, target, rounding_mode)

    _TORCH_FLOATS = {
        tl.float32: torch.float32,
        tl.float16: torch.float16,
        tl.float8e4nv: torch.float8_e4m3fn,
    }
    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter._convert_float = convert_float
    dispatch.interpreter_multiplies_bfloat16 = True
    dispatch.interpreter_rounds_e4m3 = True


def add_bulk_reductions() -> None:
    """Makes `descriptor.atomic_add` add, which the interpreter does not know (Triton 3.6 to 3.9)."""
    import triton.language as tl
    from triton._C.libtriton import ir
    from triton.runtime import interpreter

    def create_descriptor_reduce(self: Any, kind: Any, descriptor: Any, value: Any, offsets: Any) -> Any:
        if kind != ir.DESCRIPTOR_REDUCE_KIND.ADD or value.dtype.scalar != tl.float32:
            raise NotImplementedError(f"a bulk reduction by {kind} of {value.dtype}: only sums of float32")
        pointers, inside = descriptor.materialize_pointers(offsets)
        mask = interpreter.TensorHandle(inside, tl.int1)
        relaxed, scope = ir.MEM_SEMANTIC.RELAXED, ir.MEM_SYNC_SCOPE.GPU
        return self.create_atomic_rmw(ir.ATOMIC_OP.FADD, pointers, value, mask, relaxed, scope)

    if not hasattr(interpreter.InterpreterBuilder, "create_descriptor_reduce"):
        interpreter.InterpreterBuilder.create_descriptor_reduce = create_descriptor_reduce


def leave_out_idle_work() -> None:
    """Leaves out three things that take most of the interpreter's time and change no result (Triton 3.6 to 3.9).

    Every call of a helper looks through all of `triton.language` for functions to replace, although its launch, or the
    first helper of the same module in that launch, has replaced them. Every sum and product of integers is computed
    again in 64 bits, for an assertion that is dropped. Every result makes a table of all dtypes to find its own in.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    plain_launch = interpreter.GridExecutor.__call__
    plain_patch = interpreter._patch_lang
    numpy_scalar = functools.cache(interpreter._get_np_dtype)
    replaced: set[int] = set()

    def launch(self: Any, *arguments: Any, **keywords: Any) -> None:
        replaced.clear()  # the launch before has put the language's own functions back
        plain_launch(self, *arguments, **keywords)

    @functools.wraps(plain_patch)
    def patch_lang(function: Any) -> Any:
        module = id(function.__globals__)
        if module in replaced:
            return None
        replaced.add(module)
        return plain_patch(function)

    @functools.wraps(interpreter._get_np_dtype)
    def numpy_dtype(dtype: Any) -> np.dtype:
        if isinstance(dtype.scalar, tl.pointer_type):  # has no hash
            return np.dtype(np.uint64)
        return numpy_scalar(dtype.scalar)

    interpreter.GridExecutor.__call__ = launch
    interpreter._patch_lang = patch_lang
    interpreter._get_np_dtype = numpy_dtype
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = replace(options, sanitize_overflow=options.debug)


def _between(data: np.ndarray, source: torch.dtype, target: torch.dtype) -> np.ndarray:
    """The bits of what PyTorch converts, saturating as the instruction does (cvt.rn.satfinite)."""
    values = torch.from_numpy(np.ascontiguousarray(data)).view(source)
    if target == torch.float8_e4m3fn:
        values = values.clamp(-448.0, 448.0)  # keeps NaN
    bits = values.to(target).view(
        torch.uint8 if target.itemsize == 1 else torch.int16 if target.itemsize == 2 else torch.int32
    )
    return bits.numpy().view(f"uint{8 * target.itemsize}").reshape(data.shape)


def _to_bfloat16(data: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16, rounded to nearest even."""
    contiguous = np.ascontiguousarray(data)
    rounded = torch.from_numpy(contiguous).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16).reshape(data.shape)


def _to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)
