"""Configs refuse values out of range by name; presets have the sizes of their papers."""

import dataclasses
from typing import Any

import pytest

from fastattn.models import (
    BERT,
    GPT,
    EncoderDecoder,
    ImageTransformerConfig,
    TransformerConfig,
    ViT,
    bert_base,
    gpt2_124m,
    tiny,
    transformer_base,
    vit_base_16,
)
from fastattn.models.config import operation_implementation


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size=0 must be above 0"),
        ({"max_length": -1}, "max_length=-1 must be above 0"),
        ({"d_model": 0}, "d_model=0 must be above 0"),
        ({"n_layers": 0}, "n_layers=0 must be above 0"),
        ({"d_model": 32, "n_heads": 5}, "d_model=32 must be divisible by n_heads=5"),
        ({"mlp_ratio": 0.01}, "mlp_ratio=0.01 leaves no hidden unit at d_model=32"),
        ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
        ({"dropout": -0.1}, "dropout=-0.1 must be at least 0 and below 1"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps=0.0 must be above 0"),
        ({"approximate": "foo"}, "approximate='foo' must be 'none' or 'tanh'"),
        (
            {"implementation": "fast"},
            "implementation='fast' is unknown; models know 'naive', 'torch', 'fastattn'",
        ),
    ],
)
def test_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_image_size_and_patches() -> None:
    assert ImageTransformerConfig(n_classes=10, image_size=32, patch_size=8).n_patches == 16
    with pytest.raises(ValueError, match="image_size=30 must be divisible by patch_size=8"):
        ImageTransformerConfig(n_classes=10, image_size=30, patch_size=8)
    with pytest.raises(ValueError, match="n_classes=0 must be above 0"):
        ImageTransformerConfig(n_classes=0)


def test_what_implementations_mean() -> None:
    assert [operation_implementation(n) for n in ("naive", "torch", "fastattn")] == [
        "reference",
        "torch",
        None,
    ]
    with pytest.raises(ValueError, match="'reference' is unknown"):
        operation_implementation("reference")


def test_is_frozen_and_replaceable() -> None:
    config = tiny()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.d_model = 64  # type: ignore[misc]
    assert dataclasses.replace(config, implementation="naive").implementation == "naive"
    assert isinstance(config, TransformerConfig)


@pytest.mark.parametrize(
    ("model", "config", "millions"),
    [
        # As published, or counted from the published checkpoints: 124.4 (GPT-2), 110.1 (bert-base-uncased,
        # its heads included), 63.1 (the paper says 65 with its own vocabulary), 86.6 (ViT-B/16).
        (GPT, gpt2_124m(), 124.4),
        (BERT, bert_base(), 110.1),
        (EncoderDecoder, transformer_base(), 63.1),
        (ViT, vit_base_16(), 86.6),
    ],
    ids=["gpt2", "bert", "transformer", "vit"],
)
def test_presets_have_their_papers_sizes(model: Any, config: Any, millions: float) -> None:
    import torch

    with torch.device("meta"):
        parameters = sum(p.numel() for p in model(config).parameters())
    assert round(parameters / 1e6, 1) == millions
