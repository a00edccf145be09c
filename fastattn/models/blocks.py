"""What the models share: the Transformer block, the embedding of tokens, initial weights, the loss.

Shapes: batch is sequences, seq is tokens (or patches), and the residual stream is (batch, seq, d_model).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.dispatch import refuse_transforms
from fastattn.models.config import BlockConfig, operation_implementation
from fastattn.nn import GELU, MLP, LayerNorm, MultiheadAttention
from fastattn.nn._fusion import add_and_normalize, is_plain, read_stream
from fastattn.ops.linear_cross_entropy import linear_cross_entropy

# The projections that write into the residual stream, by the end of their parameters' names.
_RESIDUAL_WEIGHTS = ("attention.out_proj.weight", "mlp.contract.weight")


class Block(nn.Module):
    """Self-attention, cross-attention where asked for, then the MLP: each a branch added to the stream.

    `PreNormBlock` and `PostNormBlock` say where the norms stand.

    Args:
        config: sizes, dropout and implementation.
        causal: a position sees itself and those before it, not those after.
        cross_attention: between the two, attend to a `memory`, the output of an encoder.
    """

    def __init__(self, config: BlockConfig, *, causal: bool = False, cross_attention: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.attention_norm = make_layer_norm(config)
        self.attention = make_attention(config)
        self.reads_memory = cross_attention
        if cross_attention:
            self.cross_attention_norm = make_layer_norm(config)
            self.cross_attention = make_attention(config)
        self.mlp_norm = make_layer_norm(config)
        self.mlp = make_mlp(config)
        self.dropout = make_dropout(config)

    def branches(
        self, padding: Tensor | None, memory: Tensor | None, memory_padding: Tensor | None
    ) -> Iterator[tuple[nn.Module, Callable[[Tensor], Tensor]]]:
        """Each branch in its order, as a function of what it reads, and its norm; arguments as a block's."""
        if self.reads_memory != (memory is not None):
            raise ValueError("memory goes with cross_attention=True: both or neither")

        def attend_to_itself(y: Tensor) -> Tensor:
            return self.attention(y, y, y, key_padding_mask=padding, is_causal=self.causal)[0]

        def attend_to_memory(y: Tensor) -> Tensor:
            return self.cross_attention(y, memory, memory, key_padding_mask=memory_padding)[0]

        yield self.attention_norm, attend_to_itself
        if self.reads_memory:
            yield self.cross_attention_norm, attend_to_memory
        yield self.mlp_norm, self.mlp


class PreNormBlock(Block):
    """A block whose branches read a normalised stream (GPT-2, ViT).

    Its last branch is left for the next norm that reads the stream, the next block's or the final one, which adds
    it in the same pass over memory.
    """

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None = None,
        *,
        padding: Tensor | None = None,
        memory: Tensor | None = None,
        memory_padding: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One layer.

        Args:
            x: the stream, (batch, seq, d_model).
            branch: of the same shape, has yet to be added to it; None for nothing.
            padding: (batch, seq) bool, True at positions that nobody may attend to.
            memory: (batch, seq_memory, d_model), for cross-attention.
            memory_padding: (batch, seq_memory) bool, True hides.

        Returns:
            (x, branch) for the next block, or for `read_stream` behind the last one.

        Raises:
            ValueError: a memory is missing, or given to a block without cross-attention.
        """
        for norm, function in self.branches(padding, memory, memory_padding):
            y, x = read_stream(x, branch, self.dropout, norm)
            branch = function(y)
        assert branch is not None
        return x, branch


class PostNormBlock(Block):
    """A block that normalises the sum of stream and branch (Vaswani et al., BERT)."""

    def forward(
        self,
        x: Tensor,
        *,
        padding: Tensor | None = None,
        memory: Tensor | None = None,
        memory_padding: Tensor | None = None,
    ) -> Tensor:
        """One layer; arguments as `PreNormBlock`'s.

        Returns:
            (batch, seq, d_model).

        Raises:
            ValueError: a memory is missing, or given to a block without cross-attention.
        """
        for norm, function in self.branches(padding, memory, memory_padding):
            x, _ = add_and_normalize(function(x), x, self.dropout, norm)
        return x


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


def make_mlp(config: BlockConfig) -> MLP:
    """Two linear layers, `expand` and `contract`, with the config's GELU between them."""
    return MLP(
        config.d_model,
        config.d_mlp,
        activation="gelu_tanh" if config.approximate == "tanh" else "gelu",
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


def head_loss(
    hidden: Tensor, head: nn.Linear, targets: Tensor, implementation: str, name: str = "targets"
) -> Tensor:
    """The `token_loss` of `head(hidden)`, whose logits fastattn never holds whole.

    Args:
        hidden: (batch, seq, d_model).
        head: the layer from d_model to the classes.
        targets, name: as `token_loss`'s.
        implementation: the model's. "naive" and "torch" hold the logits, and so does "fastattn" of fewer than two
            classes a feature (on a CPU, 1,024 tokens of 256 classes and width 192 in chunks made a step 4 % longer),
            where the head has to be called, since it was replaced or has hooks, and within torch.func transforms.
    """
    few = head.out_features < 2 * head.in_features
    if (
        implementation != "fastattn"
        or few
        or not is_plain(head, nn.Linear)
        or refuse_transforms() is not None
    ):
        return token_loss(head(hidden), targets, name)
    _check_targets(name, targets, hidden)
    try:
        return linear_cross_entropy(
            hidden, head.weight, targets, linear_bias=head.bias, out_dtype=torch.float32
        )
    except IndexError:
        raise _outside(name, targets[targets != -100], head.out_features) from None


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
    _check_targets(name, targets, logits)
    try:
        # In float32 whatever the logits are: CUDA's autocast does so by itself, a CPU's does not.
        return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten().long())
    except IndexError:
        raise _outside(name, targets[targets != -100], logits.size(-1)) from None


def _check_targets(name: str, targets: Tensor, rows: Tensor) -> None:
    if targets.shape != rows.shape[:-1]:
        raise ValueError(f"{name} have shape {tuple(targets.shape)}; {tuple(rows.shape[:-1])} is needed")
    if targets.numel() == 0:
        raise ValueError(f"{name} have shape {tuple(targets.shape)}; a mean loss needs at least 1 target")
    _check_integers(name, targets)


def _check_integers(name: str, ids: Tensor) -> None:
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} has dtype={ids.dtype}; int64 or int32 is needed")


def _outside(name: str, ids: Tensor, bound: int) -> ValueError:
    """The error that names an id outside [0, bound)."""
    low, high = (int(end) for end in ids.aminmax())
    return ValueError(f"{name} hold the id {low if low < 0 else high}; it must be in [0, {bound})")
