"""What the normalization kernels share: tiles of rows, parameters, moments, and x_hat."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _column_tile(ON_TWO_AXES: tl.constexpr):
    """Which column tile a program of a grid of `walk_grid` has; ON_TWO_AXES: axis 2 is longer than 1."""
    tile = tl.program_id(1)
    if ON_TWO_AXES:
        tile += tl.program_id(2) * tl.num_programs(1)
    return tile


@triton.jit
def _multiple_of(size, ALIGNMENT: tl.constexpr):
    """The size itself, which ALIGNMENT divides, in a form that shows it to the compiler.

    Loads are as wide as what it knows of the sizes. Triton itself tells only multiples of 16 apart, where 8
    elements of 16 bits are a 16-byte load, and `tl.multiple_of` does not reach a kernel's arguments.
    """
    return size // ALIGNMENT * ALIGNMENT


@triton.jit
def _rows_of(matrix, rows, ALIGNMENT: tl.constexpr):
    """Pointers (BLOCK_M, 1) to the first elements of rows, which are int64."""
    return matrix.ptr + rows[:, None] * _multiple_of(matrix.stride_m, ALIGNMENT)


@triton.jit
def _load_tile(rows_ptr, columns, inside):
    """A float32 tile (BLOCK_M, BLOCK_N) of the rows that start at rows_ptr (BLOCK_M, 1); zero outside."""
    return tl.load(rows_ptr + columns[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_tile(rows_ptr, tile, columns, inside):
    tl.store(rows_ptr + columns[None, :], tile.to(rows_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _load_parameter(ptr, columns, WIDTH, BLOCK_M: tl.constexpr, OTHER: tl.constexpr):
    """A float32 row (1, BLOCK_N) of weight or bias; the last column tile overruns."""
    inside = columns < WIDTH
    if BLOCK_M == 1:
        # As a matrix of the tile's own shape it is given the tile's layout also where the dtypes differ: no
        # exchange through shared memory, which spilled in bfloat16 rows of 32,768 with a float32 weight.
        return tl.load(ptr + columns[None, :], mask=inside[None, :], other=OTHER).to(tl.float32)
    else:
        # Among several rows that would take 50 registers more in the backward.
        return tl.load(ptr + columns, mask=inside, other=OTHER).to(tl.float32)[None, :]


@triton.jit
def _load_scale(weight_ptr, columns, WIDTH, BLOCK_M: tl.constexpr, ZERO_CENTERED: tl.constexpr):
    """What x_hat is multiplied by: weight, 1 + weight, or 1.0 without one; not zero where the tile overruns."""
    scale = 1.0
    if weight_ptr is not None:
        scale = _load_parameter(weight_ptr, columns, WIDTH, BLOCK_M, 1.0)
        if ZERO_CENTERED:
            scale += 1.0
    return scale


@triton.jit
def _load_shift(bias_ptr, columns, WIDTH, BLOCK_M: tl.constexpr):
    """What is added to x_hat * scale: bias, or 0.0 without one."""
    shift = 0.0
    if bias_ptr is not None:
        shift = _load_parameter(bias_ptr, columns, WIDTH, BLOCK_M, 0.0)
    return shift


@triton.jit
def _load_column(ptr, rows, row_inside):
    """One number a row as a column (BLOCK_M, 1) in float32; 0.0 outside, and where there is none."""
    column = 0.0
    if ptr is not None:
        column = tl.load(ptr + rows, mask=row_inside, other=0.0).to(tl.float32)[:, None]
    return column


@triton.jit
def _moments(x, inside, count, CENTERED: tl.constexpr):
    """Mean of each row of a tile and its sum of squared distances from it, in two passes in registers.

    Not CENTERED, zero stands for the mean.
    """
    if CENTERED:
        mean = tl.sum(x, axis=1) / count
        x = tl.where(inside, x - mean[:, None], 0.0)
    else:
        mean = tl.zeros((x.shape[0],), tl.float32)
    return mean, tl.sum(x * x, axis=1)


@triton.jit
def _combine_moments(mean_a, squares_a, count_a, mean_b, squares_b, count_b):
    """Moments of two sets of values from the moments of each (Chan, Golub and LeVeque, 1979, eq. 2.1)."""
    share = count_b / (count_a + count_b)
    delta = mean_b - mean_a
    return mean_a + delta * share, squares_a + squares_b + delta * delta * (share * count_a)


@triton.jit
def _inverse(scale, FROM_OUTPUT: tl.constexpr):
    """1 / scale where x_hat is to be made from y; NaN for a scale of zero, of which y keeps nothing."""
    inverse = 1.0
    if FROM_OUTPUT:
        inverse = tl.where(scale == 0.0, float("nan"), 1.0 / scale)
    return inverse


@triton.jit
def _x_hat(kept, mean, rstd, inverse, shift, CENTERED: tl.constexpr, FROM_OUTPUT: tl.constexpr):
    """The normalized tile again, from what was normalized, or from y = x_hat * scale + shift."""
    if FROM_OUTPUT:
        return (kept - shift) * inverse
    elif CENTERED:
        return (kept - mean) * rstd
    else:
        return kept * rstd
