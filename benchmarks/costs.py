"""How much arithmetic and traffic an operation needs: the formulas behind every TFLOP/s and GB/s.

FLOPs count an addition, a product, a division, a root, an exponential, erf or tanh as one each. Bytes are the
least that must move between device memory and the chip: every input read once, every output written once.
tests/benchmarks/test_costs.py counts both by other means.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.cases import (
    AddLayerNormCase,
    AddRMSNormCase,
    AttentionCase,
    BiasGeluCase,
    BlockCase,
    GegluCase,
    GeluCase,
    GptCase,
    LayerNormCase,
    LinearLossCase,
    LossCase,
    MlpCase,
    OpCase,
    RMSNormCase,
    RotaryCase,
    SwigluCase,
)
from benchmarks.cases.attention_options import learned_parameters

_FLOAT32, _INT64 = 4, 8


@dataclass(frozen=True)
class Cost:
    """FLOPs and bytes of one call."""

    flops: int
    bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def tflops(self, milliseconds: float) -> float:
        """TFLOP/s at this time a call."""
        return self.flops / milliseconds / 1e9

    def gbytes(self, milliseconds: float) -> float:
        """GB/s (10^9 bytes) at this time a call."""
        return self.bytes / milliseconds / 1e6


def attention_pairs(seq_q: int, seq_k: int, causal: bool | str, left: int | None = None) -> int:
    """How many (query, key) pairs are not masked, in one head; `left` is a causal window's."""
    if not causal:
        return seq_q * seq_k
    offset = seq_k - seq_q if causal == "bottom_right" else 0
    pairs = _pairs_up_to(seq_q, seq_k, offset)
    return pairs if left is None else pairs - _pairs_up_to(seq_q, seq_k, offset - left - 1)


def _pairs_up_to(seq_q: int, seq_k: int, offset: int) -> int:
    """How many of the keys are at most i + offset, added up over the queries i."""
    first = min(max(0, -offset), seq_q)  # the first query with a key
    full = min(max(seq_k - offset - 1, first), seq_q)  # the first one with all keys
    rising = full - first
    return rising * (first + full - 1) // 2 + rising * (offset + 1) + (seq_q - full) * seq_k


def _case_pairs(case: AttentionCase) -> int:
    """Unmasked pairs in all heads. Padding by a mask or by lengths is not taken off."""
    batch, heads, _, seq_q, seq_k, _ = case.shape
    window = case.keywords("meta").get("window")
    if window is None:
        return batch * heads * attention_pairs(seq_q, seq_k, case.causal)
    # It ends at a query's own key, as a causal mask at the bottom right does.
    return batch * heads * attention_pairs(seq_q, seq_k, case.causal or "bottom_right", window[0])


def _learned_bytes(case: AttentionCase) -> int:
    """What options learn: a bias is read once, as everything is."""
    learned = learned_parameters(case.asked, case.shape, case.dtype, "meta").values()
    return sum(t.nbytes for t in learned)


def attention_forward(case: AttentionCase, save_lse: bool = False) -> Cost:
    """Two matrix products over the unmasked pairs; as is customary, the softmax is not counted."""
    batch, heads, kv_heads, seq_q, seq_k, head_dim = case.shape
    queries, keys = batch * heads * seq_q * head_dim, batch * kv_heads * seq_k * head_dim
    traffic = (2 * queries + 2 * keys) * case.dtype.itemsize  # q, out, k, v
    lse = batch * heads * seq_q * _FLOAT32 if save_lse or "lse" in case.asked else 0
    return Cost(4 * _case_pairs(case) * head_dim, traffic + lse + _learned_bytes(case))


def attention_backward(case: AttentionCase) -> Cost:
    """Five matrix products: the scores again, dV, dP, dQ and dK. 2.5 times the forward's arithmetic."""
    batch, heads, kv_heads, seq_q, seq_k, head_dim = case.shape
    queries, keys = batch * heads * seq_q * head_dim, batch * kv_heads * seq_k * head_dim
    # Reads q, out, dout, k, v and lse (and its gradient); writes dq, dk, dv. What is learned is read and written.
    lse = batch * heads * seq_q * _FLOAT32 * (2 if "lse" in case.asked else 1)
    traffic = (4 * queries + 4 * keys) * case.dtype.itemsize + lse + 2 * _learned_bytes(case)
    return Cost(10 * _case_pairs(case) * head_dim, traffic)


