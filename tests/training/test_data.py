"""Text is read in a fixed order, tokenized without loss, and cut into the same batches for the same seed."""

import errno
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastattn.training import data
from fastattn.training.data import (
    BPETokenizer,
    ByteTokenizer,
    DataError,
    batches,
    read_texts,
    split,
    validation_batches,
)

TEXTS = ["the first document, naïve: €\n", "def second():\n    return 2\n" * 40, "third"]


def test_standard_library_is_the_default() -> None:
    texts = read_texts()
    assert texts == read_texts()
    assert sum(map(len, texts)) > 5_000_000
    source = Path(importlib.import_module("ast").__file__ or "").read_text("utf-8")
    assert source in texts
    documentation = importlib.import_module("pydoc_data.topics")
    assert documentation.topics["assert"] in texts
    assert Path(documentation.__file__ or "").read_text("utf-8") not in texts
    assert all(texts)


def test_skips_what_is_not_the_standard_librarys_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "b.py",
        "a/z.py",
        "a/.hidden.py",
        "test/t.py",
        "site-packages/p.py",
        "a/__pycache__/c.py",
        "n.txt",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "latin.py").write_bytes(b"\xe9")
    (tmp_path / "empty.py").write_bytes(b"")
    monkeypatch.setattr(data.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert read_texts() == ["a/z.py", "b.py"]
    for name in ("a/z.py", "b.py"):
        (tmp_path / name).unlink()
    with pytest.raises(DataError, match="no source files of the standard library"):
        read_texts()


def test_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "folder" / "b").mkdir(parents=True)
    (tmp_path / "folder" / "b" / "two.md").write_text("two", "utf-8")
    (tmp_path / "folder" / "c.txt").write_text("three €", "utf-8")
    (tmp_path / "folder" / "a.txt").write_text("one\r\n", "utf-8", newline="")
    (tmp_path / "folder" / "picture").write_bytes(b"\xff\xfe\x00")
    single = tmp_path / "single.txt"
    single.write_text("single", "utf-8")
    assert read_texts([single, tmp_path / "folder"]) == ["single", "one\r\n", "two", "three €"]
    assert read_texts(str(single)) == ["single"]


def test_unusable_files_are_named_in_one_line(tmp_path: Path) -> None:
    missing, empty, latin = tmp_path / "missing.txt", tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_bytes(b"")
    latin.write_bytes(b"caf\xe9")
    for path, message in (
        (missing, f"cannot read {missing}: No such file or directory"),
        (empty, f"{empty} is empty"),
        (latin, f"{latin} is not UTF-8 text: byte 3 is 0xe9"),
    ):
        with pytest.raises(DataError) as error:
            read_texts([path])
        assert str(error.value) == message
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(DataError, match="no text in UTF-8 is in the folder"):
        read_texts([folder])
    with pytest.raises(DataError, match="no files were given"):
        read_texts([])
    assert issubclass(DataError, ValueError)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_pipes_in_a_folder_are_passed_over(tmp_path: Path) -> None:
    """Reading a pipe that nobody writes to never ended; in another process, so that it ends here."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "text").write_text("text")
    script = f"from fastattn.training.data import read_texts; print(read_texts({str(tmp_path)!r}))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert found.stdout == "['text']\n", found.stderr


@pytest.mark.parametrize("unreadable", ["folder", "folder/below", "folder/text"])
def test_what_cannot_be_read_in_a_folder_is_named(
    unreadable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a folder was said to hold no text in UTF-8. Patched, as root may read everything."""
    (tmp_path / "folder" / "below").mkdir(parents=True)
    (tmp_path / "folder" / "text").write_text("text")

    def refuse_in(function: Any) -> Any:
        def refusing(path: Any, *arguments: Any) -> Any:
            if Path(path) == tmp_path / unreadable:
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return function(path, *arguments)

        return refusing

    monkeypatch.setattr(os, "scandir", refuse_in(os.scandir))
    monkeypatch.setattr(Path, "read_bytes", refuse_in(Path.read_bytes))
    with pytest.raises(DataError) as error:
        read_texts(tmp_path / "folder")
    assert str(error.value) == f"cannot read {tmp_path / unreadable}: Permission denied"


def test_bytes_are_lossless() -> None:
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(TEXTS)
    assert tokens.dtype == torch.uint8
    assert bytes(tokens.tolist()) == "".join(t + "\0" for t in TEXTS).encode()
    assert tokenizer.decode(tokens) == "\0".join(TEXTS) + "\0"
    assert tokenizer.decode(torch.tensor([0xE2, 0x82, 65])) == "�A"
    assert tokenizer.encode([]).shape == (0,)


def test_bpe_is_lossless_and_shorter() -> None:
    pytest.importorskip("tokenizers", reason="tokenizers is not installed (extra `train`)")
    tokenizer = BPETokenizer.train(TEXTS, vocab_size=300)
    assert 257 < tokenizer.vocab_size <= 300
    tokens = tokenizer.encode(TEXTS)
    assert tokens.dtype == torch.int32
    assert tokens.min() >= 0 and tokens.max() < tokenizer.vocab_size
    assert tokenizer.decode(tokens) == "".join(text + BPETokenizer.END for text in TEXTS)
    assert len(tokens) < 0.7 * len(ByteTokenizer().encode(TEXTS))
    again = BPETokenizer.train(TEXTS, vocab_size=300)
    assert torch.equal(again.encode(TEXTS), tokens)
    assert tokenizer.encode([]).shape == (0,)


