"""The block's two orders of normalisation, its cross-attention, and checkpointing through it."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastattn.models import BERT, GPT, EncoderDecoder, ImageTransformerConfig, ViT, tiny
from fastattn.models.blocks import (
    Block,
    PostNormBlock,
    PreNormBlock,
    check_tokens,
    head_loss,
    init_normal_,
    make_dropout,
    make_mlp,
    token_loss,
)
from fastattn.nn._fusion import read_stream
from fastattn.testing import make_tensor
from tests.models.agreement import assert_near

CONFIG = tiny(implementation="torch", layer_norm_eps=0.01)


def _copy_into(block: Block, layer: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer) -> None:
    """Gives the block the weights of torch.nn's own layer."""
    block.attention.load_state_dict(layer.self_attn.state_dict())
    block.attention_norm.load_state_dict(layer.norm1.state_dict())
    if isinstance(layer, nn.TransformerDecoderLayer):
        block.cross_attention.load_state_dict(layer.multihead_attn.state_dict())
        block.cross_attention_norm.load_state_dict(layer.norm2.state_dict())
        block.mlp_norm.load_state_dict(layer.norm3.state_dict())
    else:
        block.mlp_norm.load_state_dict(layer.norm2.state_dict())
    block.mlp.expand.load_state_dict(layer.linear1.state_dict())
    block.mlp.contract.load_state_dict(layer.linear2.state_dict())


BLOCKS: dict[bool, type[Block]] = {True: PreNormBlock, False: PostNormBlock}


def _run(block: Block, x: Tensor, **keywords: Tensor) -> Tensor:
    """A layer with all of its sums made."""
    out = block(x, **keywords)
    if isinstance(out, Tensor):
        return out
    stream, branch = out
    return stream + block.dropout(branch)


def _randomized(layer: nn.Module) -> nn.Module:
    for seed, parameter in enumerate(layer.parameters()):
        parameter.data.copy_(make_tensor(*parameter.shape, seed=seed) * 0.3)
    return layer


