"""A training that stopped goes on bitwise as if it had not."""

import sys
from pathlib import Path

import pytest
import torch

from fastattn.models import GPT, tiny
from fastattn.training import checkpoint
from fastattn.training.data import ByteTokenizer, batches, read_texts
from fastattn.training.loop import TrainConfig, make_optimizer, train

STEPS, STOP = 6, 3
CONFIG = TrainConfig(steps=STEPS, learning_rate=1e-2, warmup_steps=2)


@pytest.fixture
def _safetensors() -> None:
    pytest.importorskip("safetensors", reason="safetensors is not installed (extra `train`)")


def _model(seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    # Dropout, so that the random state matters.
    return GPT(tiny(n_layers=1, dropout=0.1, implementation="torch"))


def _batches(start: int = 0):  # type: ignore[no-untyped-def]
    return batches(ByteTokenizer().encode(read_texts()[:5]), 2, 16, seed=0, start=start)


@pytest.mark.usefixtures("_safetensors")
def test_resumes_bitwise(tmp_path: Path) -> None:
    whole = _model()
    whole_optimizer = make_optimizer(whole, CONFIG)
    torch.manual_seed(1)
    expected = []

    def save_at_stop(record) -> None:  # type: ignore[no-untyped-def]
        expected.append(record.loss)
        if record.step == STOP - 1:
            checkpoint.save(tmp_path, whole, whole_optimizer, step=STOP)

    train(whole, _batches(), CONFIG, optimizer=whole_optimizer, on_step=save_at_stop)

    resumed = _model(seed=2)
    optimizer = make_optimizer(resumed, CONFIG)
    start = checkpoint.load(tmp_path, resumed, optimizer)
    assert start == STOP
    history = train(resumed, _batches(start), CONFIG, optimizer=optimizer, start=start)
    assert [record.loss for record in history] == expected[STOP:]
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    states = [o.state_dict()["state"] for o in (whole_optimizer, optimizer)]
    for key, state in states[0].items():
        assert all(torch.equal(states[1][key][name], value) for name, value in state.items())
    assert resumed.head.weight is resumed.token_embedding.weight


@pytest.mark.usefixtures("_safetensors")
def test_weights_are_a_plain_safetensors_file(tmp_path: Path) -> None:
    """Without the prefix that torch.compile gives names, and the tied matrix once."""
    from safetensors.torch import load_file

    model = _model()
    compiled = torch.compile(model, backend="eager")
    checkpoint.save(tmp_path, compiled, make_optimizer(model, CONFIG), step=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "training.pt"]
    tensors = load_file(tmp_path / "model.safetensors")
    named = dict(model.named_parameters())
    assert len(tensors) == len(named)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, model.state_dict()[name])
    other = _model(seed=2)
    checkpoint.load(tmp_path, torch.compile(other, backend="eager"), make_optimizer(other, CONFIG))
    assert torch.equal(other.token_embedding.weight, model.token_embedding.weight)


@pytest.mark.usefixtures("_safetensors")
def test_a_half_written_checkpoint_is_refused(tmp_path: Path) -> None:
    model = _model()
    optimizer = make_optimizer(model, CONFIG)
    with pytest.raises(FileNotFoundError, match=r"holds no checkpoint: model.safetensors is missing"):
        checkpoint.load(tmp_path, model, optimizer)
    for step in (1, 2):
        checkpoint.save(tmp_path / str(step), model, optimizer, step=step)
    (tmp_path / "1" / "training.pt").replace(tmp_path / "2" / "training.pt")
    with pytest.raises(ValueError, match="has the weights of step 2 beside the optimizer of step 1"):
        checkpoint.load(tmp_path / "2", model, optimizer)
    with pytest.raises(FileNotFoundError, match=r"training.pt is missing"):
        checkpoint.load(tmp_path / "1", model, optimizer)


@pytest.mark.usefixtures("_safetensors")
def test_another_models_weights_are_refused(tmp_path: Path) -> None:
    model = _model()
    checkpoint.save(tmp_path, model, make_optimizer(model, CONFIG), step=1)
    wider = GPT(tiny(d_model=64))
    with pytest.raises(RuntimeError, match="size mismatch"):
        checkpoint.load(tmp_path, wider, make_optimizer(wider, CONFIG))


@pytest.mark.usefixtures("_safetensors")
def test_an_interrupted_save_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model()
    optimizer = make_optimizer(model, CONFIG)
    checkpoint.save(tmp_path, model, optimizer, step=1)

    def interrupted(state: object, file: str) -> None:
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    before = (tmp_path / "training.pt").read_bytes()
    monkeypatch.setattr(checkpoint.torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, model, optimizer, step=1)
    assert (tmp_path / "training.pt").read_bytes() == before
    monkeypatch.undo()
    assert checkpoint.load(tmp_path, model, optimizer) == 1


def test_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    model = _model()
    for call in (
        lambda: checkpoint.save(tmp_path / "new", model, make_optimizer(model, CONFIG), step=1),
        lambda: checkpoint.load(tmp_path / "new", model, make_optimizer(model, CONFIG)),
    ):
        with pytest.raises(ImportError, match="need the package safetensors: pip install safetensors"):
            call()
    assert not (tmp_path / "new").exists()
