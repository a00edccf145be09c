"""What a call of attention asks for beyond q, k and v: one tuple, from the registered operator down to the kernels."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class AttentionOptions(NamedTuple):
    """The options of the attention launchers, in the order of the registered operators' arguments.

    The score of query i and key j, in a batch b and a head h, before the softmax:

        s = scale * q_i . k_j;  s = softcap * tanh(s / softcap);  s += bias_ij;  s -= slope * |i + seq_k - seq_q - j|

    and it is -inf where `mask` is false, j >= key_lengths[b], or j lies outside
    [i + offset - left, i + offset + right], offset being seq_k - seq_q with `bottom_right` and else 0.

    Attributes:
        scale: multiplies the products.
        left, right: keys seen before and after the query's own place; -1 for all of them. Causal is right = 0.
        bottom_right: the query's own place counts from the end of the keys.
        softcap: bound of the scores; 0.0 for none.
        dropout_p: probability that a weight is dropped, after the softmax; the others are divided by 1 - dropout_p.
        bias: (batch or 1, heads or 1, seq_q or 1, seq_k or 1), floating, any strides.
        mask: bool of such a shape; true where a query sees a key.
        alibi_slopes: (batch or 1, heads), float32.
        sinks: (heads,), floating: the score of one more key whose value is 0. lse counts it.
        key_lengths: (batch,), int32: keys from there on are hidden, and never read.
        cu_seqlens_q, cu_seqlens_k: (sequences + 1,), int32: q is (1, heads, total_q, head_dim), k and v likewise, and
            sequence n has the rows cu_seqlens[n] .. cu_seqlens[n + 1]. Sequences take the place of the batch in
            bias, mask, alibi_slopes and key_lengths; seq_q and seq_k are each sequence's own.
        dropout_seed: (2,), int64, on the tensors' device; None without dropout.
        max_seqlen_q, max_seqlen_k: of the sequences, 0 without cu_seqlens.
        deterministic: the gradients' bits are those of every run, whatever the launch config.
    """

    scale: float
    left: int = -1
    right: int = -1
    bottom_right: bool = False
    softcap: float = 0.0
    dropout_p: float = 0.0
    bias: Tensor | None = None
    mask: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    key_lengths: Tensor | None = None
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    dropout_seed: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0
    deterministic: bool = False

    def sequences(self, batch: int) -> int:
        """How many sequences there are: the batch, or those that are packed."""
        return batch if self.cu_seqlens_q is None else self.cu_seqlens_q.numel() - 1

    def longest_q(self, seq_q: int) -> int:
        return seq_q if self.cu_seqlens_q is None else self.max_seqlen_q

    def longest_k(self, seq_k: int) -> int:
        return seq_k if self.cu_seqlens_k is None else self.max_seqlen_k
