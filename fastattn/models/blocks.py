"""What the models share: the Transformer block, the embedding of tokens, initial weights, the loss.

Shapes: batch is sequences, seq is tokens (or patches), and the residual stream is (batch, seq, d_model).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.models.config import BlockConfig, operation_implementation
from fastattn.nn import GELU, LayerNorm, MultiheadAttention

# The projections that write into the residual stream, by the end of their parameters' names.
_RESIDUAL_WEIGHTS = ("attention.out_proj.weight", "mlp.contract.weight")


class Block(nn.Module):
    """Self-attention, cross-attention where asked for, then the MLP: each a branch added to the stream.

    Args:
        config: sizes, dropout and implementation.
        causal: a position sees itself and those before it, not those after.
        cross_attention: between the two, attend to a `memory`, the output of an encoder.
        norm_first: normalise what a branch reads (pre-norm, GPT-2 and ViT) rather than the sum it makes
            (post-norm, Vaswani et al. and BERT).
    """

    def __init__(
        self,
        config: BlockConfig,
        *,
        causal: bool = False,
        cross_attention: bool = False,
        norm_first: bool = True,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.norm_first = norm_first
        self.attention_norm = make_layer_norm(config)
        self.attention = make_attention(config)
        self.reads_memory = cross_attention
        if cross_attention:
            self.cross_attention_norm = make_layer_norm(config)
            self.cross_attention = make_attention(config)
        self.mlp_norm = make_layer_norm(config)
        self.mlp = MLP(config)
        self.dropout = make_dropout(config)

    def forward(
        self,
        x: Tensor,
        padding: Tensor | None = None,
        memory: Tensor | None = None,
        memory_padding: Tensor | None = None,
    ) -> Tensor:
        """One layer.

        Args:
            x: (batch, seq, d_model).
            padding: (batch, seq) bool, True at positions that nobody may attend to.
            memory: (batch, seq_memory, d_model), for cross-attention.
            memory_padding: (batch, seq_memory) bool, True hides.

        Returns:
            (batch, seq, d_model).

        Raises:
            ValueError: a memory is missing, or given to a block without cross-attention.
        """
        if self.reads_memory != (memory is not None):
            raise ValueError("memory goes with cross_attention=True: both or neither")

        def attend_to_itself(y: Tensor) -> Tensor:
            return self.attention(y, y, y, key_padding_mask=padding, is_causal=self.causal)[0]

        def attend_to_memory(y: Tensor) -> Tensor:
            return self.cross_attention(y, memory, memory, key_padding_mask=memory_padding)[0]

        x = self._add(x, self.attention_norm, attend_to_itself)
        if self.reads_memory:
            x = self._add(x, self.cross_attention_norm, attend_to_memory)
        return self._add(x, self.mlp_norm, self.mlp)

    def _add(self, x: Tensor, norm: nn.Module, branch: Callable[[Tensor], Tensor]) -> Tensor:
        if self.norm_first:
            return x + self.dropout(branch(norm(x)))
        return norm(x + self.dropout(branch(x)))


class MLP(nn.Module):
    """Two linear layers with a GELU between them, on each position alone."""

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.expand = nn.Linear(config.d_model, config.d_mlp)
        self.gelu = make_gelu(config)
        self.contract = nn.Linear(config.d_mlp, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.contract(self.gelu(self.expand(x)))


def make_attention(config: BlockConfig) -> MultiheadAttention:
    """The attention of a config: its heads, dropout and implementation."""
    return MultiheadAttention(
        config.d_model,
        config.n_heads,
        dropout=config.dropout,
        batch_first=True,
        implementation=operation_implementation(config.implementation),
    )


def make_layer_norm(config: BlockConfig) -> LayerNorm:
    """A LayerNorm over the residual stream."""
    return LayerNorm(
        config.d_model,
        eps=config.layer_norm_eps,
        implementation=operation_implementation(config.implementation),
    )


def make_gelu(config: BlockConfig) -> GELU:
    """The config's form of GELU."""
    return GELU(config.approximate, implementation=operation_implementation(config.implementation))


