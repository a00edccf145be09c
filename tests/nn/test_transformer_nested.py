"""Nested tensors in the Transformer's encoder layer."""

import pytest
import torch

import fastattn
from fastattn.testing import make_tensor
from tests.nn.layers import EMBED, HEADS, LAYERS, make_layer


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    ("layout", "norm_first", "is_causal"),
    [(torch.strided, False, False), (torch.jagged, True, True)],
    ids=["strided-post-full", "jagged-pre-causal"],
)
def test_nested_tensors_are_sequences_alone(
    layout: torch.layout, norm_first: bool, is_causal: bool, device: torch.device
) -> None:
    """With gradients, which torch.nn's layer has none of here."""
    module = make_layer(LAYERS[0], device, norm_first=norm_first)
    found = []
    for nested in (True, False):
        rows = [make_tensor(n, EMBED, device=device, seed=n).requires_grad_() for n in (3, 1, 5)]
        if nested:
            src = torch.nested.as_nested_tensor(rows, layout=layout)
            out = module(src, is_causal=is_causal)
            assert out.is_nested and out.layout == layout
            assert (out + src).is_nested  # a residual around the layer
            outs = out.unbind()
        else:
            outs = [module(row, is_causal=is_causal) for row in rows]
        module.zero_grad()
        sum((out * make_tensor(*out.shape, device=device, seed=9)).sum() for out in outs).backward()
        gradients = [t.grad for t in (*rows, *module.parameters())]
        found.append([*outs, *gradients])
    for actual, expected in zip(*found, strict=True):
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_that_are_not_taken() -> None:
    encoder, decoder = (make_layer(name) for name in LAYERS)
    nested = torch.nested.nested_tensor([torch.randn(3, EMBED), torch.randn(2, EMBED)])
    for masks, named in (
        ({"src_mask": torch.zeros(3, 3)}, "src_mask"),
        ({"src_key_padding_mask": torch.zeros(2, 3)}, "src_key_padding_mask"),
    ):
        with pytest.raises(ValueError, match=f"{named} goes with no nested tensor"):
            encoder(nested, **masks)
    encoder.self_attn = torch.nn.MultiheadAttention(EMBED, HEADS, batch_first=True)
    with pytest.raises(
        fastattn.NotSupported, match=r"and self_attn is <class 'torch\.nn.*enable_nested_tensor"
    ):
        encoder(nested)
    with pytest.raises(fastattn.NotSupported, match="a nested tgt or memory is not supported"):
        decoder(nested, nested)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("lengths", [(), (0,), (2, 0)], ids=str)
def test_empty_nested_tensors(lengths: tuple[int, ...], device: torch.device) -> None:
    src = torch.nested.nested_tensor([make_tensor(n, EMBED, device=device) for n in lengths], device=device)
    out = make_layer(LAYERS[0], device)(src)
    assert out.is_nested and [row.shape for row in out.unbind()] == [row.shape for row in src.unbind()]
