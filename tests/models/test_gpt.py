"""GPT: the same loss by every implementation, causal, compiled in one graph, and it learns."""

import dataclasses
import math
import shutil
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.profiler import profile

from fastattn.models import GPT, gpt2_124m, tiny
from fastattn.training.data import ByteTokenizer, batches, read_texts
from fastattn.training.loop import TrainConfig, train
from tests.models.agreement import (
    IMPLEMENTATIONS,
    NEAR,
    assert_bfloat16_agrees,
    assert_implementations_agree,
    assert_near,
    break_attention,
    compile_whole,
)

CONFIG = tiny(approximate="tanh")
BATCH, SEQ = 2, 17


def _model(implementation: str = "torch", **changes: int) -> GPT:
    return GPT(dataclasses.replace(CONFIG, implementation=implementation, **changes))


# A layer's error is easier to see without another's behind it; the agreement in float32 is of two.
SHALLOW = partial(_model, n_layers=1)


def _tokens(device: torch.device | str = "cpu", batch: int = BATCH, seq: int = SEQ) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, CONFIG.vocab_size, (batch, seq), generator=generator).to(device)


def test_implementations_agree(device: torch.device) -> None:
    tokens = _tokens(device)
    assert_implementations_agree(_model, tokens, tokens.roll(-1, 1), device=device)


def test_implementations_agree_in_bfloat16(device: torch.device) -> None:
    tokens = _tokens(device)
    assert_bfloat16_agrees(SHALLOW, device, tokens=tokens, targets=tokens.roll(-1, 1))


def test_takes_the_fused_forms(device: torch.device) -> None:
    """Two norms a block and a final one, all but the first with the sum before them; no sum and no logits otherwise."""
    model, tokens = _model("fastattn").to(device), _tokens(device)
    with profile() as recorded:
        loss = model(tokens, tokens.roll(-1, 1))
    calls = {event.key: event.count for event in recorded.key_averages()}
    assert calls["fastattn::norm_forward"] == 2 * CONFIG.n_layers + 1
    assert calls["fastattn::linear_cross_entropy_forward"] == 1
    assert calls["aten::add"] == 1  # of token and position embedding
    with profile() as recorded:
        loss.backward()
    calls = {event.key: event.count for event in recorded.key_averages()}
    assert calls["fastattn::norm_backward"] == 2 * CONFIG.n_layers + 1


