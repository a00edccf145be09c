"""GPT: a decoder that predicts the next token from the ones before it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastattn.models.blocks import (
    PreNormBlock,
    check_tokens,
    embed_tokens,
    head_loss,
    init_normal_,
    make_dropout,
    make_layer_norm,
)
from fastattn.models.config import TransformerConfig
from fastattn.nn._fusion import read_stream


class GPT(nn.Module):
    """The GPT-2 architecture: learned positions, pre-norm blocks, an output head tied to the embedding.

    Source: Radford et al., "Language Models are Unsupervised Multitask Learners" (2019), section 2.3.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position_embedding = nn.Embedding(config.max_length, config.d_model)
        self.dropout = make_dropout(config)
        self.blocks = nn.ModuleList(PreNormBlock(config, causal=True) for _ in range(config.n_layers))
        self.final_norm = make_layer_norm(config)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.head.weight = self.token_embedding.weight
        # Each block adds two branches to the residual stream; this keeps its variance near one at any depth.
        init_normal_(self, std=0.02, residual_std=0.02 / math.sqrt(2 * config.n_layers))

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits for every next token, or their loss against `targets`.

        Args:
            tokens: (batch, seq) integers in [0, vocab_size), seq at most max_length.
            targets: (batch, seq) integers, the token after each position; -100 is left out of the loss.

        Returns:
            logits (batch, seq, vocab_size), or where targets are given the mean cross-entropy in nats,
            float32.

        Raises:
            ValueError: a wrong shape, a sequence above max_length, no target at all, or (on a CPU) an id outside
                the vocabulary.
            TypeError: tokens or targets are not int64 or int32.
        """
        check_tokens("tokens", tokens, self.config.max_length)
        x = embed_tokens("tokens", tokens, self.token_embedding)
        x = self.dropout(x + self.position_embedding.weight[: tokens.size(1)])  # (batch, seq, d_model)
        branch = None
        for block in self.blocks:
            x, branch = block(x, branch)
        hidden, _ = read_stream(x, branch, self.dropout, self.final_norm)
        if targets is None:
            return self.head(hidden)
        return head_loss(hidden, self.head, targets, self.config.implementation)

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continues each sequence; beyond max_length the oldest tokens go out of sight.

        Args:
            tokens: (batch, seq) integers, seq at least 1.
            new_tokens: how many to add, at least 0.
            temperature: divides the logits; 0 always takes the likeliest token.
            top_k: draw from the k likeliest tokens only; None draws from all.
            generator: source of the random numbers.

        Returns:
            (batch, seq + new_tokens), beginning with the tokens given.

        Raises:
            ValueError: an argument is out of its range, or (on a CPU) an id outside the vocabulary.
            TypeError: tokens are not int64 or int32.
        """
        check_tokens("tokens", tokens)
        if tokens.size(1) < 1:
            raise ValueError("tokens has 0 positions; at least 1 is needed to continue")
        if new_tokens < 0:
            raise ValueError(f"new_tokens={new_tokens} must be at least 0")
        if not temperature >= 0:
            raise ValueError(f"temperature={temperature} must be at least 0")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k={top_k} must be at least 1")
        was_training = self.training
        self.eval()
        try:
            for _ in range(new_tokens):
                logits = self(tokens[:, -self.config.max_length :])[:, -1]  # (batch, vocab_size)
                tokens = torch.cat([tokens, _draw(logits, temperature, top_k, generator)], dim=1)
        finally:
            self.train(was_training)
        return tokens


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """One token id for each row of logits, (batch, 1)."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    if top_k is not None and top_k < logits.size(-1):
        least = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    weights = F.softmax(logits.float() / temperature, dim=-1)
    return torch.multinomial(weights, 1, generator=generator)
