"""ViT: the same loss by every implementation, patches in their order, and it learns."""

from functools import partial

import pytest
import torch

from fastattn.models import ImageTransformerConfig, ViT
from fastattn.testing import make_tensor
from tests.models.agreement import (
    assert_bfloat16_agrees,
    assert_implementations_agree,
    assert_near,
    break_attention,
    compile_whole,
)

CLASSES = 5


def _model(implementation: str = "torch", n_layers: int = 2) -> ViT:
    config = ImageTransformerConfig(
        n_classes=CLASSES,
        image_size=12,
        patch_size=4,
        channels=3,
        d_model=32,
        n_layers=n_layers,
        n_heads=2,
        implementation=implementation,
    )
    return ViT(config)


# A layer's error is easier to see without another's behind it; the agreement in float32 is of two.
SHALLOW = partial(_model, n_layers=1)


def _images(device: torch.device | str = "cpu") -> torch.Tensor:
    return make_tensor(2, 3, 12, 12, device=device)


def _targets(device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.tensor([1, 4], device=device)


def test_implementations_agree(device: torch.device) -> None:
    assert_implementations_agree(_model, _images(device), _targets(device), device=device)


def test_implementations_agree_in_bfloat16(device: torch.device) -> None:
    assert_bfloat16_agrees(SHALLOW, device, images=_images(device), targets=_targets(device))


@pytest.mark.parametrize("how", ["zeros"])
def test_agreement_in_bfloat16_can_fail(
    how: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever part of attention is broken, as in test_gpt.py."""
    break_attention(monkeypatch, how)
    with pytest.raises(AssertionError, match=r"^logits 0: largest error"):
        assert_bfloat16_agrees(SHALLOW, device, images=_images(device), targets=_targets(device))


def test_logits_and_loss() -> None:
    torch.manual_seed(0)
    model, images = _model(), _images()
    logits = model(images)
    assert logits.shape == (2, CLASSES)
    assert_near(model(images, _targets()), torch.nn.functional.cross_entropy(logits, _targets()))


def test_patches_are_a_linear_layer_in_reading_order() -> None:
    model, images = _model(), _images()
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4)  # (batch, channels, rows, columns, 4, 4)
    flat = (
        patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    )  # (batch, rows * columns, channels * 16)
    weight, bias = model.patch_embedding.weight.flatten(1), model.patch_embedding.bias
    seen = []
    model.blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    model(images)
    expected = torch.nn.functional.linear(flat, weight, bias) + model.position_embedding[:, 1:]
    assert_near(seen[0][:, 1:], expected)
    first = (model.class_token + model.position_embedding[:, :1]).expand(2, 1, -1)
    assert torch.equal(seen[0][:, :1], first)


def test_class_token_is_what_the_head_reads() -> None:
    torch.manual_seed(0)
    model = _model()
    outputs = []
    model.blocks[-1].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    logits = model(_images())
    stream, branch = outputs[0]
    assert_near(logits, model.head(model.final_norm(stream[:, :1] + branch[:, :1]))[:, 0])


def test_every_patch_and_its_place_matter() -> None:
    torch.manual_seed(0)
    model, images = _model(), _images()
    logits = model(images)
    for row in range(3):
        for column in range(3):
            changed = images.clone()
            changed[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1.0
            assert not torch.allclose(model(changed), logits, atol=1e-5)
    assert not torch.allclose(model(images.roll(4, dims=3)), logits, atol=1e-5)


def test_learns() -> None:
    torch.manual_seed(0)
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(_images(), _targets())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_compiles_in_one_graph(device: torch.device) -> None:
    """By the default implementation; test_gpt.py compiles the same blocks by all three."""
    torch.manual_seed(0)
    model, inputs = _model("fastattn", n_layers=1).to(device), (_images(device), _targets(device))
    loss = compile_whole(model)(*inputs)
    loss.backward()
    assert_near(loss, model(*inputs))


def test_bad_input_is_named() -> None:
    model = _model()
    for shape in ((2, 3, 12, 16), (2, 1, 12, 12), (3, 12, 12)):
        with pytest.raises(ValueError, match=r"images have shape .*; \(batch, 3, 12, 12\) is needed"):
            model(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"targets have shape \(3,\); \(2,\) is needed"):
        model(_images(), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"images have dtype=torch.uint8; a floating-point dtype is needed"):
        model(_images().byte())
    with pytest.raises(ValueError, match=r"targets hold the id 5; it must be in \[0, 5\)"):
        model(_images(), torch.tensor([1, 5]))
