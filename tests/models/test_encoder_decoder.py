"""The 2017 Transformer: the same loss by every implementation, causal in the target only, padding unseen."""

import dataclasses
import math
from functools import partial

import pytest
import torch
from torch import Tensor

from fastattn.models import EncoderDecoder, tiny
from fastattn.models.encoder_decoder import sinusoidal_positions
from tests.models.agreement import (
    IMPLEMENTATIONS,
    assert_bfloat16_agrees,
    assert_implementations_agree,
    assert_near,
    break_attention,
    compile_whole,
)

CONFIG = tiny(vocab_size=64)
BATCH, SEQ_SOURCE, SEQ_TARGET = 2, 13, 9


def _model(implementation: str = "torch", **changes: int) -> EncoderDecoder:
    return EncoderDecoder(dataclasses.replace(CONFIG, implementation=implementation, **changes))


# A layer's error is easier to see without another's behind it; the agreement in float32 is of two.
SHALLOW = partial(_model, n_layers=1)


def _inputs(device: torch.device | str = "cpu") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    source = torch.randint(0, CONFIG.vocab_size, (BATCH, SEQ_SOURCE), generator=generator)
    target = torch.randint(0, CONFIG.vocab_size, (BATCH, SEQ_TARGET + 1), generator=generator)
    target_padding = torch.arange(SEQ_TARGET) >= torch.tensor([[9], [6]])
    inputs = {
        "source": source,
        "target": target[:, :-1],
        "targets": target[:, 1:].masked_fill(target_padding, -100),
        "source_padding": torch.arange(SEQ_SOURCE) >= torch.tensor([[10], [13]]),
        "target_padding": target_padding,
    }
    return {name: value.to(device) for name, value in inputs.items()}


def test_implementations_agree(device: torch.device) -> None:
    assert_implementations_agree(_model, device=device, **_inputs(device))


def test_implementations_agree_without_padding(device: torch.device) -> None:
    inputs = {n: value for n, value in _inputs(device).items() if not n.endswith("padding")}
    assert_implementations_agree(_model, device=device, **inputs)


def test_implementations_agree_in_bfloat16(device: torch.device) -> None:
    assert_bfloat16_agrees(SHALLOW, device, **_inputs(device))