@pytest.mark.parametrize("how", ["zeros", "is_causal", "detached"])
def test_agreement_in_bfloat16_can_fail(
    how: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It compared the loss alone, of initial weights, which attention hardly moves: each of these passed."""
    break_attention(monkeypatch, how)
    tokens = _tokens(device)
    with pytest.raises(AssertionError, match=r"^(logits 0|gradient of .*): largest error"):
        assert_bfloat16_agrees(SHALLOW, device, tokens=tokens, targets=tokens.roll(-1, 1))


def test_logits_and_loss() -> None:
    torch.manual_seed(0)
    model, tokens = _model(), _tokens()
    logits = model(tokens)
    assert logits.shape == (BATCH, SEQ, CONFIG.vocab_size)
    targets = tokens.roll(-1, 1)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert_near(model(tokens, targets), expected)
    # Small initial weights predict nothing yet: every token is about as likely.
    assert expected.item() == pytest.approx(torch.tensor(CONFIG.vocab_size).log().item(), rel=0.01)
    targets[:, 3:] = -100
    kept = torch.nn.functional.cross_entropy(logits[:, :3].flatten(0, 1), targets[:, :3].flatten())
    assert_near(model(tokens, targets), kept)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_is_causal(implementation: str, device: torch.device) -> None:
    """Other tokens from position 9 on change no logit before it, and do change those from it on."""
    torch.manual_seed(0)
    model, tokens = _model(implementation).to(device), _tokens(device)
    changed = tokens.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % CONFIG.vocab_size
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert_near(after[:, :9], before[:, :9])
    assert not torch.allclose(after[:, 9:], before[:, 9:], atol=1e-3)


def test_positions_matter() -> None:
    torch.manual_seed(0)
    logits = _model()(torch.zeros(1, 5, dtype=torch.int64))
    assert not torch.allclose(logits[:, 1:], logits[:, :-1], atol=1e-3)


def test_head_is_the_embedding() -> None:
    model = _model()
    assert model.head.weight is model.token_embedding.weight
    names = [name for name, _ in model.named_parameters()]
    assert "token_embedding.weight" in names and "head.weight" not in names
    copy = _model()
    copy.load_state_dict(model.state_dict())
    assert copy.head.weight is copy.token_embedding.weight
    assert torch.equal(copy(_tokens()), model(_tokens()))


def test_initial_weights_are_gpt2s() -> None:
    torch.manual_seed(0)
    model = GPT(gpt2_124m(n_layers=2, vocab_size=1000))
    assert model.token_embedding.weight.std().item() == pytest.approx(0.02, rel=0.01)
    for block in model.blocks:
        for residual in (block.attention.out_proj, block.mlp.contract):
            assert residual.weight.std().item() == pytest.approx(0.02 / 2.0, rel=0.01)
            assert not residual.bias.any()


def test_same_seed_same_weights_in_every_implementation() -> None:
    states = []
    for implementation in IMPLEMENTATIONS:
        torch.manual_seed(5)
        states.append(_model(implementation).state_dict())
    for state in states[1:]:
        assert all(torch.equal(state[name], value) for name, value in states[0].items())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_learns_real_text(implementation: str, device: torch.device) -> None:
    """Four steps on the standard library's source bring the loss well below that of guessing a byte."""
    text = ByteTokenizer().encode(read_texts()[:20])
    torch.manual_seed(0)
    model = _model(implementation, n_layers=1).to(device)
    config = TrainConfig(steps=4, learning_rate=2e-2)
    losses = [record.loss for record in train(model, batches(text, 2, 16, seed=1, device=device), config)]
    assert losses[0] > 5.3  # guessing one of 256 bytes costs ln 256 = 5.55 nats
    assert losses[-1] < losses[0] - 0.8


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compiles_in_one_graph(implementation: str, device: torch.device) -> None:
    torch.manual_seed(0)
    model, tokens = _model(implementation, n_layers=1).to(device), _tokens(device)
    targets = tokens.roll(-1, 1)
    compiled = compile_whole(model)
    gradients, losses = [], []
    for run in (model, compiled):
        model.zero_grad()
        loss = run(tokens, targets)
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert_near(losses[1], losses[0])
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=NEAR)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="no C++ compiler")
def test_compiles_with_inductor(device: torch.device) -> None:
    torch.manual_seed(0)
    model, tokens = _model("torch").to(device), _tokens(device)
    expected = model(tokens, tokens).item()
    loss = compile_whole(model, backend="inductor")(tokens, tokens)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=NEAR)


def test_compiles_for_any_batch_and_length() -> None:
    """With dynamic=True, other sizes find the graph that the first ones made."""
    torch.manual_seed(0)
    model = _model("torch", n_layers=1)
    graphs = CompileCounterWithBackend("eager")
    compiled = compile_whole(model, backend=graphs, dynamic=True)
    for batch, seq in ((2, 7), (3, 9), (5, 33)):
        tokens = _tokens(batch=batch, seq=seq)
        assert_near(compiled(tokens, tokens), model(tokens, tokens))
    assert graphs.frame_count == 1


def test_generates() -> None:
    torch.manual_seed(0)
    model = _model(max_length=8).train()
    start = _tokens(seq=5)
    generator = torch.Generator().manual_seed(1)
    out = model.generate(start, 7, generator=generator)  # longer than max_length
    assert out.shape == (BATCH, 12)
    assert torch.equal(out[:, :5], start)
    assert model.training
    again = model.generate(start, 7, generator=torch.Generator().manual_seed(1))
    assert torch.equal(out, again)
    other = model.generate(start, 7, generator=torch.Generator().manual_seed(2))
    assert not torch.equal(out, other)


