"""A training that stopped goes on bitwise as if it had not."""

import os
import re
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
    assert sorted(map(_kind, tmp_path.iterdir())) == ["model.safetensors", "training-*.pt"]
    tensors = load_file(tmp_path / "model.safetensors")
    named = dict(model.named_parameters())
    assert len(tensors) == len(named)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, model.state_dict()[name])
    other = _model(seed=2)
    checkpoint.load(tmp_path, torch.compile(other, backend="eager"), make_optimizer(other, CONFIG))
    assert torch.equal(other.token_embedding.weight, model.token_embedding.weight)


@pytest.mark.usefixtures("_safetensors")
def test_files_of_two_saves_are_refused(tmp_path: Path) -> None:
    """Two runs at one step: the step was compared, so that the weights of one took the optimizer of the other."""
    model = _model()
    optimizer = make_optimizer(model, CONFIG)
    with pytest.raises(FileNotFoundError, match=r"holds no checkpoint: model.safetensors is missing"):
        checkpoint.load(tmp_path, model, optimizer)
    for run in ("a", "b"):
        checkpoint.save(tmp_path / run, model, optimizer, step=1)
    (ours,), (theirs,) = ((tmp_path / run).glob("training-*.pt") for run in "ab")
    (tmp_path / "b" / "model.safetensors").replace(tmp_path / "a" / "model.safetensors")
    with pytest.raises(
        FileNotFoundError, match=f"no whole checkpoint: {theirs.name} of its weights is missing"
    ):
        checkpoint.load(tmp_path / "a", model, optimizer)
    ours.rename(ours.with_name(theirs.name))
    with pytest.raises(ValueError, match=r"has the weights of save \w+ beside the optimizer of \w+"):
        checkpoint.load(tmp_path / "a", model, optimizer)


@pytest.mark.usefixtures("_safetensors")
def test_other_programs_weights_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_model

    model = _model()
    save_model(model, str(tmp_path / "model.safetensors"))
    with pytest.raises(ValueError, match=r"names no checkpoint; it was not written by save\(\)"):
        checkpoint.load(tmp_path, model, make_optimizer(model, CONFIG))


@pytest.mark.usefixtures("_safetensors")
def test_another_models_weights_are_refused(tmp_path: Path) -> None:
    model = _model()
    checkpoint.save(tmp_path, model, make_optimizer(model, CONFIG), step=1)
    wider = GPT(tiny(d_model=64))
    with pytest.raises(RuntimeError, match="size mismatch"):
        checkpoint.load(tmp_path, wider, make_optimizer(wider, CONFIG))


@pytest.mark.usefixtures("_safetensors")
@pytest.mark.parametrize(
    ("place", "left"),
    [("torch.save", 1), ("save_model", 1), ("fsync", 1), ("replace", 1), ("glob", 2)],
)
def test_an_interrupted_save_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, left: int
) -> None:
    """The weights of step 2 lay beside the optimizer of step 1, and nothing could be loaded."""
    models = _model(seed=1), _model(seed=2)
    checkpoint.save(tmp_path, models[0], make_optimizer(models[0], CONFIG), step=1)
    (tmp_path / "notes.txt").write_text("not ours")

    def interrupted(first: object, file: object = None, *others: object) -> None:
        if isinstance(file, str | Path) and place in ("torch.save", "save_model"):
            Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    owner, name = {
        "torch.save": (torch, "save"),
        "save_model": (sys.modules["safetensors.torch"], "save_model"),
        "fsync": (os, "fsync"),
        "replace": (os, "replace"),
        "glob": (Path, "glob"),  # what is done first after the new one is whole
    }[place]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(tmp_path, models[1], make_optimizer(models[1], CONFIG), step=2)

    def loaded() -> int:
        model = _model()
        step = checkpoint.load(tmp_path, model, make_optimizer(model, CONFIG))
        expected = models[step - 1].state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
        return step

    assert loaded() == left
    checkpoint.save(tmp_path, models[1], make_optimizer(models[1], CONFIG), step=2)
    assert loaded() == 2
    assert [_kind(path) for path in sorted(tmp_path.iterdir())] == [
        "model.safetensors",
        "notes.txt",
        "training-*.pt",
    ]


def _kind(path: Path) -> str:
    return re.sub("-[0-9a-f]{16}", "-*", path.name)


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
