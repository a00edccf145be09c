"""The Transformer of 2017: an encoder reads a source, a decoder writes a target while looking at it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastattn.models.blocks import (
    PostNormBlock,
    check_padding,
    check_tokens,
    embed_tokens,
    head_loss,
    make_dropout,
)
from fastattn.models.config import TransformerConfig


class EncoderDecoder(nn.Module):
    """Sinusoidal positions, post-norm blocks, one matrix for both embeddings and the output.

    Its MLP has GELU in the place of the paper's ReLU.

    Source: Vaswani et al., "Attention Is All You Need" (2017), section 3.
    """

    positions: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.register_buffer(
            "positions", sinusoidal_positions(config.max_length, config.d_model), persistent=False
        )
        self.dropout = make_dropout(config)
        self.encoder = nn.ModuleList(PostNormBlock(config) for _ in range(config.n_layers))
        self.decoder = nn.ModuleList(
            PostNormBlock(config, causal=True, cross_attention=True) for _ in range(config.n_layers)
        )
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.head.weight = self.token_embedding.weight
        self._init_weights()

    def forward(
        self,
        source: Tensor,
        target: Tensor,
        targets: Tensor | None = None,
        *,
        source_padding: Tensor | None = None,
        target_padding: Tensor | None = None,
    ) -> Tensor:
        """Logits for the token after each of `target`, or their loss against `targets`.

        Args:
            source: (batch, seq_source) integers in [0, vocab_size).
            target: (batch, seq_target), the target so far: it begins with a start token.
            targets: (batch, seq_target) integers, the target one token ahead; -100 is left out of the loss.
            source_padding, target_padding: bool, of the shape of their tokens, True at padding.

        Returns:
            logits (batch, seq_target, vocab_size), or where targets are given the mean cross-entropy in nats,
            float32.

        Raises:
            ValueError: a shape does not fit or leaves no target, or (on a CPU) an id is outside the vocabulary.
            TypeError: a dtype does not fit; integers are int64 or int32.
        """
        memory = self.encode(source, source_padding)
        hidden = self.decode(target, memory, source_padding, target_padding)
        if targets is None:
            return self.head(hidden)
        return head_loss(hidden, self.head, targets, self.config.implementation)

    def encode(self, source: Tensor, source_padding: Tensor | None = None) -> Tensor:
        """The encoder's representation of each source token, (batch, seq_source, d_model)."""
        check_padding("source_padding", source_padding, source)
        x = self._embed("source", source)
        for block in self.encoder:
            x = block(x, padding=source_padding)
        return x

    def decode(
        self,
        target: Tensor,
        memory: Tensor,
        source_padding: Tensor | None = None,
        target_padding: Tensor | None = None,
    ) -> Tensor:
        """The decoder's representation of each target token, (batch, seq_target, d_model), given the memory."""
        check_padding("target_padding", target_padding, target)
        if memory.size(0) != target.size(0):
            raise ValueError(f"target has batch {target.size(0)}, but the source has batch {memory.size(0)}")
        x = self._embed("target", target)
        for block in self.decoder:
            x = block(x, padding=target_padding, memory=memory, memory_padding=source_padding)
        return x

    def _embed(self, name: str, tokens: Tensor) -> Tensor:
        check_tokens(name, tokens, self.config.max_length)
        # The matrix is also the output layer's; scaled up, its rows weigh as much as the positions.
        x = embed_tokens(name, tokens, self.token_embedding) * math.sqrt(self.config.d_model)
        return self.dropout(x + self.positions[: tokens.size(1)])

    def _init_weights(self) -> None:
        """Glorot's uniform distribution; attention's input projection comes with it from torch.nn."""
        for module in self.modules():
            if isinstance(module, nn.Linear) and module is not self.head:
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.token_embedding.weight, std=self.config.d_model**-0.5)


def sinusoidal_positions(length: int, d_model: int) -> Tensor:
    """Section 3.5: sin(position / 10000^(2i / d_model)) in dimension 2i, the cosine in 2i + 1.

    Returns:
        (length, d_model) float32.
    """
    frequencies = 10000.0 ** (-torch.arange(0, d_model, 2, dtype=torch.float64) / d_model)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies  # (length, d_model / 2)
    waves = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)
    return waves[:, :d_model].float()
