"""MultiheadAttention gives torch.nn's numbers from torch.nn's state dicts, and refuses the rest by name."""

from typing import Any

import pytest
import torch
from torch import Tensor

import fastattn
from fastattn.testing import make_tensor
from tests.models.agreement import assert_near
from tests.nn.pairs import (
    BATCH,
    EMBED,
    HEADS,
    IMPLEMENTATIONS,
    SEQ_K,
    SEQ_Q,
    assert_same,
    causal_mask,
    make_pair,
    padding_mask,
)


def _attention_pair(device: torch.device, **keywords: Any) -> tuple[Any, Any]:
    keywords = {"batch_first": True, **keywords}
    return make_pair(
        fastattn.nn.MultiheadAttention, torch.nn.MultiheadAttention, device, EMBED, HEADS, **keywords
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "seq_first"])
def test_self_attention_matches(
    implementation: str | None, bias: bool, batch_first: bool, device: torch.device
) -> None:
    module, peer = _attention_pair(device, bias=bias, batch_first=batch_first, implementation=implementation)
    x = make_tensor(BATCH, SEQ_Q, EMBED, device=device)
    assert_same(module, peer, lambda m, x: m(x, x, x, need_weights=False)[0], x)


@pytest.mark.parametrize("shared", [True, False], ids=["key_is_value", "key_and_value"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "seq_first"])
def test_cross_attention_matches(shared: bool, batch_first: bool, device: torch.device) -> None:
    module, peer = _attention_pair(device, batch_first=batch_first)
    query = make_tensor(BATCH, SEQ_Q, EMBED, device=device)
    memory = [
        make_tensor(BATCH, SEQ_K, EMBED, device=device, seed=seed) for seed in ((1,) if shared else (1, 2))
    ]
    if not batch_first:
        query, memory = query.transpose(0, 1), [t.transpose(0, 1) for t in memory]

    def call(m: torch.nn.Module, query: Tensor, *memory: Tensor) -> Tensor:
        return m(query, memory[0], memory[-1], need_weights=False)[0]

    assert_same(module, peer, call, query, *memory)


def test_other_key_and_value_widths_match(device: torch.device) -> None:
    module, peer = _attention_pair(device, kdim=20, vdim=24)
    inputs = [
        make_tensor(BATCH, seq, e, device=device) for seq, e in ((SEQ_Q, EMBED), (SEQ_K, 20), (SEQ_K, 24))
    ]
    assert_same(module, peer, lambda m, q, k, v: m(q, k, v, need_weights=False)[0], *inputs)


def test_unbatched_matches(device: torch.device) -> None:
    module, peer = _attention_pair(device)
    x = make_tensor(SEQ_Q, EMBED, device=device)
    padding = padding_mask(SEQ_Q, device, batch=1)[0]
    assert_same(module, peer, lambda m, x: m(x, x, x, need_weights=False)[0], x)
    assert_same(module, peer, lambda m, x: m(x, x, x, padding, need_weights=False)[0], x)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
def test_packed_sequences_see_themselves_alone(
    is_causal: bool, implementation: str | None, device: torch.device
) -> None:
    module, peer = _attention_pair(device, implementation=implementation)
    lengths = (4, 1, 0, 6)
    starts = torch.tensor([0, 4, 5, 5, 11], dtype=torch.int32, device=device)

    def call(m: torch.nn.Module, x: Tensor) -> Tensor:
        if m is module:
            return m(x, x, x, is_causal=is_causal, cu_seqlens=starts, max_seqlen=6)[0]
        outs = []
        for row in filter(len, x.split(lengths)):
            mask = causal_mask(len(row), device) if is_causal else None
            outs.append(m(row, row, row, attn_mask=mask, need_weights=False, is_causal=is_causal)[0])
        return torch.cat(outs)

    x = make_tensor(sum(lengths), EMBED, device=device)
    assert_same(module, peer, call, x)
    assert_near(module(x, x, x, cu_seqlens=starts)[0], module(x, x, x, cu_seqlens=starts, max_seqlen=6)[0])


