"""The LayerNorm launchers: every form of the kernels at small odd sizes, and at real sizes on a GPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fastattn import reference
from fastattn.kernels._norm_config import (
    LayerNormBackwardConfig,
    LayerNormConfig,
    select_layer_norm_backward_config,
    select_layer_norm_forward_config,
)
from fastattn.kernels._target import KNOWN_TARGETS
from fastattn.kernels.layer_norm_backward import layer_norm_backward
from fastattn.kernels.layer_norm_forward import as_rows, layer_norm_forward
from fastattn.testing import assert_accurate, make_tensor

EPS = 1e-5
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Forms of the kernels, forced at small widths: what is selected, dx and the statistics over column tiles, the
# last of them partly filled, programs that each walk several blocks of rows, and more programs than partial
# sums are added up at a time.
_TILE = LayerNormConfig(block_m=4, block_n=32, num_warps=1)
_ROW = LayerNormConfig(block_m=1, block_n=1024, num_warps=1)
FORMS: dict[str, tuple[LayerNormConfig | None, LayerNormBackwardConfig | None]] = {
    "selected": (None, None),
    "tiles": (_TILE, LayerNormBackwardConfig(walk=_TILE, dx=_TILE, sums=_TILE, programs=3)),
    "one-row": (
        _ROW,
        LayerNormBackwardConfig(walk=_ROW, dx=None, sums=LayerNormConfig(2, 32, 1), programs=3),
    ),
}


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.empty gives NaN, so that an element that no kernel writes shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Case:
    """One LayerNorm: its sizes, dtypes, and which parameters it has."""

    rows: int = 7
    width: int = 63
    dtype: str = "fp32"
    parameters: str | None = None
    has_weight: bool = True
    has_bias: bool = True

    def __str__(self) -> str:
        parts = [f"{self.rows}x{self.width}", self.dtype]
        parts += [f"{self.parameters}-parameters"] if self.parameters else []
        parts += [] if self.has_weight else ["no-weight"]
        parts += [] if self.has_bias else ["no-bias"]
        return "-".join(parts)

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        """x, weight, bias and dy."""
        dtype, parameter_dtype = DTYPES[self.dtype], DTYPES[self.parameters or self.dtype]
        x = make_tensor(self.rows, self.width, dtype=dtype, device=device, seed=0)
        dy = make_tensor(self.rows, self.width, dtype=dtype, device=device, seed=1)
        weight = make_tensor(self.width, dtype=parameter_dtype, device=device, seed=2)
        bias = make_tensor(self.width, dtype=parameter_dtype, device=device, seed=3)
        return x, weight if self.has_weight else None, bias if self.has_bias else None, dy


def gradients(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, dy: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """y and every gradient of the reference, computed in `dtype` on the same rounded inputs."""
    given = {"dx": x, "dweight": weight, "dbias": bias}
    leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in given.items() if t is not None}
    y = reference.layer_norm(leaves["dx"], x.size(-1), leaves.get("dweight"), leaves.get("dbias"), EPS)
    found = torch.autograd.grad(y, list(leaves.values()), dy.to(dtype))
    return {"y": y.detach(), **dict(zip(leaves, found, strict=True))}


def check(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    dy: Tensor,
    forward: LayerNormConfig | None = None,
    backward: LayerNormBackwardConfig | None = None,
) -> None:
    """Runs both launchers and compares everything they return with the reference in float64.

    The peer is the reference in float32, rounded to the dtype of the result: better than PyTorch's own
    operator, which rounds more often.
    """
    copies = [t.clone() if t is not None else None for t in (x, weight, bias, dy)]
    y, mean, rstd = layer_norm_forward(x, weight, bias, 1, EPS, config=forward)
    dtypes = [None if t is None else t.dtype for t in (weight, bias)]
    dx, dweight, dbias = layer_norm_backward(dy, x, weight, mean, rstd, 1, True, *dtypes, config=backward)

    truth = gradients(x, weight, bias, dy, torch.float64)
    peer = gradients(x, weight, bias, dy, torch.float32)
    growth = math.sqrt(x.size(0))
    assert_accurate(y, peer["y"].to(x.dtype), truth["y"], name="y")
    assert_accurate(dx, peer["dx"].to(x.dtype), truth["dx"], name="dx")
    if weight is not None:
        assert_accurate(
            dweight, peer["dweight"].to(weight.dtype), truth["dweight"], name="dweight", growth=growth
        )
    if bias is not None:
        assert_accurate(dbias, peer["dbias"].to(bias.dtype), truth["dbias"], name="dbias", growth=growth)
    check_statistics(x, mean, rstd)
    for before, after in zip(copies, (x, weight, bias, dy), strict=True):
        assert before is None or torch.equal(before, after)


def check_statistics(x: Tensor, mean: Tensor, rstd: Tensor) -> None:
    """Mean and rstd to float32's precision, whatever x's dtype."""
    wide = x.double()
    assert mean.dtype == rstd.dtype == torch.float32
    variance = wide.var(-1, correction=0)
    # A mean's rounding errors are relative to the values it is of.
    scale = wide.abs().amax(-1)
    assert ((mean - wide.mean(-1)).abs() <= 4 * 2.0**-23 * scale).all()
    assert ((rstd * (variance + EPS).sqrt() - 1).abs() <= 1e-5).all()


WIDTHS = [Case(width=width) for width in (1, 3, 63, 127)]
WIDE = [Case(rows=3, width=768), Case(rows=3, width=1000, dtype="fp16", parameters="fp32")]
ROWS = [Case(rows=rows, width=17) for rows in (1, 40)]
PRECISIONS = [Case(dtype=dtype, width=127) for dtype in ("bf16", "fp16")]
MIXED = [
    Case(dtype=dtype, parameters=parameters, width=33)
    for dtype, parameters in (("bf16", "fp32"), ("fp32", "bf16"), ("fp16", "bf16"))
]
PARTIAL = [
    Case(width=33, has_weight=has_weight, has_bias=has_bias)
    for has_weight, has_bias in ((False, True), (True, False), (False, False))
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", [*WIDTHS, *WIDE, *ROWS, *PRECISIONS, *MIXED, *PARTIAL], ids=str)
def test_matches_reference(case: Case, form: str, device: torch.device) -> None:
    check(*case.inputs(device), *FORMS[form])


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("width", [3, 200])
def test_shipped_configs_match_reference(width: int, target: str, device: torch.device) -> None:
    """The tiles that GPUs run, of up to 64 rows, with a number of rows that fills none of them."""
    known = KNOWN_TARGETS[target]
    alignment = math.gcd(width, 16)
    forward = select_layer_norm_forward_config(width, alignment, torch.float32, known)
    backward = select_layer_norm_backward_config(width, alignment, torch.float32, known)
    check(*Case(rows=9, width=width).inputs(device), forward, backward)


@pytest.mark.parametrize("form", FORMS)
def test_rows_at_a_distance(form: str, device: torch.device) -> None:
    """Gaps between the rows hold NaN."""
    x = make_tensor(6, 37, strides=(50, 1), device=device)
    dy = make_tensor(6, 37, strides=(41, 1), device=device, seed=1)
    weight, bias = make_tensor(37, device=device, seed=2), make_tensor(37, device=device, seed=3)
    check(x, weight, bias, dy, *FORMS[form])


@pytest.mark.parametrize(
    "shape, strides, copied",
    [
        ((6, 8), (8, 1), False),
        ((6, 8), (11, 1), False),
        ((6, 8), (0, 1), False),
        ((2, 3, 8), (33, 11, 1), False),
        ((2, 3, 4, 2), (33, 11, 2, 1), False),
        ((6, 1), (5, 9), False),
        ((6, 8), (1, 6), True),
        ((2, 3, 8), (8, 16, 1), True),
    ],
    ids=str,
)
def test_rows_at_equal_distances_are_not_copied(
    shape: tuple[int, ...], strides: tuple[int, ...], copied: bool, device: torch.device
) -> None:
    width = 1 if shape[-1] == 1 else 8
    x = torch.arange(100.0, device=device).as_strided(shape, strides)
    matrix = as_rows(x, 6, width)
    assert torch.equal(matrix, x.reshape(6, width))
    assert (matrix.data_ptr() != x.data_ptr()) == copied


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("strides", [(0, 1), (1, 0), (0, 0), (1, 5)], ids=str)
def test_gradients_of_any_strides(strides: tuple[int, int], form: str, device: torch.device) -> None:
    """Expanded gradients, such as that of a sum, and transposed ones."""
    x, weight, bias, _ = Case(rows=5, width=37).inputs(device)
    dy = make_tensor(5 * 37, device=device, seed=1).as_strided((5, 37), strides)
    check(x, weight, bias, dy, *FORMS[form])


def test_transposed_and_higher_rank_inputs(device: torch.device) -> None:
    """Normalizes over two dimensions of a transposed four-dimensional x, and over rows that are no matrix."""
    x = make_tensor(3, 5, 2, 4, device=device).permute(2, 3, 1, 0)
    weight = make_tensor(5, 3, device=device, seed=2)
    y, mean, rstd = layer_norm_forward(x, weight, None, 2, EPS)
    assert y.is_contiguous() and mean.shape == rstd.shape == (2, 4)
    truth = reference.layer_norm(x.double(), (5, 3), weight.double(), None, EPS)
    torch.testing.assert_close(y, truth.float())
    x = make_tensor(2, 5, 3, 16, device=device).transpose(1, 2)
    y, _, _ = layer_norm_forward(x, None, None, 1, EPS)
    torch.testing.assert_close(y, reference.layer_norm(x.double(), 16, None, None, EPS).float())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [0.0, 0.1, -3e4])
def test_constant_rows(value: float, form: str, device: torch.device) -> None:
    """The variance is zero: y is the bias, however far from zero the rows are, and dx is finite."""
    forward, backward = FORMS[form]
    x = torch.full((3, 63), value, device=device)
    _, weight, bias, dy = Case(rows=3).inputs(device)
    y, mean, rstd = layer_norm_forward(x, weight, bias, 1, EPS, config=forward)
    torch.testing.assert_close(y, bias.expand(3, -1), atol=1e-6, rtol=0.0)
    torch.testing.assert_close(rstd, torch.full((3,), EPS**-0.5, device=device))
    found = layer_norm_backward(
        dy, x, weight, mean, rstd, 1, True, torch.float32, torch.float32, config=backward
    )
    assert all(gradient.isfinite().all() for gradient in found)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", [63, 400])
def test_large_mean_and_small_variance(width: int, form: str, device: torch.device) -> None:
    """Mean 1e4, standard deviation 0.1: the mean of squares less the square of the mean has no digit left,
    and a mean rounded to float32 is off by up to 5e-4, which is 0.5 % of the deviation.
    """
    forward, _ = FORMS[form]
    x = 1e4 + 0.1 * make_tensor(4, width, device=device)
    y, mean, rstd = layer_norm_forward(x, None, None, 1, EPS, config=forward)
    truth = reference.layer_norm(x.double(), width, None, None, EPS)
    assert (y - truth).abs().max() < 1e-5
    check_statistics(x, mean, rstd)


@pytest.mark.parametrize("form", FORMS)
def test_column_tiles_of_very_different_means(form: str, device: torch.device) -> None:
    """The first tile's mean is 0 and the others' 1e3: what is subtracted from them is then no help."""
    x = make_tensor(3, 100, device=device)
    x[:, 32:] += 1e3
    check(x, None, None, make_tensor(3, 100, device=device, seed=1), *FORMS[form])


@pytest.mark.parametrize("form", FORMS)
def test_two_runs_give_the_same_bits(form: str, device: torch.device) -> None:
    forward, backward = FORMS[form]
    x, weight, bias, dy = Case(rows=11).inputs(device)
    runs = []
    for _ in range(2):
        _, mean, rstd = layer_norm_forward(x, weight, bias, 1, EPS, config=forward)
        runs.append(
            layer_norm_backward(
                dy, x, weight, mean, rstd, 1, True, torch.float32, torch.float32, config=backward
            )
        )
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("asked", ["x", "w", "b", "xw", "xb", "wb", ""])
def test_gradients_asked_for(asked: str, form: str, device: torch.device) -> None:
    """What is asked for has the same bits as among all; what is not asked for is empty."""
    _, backward = FORMS[form]
    x, weight, bias, dy = Case().inputs(device)
    _, mean, rstd = layer_norm_forward(x, weight, bias, 1, EPS)
    everything = layer_norm_backward(
        dy, x, weight, mean, rstd, 1, True, torch.float32, torch.float32, config=backward
    )
    dtypes = (torch.float32 if "w" in asked else None, torch.float32 if "b" in asked else None)
    found = layer_norm_backward(dy, x, weight, mean, rstd, 1, "x" in asked, *dtypes, config=backward)
    for name, gradient, expected in zip("xwb", found, everything, strict=True):
        assert torch.equal(gradient, expected) if name in asked else gradient.shape == (0,)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)], ids=str)
def test_empty(shape: tuple[int, int], device: torch.device) -> None:
    x, weight = torch.empty(shape, device=device), torch.ones(shape[1], device=device)
    y, mean, rstd = layer_norm_forward(x, weight, weight, 1, EPS)
    assert y.shape == shape and mean.shape == rstd.shape == shape[:1]
    dx, dweight, dbias = layer_norm_backward(y, x, weight, mean, rstd, 1, True, torch.float32, torch.bfloat16)
    assert dx.shape == shape
    assert torch.equal(dweight, torch.zeros_like(weight))
    assert torch.equal(dbias, torch.zeros_like(weight, dtype=torch.bfloat16))


def test_nan_stays_in_its_row(device: torch.device) -> None:
    x, weight, bias, dy = Case(rows=4).inputs(device)
    x[1, 5] = math.nan
    y, mean, rstd = layer_norm_forward(x, weight, bias, 1, EPS)
    dx, _, _ = layer_norm_backward(dy, x, weight, mean, rstd, 1, True, None, None)
    for result in (y, dx):
        assert result[1].isnan().all()
        assert result[[0, 2, 3]].isfinite().all()


def test_offsets_beyond_32_bits(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third row starts 2^31 + 16 elements after the first: a product of 32-bit numbers would be negative.

    The row stride itself fits 32 bits, or it would widen the product. Of the 4 GiB no page between the rows is
    touched.
    """
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    strides = (2**30 + 8, 1)
    x = torch.empty(2**31 + 64, dtype=torch.float16, device=device).as_strided((3, 32), strides)
    x.copy_(make_tensor(3, 32, dtype=torch.float16))
    for forward, backward in FORMS.values():
        y, mean, rstd = layer_norm_forward(x, None, None, 1, EPS, config=forward)
        expected, _, _ = layer_norm_forward(x.contiguous(), None, None, 1, EPS, config=forward)
        assert torch.equal(y, expected)
        both = [
            layer_norm_backward(
                y, t, y[0], mean, rstd, 1, True, torch.float32, torch.float32, config=backward
            )
            for t in (x, x.contiguous())
        ]
        assert all(torch.equal(first, second) for first, second in zip(*both, strict=True))