def make_dropout(config: BlockConfig) -> nn.Module:
    """Dropout, or nothing at all where its probability is 0."""
    return nn.Dropout(config.dropout) if config.dropout > 0 else nn.Identity()


@torch.no_grad()
def init_normal_(model: nn.Module, std: float, residual_std: float | None = None) -> None:
    """Weights and embeddings from a normal distribution, biases 0; LayerNorm weights stay 1.

    Args:
        std: standard deviation.
        residual_std: another one for the projections that write into the residual stream.
    """
    for name, parameter in model.named_parameters():
        if residual_std is not None and name.endswith(_RESIDUAL_WEIGHTS):
            parameter.normal_(0.0, residual_std)
        elif parameter.dim() >= 2:
            parameter.normal_(0.0, std)
        elif name.endswith("bias"):
            parameter.zero_()


def check_tokens(name: str, tokens: Tensor, max_length: int | None = None) -> None:
    """Raises where `tokens` is not (batch, seq) integers with seq at most max_length, None for any."""
    if tokens.dim() != 2:
        raise ValueError(f"{name} has {tokens.dim()} dimensions; 2 are needed, (batch, seq)")
    _check_integers(name, tokens)
    if max_length is not None and tokens.size(1) > max_length:
        raise ValueError(f"{name} has {tokens.size(1)} positions; max_length={max_length} is the most")


def check_padding(name: str, padding: Tensor | None, tokens: Tensor) -> None:
    """Raises where a padding mask is not bool of the shape of its tokens."""
    if padding is None:
        return
    if padding.dtype != torch.bool:
        raise TypeError(f"{name} has dtype={padding.dtype}; bool is needed, True at padding")
    if padding.shape != tokens.shape:
        raise ValueError(f"{name} has shape {tuple(padding.shape)}; the tokens have {tuple(tokens.shape)}")


def embed_tokens(name: str, tokens: Tensor, embedding: nn.Embedding) -> Tensor:
    """The embedding of each token, (batch, seq, d_model).

    An id outside the vocabulary is named on a CPU; on a GPU, looking for one would stop the queue.
    """
    try:
        return embedding(tokens)
    except IndexError:
        raise _outside(name, tokens, embedding.num_embeddings) from None


def token_loss(logits: Tensor, targets: Tensor, name: str = "targets") -> Tensor:
    """Mean cross-entropy in nats, float32; a target of -100 is left out, and NaN is the mean of none.

    Args:
        logits: (batch, seq, classes) or (batch, classes).
        targets: (batch, seq) or (batch,) int64 or int32.
        name: what the messages call the targets.

    Raises:
        ValueError: the shapes differ or are empty, or (on a CPU) a target is out of range.
        TypeError: the targets are not int64 or int32.
    """
    if targets.shape != logits.shape[:-1]:
        raise ValueError(f"{name} have shape {tuple(targets.shape)}; {tuple(logits.shape[:-1])} is needed")
    if targets.numel() == 0:
        raise ValueError(f"{name} have shape {tuple(targets.shape)}; a mean loss needs at least 1 target")
    _check_integers(name, targets)
    try:
        # In float32 whatever the logits are: CUDA's autocast does so by itself, a CPU's does not.
        return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten().long())
    except IndexError:
        raise _outside(name, targets[targets != -100], logits.size(-1)) from None


def _check_integers(name: str, ids: Tensor) -> None:
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} has dtype={ids.dtype}; int64 or int32 is needed")


def _outside(name: str, ids: Tensor, bound: int) -> ValueError:
    """The error that names an id outside [0, bound)."""
    low, high = (int(end) for end in ids.aminmax())
    return ValueError(f"{name} hold the id {low if low < 0 else high}; it must be in [0, {bound})")