def layer_norm_forward(case: LayerNormCase, save_statistics: bool = False) -> Cost:
    """Mean N + 1, centring N, variance 2N + 1, rstd 2, scaling N, weight N, bias N operations a row."""
    per_row = (5 + 2 * case.affine) * case.width + 4
    traffic = 2 * case.rows * case.width + 2 * case.width * case.affine
    statistics = 2 * case.rows * _FLOAT32 if save_statistics else 0
    return Cost(case.rows * per_row, traffic * case.dtype.itemsize + statistics)


def layer_norm_backward(case: LayerNormCase) -> Cost:
    """x-hat 2N, its two means 3N + 2, dx 4N operations a row; with weight and bias, dy * w N, dw 2N, db N."""
    per_row = (9 + 4 * case.affine) * case.width + 2
    # Reads x, dy, weight and both statistics; writes dx, dw, db.
    traffic = 3 * case.rows * case.width + 3 * case.width * case.affine
    return Cost(case.rows * per_row, traffic * case.dtype.itemsize + 2 * case.rows * _FLOAT32)


def rms_norm_forward(case: RMSNormCase, save_statistics: bool = False) -> Cost:
    """Mean of squares 2N + 1, eps and root 2, scaling N, weight N operations a row."""
    per_row = (3 + case.affine) * case.width + 3
    traffic = 2 * case.rows * case.width + case.width * case.affine
    statistics = case.rows * _FLOAT32 if save_statistics else 0
    return Cost(case.rows * per_row, traffic * case.dtype.itemsize + statistics)


def rms_norm_backward(case: RMSNormCase) -> Cost:
    """x-hat N, its mean 2N + 1, dx 3N operations a row; with weight, dy * w N, dw 2N."""
    per_row = (6 + 3 * case.affine) * case.width + 1
    # Reads x, dy, weight and rstd; writes dx and dw.
    traffic = 3 * case.rows * case.width + 2 * case.width * case.affine
    return Cost(case.rows * per_row, traffic * case.dtype.itemsize + case.rows * _FLOAT32)


def add_layer_norm_forward(case: AddLayerNormCase, save_statistics: bool = False) -> Cost:
    """The sum N more than LayerNorm; reads x and residual, writes y and h."""
    norm = layer_norm_forward(LayerNormCase(case.rows, case.width, dtype=case.dtype), save_statistics)
    return norm + _sum_forward(case)


def add_layer_norm_backward(case: AddLayerNormCase) -> Cost:
    """The sum N more than LayerNorm. Reads h and both gradients; writes dx, and of another dtype dresidual."""
    norm = layer_norm_backward(LayerNormCase(case.rows, case.width, dtype=case.dtype))
    return norm + _sum_backward(case)


def add_rms_norm_forward(case: AddRMSNormCase, save_statistics: bool = False) -> Cost:
    """The sum N more than RMSNorm; reads x and residual, writes y and h."""
    norm = rms_norm_forward(RMSNormCase(case.rows, case.width, dtype=case.dtype), save_statistics)
    return norm + _sum_forward(case)


def add_rms_norm_backward(case: AddRMSNormCase) -> Cost:
    """The sum N more than RMSNorm, as above."""
    return rms_norm_backward(RMSNormCase(case.rows, case.width, dtype=case.dtype)) + _sum_backward(case)


def _sum_forward(case: AddLayerNormCase) -> Cost:
    elements, residual = case.rows * case.width, case.residual_dtype or case.dtype
    return Cost(elements, 2 * elements * residual.itemsize)


def _sum_backward(case: AddLayerNormCase) -> Cost:
    elements, residual = case.rows * case.width, case.residual_dtype or case.dtype
    # The norm's three tensors are dy, dx and one in x's dtype, in whose place are h and its gradient.
    traffic = (2 * residual.itemsize - case.dtype.itemsize) * elements
    return Cost(elements, traffic + (elements * residual.itemsize if residual != case.dtype else 0))


