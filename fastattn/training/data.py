"""Text to batches: real text that is on every machine, two tokenizers, seeded batches.

texts = read_texts()
tokenizer = ByteTokenizer()
train_tokens, validation_tokens = split(tokenizer.encode(texts), seq_len=256)
for inputs, targets in batches(train_tokens, batch_size=8, seq_len=256, seed=0):
    ...
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

# What lies beside the standard library's own source: other people's packages, tests full of odd bytes, and
# the documentation in string literals, which is read as the text that it is.
_OTHERS_PACKAGES = {"dist-packages", "site-packages"}
_TESTS = {"idle_test", "lib2to3", "test", "tests"}
_SKIPPED_FOLDERS = {"__pycache__", "pydoc_data"} | _OTHERS_PACKAGES | _TESTS


class DataError(ValueError):
    """The text cannot be used; the message says in one line which file or size, and why."""


def read_texts(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]] | None = None,
) -> list[str]:
    """Documents in a fixed order, so that the same files always make the same tokens.

    Args:
        paths: one or more UTF-8 text files, and folders whose text files are taken recursively in sorted
            order (what is not a regular file of UTF-8 in a folder is passed over). None takes the running
            Python's own standard library: its source files (about 12 MB), then its documentation of the
            language (0.5 MB).

    Returns:
        one string a document, none of them empty.

    Raises:
        DataError: a path cannot be read, is empty or is not UTF-8, or there is no text at all.
    """
    if paths is None:
        return _standard_library()
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    texts = []
    for path in map(Path, paths):
        texts += _read_folder(path) if path.is_dir() else [_read_file(path)]
    if not texts:
        raise DataError("no files were given to read text from")
    return texts


class ByteTokenizer:
    """One token a byte of UTF-8; byte 0, which text does not hold, ends a document."""

    vocab_size = 256

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Tokens of all documents in order, (length,) uint8."""
        data = bytearray("".join(text + "\0" for text in texts), "utf-8")
        # torch.frombuffer refuses an empty buffer.
        return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)

    def decode(self, tokens: Tensor) -> str:
        """Text of (length,) token ids; a byte sequence that is not UTF-8 shows as a replacement sign."""
        return bytes(tokens.tolist()).decode("utf-8", errors="replace")


class BPETokenizer:
    """Byte-level byte-pair encoding, trained on the text itself; needs the `tokenizers` package.

    Source: Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units" (2016); over bytes
    as in Radford et al. (2019), section 2.2.
    """

    END = "<|endoftext|>"

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.vocab_size: int = tokenizer.get_vocab_size()
        self._end: int = tokenizer.token_to_id(self.END)

    @classmethod
    def train(
        cls, texts: Sequence[str], vocab_size: int = 8192, sample_bytes: int = 4_000_000
    ) -> BPETokenizer:
        """Learns the merges from documents spread evenly over the text.

        Args:
            texts: the documents, as `read_texts` returns them.
            vocab_size: at most so many tokens; at least 257, the bytes and the end of a document.
            sample_bytes: about how much text to learn from; 4 MB take a few seconds.

        Raises:
            ImportError: `tokenizers` is not installed.
            ValueError: vocab_size is below 257.
        """
        if vocab_size < 257:
            raise ValueError(f"vocab_size={vocab_size} must be at least 257")
        try:
            library = import_module("tokenizers")
        except ImportError as error:
            raise ImportError("BPETokenizer needs the package tokenizers: pip install tokenizers") from error
        bytes_as_letters = library.pre_tokenizers.ByteLevel
        tokenizer = library.Tokenizer(library.models.BPE())
        tokenizer.pre_tokenizer = bytes_as_letters(add_prefix_space=False)
        tokenizer.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[cls.END],
            initial_alphabet=bytes_as_letters.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(_sample(texts, sample_bytes), trainer)
        return cls(tokenizer)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Tokens of all documents in order, (length,) int32."""
        end = torch.tensor([self._end], dtype=torch.int32)
        tokens = []
        for i in range(0, len(texts), 256):  # an encoding is many times its text: some documents at a time
            for encoding in self._tokenizer.encode_batch_fast(list(texts[i : i + 256])):
                tokens += [torch.tensor(encoding.ids, dtype=torch.int32), end]
        return torch.cat(tokens) if tokens else end[:0]

    def decode(self, tokens: Tensor) -> str:
        """Text of (length,) token ids."""
        return self._tokenizer.decode(tokens.tolist(), skip_special_tokens=False)


def _sample(texts: Sequence[str], size: int) -> list[str]:
    """Pieces of 64 K characters spread evenly over the texts, about `size` characters in all."""
    length = 1 << 16
    pieces = [text[i : i + length] for text in texts for i in range(0, len(text), length)]
    total = sum(map(len, pieces))
    return pieces[:: max(1, total // max(1, size))]


def split(tokens: Tensor, seq_len: int, validation: float = 0.05) -> tuple[Tensor, Tensor]:
    """Holds out the last part of the tokens: (training tokens, validation tokens), both views.

    Args:
        tokens: (length,) integers.
        seq_len: each part has at least one sequence of so many tokens, and the target after its last.
        validation: the fraction to hold out, above 0 and below 1.

    Raises:
        DataError: the text is too short for two sequences.
        ValueError: the fraction is out of range.
    """
    if not 0.0 < validation < 1.0:
        raise ValueError(f"validation={validation} must be above 0 and below 1")
    least = 2 * (seq_len + 1)
    if tokens.numel() < least:
        raise DataError(
            f"the text has {tokens.numel()} tokens; two sequences of seq_len={seq_len} need {least}"
        )
    held_out = min(max(int(tokens.numel() * validation), seq_len + 1), tokens.numel() - seq_len - 1)
    return tokens[:-held_out], tokens[-held_out:]


def batches(
    tokens: Tensor,
    batch_size: int,
    seq_len: int,
    seed: int = 0,
    *,
    start: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless random windows of the text, the same ones for the same arguments on every device.

    Args:
        tokens: (length,) integers, as a tokenizer's `encode` returns them.
        batch_size: windows a batch.
        seq_len: tokens a window.
        seed: chooses the windows; the global random state is neither read nor changed.
        start: begins after so many batches, as a resumed training does.
        device: where the batches go; to a GPU through pinned memory, without waiting.

    Returns:
        an iterator of (inputs, targets), each (batch_size, seq_len) int64; targets are one token ahead.

    Raises:
        DataError: the text is too short for one window.
        ValueError: a size is below 1, or start below 0.
    """
    _check_sizes(tokens, batch_size, seq_len)
    if start < 0:
        raise ValueError(f"start={start} must be at least 0")
    return _random_batches(tokens, batch_size, seq_len, seed, start, torch.device(device))


