"""ViT: an encoder over the patches of an image, which a class token reads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastattn.models.blocks import PreNormBlock, init_normal_, make_dropout, make_layer_norm, token_loss
from fastattn.models.config import ImageTransformerConfig
from fastattn.nn._fusion import read_stream


class ViT(nn.Module):
    """Linear patch embedding, a class token, learned positions, pre-norm blocks.

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words" (2020), section 3.1, equations 1 to 4.
    """

    def __init__(self, config: ImageTransformerConfig) -> None:
        super().__init__()
        self.config = config
        # A convolution whose stride is its size is a linear layer on each patch.
        self.patch_embedding = nn.Conv2d(
            config.channels, config.d_model, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.class_token = nn.Parameter(torch.empty(1, 1, config.d_model))
        self.position_embedding = nn.Parameter(torch.empty(1, 1 + config.n_patches, config.d_model))
        self.dropout = make_dropout(config)
        self.blocks = nn.ModuleList(PreNormBlock(config) for _ in range(config.n_layers))
        self.final_norm = make_layer_norm(config)
        self.head = nn.Linear(config.d_model, config.n_classes)
        init_normal_(self, std=0.02)

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits of the classes, or their loss against `targets`.

        Args:
            images: (batch, channels, image_size, image_size), floating.
            targets: (batch,) integers in [0, n_classes).

        Returns:
            logits (batch, n_classes), or where targets are given the mean cross-entropy in nats, float32.

        Raises:
            ValueError: a shape does not fit, or (on a CPU) a target is out of range.
            TypeError: images are not floating, or targets not int64 or int32.
        """
        channels, size = self.config.channels, self.config.image_size
        if images.dim() != 4 or images.shape[1:] != (channels, size, size):
            raise ValueError(
                f"images have shape {tuple(images.shape)}; (batch, {channels}, {size}, {size}) is needed"
            )
        if not images.is_floating_point():
            raise TypeError(f"images have dtype={images.dtype}; a floating-point dtype is needed")
        patches = self.patch_embedding(images).flatten(2).transpose(1, 2)  # (batch, n_patches, d_model)
        class_token = self.class_token.expand(images.size(0), -1, -1)
        x = torch.cat([class_token, patches], dim=1) + self.position_embedding
        x = self.dropout(x)
        branch = None
        for block in self.blocks:
            x, branch = block(x, branch)
        # The class token alone.
        first = None if branch is None else branch[:, 0]
        hidden, _ = read_stream(x[:, 0], first, self.dropout, self.final_norm)
        logits = self.head(hidden)
        return logits if targets is None else token_loss(logits, targets)