def gelu_forward(case: GeluCase) -> Cost:
    """erf: 5 operations an element; tanh: 9."""
    elements = case.rows * case.width
    return Cost((5 if case.approximate == "none" else 9) * elements, 2 * elements * case.dtype.itemsize)


def gelu_backward(case: GeluCase) -> Cost:
    """erf: 11 operations an element, from x and dy; tanh: 18."""
    elements = case.rows * case.width
    return Cost((11 if case.approximate == "none" else 18) * elements, 3 * elements * case.dtype.itemsize)


def bias_gelu_forward(case: BiasGeluCase) -> Cost:
    """GELU's operations and an addition an element; x, the bias and y."""
    return gelu_forward(case) + Cost(case.rows * case.width, case.width * case.dtype.itemsize)


def bias_gelu_backward(case: BiasGeluCase) -> Cost:
    """GELU's operations, the addition again and one for the sum an element. Reads x, dy, the bias; writes dx, dbias."""
    return gelu_backward(case) + Cost(2 * case.rows * case.width, 2 * case.width * case.dtype.itemsize)


def geglu_forward(case: GegluCase) -> Cost:
    """GELU's operations and a product an element; value, gate and y."""
    elements = case.rows * case.width
    return gelu_forward(case) + Cost(elements, elements * case.dtype.itemsize)


def geglu_backward(case: GegluCase) -> Cost:
    """GELU's forward and backward and two products an element. Reads dy, value and gate; writes both gradients."""
    elements = case.rows * case.width
    flops = gelu_forward(case).flops + gelu_backward(case).flops + 2 * elements
    return Cost(flops, 5 * elements * case.dtype.itemsize)


def swiglu_forward(case: SwigluCase) -> Cost:
    """The sigmoid 3 operations, two products an element; value, gate and y."""
    elements = case.rows * case.width
    return Cost(5 * elements, 3 * elements * case.dtype.itemsize)


def swiglu_backward(case: SwigluCase) -> Cost:
    """The sigmoid 3, silu 1 and its slope 3, three products an element. Reads dy and x; writes both gradients."""
    elements = case.rows * case.width
    return Cost(10 * elements, 5 * elements * case.dtype.itemsize)


def mlp_forward(case: MlpCase) -> Cost:
    """Two matrix products; bytes of x, the parameters and y, as if the hidden values stayed on the chip."""
    products = 2 * case.rows * case.width * case.hidden
    parameters = 2 * case.width * case.hidden + case.hidden + case.width
    return Cost(2 * products, (2 * case.rows * case.width + parameters) * case.dtype.itemsize)


def mlp_backward(case: MlpCase) -> Cost:
    """Four matrix products. Reads x, dy and the parameters; writes the gradient of each of x and the parameters."""
    forward = mlp_forward(case)
    return Cost(2 * forward.flops, 2 * forward.bytes - case.rows * case.width * case.dtype.itemsize)


def loss_forward(case: LossCase) -> Cost:
    """The largest logit, a difference, an exponential and a sum: 4 operations a logit; ignored rows are not read."""
    logits = _kept_rows(case) * case.vocabulary
    return Cost(4 * logits, (logits + 1) * case.dtype.itemsize + case.rows * _INT64)


def loss_backward(case: LossCase) -> Cost:
    """A difference, an exponential and a product a logit. Reads as the forward, and writes every logit's gradient."""
    logits = _kept_rows(case) * case.vocabulary
    traffic = loss_forward(case).bytes + case.rows * case.vocabulary * case.dtype.itemsize
    return Cost(3 * logits, traffic)


def linear_loss_forward(case: LinearLossCase) -> Cost:
    """One matrix product of the rows that count; bytes of these, W, the targets and the loss: no logits."""
    rows = _kept_rows(case)
    values = rows * case.width + case.vocabulary * case.width + 1
    flops = 2 * rows * case.width * case.vocabulary
    return Cost(flops, values * case.dtype.itemsize + case.rows * _INT64)


def linear_loss_backward(case: LinearLossCase) -> Cost:
    """Two matrix products, from logits made in the forward. Reads as the forward; writes the gradients of x and W."""
    forward = linear_loss_forward(case)
    written = (case.rows + case.vocabulary) * case.width * case.dtype.itemsize
    return Cost(2 * forward.flops, forward.bytes + written)