def validation_batches(
    tokens: Tensor, batch_size: int, seq_len: int, limit: int, *, device: torch.device | str = "cpu"
) -> list[tuple[Tensor, Tensor]]:
    """At most `limit` batches of windows that follow each other and do not overlap, from the beginning.

    The last batch may be smaller. Shapes, devices and errors are those of `batches`.
    """
    _check_sizes(tokens, batch_size, seq_len)
    if limit < 1:
        raise ValueError(f"limit={limit} must be at least 1")
    windows = torch.arange(0, tokens.numel() - seq_len, seq_len)[: batch_size * limit]
    return [_cut(tokens, offsets, seq_len, torch.device(device)) for offsets in windows.split(batch_size)]


def _check_sizes(tokens: Tensor, batch_size: int, seq_len: int) -> None:
    for name, value in (("batch_size", batch_size), ("seq_len", seq_len)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if tokens.numel() < seq_len + 1:
        raise DataError(
            f"the text has {tokens.numel()} tokens; a sequence of seq_len={seq_len} needs {seq_len + 1}"
        )


def _random_batches(
    tokens: Tensor, batch_size: int, seq_len: int, seed: int, start: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    step = 0
    while True:
        offsets = torch.randint(0, tokens.numel() - seq_len, (batch_size,), generator=generator)
        if step >= start:
            yield _cut(tokens, offsets, seq_len, device)
        step += 1


def _cut(tokens: Tensor, offsets: Tensor, seq_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The windows that begin at `offsets`, as (inputs, targets)."""
    windows = tokens[offsets[:, None] + torch.arange(seq_len + 1)].long()  # (batch_size, seq_len + 1)
    inputs, targets = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
    if device.type == "cuda":
        inputs, targets = inputs.pin_memory(), targets.pin_memory()
    return inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)


def _standard_library() -> list[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = [text for path in _files(root, ".py", _SKIPPED_FOLDERS) if (text := _try_read(path))]
    try:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions leave it out
        topics = {}
    texts += [topics[name] for name in sorted(topics) if topics[name]]
    if not texts:
        raise DataError(f"no source files of the standard library are in {root}; give text files instead")
    return texts


def _read_folder(folder: Path) -> list[str]:
    paths = _files(folder, "", {"__pycache__"}, onerror=_refuse)
    texts = [text for path in paths if (text := _try_read(path, onerror=_refuse))]
    if not texts:
        raise DataError(f"no text in UTF-8 is in the folder {folder}")
    return texts


def _files(
    root: Path, suffix: str, skipped: set[str], onerror: Callable[[OSError], object] | None = None
) -> list[Path]:
    """Files below root by sorted relative path, without hidden ones and pipes, which may never end."""
    found = []
    for folder, folders, names in os.walk(root, onerror=onerror):
        folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
        paths = [Path(folder, name) for name in names if name.endswith(suffix) and not name.startswith(".")]
        found += [path for path in paths if os.path.isfile(path)]
    return sorted(found, key=lambda path: path.relative_to(root).parts)


def _try_read(path: Path, onerror: Callable[[OSError], object] | None = None) -> str | None:
    """The text of a file in a folder, or None where it has none."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None
    except OSError as error:
        if onerror is not None:
            onerror(error)
        return None


def _refuse(error: OSError) -> NoReturn:
    raise DataError(f"cannot read {error.filename}: {error.strerror or error}") from error


def _read_file(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        _refuse(error)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise DataError(f"{path} is not UTF-8 text: byte {error.start} is {byte:#04x}") from error
    if not text:
        raise DataError(f"{path} is empty")
    return text
