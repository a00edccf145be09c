"""The sizes of a model, checked once, and the presets known by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# What a model's `implementation` means to the operations of fastattn; None is their automatic choice.
OPERATION_IMPLEMENTATIONS = {"naive": "reference", "torch": "torch", "fastattn": None}


def operation_implementation(name: str) -> str | None:
    """The operations' `implementation=` behind a model's: "naive" is "reference", "fastattn" is None.

    Raises:
        ValueError: the name is not "naive", "torch" or "fastattn".
    """
    if name not in OPERATION_IMPLEMENTATIONS:
        known = ", ".join(map(repr, OPERATION_IMPLEMENTATIONS))
        raise ValueError(f"implementation={name!r} is unknown; models know {known}")
    return OPERATION_IMPLEMENTATIONS[name]


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """What every Transformer here is made of, whatever it reads.

    Args:
        d_model: width of the residual stream.
        n_layers: blocks, in the encoder and in the decoder each where there are both.
        n_heads: attention heads; must divide d_model.
        mlp_ratio: hidden width of the MLP, in multiples of d_model.
        dropout: probability, for the embeddings, the attention weights and the residual branches.
        layer_norm_eps: what LayerNorm adds to the variance.
        approximate: GELU's form, "none" (erf) or "tanh".
        implementation: "naive" (the formulas in PyTorch operators), "torch" (PyTorch's fused functions) or
            "fastattn" (the first of fastattn's own that can). It changes no weight; dropout may draw other
            random numbers.

    Raises:
        ValueError: a value is out of its range; the message names both.
    """

    d_model: int = 768
    n_layers: int = 12
    n_heads: int = 12
    mlp_ratio: float = 4
    dropout: float = 0.0
    layer_norm_eps: float = 1e-5
    approximate: str = "none"
    implementation: str = "fastattn"

    def __post_init__(self) -> None:
        self._check_positive("d_model", "n_layers", "n_heads", "mlp_ratio", "layer_norm_eps")
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model={self.d_model} must be divisible by n_heads={self.n_heads}")
        if self.d_mlp < 1:
            raise ValueError(f"mlp_ratio={self.mlp_ratio} leaves no hidden unit at d_model={self.d_model}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1")
        if self.approximate not in ("none", "tanh"):
            raise ValueError(f"approximate={self.approximate!r} must be 'none' or 'tanh'")
        operation_implementation(self.implementation)

    def _check_positive(self, *names: str) -> None:
        for name in names:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")

    @property
    def d_mlp(self) -> int:
        """Hidden width of the MLP."""
        return int(self.d_model * self.mlp_ratio)


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(BlockConfig):
    """A Transformer over tokens: `GPT`, `BERT` and `EncoderDecoder`.

    Args:
        vocab_size: token ids are in [0, vocab_size).
        max_length: the longest sequence, in tokens.
    """

    vocab_size: int
    max_length: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("vocab_size", "max_length")


@dataclass(frozen=True, kw_only=True)
class ImageTransformerConfig(BlockConfig):
    """A Transformer over the patches of square images: `ViT`.

    Args:
        n_classes: classes to tell apart.
        image_size: height and width in pixels; a multiple of patch_size.
        patch_size: height and width of a patch in pixels.
        channels: colours of an image.
    """

    n_classes: int
    image_size: int = 224
    patch_size: int = 16
    channels: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_positive("n_classes", "image_size", "patch_size", "channels")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size={self.image_size} must be divisible by patch_size={self.patch_size}"
            )

    @property
    def n_patches(self) -> int:
        """Patches of one image."""
        return (self.image_size // self.patch_size) ** 2


def gpt2_124m(**changes: Any) -> TransformerConfig:
    """The smallest GPT-2 (Radford et al. 2019): 12 layers of width 768, 124 million parameters."""
    return TransformerConfig(**{"vocab_size": 50257, "max_length": 1024, "approximate": "tanh", **changes})


def bert_base(**changes: Any) -> TransformerConfig:
    """BERT base (Devlin et al. 2018): 12 layers of width 768, 110 million parameters."""
    return TransformerConfig(
        **{"vocab_size": 30522, "max_length": 512, "dropout": 0.1, "layer_norm_eps": 1e-12, **changes}
    )


def transformer_base(**changes: Any) -> TransformerConfig:
    """The base model of Vaswani et al. (2017): 6 + 6 layers of width 512, 8 heads, a shared vocabulary."""
    sizes = {"vocab_size": 37000, "max_length": 1024, "d_model": 512, "n_layers": 6, "n_heads": 8}
    return TransformerConfig(**{**sizes, "dropout": 0.1, **changes})


def vit_base_16(**changes: Any) -> ImageTransformerConfig:
    """ViT-B/16 (Dosovitskiy et al. 2020) for 1,000 classes: 12 layers of width 768, 86 million parameters."""
    return ImageTransformerConfig(**{"n_classes": 1000, "layer_norm_eps": 1e-6, **changes})


def tiny(**changes: Any) -> TransformerConfig:
    """Two layers of width 32 over bytes, for tests: an epoch of nothing in no time."""
    sizes = {"vocab_size": 256, "max_length": 64, "d_model": 32, "n_layers": 2, "n_heads": 2}
    return TransformerConfig(**{**sizes, **changes})