def test_bpe_has_a_token_for_every_byte() -> None:
    pytest.importorskip("tokenizers", reason="tokenizers is not installed (extra `train`)")
    tokenizer = BPETokenizer.train(["only plain letters"], vocab_size=260)
    unseen = "\x00\t€ 漢 😀"
    assert tokenizer.decode(tokenizer.encode([unseen])[:-1]) == unseen


def test_bpe_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="vocab_size=256 must be at least 257"):
        BPETokenizer.train(TEXTS, vocab_size=256)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match="needs the package tokenizers: pip install tokenizers"):
        BPETokenizer.train(TEXTS)


def test_sample_is_spread_over_the_texts() -> None:
    texts = [letter * 100_000 for letter in "abcdefgh"]
    sample = data._sample(texts, 200_000)
    assert 150_000 <= sum(map(len, sample)) <= 300_000
    assert len({piece[0] for piece in sample}) >= 3
    assert sum(map(len, data._sample(["x" * 800_000], 200_000))) <= 300_000
    assert data._sample(texts, 10_000_000) == [p for t in texts for p in (t[:65536], t[65536:])]


def test_split_holds_out_the_end() -> None:
    tokens = torch.arange(1000)
    train, validation = split(tokens, seq_len=10, validation=0.1)
    assert torch.equal(train, tokens[:900]) and torch.equal(validation, tokens[900:])
    train, validation = split(tokens[:40], seq_len=10, validation=0.1)
    assert len(validation) == 11  # one sequence at least
    with pytest.raises(DataError, match=r"the text has 21 tokens; two sequences of seq_len=10 need 22"):
        split(tokens[:21], seq_len=10)
    with pytest.raises(ValueError, match=r"validation=1.5 must be above 0 and below 1"):
        split(tokens, seq_len=10, validation=1.5)
    # A large share leaves the training one sequence, too.
    assert len(split(tokens[:22], seq_len=10, validation=0.9)[0]) == 11


def _take(iterator: Any, count: int) -> list[Any]:
    return [next(iterator) for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_batches_are_windows_one_token_apart(dtype: torch.dtype) -> None:
    tokens = torch.arange(200).to(dtype)
    for inputs, targets in _take(batches(tokens, 4, 16, seed=0), 20):
        assert inputs.shape == targets.shape == (4, 16)
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.is_contiguous() and targets.is_contiguous()
        assert torch.equal(inputs - inputs[:, :1], torch.arange(16).expand(4, -1))
        assert torch.equal(targets, inputs + 1)


def test_batches_reach_the_whole_text() -> None:
    """The first token and the last are drawn, and nothing beyond."""
    drawn = torch.cat([torch.cat(batch).flatten() for batch in _take(batches(torch.arange(6), 4, 4), 20)])
    assert set(drawn.tolist()) == set(range(6))
    inputs, targets = next(batches(torch.arange(5), 1, 4))
    assert inputs.tolist() == [[0, 1, 2, 3]] and targets.tolist() == [[1, 2, 3, 4]]


def test_batches_hang_on_their_seed_alone() -> None:
    tokens = torch.arange(1000)
    torch.manual_seed(1)
    first = _take(batches(tokens, 2, 8, seed=3), 5)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    second = _take(batches(tokens, 2, 8, seed=3), 5)
    other = _take(batches(tokens, 2, 8, seed=4), 5)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))
    assert not any(torch.equal(a[0], b[0]) for a, b in zip(first, other, strict=True))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_batches_start_where_a_training_stopped() -> None:
    tokens = torch.arange(1000)
    whole = _take(batches(tokens, 2, 8, seed=3), 6)
    resumed = _take(batches(tokens, 2, 8, seed=3, start=4), 2)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(whole[4:], resumed, strict=True))


def test_validation_batches_follow_each_other() -> None:
    tokens = torch.arange(50)
    found = validation_batches(tokens, 2, 10, limit=5)
    assert [tuple(inputs.shape) for inputs, _ in found] == [(2, 10), (2, 10)]
    assert torch.cat([inputs.flatten() for inputs, _ in found]).tolist() == list(range(40))
    found = validation_batches(torch.arange(51), 2, 10, limit=5)
    assert [tuple(inputs.shape) for inputs, _ in found] == [(2, 10), (2, 10), (1, 10)]
    assert found[-1][1].tolist() == [list(range(41, 51))]
    assert len(validation_batches(tokens, 1, 10, limit=3)) == 3


def test_batches_errors_come_at_once() -> None:
    """From the call, not from the first batch."""
    tokens = torch.arange(16)
    with pytest.raises(DataError, match="the text has 16 tokens; a sequence of seq_len=16 needs 17"):
        batches(tokens, 1, 16)
    with pytest.raises(DataError, match="needs 17"):
        validation_batches(tokens, 1, 16, limit=1)
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        batches(tokens, 0, 8)
    with pytest.raises(ValueError, match="seq_len=0 must be at least 1"):
        batches(tokens, 1, 0)
    with pytest.raises(ValueError, match="start=-1 must be at least 0"):
        batches(tokens, 1, 8, start=-1)
    with pytest.raises(ValueError, match="limit=0 must be at least 1"):
        validation_batches(tokens, 1, 8, limit=0)


@pytest.mark.gpu
def test_batches_go_to_the_gpu() -> None:
    tokens = torch.arange(1000)
    there, here = next(batches(tokens, 4, 16, device="cuda")), next(batches(tokens, 4, 16))
    assert there[0].is_cuda and there[1].is_cuda
    assert torch.equal(there[0].cpu(), here[0]) and torch.equal(there[1].cpu(), here[1])
