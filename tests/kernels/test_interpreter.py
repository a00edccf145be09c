"""The mended interpreter computes bfloat16 as a GPU does; unmended, it does not. Otherwise both compute the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fastattn import dispatch
from tests.attention_options import Case, launcher_results, make_inputs

pytestmark = pytest.mark.skipif(not dispatch.INTERPRETING, reason="Triton's interpreter is off")


@triton.jit
def _product_kernel(a_ptr, b_ptr, c_ptr, SIZE: tl.constexpr):
    rows = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    c = tl.dot(tl.load(a_ptr + rows), tl.load(b_ptr + rows))
    tl.store(c_ptr + rows, c.to(c_ptr.dtype.element_ty))


def _product(dtype: torch.dtype, out: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, 16, generator=generator).to(dtype) for _ in range(2))
    c = torch.empty(16, 16, dtype=out)
    _product_kernel[(1,)](a_ptr=a, b_ptr=b, c_ptr=c, SIZE=16)
    return c, a.float() @ b.float()


def test_bfloat16_dot_is_exact_up_to_float32() -> None:
    c, expected = _product(torch.bfloat16, torch.float32)
    torch.testing.assert_close(c, expected, atol=1e-5, rtol=1e-5)


def test_conversion_to_bfloat16_rounds_to_nearest_even() -> None:
    c, expected = _product(torch.bfloat16, torch.bfloat16)
    torch.testing.assert_close(c, expected.to(torch.bfloat16), atol=0, rtol=2**-8)
    halfway = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, float("inf"), float("nan"), 3.4e38])
    halfway = halfway.repeat(43)[:256].reshape(16, 16).contiguous()
    rounded = torch.empty(16, 16, dtype=torch.bfloat16)
    _product_kernel[(1,)](a_ptr=torch.eye(16), b_ptr=halfway.nan_to_num(0, 0, 0), c_ptr=rounded, SIZE=16)
    assert torch.equal(rounded, halfway.nan_to_num(0, 0, 0).to(torch.bfloat16))


def test_the_mending_is_needed() -> None:
    """When a Triton release multiplies bfloat16 rightly by itself, this fails and tests/interpreter.py can go."""
    from triton.runtime import interpreter

    mended = interpreter.InterpreterBuilder.create_dot
    plain = mended.__closure__[[*mended.__code__.co_freevars].index("plain_dot")].cell_contents
    interpreter.InterpreterBuilder.create_dot = plain
    try:
        c, expected = _product(torch.bfloat16, torch.float32)
    finally:
        interpreter.InterpreterBuilder.create_dot = mended
    assert (c - expected).abs().max() > 1e3


def test_idle_work_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of integer arithmetic is in this call: pointers, offsets, windows, and Philox, whose sums overflow."""
    from triton.runtime import interpreter

    case = Case(2, 2, 1, 37, 41, dtype=torch.bfloat16, window=(9, 5), softcap=2.0, bias="hqk", mask="bk",
                alibi="h", sinks=True, lengths=True, dropout_p=0.4, packed=True)  # fmt: skip
    inputs = make_inputs(case)
    found = launcher_results(case, inputs, "triton")
    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", replace(builder.options, sanitize_overflow=True))
    for name in ("_patch_lang", "_get_np_dtype"):
        monkeypatch.setattr(interpreter, name, getattr(interpreter, name).__wrapped__)
    expected = launcher_results(case, inputs, "triton")
    assert found["out"].any() and found["dbias"].any()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@triton.jit
def _bulk_sum_kernel(rows, FIRST: tl.constexpr, SIZE: tl.constexpr):
    """Each of the programs adds its own number, and 1, to the rows from FIRST on."""
    value = tl.zeros((1, SIZE, SIZE), tl.float32) + tl.program_id(0)
    rows.atomic_add([1, FIRST, 0], value)
    rows.atomic_add([1, FIRST, 0], value * 0.0 + 1.0)


def test_bulk_reductions_add_within_the_tensor() -> None:
    """Of rows 12 .. 28 the 8 that there are, of 16 columns the 12; nothing in what lies behind."""
    memory = torch.full((2, 24, 16), 0.5)
    rows = TensorDescriptor(memory, [2, 20, 12], [24 * 16, 16, 1], [1, 16, 16])
    _bulk_sum_kernel[(4,)](rows=rows, FIRST=12, SIZE=16)
    expected = torch.full((2, 24, 16), 0.5)
    expected[1, 12:20, :12] += 0 + 1 + 2 + 3 + 4 * 1
    assert torch.equal(memory, expected)


def test_bulk_reductions_are_missing() -> None:
    """When a Triton release interprets them, this fails, and what tests/interpreter.py adds can go."""
    from triton.runtime import interpreter

    added = interpreter.InterpreterBuilder.create_descriptor_reduce
    assert added.__module__ == "tests.interpreter"


def test_unmended_bfloat16_attention_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import fastattn

    monkeypatch.setattr(dispatch, "interpreter_multiplies_bfloat16", False)
    q = torch.ones(1, 1, 4, 16, dtype=torch.bfloat16)
    assert fastattn.explain(q, q, q).implementation == "torch"
    with pytest.raises(fastattn.NotSupported, match="interpreter multiplies bfloat16 as integers"):
        fastattn.attention(q, q, q, implementation="triton")


@triton.jit
def _convert_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    place = tl.arange(0, SIZE)
    tl.store(y_ptr + place, tl.load(x_ptr + place).to(y_ptr.dtype.element_ty))


def test_conversion_to_e4m3_rounds_and_saturates() -> None:
    """Unmended, it cuts digits off, and NaN becomes a number."""
    x = torch.cat(
        [torch.linspace(-500, 500, 1000), torch.logspace(-6, 0, 1000), torch.tensor([1e4, torch.nan])]
    )
    x = torch.nn.functional.pad(x, (0, 2048 - x.numel()))
    y = torch.empty(2048, dtype=torch.float8_e4m3fn)
    _convert_kernel[(1,)](x_ptr=x, y_ptr=y, SIZE=2048)
    expected = x.clamp(-448, 448).to(torch.float8_e4m3fn)
    torch.testing.assert_close(y.float(), expected.float(), atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("wide", [torch.float16, torch.float32], ids=str)
def test_every_e4m3_number_is_read_exactly(wide: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    found = torch.empty(256, dtype=wide)
    _convert_kernel[(1,)](x_ptr=every, y_ptr=found, SIZE=256)
    torch.testing.assert_close(found, every.to(wide), atol=0, rtol=0, equal_nan=True)


def test_e4m3_dot_is_exact_up_to_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(32, 32, generator=generator).to(torch.float8_e4m3fn) for _ in range(2))
    a.view(torch.uint8)[3, 5] = 127  # NaN
    c = torch.empty(32, 32)
    _product_kernel[(1,)](a_ptr=a, b_ptr=b, c_ptr=c, SIZE=32)
    torch.testing.assert_close(c, a.float() @ b.float(), atol=1e-5, rtol=1e-5, equal_nan=True)
