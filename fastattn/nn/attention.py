"""Attention modules in the place of torch.nn's."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastattn.dispatch import NotSupported
from fastattn.ops.attention import attention
from fastattn.ops.attention_varlen import attention_varlen


class MultiheadAttention(torch.nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` by `fastattn.attention`, for self- and cross-attention.

    Differs from torch.nn's in what it is made for: attention weights are never returned (fused kernels do not
    hold them), so `need_weights` is False by default, and `is_causal` works without a mask beside it.

    Args:
        embed_dim, num_heads, dropout, bias, kdim, vdim, batch_first, device, dtype: as torch.nn's.
        add_bias_kv, add_zero_attn: accepted only as False.
        implementation: "triton", "torch" or "reference" forces one; None takes the first that can.

    Raises:
        ValueError: embed_dim is not divisible by num_heads.
        NotSupported: `add_bias_kv` or `add_zero_attn` is true.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        implementation: str | None = None,
    ) -> None:
        for name, asked in (("add_bias_kv", add_bias_kv), ("add_zero_attn", add_zero_attn)):
            if asked:
                raise NotSupported(f"{name}=True is not supported: it appends a key outside the sequence")
        if num_heads > 0 and embed_dim % num_heads:
            raise ValueError(f"embed_dim={embed_dim} must be divisible by num_heads={num_heads}")
        super().__init__(
            embed_dim, num_heads, dropout, bias, False, False, kdim, vdim, batch_first, device, dtype
        )
        self.implementation = implementation

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> tuple[Tensor, None]:
        """Attends from query to key and value.

        Args:
            query: (seq_q, batch, embed_dim), or (batch, seq_q, embed_dim) with batch_first, or unbatched
                (seq_q, embed_dim).
            key, value: (seq_k, batch, kdim) and (seq_k, batch, vdim), laid out like query. Give the same
                object for all three, or for key and value, and they are projected in one product.
            key_padding_mask: (batch, seq_k), or (seq_k,) unbatched: True hides a key; floats are added.
            need_weights: must be False.
            attn_mask: (seq_q, seq_k) or (batch * num_heads, seq_q, seq_k): True hides, floats are added.
            average_attn_weights: has no effect, as there are no weights.
            is_causal: query i sees keys j <= i. As in torch.nn, an attn_mask beside it is taken to be the
                causal mask and is not read.
            cu_seqlens: (sequences + 1,), int32 or int64: query, key and value are sequences packed one behind the
                other, (total, width), and each sees itself alone, as in `fastattn.attention_varlen`. No mask then.
            max_seqlen: the longest of these, or more; without it the offsets are read.

        Returns:
            (output of query's shape, None).

        Raises:
            NotSupported: need_weights is True, or the implementation asked for cannot take the call.
            ValueError: a shape does not fit.
        """
        if need_weights:
            raise NotSupported(
                "need_weights=True is not supported: fused attention never holds the (seq_q, seq_k) weights"
            )
        self._check_inputs(query, key, value)
        options: dict[str, Any] = {
            "causal": "top_left" if is_causal else False,
            "dropout_p": self.dropout if self.training else 0.0,
            "implementation": self.implementation,
        }
        if cu_seqlens is not None:
            self._check_packed(query, key, key_padding_mask, attn_mask)
            q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in self._project(query, key, value))
            lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
            return self.out_proj(attention_varlen(q, k, v, *lengths, **options).flatten(-2)), None
        q, k, v = map(self._split_heads, self._project(query, key, value))
        if key_padding_mask is not None and query.dim() == 2:
            _check_mask("key_padding_mask", key_padding_mask, (key.size(0),))
            key_padding_mask = key_padding_mask.unsqueeze(0)
        mask, bias = self._mask_and_bias(q, k, key_padding_mask, None if is_causal else attn_mask)
        out = attention(q, k, v, bias=bias, mask=mask, **options)
        return self.out_proj(self._merge_heads(out, query.dim())), None

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, num_heads={self.num_heads}, dropout={self.dropout}"

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
            raise ValueError(
                f"query, key and value have {query.dim()}, {key.dim()} and {value.dim()} dimensions; "
                "all need 3, or 2 unbatched"
            )
        widths = (
            ("query", query, "embed_dim", self.embed_dim),
            ("key", key, "kdim", self.kdim),
            ("value", value, "vdim", self.vdim),
        )
        for name, tensor, bound, width in widths:
            if tensor.size(-1) != width:
                raise ValueError(f"{name} has width {tensor.size(-1)}; {bound}={width} is needed")
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"key has shape {tuple(key.shape)} and value {tuple(value.shape)}; only widths may differ"
            )
        batch = 0 if self.batch_first else 1
        if query.dim() == 3 and query.size(batch) != key.size(batch):
            raise ValueError(f"query has batch={query.size(batch)}, but key has batch={key.size(batch)}")

    def _check_packed(
        self, query: Tensor, key: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> None:
        if query.dim() != 2 or query.size(0) != key.size(0):
            raise ValueError(
                f"query and key have shapes {tuple(query.shape)} and {tuple(key.shape)}; with cu_seqlens both "
                "are (total, width)"
            )
        for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            if mask is not None:
                raise ValueError(f"{name} goes with no cu_seqlens, which say what each sequence sees")

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The inputs through their projections, in as few products as they allow; widths embed_dim."""
        weights: tuple[Tensor, ...]
        if not self._qkv_same_embed_dim:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        elif query is key and key is value:
            q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
            return q, k, v
        elif key is value:
            parts = [self.embed_dim, 2 * self.embed_dim]
            q_weight, kv_weight = self.in_proj_weight.split(parts)
            q_bias, kv_bias = (None, None) if self.in_proj_bias is None else self.in_proj_bias.split(parts)
            k, v = F.linear(key, kv_weight, kv_bias).chunk(2, dim=-1)
            return F.linear(query, q_weight, q_bias), k, v
        else:
            weights = self.in_proj_weight.chunk(3)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (F.linear(*operands) for operands in zip((query, key, value), weights, biases, strict=True))
        return q, k, v

    def _split_heads(self, x: Tensor) -> Tensor:
        """A view (batch, heads, seq, head_dim) of a projection in the layout of the inputs."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        if x.dim() == 3:
            return x.transpose(0, 1).unsqueeze(0)
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _merge_heads(self, x: Tensor, rank: int) -> Tensor:
        """The inverse of `_split_heads`; a view too where the output has the query's strides."""
        if rank == 2:
            x = x.squeeze(0).transpose(0, 1)
        else:
            x = x.transpose(1, 2) if self.batch_first else x.permute(2, 0, 1, 3)
        return x.flatten(-2)

    def _mask_and_bias(
        self, q: Tensor, k: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The two masks as `attention` reads them: true where a query sees a key, and what is added to the scores.

        The padding mask stays (batch, 1, 1, seq_k), unless the other is of its kind.
        """
        batch, seq_q, seq_k = q.size(0), q.size(2), k.size(2)
        given = []
        if key_padding_mask is not None:
            _check_mask("key_padding_mask", key_padding_mask, (batch, seq_k))
            given.append(key_padding_mask[:, None, None, :])
        if attn_mask is not None:
            heads = () if attn_mask.dim() == 2 else (batch * self.num_heads,)
            _check_mask("attn_mask", attn_mask, (*heads, seq_q, seq_k))
            given.append(attn_mask.unflatten(0, (batch, self.num_heads)) if heads else attn_mask)
        masks = [~tensor for tensor in given if tensor.dtype == torch.bool]  # in torch.nn, True hides
        biases = [tensor for tensor in given if tensor.dtype != torch.bool]
        mask = reduce(torch.logical_and, masks) if masks else None
        return mask, reduce(torch.add, biases) if biases else None


def _check_mask(name: str, mask: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(mask.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(mask.shape)}; {shape} is needed")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{name} has dtype={mask.dtype}; bool or a floating-point dtype is needed")