@pytest.mark.parametrize("how", ["zeros", "is_causal", "key_padding_mask"])
def test_agreement_in_bfloat16_can_fail(
    how: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever part of attention is broken, as in test_gpt.py."""
    break_attention(monkeypatch, how)
    with pytest.raises(AssertionError, match=r"^logits 0: largest error"):
        assert_bfloat16_agrees(SHALLOW, device, **_inputs(device))


def test_logits_and_loss() -> None:
    torch.manual_seed(0)
    model, inputs = _model(), _inputs()
    targets = inputs.pop("targets")
    logits = model(**inputs)
    assert logits.shape == (BATCH, SEQ_TARGET, CONFIG.vocab_size)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert_near(model(**inputs, targets=targets), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_target_is_causal_and_source_is_not(implementation: str, device: torch.device) -> None:
    torch.manual_seed(0)
    model, inputs = _model(implementation).to(device), _inputs(device)
    source, target = inputs["source"], inputs["target"]
    later = target.clone()
    later[:, 5:] = (later[:, 5:] + 1) % CONFIG.vocab_size
    end = source.clone()
    end[:, -1] = (end[:, -1] + 1) % CONFIG.vocab_size
    with torch.no_grad():
        before, after = model(source, target), model(source, later)
        other_source = model(end, target)
    assert_near(after[:, :5], before[:, :5])
    assert not torch.allclose(after[:, 5:], before[:, 5:], atol=1e-3)
    assert not torch.allclose(other_source[:, 0], before[:, 0], atol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_padding_is_not_seen(implementation: str, device: torch.device) -> None:
    """Other tokens under either padding change no logit outside it; without the masks they do."""
    torch.manual_seed(0)
    model, inputs = _model(implementation).to(device), _inputs(device)
    del inputs["targets"]
    changed = dict(inputs)
    for name in ("source", "target"):
        padding = inputs[f"{name}_padding"]
        changed[name] = torch.where(padding, (inputs[name] + 7) % CONFIG.vocab_size, inputs[name])
    seen = ~inputs["target_padding"]
    with torch.no_grad():
        assert_near(model(**changed)[seen], model(**inputs)[seen])
        unmasked = model(changed["source"], inputs["target"]) - model(inputs["source"], inputs["target"])
    assert unmasked[seen].abs().max() > 1e-4


def test_target_padding_on_the_left_is_not_seen() -> None:
    """There causality alone would not hide it."""
    torch.manual_seed(0)
    model, inputs = _model(), _inputs()
    padding = torch.arange(SEQ_TARGET) < torch.tensor([[0], [3]])
    changed = torch.where(padding, (inputs["target"] + 7) % CONFIG.vocab_size, inputs["target"])
    before = model(inputs["source"], inputs["target"], target_padding=padding)
    after = model(inputs["source"], changed, target_padding=padding)
    assert_near(after[~padding], before[~padding])
    assert not torch.allclose(model(inputs["source"], changed)[1, 3:], before[1, 3:], atol=1e-4)


def test_encoding_once_and_decoding_is_the_whole() -> None:
    torch.manual_seed(0)
    model, inputs = _model(), _inputs()
    del inputs["targets"]
    memory = model.encode(inputs["source"], inputs["source_padding"])
    hidden = model.decode(inputs["target"], memory, inputs["source_padding"], inputs["target_padding"])
    logits = model.head(hidden)
    assert torch.equal(logits, model(**inputs))


def test_one_matrix_embeds_and_predicts() -> None:
    model = _model()
    assert model.head.weight is model.token_embedding.weight
    assert sum(p.shape == (CONFIG.vocab_size, CONFIG.d_model) for p in model.parameters()) == 1
    # Scaled by sqrt(d_model), an embedding's elements have variance one, as the sinusoids' nearly have.
    assert model.token_embedding.weight.std().item() == pytest.approx(CONFIG.d_model**-0.5, rel=0.05)
    x = model._embed("source", torch.tensor([[3, 3]]))
    scaled = model.token_embedding.weight[3] * math.sqrt(CONFIG.d_model)
    assert_near(x[0], scaled + sinusoidal_positions(2, CONFIG.d_model))


@pytest.mark.parametrize("d_model", [6, 7])
def test_sinusoids_are_the_papers(d_model: int) -> None:
    positions = sinusoidal_positions(50, d_model)
    assert positions.shape == (50, d_model)
    for position in (0, 1, 49):
        for dimension in range(d_model):
            angle = position / 10000 ** (2 * (dimension // 2) / d_model)
            expected = math.cos(angle) if dimension % 2 else math.sin(angle)
            assert positions[position, dimension].item() == pytest.approx(expected, abs=1e-7)
    assert "positions" not in _model().state_dict()


def test_learns_to_copy() -> None:
    torch.manual_seed(0)
    model = _model()
    source = _inputs()["source"][:, :8]
    start = torch.cat([torch.zeros_like(source[:, :1]), source[:, :-1]], dim=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = model(source, start, source)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_compiles_in_one_graph(device: torch.device) -> None:
    """By the default implementation; test_gpt.py compiles the same blocks by all three."""
    torch.manual_seed(0)
    model, inputs = _model("fastattn", n_layers=1).to(device), _inputs(device)
    loss = compile_whole(model)(**inputs)
    loss.backward()
    assert_near(loss, model(**inputs))


def test_bad_input_is_named() -> None:
    model, inputs = _model(), _inputs()
    source, target = inputs["source"], inputs["target"]
    with pytest.raises(ValueError, match="target has batch 1, but the source has batch 2"):
        model(source, target[:1])
    with pytest.raises(ValueError, match="source has 65 positions; max_length=64 is the most"):
        model(torch.zeros(2, 65, dtype=torch.int64), target)
    with pytest.raises(ValueError, match=r"target hold the id 64; it must be in \[0, 64\)"):
        model(source, torch.full_like(target, 64))
    with pytest.raises(ValueError, match=r"source_padding has shape \(2, 12\); the tokens have \(2, 13\)"):
        model(source, target, source_padding=inputs["source_padding"][:, 1:])
    with pytest.raises(TypeError, match=r"target_padding has dtype=torch.float32; bool is needed"):
        model(source, target, target_padding=torch.zeros(BATCH, SEQ_TARGET))