@pytest.mark.parametrize("target", KNOWN_TARGETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_configs_cover_every_width(dtype: str, target: str) -> None:
    known = KNOWN_TARGETS[target]
    lanes = 64 if known.backend == "hip" else 32
    for exponent in range(21):
        for width in (2**exponent, 2**exponent + 1, 3 * 2**exponent):
            alignment = math.gcd(width, 16)
            forward = select_layer_norm_forward_config(width, alignment, DTYPES[dtype], known)
            backward = select_layer_norm_backward_config(width, alignment, DTYPES[dtype], known)
            for config in (forward, backward.walk, backward.dx or backward.walk, backward.sums):
                tile = config.block_m * config.block_n
                assert tile.bit_count() == 1
                assert config.num_warps * lanes <= 1024
                # At most 32 elements a thread, or their sums spill.
                assert tile <= 32 * config.num_warps * lanes
            assert backward.dx is not None or backward.walk.block_n >= width
            # At most a few megabytes of partial sums for each parameter at the usual widths.
            assert backward.programs <= 8 * known.multiprocessors


REAL_SIZES = [
    Case(8192, 4096, "bf16"),
    Case(8192, 4096, "fp32"),
    Case(16384, 768, "bf16", "fp32"),
    Case(5000, 1001, "fp16"),
    Case(4096, 8192, "bf16"),
    Case(512, 16384, "fp32"),
    Case(512, 32768, "bf16", "fp32"),
    Case(300, 131072, "bf16"),
    Case(300, 131072, "fp32"),
    Case(64, 300001, "fp32"),
    Case(100_000, 3, "fp32"),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", REAL_SIZES, ids=str)
def test_real_sizes(case: Case, device: torch.device) -> None:
    x, weight, bias, dy = case.inputs(device)
    check(x, weight, bias, dy)


@pytest.mark.gpu
@pytest.mark.parametrize("case", REAL_SIZES, ids=str)
def test_real_sizes_give_the_same_bits_twice(case: Case, device: torch.device) -> None:
    x, weight, bias, dy = case.inputs(device)
    runs = []
    for _ in range(2):
        y, mean, rstd = layer_norm_forward(x, weight, bias, 1, EPS)
        dtypes = (weight.dtype, bias.dtype)
        runs.append((y, mean, rstd, *layer_norm_backward(dy, x, weight, mean, rstd, 1, True, *dtypes)))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.gpu
def test_large_mean_and_small_variance_in_wide_rows(device: torch.device) -> None:
    for width in (4096, 131072):
        x = 1e4 + 0.1 * make_tensor(8, width, device=device)
        y, mean, rstd = layer_norm_forward(x, None, None, 1, EPS)
        assert (y - reference.layer_norm(x.double(), width, None, None, EPS)).abs().max() < 1e-4
        check_statistics(x, mean, rstd)


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_2_31_elements(device: torch.device) -> None:
    """65,600 rows of 32,768 columns: elements past the 2^31st are in the last 64 rows."""
    x = torch.randn(65_600, 32_768, dtype=torch.float16, device=device)
    weight = make_tensor(32_768, dtype=torch.float16, device=device)
    y, mean, rstd = layer_norm_forward(x, weight, None, 1, EPS)
    dx, _, _ = layer_norm_backward(y, x, weight, mean, rstd, 1, True, torch.float32, torch.float32)
    last = x[-80:].clone()
    y_last, mean_last, rstd_last = layer_norm_forward(last, weight, None, 1, EPS)
    dx_last, _, _ = layer_norm_backward(y_last, last, weight, mean_last, rstd_last, 1, True, None, None)
    assert torch.equal(y[-80:], y_last) and torch.equal(dx[-80:], dx_last)


@pytest.mark.gpu
def test_no_recompilation_as_the_number_of_rows_changes(device: torch.device) -> None:
    """Also for 1 row and for multiples of 16, which Triton tells apart unless it is told not to."""
    from fastattn.kernels import layer_norm_backward as backward
    from fastattn.kernels import layer_norm_forward as forward

    kernels = (
        forward._layer_norm_forward_kernel,
        backward._layer_norm_backward_kernel,
        backward._layer_norm_dx_kernel,
        backward._sum_partials_kernel,
    )

    def compiled() -> list[int]:
        return [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels]

    def run(rows: int) -> None:
        for width in (768, 1001, 20_000):
            x, weight, bias, dy = Case(rows, width, "bf16").inputs(device)
            _, mean, rstd = layer_norm_forward(x, weight, bias, 1, EPS)
            layer_norm_backward(dy, x, weight, mean, rstd, 1, True, weight.dtype, bias.dtype)

    run(100)
    before = compiled()
    for rows in (1, 2, 16, 17, 64, 4096):
        run(rows)
    assert compiled() == before