def test_generates_the_likeliest() -> None:
    """Temperature 0 and top_k=1 both take the largest logit."""
    torch.manual_seed(0)
    model, start = _model(), _tokens(seq=5)
    greedy = model.generate(start, 3, temperature=0)
    assert torch.equal(greedy[:, 5], model(start)[:, -1].argmax(-1))
    assert torch.equal(greedy, model.generate(start, 3, top_k=1))


def test_generate_draws_from_the_top_k() -> None:
    torch.manual_seed(0)
    model, start = _model(), _tokens(batch=1, seq=5)
    likeliest = set(model(start)[0, -1].topk(3).indices.tolist())
    generator = torch.Generator().manual_seed(0)
    drawn = model.generate(start.expand(60, -1), 1, top_k=3, temperature=5.0, generator=generator)[:, -1]
    assert set(drawn.tolist()) == likeliest


def test_bad_input_is_named() -> None:
    model = _model()
    with pytest.raises(ValueError, match="tokens has 65 positions; max_length=64 is the most"):
        model(_tokens(seq=65))
    with pytest.raises(ValueError, match=r"tokens hold the id 256; it must be in \[0, 256\)"):
        model(torch.full((1, 3), 256))
    with pytest.raises(ValueError, match=r"tokens hold the id -1; it must be in \[0, 256\)"):
        model(torch.full((1, 3), -1))
    with pytest.raises(ValueError, match="tokens has 1 dimensions; 2 are needed"):
        model(_tokens()[0])
    with pytest.raises(TypeError, match=r"tokens has dtype=torch.float32"):
        model(torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"targets have shape \(2, 16\); \(2, 17\) is needed"):
        model(_tokens(), _tokens()[:, 1:])
    with pytest.raises(ValueError, match="temperature=-1 must be at least 0"):
        model.generate(_tokens(), 1, temperature=-1)
    with pytest.raises(ValueError, match="top_k=0 must be at least 1"):
        model.generate(_tokens(), 1, top_k=0)
    with pytest.raises(TypeError, match=r"targets has dtype=torch.float32; int64 or int32 is needed"):
        model(_tokens(), torch.zeros(BATCH, SEQ))


@pytest.mark.parametrize("outside", [256, -1])
def test_targets_outside_the_vocabulary_are_named(outside: int) -> None:
    """They were a bare IndexError; -100 beside them is left out, and no id to complain about."""
    targets = torch.full((BATCH, SEQ), -100)
    targets[0, 3] = outside
    with pytest.raises(ValueError, match=rf"targets hold the id {outside}; it must be in \[0, 256\)"):
        _model()(_tokens(), targets)


def test_int32_tokens_and_targets() -> None:
    """Targets of int32, which tokens may be, were a RuntimeError of cross_entropy."""
    torch.manual_seed(0)
    model, tokens = _model(), _tokens()
    assert torch.equal(model(tokens.int(), tokens.int()), model(tokens, tokens))


@pytest.mark.parametrize("shape", [(1, 0), (0, 3)])
def test_no_loss_of_nothing(shape: tuple[int, int]) -> None:
    """The mean over no targets was NaN; logits of nothing are fine."""
    model, tokens = _model(), torch.zeros(shape, dtype=torch.int64)
    assert model(tokens).shape == (*shape, 256)
    with pytest.raises(ValueError, match=r"targets have shape .*; a mean loss needs at least 1 target"):
        model(tokens, tokens)


def test_what_cannot_be_continued_is_named() -> None:
    """An empty prompt was an IndexError, and fewer than no tokens were none without a word."""
    model = _model()
    with pytest.raises(ValueError, match="tokens has 0 positions; at least 1 is needed to continue"):
        model.generate(torch.zeros(1, 0, dtype=torch.int64), 3)
    with pytest.raises(ValueError, match="new_tokens=-3 must be at least 0"):
        model.generate(_tokens(), -3)
    with pytest.raises(ValueError, match="temperature=nan must be at least 0"):
        model.generate(_tokens(), 1, temperature=math.nan)
    with pytest.raises(ValueError, match="tokens has 1 dimensions; 2 are needed"):
        model.generate(_tokens()[0], 1)
    assert torch.equal(model.generate(_tokens(), 0), _tokens())