def test_packed_sequences_that_are_none_are_named() -> None:
    module = fastattn.nn.MultiheadAttention(EMBED, HEADS)
    x, starts = make_tensor(5, EMBED), torch.tensor([0, 2, 5])
    with pytest.raises(ValueError, match=r"have shapes \(1, 5, 32\) and \(1, 5, 32\); with cu_seqlens"):
        module(x[None], x[None], x[None], cu_seqlens=starts)
    with pytest.raises(ValueError, match=r"have shapes \(5, 32\) and \(4, 32\); with cu_seqlens"):
        module(x, x[1:], x[1:], cu_seqlens=starts)
    for masks in ({"attn_mask": torch.zeros(5, 5)}, {"key_padding_mask": torch.zeros(5)}):
        with pytest.raises(ValueError, match=f"{next(iter(masks))} goes with no cu_seqlens"):
            module(x, x, x, cu_seqlens=starts, **masks)


def _masks(device: torch.device) -> dict[str, dict[str, Any]]:
    padding, causal = padding_mask(SEQ_Q, device), causal_mask(SEQ_Q, device)
    per_head = make_tensor(BATCH * HEADS, SEQ_Q, SEQ_Q, device=device)
    float_padding = torch.zeros(BATCH, SEQ_Q, device=device).masked_fill(padding, -2.0)
    return {
        "padding": {"key_padding_mask": padding},
        "float_padding": {"key_padding_mask": float_padding},
        "mask": {"attn_mask": causal},
        "float_mask": {"attn_mask": make_tensor(SEQ_Q, SEQ_Q, device=device)},
        "mask_per_head": {"attn_mask": per_head > 1.0},
        "float_mask_per_head": {"attn_mask": per_head},
        "mask_and_padding": {"attn_mask": causal, "key_padding_mask": padding},
        "float_mask_and_float_padding": {
            "attn_mask": per_head,
            "key_padding_mask": make_tensor(BATCH, SEQ_Q, device=device),
        },
        "causal": {"attn_mask": causal, "is_causal": True},
        "causal_and_padding": {"attn_mask": causal, "is_causal": True, "key_padding_mask": padding},
    }


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", _masks(torch.device("cpu")))
def test_masks_match(implementation: str | None, case: str, device: torch.device) -> None:
    module, peer = _attention_pair(device, implementation=implementation)
    masks = _masks(device)[case]
    x = make_tensor(BATCH, SEQ_Q, EMBED, device=device)
    assert_same(module, peer, lambda m, x: m(x, x, x, need_weights=False, **masks)[0], x)


@pytest.mark.parametrize("float_first", [True, False])
def test_bool_and_float_masks_together(float_first: bool, device: torch.device) -> None:
    """torch.nn warns and deprecates the mixture; it is the sum of both as floats."""
    module, _ = _attention_pair(device)
    padding, causal = padding_mask(SEQ_Q, device), causal_mask(SEQ_Q, device)
    added = make_tensor(SEQ_Q, SEQ_Q, device=device)
    if float_first:
        mixed: dict[str, Tensor] = {"attn_mask": added, "key_padding_mask": padding}
        hidden = padding[:, None, None, :]
    else:
        added = make_tensor(BATCH, SEQ_Q, device=device)[:, None, None, :]
        mixed = {"attn_mask": causal, "key_padding_mask": added[:, 0, 0]}
        hidden = causal
    x = make_tensor(BATCH, SEQ_Q, EMBED, device=device)
    whole = torch.zeros(BATCH, HEADS, SEQ_Q, SEQ_Q, device=device) + added
    whole = whole.masked_fill(hidden, -torch.inf).flatten(0, 1)
    assert_near(module(x, x, x, **mixed)[0], module(x, x, x, attn_mask=whole)[0])


def test_causal_needs_no_mask_and_ignores_the_one_beside_it(device: torch.device) -> None:
    module, _ = _attention_pair(device)
    x = make_tensor(BATCH, SEQ_Q, EMBED, device=device)
    with_mask = module(x, x, x, attn_mask=causal_mask(SEQ_Q, device))[0]
    assert_near(module(x, x, x, is_causal=True)[0], with_mask)
    hint = torch.zeros(SEQ_Q, SEQ_Q, dtype=torch.bool, device=device)
    assert_near(module(x, x, x, attn_mask=hint, is_causal=True)[0], with_mask)


def test_causal_is_top_left(device: torch.device) -> None:
    """Query 0 sees key 0 alone even where there are more keys than queries."""
    module, _ = _attention_pair(device)
    query = make_tensor(BATCH, SEQ_Q, EMBED, device=device)
    memory = make_tensor(BATCH, SEQ_K, EMBED, device=device, seed=1)
    out = module(query, memory, memory, is_causal=True)[0]
    alone = module(query[:, :1], memory[:, :1], memory[:, :1])[0]
    assert_near(out[:, :1], alone)


