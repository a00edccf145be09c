"""e4m3 operands inside attention's loop: what makes scores of their products, the order of values, their scales.

`quantize.py` writes what is read here.
"""

import triton
import triton.language as tl

# Weights lie in [0, 1], and e4m3 from 2^-9 to 448: 2^8 times as large, they lose less at the small end.
E4M3_SHIFT = tl.constexpr(8)
E4M3_UNSHIFT = tl.constexpr(2.0**-8)


# Keys that share a scale. Attention's tiles of keys divide it.
E4M3_BLOCK = tl.constexpr(128)


@triton.jit
def _first_block(batch, starts, start):
    """The first of a sequence's blocks of E4M3_BLOCK keys, among those of its tensors' batch.

    Packed, sequence n has the blocks from start // 128 + n on. It is the first to reach them: n sequences that end at
    `start` have fewer blocks beyond start // 128 than there are of them. So total // 128 + sequences blocks are enough,
    whatever the offsets, and no sum over sequences is needed.
    """
    if starts is None:
        return batch * 0
    else:
        return start // E4M3_BLOCK + batch


@triton.jit
def _terms_of(
    score, held, heads, kv_head, start, first_row, rows, rows_q, block, HEADS, KV_HEADS, SEQ_Q, SEQ_K
):
    """What makes scores of e4m3 products: a factor and a summand a row, each (BLOCK_M, 1), where the keys' scales are,
    and how far apart. Other calls have None instead, which a function cannot return in Triton 3.6.

    heads: of each row, or of all; start: the sequence's first row; block: of `_first_block`.
    """
    rows = first_row + rows
    corner = score.quantized.terms_ptr + ((held * HEADS + heads) * 2 * SEQ_Q + start)
    factor = tl.load(corner + rows, mask=rows < rows_q, other=0.0)
    summand = tl.load(corner + (SEQ_Q + rows), mask=rows < rows_q, other=0.0)
    block += held * tl.cdiv(SEQ_K, E4M3_BLOCK)
    scales = score.quantized.k_scales_ptr + (block * KV_HEADS + kv_head)
    return (factor * score.scale)[:, None], (summand * score.scale)[:, None], scales, KV_HEADS


@triton.jit
def _terms_of_tile(terms, first_key):
    """Factor and summand of a tile's scores, of `_terms_of`."""
    return terms[0] * tl.load(terms[2] + first_key // E4M3_BLOCK * terms[3]), terms[1]


@triton.jit
def _with_sink(row_max, row_sum, sink):
    """(maximum, sum, factor of what was summed before) with one more key, whose score is `sink` and whose value is 0.

    Behind all others: weights are rounded relative to the maximum so far, and a sink far above the keys, as the first
    of them, would leave nothing of theirs.
    """
    new_max = tl.maximum(row_max, sink)
    pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
    rescale = tl.exp2(row_max - pivot)
    return new_max, row_sum * rescale + tl.exp2(sink - pivot + E4M3_SHIFT), rescale


@triton.jit
def _in_value_order(weights):
    """Weights (BLOCK_M, BLOCK_N) with their columns in the order in which a tile of values holds its keys.

    Of 16 keys a thread holds the products of two and, 8 farther, of two more; as an 8-bit operand of the next product
    it has to hold four neighbours. So those four are made neighbours, in v's memory and here: registers stay where they
    are, and nothing passes through shared memory (FlashAttention-3, Shah et al., 2024, section 3.3).
    """
    BLOCK_M: tl.constexpr = weights.shape[0]
    BLOCK_N: tl.constexpr = weights.shape[1]
    groups = tl.reshape(weights, (BLOCK_M, BLOCK_N // 16, 2, 4, 2))
    return tl.reshape(tl.permute(groups, (0, 1, 3, 2, 4)), (BLOCK_M, BLOCK_N))


@triton.jit
def _load_value_tile(place, first_key, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """(BLOCK_N, BLOCK_V): values of the keys from first_key on, which is a multiple of BLOCK_N.

    In memory a tile is (BLOCK_V, BLOCK_N), since 8-bit products take both operands with neighbours along the keys;
    it is whole, with zeros where there is no key and no column.
    """
    columns = tl.arange(0, BLOCK_V)
    keys = tl.arange(0, BLOCK_N)
    corner = place[0] + tl.cast(first_key, tl.int64) * BLOCK_V
    return tl.trans(tl.load(corner + (columns[:, None] * BLOCK_N + keys[None, :])))


@triton.jit
def _add_values(accumulator, weights, v):
    """accumulator + weights v, the tile's product by itself first.

    Hopper's tensor cores keep some 14 bits of what they add 8-bit products to (DeepSeek-V3, 2024, section 3.3.2), which
    over thousands of keys would be the largest error of all; the sum in float32 is one multiply-add with the rescaling.
    Two accumulators of 256 columns do not fit into registers, so that there the tensor cores add up.
    """
    if v.shape[1] > 128:
        return tl.dot(weights, v, accumulator)
    else:
        return accumulator + tl.dot(weights, v)


@triton.jit
def _load_value_scales(score, batch, kv_head, KV_HEADS, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):
    """(BLOCK_V,): what multiplies each column of the output."""
    WIDEST: tl.constexpr = BLOCK_V if BLOCK_V > BLOCK_D else BLOCK_D
    corner = score.quantized.statistics_ptr + ((batch * KV_HEADS + kv_head) * 2 + 1) * WIDEST
    return tl.load(corner + tl.arange(0, BLOCK_V))