def _kept_rows(case: LossCase | LinearLossCase) -> int:
    """Rows whose target counts: every tenth, from the first on, is ignored."""
    return case.rows - -(-case.rows // 10)


def block_forward(case: BlockCase) -> Cost:
    """Matrix products: 12 width^2 weights a token and two products a head; bytes of x, the parameters and y."""
    tokens, weights = case.batch * case.seq_len, 12 * case.width**2
    pairs = case.batch * attention_pairs(case.seq_len, case.seq_len, "top_left")
    flops = 2 * tokens * weights + 4 * pairs * case.width
    parameters = weights + 13 * case.width  # 9 of biases, and two LayerNorms with a weight and a bias each
    return Cost(flops, (2 * tokens * case.width + parameters) * case.dtype.itemsize)


def block_backward(case: BlockCase) -> Cost:
    """Twice the forward's products of weights, 2.5 times those of attention.

    Reads x, dy and the parameters; writes the gradient of each of x and the parameters.
    """
    forward = block_forward(case)
    attention = 4 * case.batch * attention_pairs(case.seq_len, case.seq_len, "top_left") * case.width
    token_bytes = case.batch * case.seq_len * case.width * case.dtype.itemsize
    return Cost(2 * forward.flops + attention // 2, 2 * forward.bytes - token_bytes)


def rotary_forward(case: RotaryCase) -> Cost:
    """Four products, a difference and a sum a pair. Reads x, cos and sin, writes y."""
    elements = case.batch * case.heads * case.seq * case.head_dim
    tables = case.seq * case.head_dim * _FLOAT32
    return Cost(3 * elements, 2 * elements * case.dtype.itemsize + tables)


def rotary_backward(case: RotaryCase) -> Cost:
    """The rotation of the gradient by the negative angles: the forward's cost."""
    return rotary_forward(case)


# Their statistics are saved for a backward.
_NORMS = {
    "layer_norm": (layer_norm_forward, layer_norm_backward),
    "rms_norm": (rms_norm_forward, rms_norm_backward),
    "add_layer_norm": (add_layer_norm_forward, add_layer_norm_backward),
    "add_rms_norm": (add_rms_norm_forward, add_rms_norm_backward),
}
_FORWARD_AND_BACKWARD = {
    "gelu": (gelu_forward, gelu_backward),
    "bias_gelu": (bias_gelu_forward, bias_gelu_backward),
    "geglu": (geglu_forward, geglu_backward),
    "swiglu": (swiglu_forward, swiglu_backward),
    "mlp": (mlp_forward, mlp_backward),
    "loss": (loss_forward, loss_backward),
    "linear_loss": (linear_loss_forward, linear_loss_backward),
    "block": (block_forward, block_backward),
    "rotary": (rotary_forward, rotary_backward),
}


def operation_cost(case: OpCase, direction: str) -> Cost:
    """Cost of a case, "forward" (nothing saved) or "forward+backward"."""
    backward = direction == "forward+backward"
    if isinstance(case, AttentionCase):
        cost = attention_forward(case, save_lse=backward)
        return cost + attention_backward(case) if backward else cost
    if case.operation in _NORMS:
        norm_forward, norm_backward = _NORMS[case.operation]
        cost = norm_forward(case, backward)  # type: ignore[operator]
        return cost + norm_backward(case) if backward else cost  # type: ignore[operator]
    forward_cost, backward_cost = _FORWARD_AND_BACKWARD[case.operation]
    cost = forward_cost(case)  # type: ignore[operator]
    return cost + backward_cost(case) if backward else cost  # type: ignore[operator]


def gpt_forward_flops(case: GptCase, causal: bool | str = "top_left") -> int:
    """Matrix products of one forward: 12 width^2 weights a block, the tied head, two products a head."""
    tokens = case.batch * case.seq_len
    weights = case.layers * 12 * case.width**2 + case.width * case.vocabulary
    pairs = case.batch * attention_pairs(case.seq_len, case.seq_len, causal)
    return 2 * tokens * weights + case.layers * 4 * pairs * case.width


def gpt_step_flops(case: GptCase, causal: bool | str = "top_left") -> int:
    """Forward and backward of one training step: the model's arithmetic, so recomputation is not counted."""
    return 3 * gpt_forward_flops(case, causal)