@pytest.mark.parametrize("norm_first", [True, False], ids=["pre_norm", "post_norm"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_is_torch_nns_encoder_layer(norm_first: bool, causal: bool) -> None:
    layer = nn.TransformerEncoderLayer(
        32,
        2,
        128,
        dropout=0.0,
        activation="gelu",
        layer_norm_eps=0.01,
        batch_first=True,
        norm_first=norm_first,
    )
    _randomized(layer)
    block = BLOCKS[norm_first](CONFIG, causal=causal)
    _copy_into(block, layer)
    x = make_tensor(2, 7, 32)
    mask = nn.Transformer.generate_square_subsequent_mask(7) if causal else None
    assert_near(_run(block, x), layer(x, src_mask=mask, is_causal=causal))
    if not causal:
        padding = torch.arange(7) >= torch.tensor([[5], [7]])
        assert_near(_run(block, x, padding=padding), layer(x, src_key_padding_mask=padding))


@pytest.mark.parametrize("norm_first", [True, False], ids=["pre_norm", "post_norm"])
def test_is_torch_nns_decoder_layer(norm_first: bool) -> None:
    layer = nn.TransformerDecoderLayer(
        32,
        2,
        128,
        dropout=0.0,
        activation="gelu",
        layer_norm_eps=0.01,
        batch_first=True,
        norm_first=norm_first,
    )
    _randomized(layer)
    block = BLOCKS[norm_first](CONFIG, causal=True, cross_attention=True)
    _copy_into(block, layer)
    x, memory = make_tensor(2, 7, 32), make_tensor(2, 11, 32, seed=1)
    padding = torch.arange(11) >= torch.tensor([[8], [11]])
    mask = nn.Transformer.generate_square_subsequent_mask(7)
    expected = layer(x, memory, tgt_mask=mask, memory_key_padding_mask=padding, tgt_is_causal=True)
    assert_near(_run(block, x, memory=memory, memory_padding=padding), expected)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_mlp_has_the_configs_gelu(approximate: str) -> None:
    torch.manual_seed(0)
    mlp = make_mlp(tiny(approximate=approximate, mlp_ratio=2, implementation="torch"))
    assert mlp.expand.weight.shape == (64, 32)
    x = 3 * make_tensor(2, 7, 32)  # wide enough for the two forms to differ
    hidden = nn.functional.gelu(mlp.expand(x), approximate=approximate)
    assert torch.equal(mlp(x), mlp.contract(hidden))


def test_memory_and_cross_attention_go_together() -> None:
    x = make_tensor(1, 3, 32)
    with pytest.raises(ValueError, match="memory goes with cross_attention=True"):
        PreNormBlock(CONFIG, cross_attention=True)(x)
    with pytest.raises(ValueError, match="memory goes with cross_attention=True"):
        PostNormBlock(CONFIG)(x, memory=x)


@pytest.mark.parametrize("implementation", ["torch", "fastattn"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_checkpointing_changes_nothing(implementation: str, dropout: float, device: torch.device) -> None:
    """Activations recomputed in the backward give bitwise the gradients of activations kept."""
    config = dataclasses.replace(CONFIG, implementation=implementation, dropout=dropout)
    block = PreNormBlock(config, causal=True).to(device)
    gradients = []
    for recompute in (False, True):
        x = make_tensor(2, 7, 32, device=device, requires_grad=True)
        torch.manual_seed(0)
        branch = 0.5 * x
        x_out, branch_out = (
            checkpoint(block, x, branch, use_reentrant=False) if recompute else block(x, branch)
        )
        out = x_out + branch_out
        block.zero_grad()
        out.square().sum().backward()
        gradients.append([x.grad, *(p.grad.clone() for p in block.parameters())])
    for kept, recomputed in zip(*gradients, strict=True):
        assert torch.equal(kept, recomputed)


def test_dropout_is_no_module_where_it_is_zero() -> None:
    assert isinstance(make_dropout(CONFIG), nn.Identity)
    assert make_dropout(tiny(dropout=0.25)).p == 0.25
    assert not any(isinstance(m, nn.Dropout) for m in PreNormBlock(CONFIG).modules())


@pytest.mark.parametrize("place", ["attention branch", "mlp branch", "attention weights"])
@pytest.mark.parametrize("norm_first", [True, False], ids=["pre_norm", "post_norm"])
def test_dropout_is_everywhere(place: str, norm_first: bool) -> None:
    """In training nothing repeats, whichever place alone can drop something; in evaluation all does."""
    block = BLOCKS[norm_first](tiny(dropout=0.5, implementation="torch"))
    if place == "attention weights":
        block.dropout = nn.Identity()
    else:
        block.attention.dropout = 0.0
        other = block.mlp.contract if place == "attention branch" else block.attention.out_proj
        nn.init.zeros_(other.weight)  # the other branch has nothing left to drop
        nn.init.zeros_(other.bias)
    x = make_tensor(2, 7, 32)
    assert not torch.equal(_run(block, x), _run(block, x))
    block.eval()
    assert torch.equal(_run(block, x), _run(block, x))


@pytest.mark.parametrize("kind", [GPT, BERT, EncoderDecoder, ViT])
def test_embeddings_are_dropped(kind: Any) -> None:
    if kind is ViT:
        config: Any = ImageTransformerConfig(
            n_classes=3, image_size=8, patch_size=4, d_model=32, n_heads=2, dropout=0.5
        )
        inputs: tuple[Tensor, ...] = (make_tensor(2, 3, 8, 8),)
    else:
        config = tiny(dropout=0.5, implementation="torch")
        tokens = torch.arange(14).view(2, 7)
        inputs = (tokens, tokens) if kind is EncoderDecoder else (tokens,)
    model = kind(config)
    for name in ("blocks", "encoder", "decoder"):
        if hasattr(model, name):
            setattr(model, name, nn.ModuleList())

    def run() -> Tensor:
        out = model(*inputs)
        return out[0] if isinstance(out, tuple) else out

    assert not torch.equal(run(), run())
    model.eval()
    assert torch.equal(run(), run())


def test_initial_weights() -> None:
    torch.manual_seed(0)
    block = PreNormBlock(tiny(d_model=128))
    init_normal_(block, std=0.02, residual_std=0.002)
    expected = {
        "attention.in_proj_weight": 0.02,
        "attention.out_proj.weight": 0.002,
        "mlp.expand.weight": 0.02,
        "mlp.contract.weight": 0.002,
    }
    for name, parameter in block.named_parameters():
        if name in expected:
            # The deviation of a sample of n values is itself off by 1 / sqrt(2 n): 0.6 % for 128 x 128.
            assert parameter.std().item() == pytest.approx(expected.pop(name), rel=0.03)
        else:
            assert torch.equal(parameter, torch.full_like(parameter, float(name.endswith("weight"))))
    assert not expected


def test_loss_is_float32_and_leaves_out_ignored_targets() -> None:
    logits = make_tensor(2, 3, 5).to(torch.bfloat16)
    targets = torch.tensor([[1, -100, 2], [-100, -100, 4]])
    loss = token_loss(logits, targets)
    kept = targets != -100
    expected = -logits.float().log_softmax(-1)[kept].gather(-1, targets[kept][:, None]).mean()
    assert loss.dtype == torch.float32
    assert_near(loss, expected)
    with pytest.raises(ValueError, match=r"targets have shape \(2, 2\); \(2, 3\) is needed"):
        token_loss(logits, targets[:, 1:])


def test_head_loss_is_the_loss_of_the_heads_logits(device: torch.device) -> None:
    """In float32 too, of a model in bfloat16, and with the same messages; fastattn's makes the logits in chunks."""
    head = nn.Linear(2, 5, dtype=torch.bfloat16, device=device)
    hidden = make_tensor(2, 3, 2, dtype=torch.bfloat16, device=device)
    targets = torch.tensor([[1, -100, 2], [-100, -100, 4]], device=device)
    chunked, whole = (head_loss(hidden, head, targets, name) for name in ("fastattn", "torch"))
    assert torch.equal(whole, token_loss(head(hidden), targets))
    assert_near(chunked, whole)
    for implementation in ("fastattn", "torch"):
        with pytest.raises(ValueError, match=r"labels have shape \(2, 2\); \(2, 3\) is needed"):
            head_loss(hidden, head, targets[:, 1:], implementation, "labels")
        with pytest.raises(ValueError, match=r"labels hold the id 5; it must be in \[0, 5\)"):
            head_loss(hidden.cpu(), head.cpu(), targets.cpu().clamp(min=0) + 1, implementation, "labels")


@pytest.mark.parametrize("norm_first", [True, False], ids=["pre_norm", "post_norm"])
def test_stream_keeps_its_dtype_under_autocast(norm_first: bool, device: torch.device) -> None:
    """Branches come out of the linear layers in bfloat16; the float32 of the sum must not be lost."""
    block = BLOCKS[norm_first](tiny(implementation="fastattn")).to(device)
    x = make_tensor(2, 7, 32, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        out = block(x)
        stream, branch = out if norm_first else (out, None)
        read = read_stream(stream, branch, block.dropout, block.mlp_norm)
    assert stream.dtype == torch.float32
    assert branch is None or branch.dtype == torch.bfloat16
    assert [part.dtype for part in read] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), ValueError, "tokens has 1 dimensions; 2 are needed"),
        (torch.zeros(1, 3), TypeError, "tokens has dtype=torch.float32; int64 or int32 is needed"),
        (
            torch.zeros(1, 9, dtype=torch.int64),
            ValueError,
            "tokens has 9 positions; max_length=8 is the most",
        ),
    ],
)
def test_tokens_are_checked(tokens: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_tokens("tokens", tokens, 8)