def test_padding_mask_is_not_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor with a causal mask beside it, which needs no tensor."""
    seen = []

    def spy(q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        seen.append((tuple(keywords["mask"].shape), keywords["bias"], keywords["causal"]))
        return torch.zeros_like(q)

    monkeypatch.setattr("fastattn.nn.attention.attention", spy)
    module = fastattn.nn.MultiheadAttention(EMBED, HEADS, batch_first=True)
    x = make_tensor(BATCH, SEQ_Q, EMBED)
    for is_causal in (False, True):
        module(x, x, x, key_padding_mask=padding_mask(SEQ_Q, torch.device("cpu")), is_causal=is_causal)
    shape = (BATCH, 1, 1, SEQ_Q)
    assert seen == [(shape, None, False), (shape, None, "top_left")]


@pytest.mark.parametrize("batch_first", [True, False], ids=["batch_first", "seq_first"])
def test_heads_are_views(batch_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v are slices of one product, which nothing copied."""
    seen: list[Tensor] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        seen.extend((q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    monkeypatch.setattr("fastattn.nn.attention.attention", spy)
    module = fastattn.nn.MultiheadAttention(EMBED, HEADS, batch_first=batch_first)
    x = make_tensor(BATCH, SEQ_Q, EMBED) if batch_first else make_tensor(SEQ_Q, BATCH, EMBED)
    module(x, x, x)
    assert [tuple(t.shape) for t in seen] == [(BATCH, HEADS, SEQ_Q, EMBED // HEADS)] * 3
    assert len({t.untyped_storage().data_ptr() for t in seen}) == 1
    assert all(t.stride(-1) == 1 for t in seen)


def test_dropout_is_for_training_only(device: torch.device) -> None:
    module, peer = _attention_pair(device, dropout=0.5)
    x = make_tensor(BATCH, SEQ_Q, EMBED, device=device)
    module.eval(), peer.eval()
    assert_near(module(x, x, x)[0], peer(x, x, x, need_weights=False)[0])
    module.train()
    with torch.no_grad():
        assert not torch.equal(module(x, x, x)[0], module(x, x, x)[0])


@pytest.mark.parametrize("implementation", ["torch", "reference"])
def test_is_causal_with_dropout(implementation: str, device: torch.device) -> None:
    """Dropout takes another way through the module; from one seed it drops the same weights twice."""
    module, _ = _attention_pair(device, dropout=0.5, implementation=implementation)
    x = make_tensor(BATCH, SEQ_Q, EMBED, device=device)
    outs = []
    for last in (x[:, -1:], x[:, :1]):
        changed = torch.cat([x[:, :-1], last], dim=1)
        torch.manual_seed(0)
        outs.append(module(changed, changed, changed, is_causal=True)[0])
    assert_near(outs[1][:, :-1], outs[0][:, :-1])
    assert not torch.allclose(outs[1][:, -1], outs[0][:, -1], atol=1e-3)


def test_sequence_comes_first_by_default(device: torch.device) -> None:
    """Called as torch.nn's is by default; with batch and sequence exchanged, 9 tokens see 2 and not 2 see 9."""
    module, peer = make_pair(
        fastattn.nn.MultiheadAttention, torch.nn.MultiheadAttention, device, EMBED, HEADS
    )
    x = make_tensor(SEQ_Q, BATCH, EMBED, device=device)
    assert_same(module, peer, lambda m, x: m(x, x, x, need_weights=False)[0], x)


def test_initial_weights_are_torch_nns() -> None:
    torch.manual_seed(3)
    module = fastattn.nn.MultiheadAttention(EMBED, HEADS)
    torch.manual_seed(3)
    peer = torch.nn.MultiheadAttention(EMBED, HEADS)
    for (name, parameter), (peer_name, peer_parameter) in zip(
        module.named_parameters(), peer.named_parameters(), strict=True
    ):
        assert name == peer_name
        assert torch.equal(parameter, peer_parameter)


def test_inside_torch_nns_encoder_layer(device: torch.device) -> None:
    """The drop-in takes the place of a layer's self_attn, masks included."""
    layer = torch.nn.TransformerEncoderLayer(EMBED, HEADS, 64, dropout=0.0, batch_first=True).to(device)
    x = make_tensor(BATCH, SEQ_Q, EMBED, device=device)
    masks = {"src_mask": causal_mask(SEQ_Q, device), "src_key_padding_mask": padding_mask(SEQ_Q, device)}
    expected = layer(x, **masks)
    replacement = fastattn.nn.MultiheadAttention(EMBED, HEADS, batch_first=True).to(device)
    replacement.load_state_dict(layer.self_attn.state_dict())
    layer.self_attn = replacement
    assert_near(layer(x, **masks), expected)


def test_autocast_matches(device: torch.device) -> None:
    module, peer = _attention_pair(device)
    x = make_tensor(BATCH, SEQ_Q, EMBED, device=device)
    padding = padding_mask(SEQ_Q, device)
    for masks in ({}, {"key_padding_mask": padding}, {"attn_mask": make_tensor(SEQ_Q, SEQ_Q, device=device)}):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            out, expected = module(x, x, x, **masks)[0], peer(x, x, x, need_weights=False, **masks)[0]
        assert out.dtype == expected.dtype == torch.bfloat16
        # Three roundings to bfloat16: of the projections, of the attention and of the output.
        assert_near(out, expected, 3 * 2.0**-8)


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "padding"])
def test_compiles_in_one_graph(masked: bool, device: torch.device) -> None:
    module, _ = _attention_pair(device, implementation="torch")
    x = make_tensor(BATCH, SEQ_Q, EMBED, device=device)
    masks = {"key_padding_mask": padding_mask(SEQ_Q, device)} if masked else {"is_causal": True}
    compiled = torch.compile(lambda x: module(x, x, x, **masks)[0], fullgraph=True, backend="aot_eager")
    assert_near(compiled(x), module(x, x, x, **masks)[0])
    with pytest.raises(ValueError, match="'fast' is unknown"):
        fastattn.nn.GELU(implementation="fast")(x)


def test_refused_by_name() -> None:
    x = make_tensor(BATCH, SEQ_Q, EMBED)
    module = fastattn.nn.MultiheadAttention(EMBED, HEADS)
    with pytest.raises(fastattn.NotSupported, match=r"need_weights=True.*never holds"):
        module(x, x, x, need_weights=True)
    with pytest.raises(fastattn.NotSupported, match="add_bias_kv=True"):
        fastattn.nn.MultiheadAttention(EMBED, HEADS, add_bias_kv=True)
    with pytest.raises(fastattn.NotSupported, match="add_zero_attn=True"):
        fastattn.nn.MultiheadAttention(EMBED, HEADS, add_zero_attn=True)


def test_bad_input_is_named() -> None:
    x = make_tensor(BATCH, SEQ_Q, EMBED)
    module = fastattn.nn.MultiheadAttention(EMBED, HEADS, batch_first=True)
    with pytest.raises(ValueError, match="embed_dim=32 must be divisible by num_heads=5"):
        fastattn.nn.MultiheadAttention(EMBED, 5)
    with pytest.raises(ValueError, match="have 1, 3 and 3 dimensions; all need 3"):
        module(x[0, 0], x, x)
    with pytest.raises(ValueError, match="key has width 31; kdim=32 is needed"):
        module(x, x[..., 1:], x)
    with pytest.raises(ValueError, match=r"key_padding_mask has shape \(9,\); \(2, 9\) is needed"):
        module(x, x, x, key_padding_mask=torch.zeros(SEQ_Q, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"key_padding_mask has shape \(1, 9\); \(9,\) is needed"):
        module(x[0], x[0], x[0], key_padding_mask=torch.zeros(1, SEQ_Q, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"attn_mask has shape \(4, 9, 9\); \(8, 9, 9\) is needed"):
        module(x, x, x, attn_mask=torch.zeros(HEADS, SEQ_Q, SEQ_Q))
    with pytest.raises(TypeError, match=r"attn_mask has dtype=torch.int64; bool or"):
        module(x, x, x, attn_mask=torch.zeros(SEQ_Q, SEQ_Q, dtype=torch.int64))


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_batches_that_differ_are_refused(masked: bool) -> None:
    """With a mask the call goes to PyTorch's operator, which would broadcast a batch of 1."""
    module = fastattn.nn.MultiheadAttention(EMBED, HEADS, batch_first=True)
    query, key = torch.randn(1, 3, EMBED), torch.randn(4, 5, EMBED)
    mask = torch.zeros(3, 5, dtype=torch.bool) if masked else None
    with pytest.raises(ValueError, match="query has batch=1, but key has batch=4"):
        module(query, key, key, attn_mask=mask)
    with pytest.raises(ValueError, match="only widths may differ"):
        module(key, key, torch.randn(4, 6, EMBED), attn_mask=mask)
