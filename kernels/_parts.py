"""A row's columns in one or two tiles, each of a width that is a power of two.

Sides of tiles are powers of two, so that one tile of 80 columns has 128: products of 48 columns of zeros. Of 64 and 16
it has none. A row in parts is a tuple of one tile, of all its columns, or of two: BLOCK_D of them, and those behind,
padded by themselves. There are two where BLOCK_D is below HEAD_DIM; `fastattn.kernels._layout.first_block` says when.
A product over the columns is the sum of the parts' products, one with the columns a part each.
"""

import triton
import triton.language as tl

from fastattn.kernels._tiles import _add_tile, _load_own_tile, _load_tile, _store_rows


@triton.constexpr_function
def _rest_block(HEAD_DIM, BLOCK_D):
    """The width of the second tile; a matrix instruction takes at least 16 columns."""
    return max(16, 1 << (HEAD_DIM - BLOCK_D - 1).bit_length())


@triton.jit
def _load_parts(
    place,
    first,
    SEQ,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MAY_OVERRUN: tl.constexpr,
):
    """The rows that `_load_tile` gives."""
    if HEAD_DIM > BLOCK_D:
        behind = place[0] + BLOCK_D, place[1], place[2]
        REST: tl.constexpr = _rest_block(HEAD_DIM, BLOCK_D)
        return (
            _load_tile(place, first, SEQ, BLOCK_D, ROWS, BLOCK_D, MAY_OVERRUN),
            _load_tile(behind, first, SEQ, HEAD_DIM - BLOCK_D, ROWS, REST, MAY_OVERRUN),
        )
    else:
        return (_load_tile(place, first, SEQ, HEAD_DIM, ROWS, BLOCK_D, MAY_OVERRUN),)


@triton.jit
def _load_own_parts(
    ptr,
    first,
    stride,
    SEQ,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPECIALIZED: tl.constexpr,
    rows=None,
):
    """The rows that `_load_own_tile` gives."""
    if HEAD_DIM > BLOCK_D:
        REST: tl.constexpr = _rest_block(HEAD_DIM, BLOCK_D)
        return (
            _load_own_tile(ptr, first, stride, SEQ, BLOCK_D, ROWS, BLOCK_D, SPECIALIZED, rows),
            _load_own_tile(
                ptr + BLOCK_D, first, stride, SEQ, HEAD_DIM - BLOCK_D, ROWS, REST, SPECIALIZED, rows
            ),
        )
    else:
        return (_load_own_tile(ptr, first, stride, SEQ, HEAD_DIM, ROWS, BLOCK_D, SPECIALIZED, rows),)


@triton.jit
def _store_parts(
    ptr,
    parts,
    first,
    stride,
    SEQ,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    rows=None,
):
    """Writes rows as `_store_rows` does."""
    if HEAD_DIM > BLOCK_D:
        REST: tl.constexpr = _rest_block(HEAD_DIM, BLOCK_D)
        _store_rows(ptr, parts[0], first, stride, SEQ, BLOCK_D, ROWS, BLOCK_D, rows)
        _store_rows(ptr + BLOCK_D, parts[1], first, stride, SEQ, HEAD_DIM - BLOCK_D, ROWS, REST, rows)
    else:
        _store_rows(ptr, parts[0], first, stride, SEQ, HEAD_DIM, ROWS, BLOCK_D, rows)


@triton.jit
def _zero_parts(HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Accumulators of rows, in float32."""
    if HEAD_DIM > BLOCK_D:
        REST: tl.constexpr = _rest_block(HEAD_DIM, BLOCK_D)
        return tl.zeros((ROWS, BLOCK_D), tl.float32), tl.zeros((ROWS, REST), tl.float32)
    else:
        return (tl.zeros((ROWS, BLOCK_D), tl.float32),)


@triton.jit
def _products_of_rows(a, b):
    """a b^T: of each row of one with each row of the other, over all columns."""
    products = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    if len(a) > 1:
        products = tl.dot(a[1], tl.trans(b[1]), products, input_precision="ieee")
    return products


@triton.jit
def _add_product(sums, weights, parts):
    """sums + weights times rows."""
    first = tl.dot(weights, parts[0], sums[0], input_precision="ieee")
    if len(parts) > 1:
        return first, tl.dot(weights, parts[1], sums[1], input_precision="ieee")
    else:
        return (first,)


@triton.jit
def _add_product_to_rows(
    place,
    weights,
    parts,
    first,
    SEQ,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Adds weights times rows to float32 rows in memory, as `_add_tile` does."""
    product = tl.dot(weights, parts[0], input_precision="ieee")
    if HEAD_DIM > BLOCK_D:
        REST: tl.constexpr = _rest_block(HEAD_DIM, BLOCK_D)
        _add_tile(place, product, first, SEQ, BLOCK_D, ROWS, BLOCK_D)
        behind = place[0] + BLOCK_D, place[1], place[2]
        product = tl.dot(weights, parts[1], input_precision="ieee")
        _add_tile(behind, product, first, SEQ, HEAD_DIM - BLOCK_D, ROWS, REST)
    else:
        _add_tile(place, product, first, SEQ, HEAD_DIM, ROWS, BLOCK_D)


@triton.jit
def _scaled(parts, factor):
    """Rows times a factor, of all or of each row."""
    if len(parts) > 1:
        return parts[0] * factor, parts[1] * factor
    else:
        return (parts[0] * factor,)


@triton.jit
def _over(parts, divisor):
    """Rows divided, each by its divisor."""
    if len(parts) > 1:
        return parts[0] / divisor, parts[1] / divisor
    else:
        return (parts[0] / divisor,)


@triton.jit
def _only(kept, parts):
    """Rows, of which those that are not kept are 0."""
    if len(parts) > 1:
        return tl.where(kept, parts[0], 0.0), tl.where(kept, parts[1], 0.0)
    else:
        return (tl.where(kept, parts[0], 0.0),)
