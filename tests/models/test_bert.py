"""BERT: the same loss by every implementation, padding that nobody sees, two heads."""

import dataclasses
from functools import partial

import pytest
import torch
from torch import Tensor

from fastattn.models import BERT, tiny
from tests.models.agreement import (
    IMPLEMENTATIONS,
    assert_bfloat16_agrees,
    assert_implementations_agree,
    assert_near,
    break_attention,
    compile_whole,
)

CONFIG = tiny(vocab_size=64)
BATCH, SEQ = 2, 13
MASK_TOKEN = 1


def _model(implementation: str = "torch", **changes: int) -> BERT:
    return BERT(dataclasses.replace(CONFIG, implementation=implementation, **changes))


# A layer's error is easier to see without another's behind it; the agreement in float32 is of two.
SHALLOW = partial(_model, n_layers=1)


def _inputs(device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Two sequences, the second of nine tokens and four of padding; every fourth token masked."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, CONFIG.vocab_size, (BATCH, SEQ), generator=generator)
    masked = torch.arange(SEQ) % 4 == 1
    padding = torch.arange(SEQ) >= torch.tensor([[13], [9]])
    inputs = {
        "tokens": tokens.masked_fill(masked, MASK_TOKEN),
        "targets": tokens.masked_fill(~masked | padding, -100),
        "next_sentence": torch.tensor([0, 1]),
        "token_types": (torch.arange(SEQ) > 5).long().expand(BATCH, -1),
        "padding": padding,
    }
    return {name: value.to(device) for name, value in inputs.items()}


def test_implementations_agree(device: torch.device) -> None:
    assert_implementations_agree(_model, device=device, **_inputs(device))


def test_implementations_agree_without_padding(device: torch.device) -> None:
    inputs = _inputs(device)
    del inputs["padding"]
    assert_implementations_agree(_model, device=device, **inputs)


def test_implementations_agree_in_bfloat16(device: torch.device) -> None:
    assert_bfloat16_agrees(SHALLOW, device, **_inputs(device))


@pytest.mark.parametrize("how", ["zeros", "key_padding_mask"])
def test_agreement_in_bfloat16_can_fail(
    how: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It compared the loss alone, of initial weights, which attention hardly moves: each of these passed."""
    break_attention(monkeypatch, how)
    with pytest.raises(AssertionError, match=r"^logits 0: largest error"):
        assert_bfloat16_agrees(SHALLOW, device, **_inputs(device))


def test_logits_and_losses() -> None:
    torch.manual_seed(0)
    model, inputs = _model(), _inputs()
    targets, next_sentence = inputs.pop("targets"), inputs.pop("next_sentence")
    token_logits, sentence_logits = model(**inputs)
    assert token_logits.shape == (BATCH, SEQ, CONFIG.vocab_size)
    assert sentence_logits.shape == (BATCH, 2)
    assert model.encode(**inputs).shape == (BATCH, SEQ, CONFIG.d_model)
    token_loss = torch.nn.functional.cross_entropy(token_logits.flatten(0, 1), targets.flatten())
    sentence_loss = torch.nn.functional.cross_entropy(sentence_logits, next_sentence)
    assert_near(model(**inputs, targets=targets), token_loss)
    assert_near(model(**inputs, next_sentence=next_sentence), sentence_loss)
    both = model(**inputs, targets=targets, next_sentence=next_sentence)
    assert_near(both, token_loss + sentence_loss)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_is_not_seen(implementation: str, device: torch.device) -> None:
    """Other tokens under the padding change no representation outside it; without the mask they do."""
    torch.manual_seed(0)
    model, inputs = _model(implementation).to(device), _inputs(device)
    tokens, padding = inputs["tokens"], inputs["padding"]
    changed = torch.where(padding, (tokens + 7) % CONFIG.vocab_size, tokens)
    with torch.no_grad():
        before, after = model.encode(tokens, padding=padding), model.encode(changed, padding=padding)
        unmasked = model.encode(tokens) - model.encode(changed)
    assert_near(after[~padding], before[~padding])
    assert unmasked[~padding].abs().max() > 1e-3


def test_padded_batch_is_the_sequence_alone() -> None:
    torch.manual_seed(0)
    model, inputs = _model(), _inputs()
    padded = model.encode(inputs["tokens"], padding=inputs["padding"])
    assert_near(padded[1:, :9], model.encode(inputs["tokens"][1:, :9]))


def test_sees_both_sides_and_types() -> None:
    torch.manual_seed(0)
    model, inputs = _model(), _inputs()
    tokens = inputs["tokens"]
    changed = tokens.clone()
    changed[:, -1] += 1
    assert (model.encode(tokens)[:, 0] - model.encode(changed)[:, 0]).abs().max() > 1e-3
    types = inputs["token_types"]
    assert not torch.allclose(model.encode(tokens), model.encode(tokens, token_types=types), atol=1e-3)
    zeros = torch.zeros_like(types)
    assert torch.equal(model.encode(tokens), model.encode(tokens, token_types=zeros))


def test_next_sentence_is_read_from_the_first_token() -> None:
    torch.manual_seed(0)
    model, inputs = _model(), _inputs()
    hidden = model.encode(inputs["tokens"])
    logits = model.next_sentence_head(hidden)
    others, first = hidden.clone(), hidden.clone()
    others[:, 1:] += 1.0
    first[:, 0] += 1.0
    assert torch.equal(model.next_sentence_head(others), logits)
    assert not torch.allclose(model.next_sentence_head(first), logits, atol=1e-3)


def test_output_layer_is_the_embedding() -> None:
    model = _model()
    assert model.masked_token_head.output.weight is model.token_embedding.weight


def test_learns_masked_tokens() -> None:
    torch.manual_seed(0)
    model, inputs = _model(), _inputs()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(**inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_compiles_in_one_graph(device: torch.device) -> None:
    """By the default implementation; test_gpt.py compiles the same blocks by all three."""
    torch.manual_seed(0)
    model, inputs = _model("fastattn", n_layers=1).to(device), _inputs(device)
    loss = compile_whole(model)(**inputs)
    loss.backward()
    assert_near(loss, model(**inputs))


def test_bad_input_is_named() -> None:
    model, tokens = _model(), _inputs()["tokens"]
    with pytest.raises(ValueError, match=r"padding has shape \(13,\); the tokens have \(2, 13\)"):
        model(tokens, padding=torch.zeros(SEQ, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"padding has dtype=torch.int64; bool is needed"):
        model(tokens, padding=torch.zeros(BATCH, SEQ, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"token_types have shape \(2, 12\); \(2, 13\) is needed"):
        model(tokens, token_types=tokens[:, 1:])
    with pytest.raises(ValueError, match=r"token_types hold the id 2; it must be in \[0, 2\)"):
        model(tokens, token_types=torch.full_like(tokens, 2))
    with pytest.raises(ValueError, match=r"tokens hold the id 64; it must be in \[0, 64\)"):
        model(torch.full_like(tokens, 64))
    with pytest.raises(ValueError, match="tokens has 65 positions; max_length=64 is the most"):
        model(torch.zeros(1, 65, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"token_types has dtype=torch.float32; int64 or int32 is needed"):
        model(tokens, token_types=tokens.float())
    with pytest.raises(ValueError, match=r"next_sentence hold the id 2; it must be in \[0, 2\)"):
        model(tokens, next_sentence=torch.tensor([0, 2]))
    with pytest.raises(TypeError, match=r"next_sentence has dtype=torch.bool; int64 or int32 is needed"):
        model(tokens, next_sentence=torch.tensor([False, True]))
