"""BERT: an encoder that reads a text from both sides, with the two heads it is pre-trained with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastattn.models.blocks import (
    PostNormBlock,
    check_padding,
    check_tokens,
    embed_tokens,
    head_loss,
    init_normal_,
    make_dropout,
    make_gelu,
    make_layer_norm,
    token_loss,
)
from fastattn.models.config import TransformerConfig


class BERT(nn.Module):
    """Learned positions and token types, post-norm blocks, masked-token and next-sentence heads.

    Source: Devlin et al., "BERT" (2018), section 3.
    """

    TOKEN_TYPES = 2  # the first text and the second

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position_embedding = nn.Embedding(config.max_length, config.d_model)
        self.type_embedding = nn.Embedding(self.TOKEN_TYPES, config.d_model)
        self.embedding_norm = make_layer_norm(config)
        self.dropout = make_dropout(config)
        self.blocks = nn.ModuleList(PostNormBlock(config) for _ in range(config.n_layers))
        self.masked_token_head = MaskedTokenHead(config, self.token_embedding)
        self.next_sentence_head = NextSentenceHead(config)
        init_normal_(self, std=0.02)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        next_sentence: Tensor | None = None,
        *,
        token_types: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The logits of both heads, or the loss where targets are given.

        Args:
            tokens: (batch, seq) integers in [0, vocab_size), seq at most max_length, masked tokens included.
            targets: (batch, seq) integers: the original token where one was masked, -100 elsewhere.
            next_sentence: (batch,) integers: 0 where the second text follows the first, 1 where it does not.
            token_types: (batch, seq) integers: 0 in the first text, 1 in the second; None is all 0.
            padding: (batch, seq) bool, True at padding; its tokens change no other output.

        Returns:
            (token logits (batch, seq, vocab_size), next-sentence logits (batch, 2)), or the sum of the mean
            losses of the heads that have targets, float32.

        Raises:
            ValueError: a shape does not fit or leaves no target, or (on a CPU) an id is out of range.
            TypeError: a dtype does not fit; integers are int64 or int32.
        """
        hidden = self.encode(tokens, token_types=token_types, padding=padding)
        if targets is None and next_sentence is None:
            return self.masked_token_head(hidden), self.next_sentence_head(hidden)
        losses = []
        if targets is not None:
            transformed, output = self.masked_token_head.transformed(hidden), self.masked_token_head.output
            losses.append(head_loss(transformed, output, targets, self.config.implementation))
        if next_sentence is not None:
            losses.append(token_loss(self.next_sentence_head(hidden), next_sentence, "next_sentence"))
        return sum(losses[1:], losses[0])

    def encode(
        self, tokens: Tensor, *, token_types: Tensor | None = None, padding: Tensor | None = None
    ) -> Tensor:
        """The representation of each token, (batch, seq, d_model); arguments as `forward`'s."""
        check_tokens("tokens", tokens, self.config.max_length)
        check_padding("padding", padding, tokens)
        if token_types is None:
            token_types = torch.zeros_like(tokens)
        check_tokens("token_types", token_types)
        if token_types.shape != tokens.shape:
            raise ValueError(
                f"token_types have shape {tuple(token_types.shape)}; {tuple(tokens.shape)} is needed"
            )
        x = embed_tokens("tokens", tokens, self.token_embedding)
        x = x + self.position_embedding.weight[: tokens.size(1)]
        x = x + embed_tokens("token_types", token_types, self.type_embedding)
        x = self.dropout(self.embedding_norm(x))
        for block in self.blocks:
            x = block(x, padding=padding)
        return x


class MaskedTokenHead(nn.Module):
    """Which token was masked: a transformation, then the embedding matrix as the output layer."""

    def __init__(self, config: TransformerConfig, token_embedding: nn.Embedding) -> None:
        super().__init__()
        self.transform = nn.Linear(config.d_model, config.d_model)
        self.gelu = make_gelu(config)
        self.norm = make_layer_norm(config)
        self.output = nn.Linear(config.d_model, config.vocab_size)
        self.output.weight = token_embedding.weight

    def forward(self, hidden: Tensor) -> Tensor:
        return self.output(self.transformed(hidden))

    def transformed(self, hidden: Tensor) -> Tensor:
        """What the output layer reads, (batch, seq, d_model)."""
        return self.norm(self.gelu(self.transform(hidden)))


class NextSentenceHead(nn.Module):
    """Whether the second text follows the first, from the first token's representation."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.pooler = nn.Linear(config.d_model, config.d_model)
        self.output = nn.Linear(config.d_model, 2)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.output(torch.tanh(self.pooler(hidden[:, 0])))
