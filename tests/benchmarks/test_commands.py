"""The commands' errors: one line on standard error, exit code 2, and nothing trained or timed before."""

import os
import socket
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as commands
from benchmarks import demo, environment, run_options
from benchmarks import run as run_module
from benchmarks.demo_options import DemoOptions
from benchmarks.suites import SUITES
from fastattn import dispatch


@pytest.fixture
def refused(monkeypatch, capfd):
    """Runs a command that must refuse; returns its line."""

    def started(*arguments, **keywords):
        raise AssertionError("work began before the arguments were checked")

    monkeypatch.setattr(demo.Demo, "run", started)
    monkeypatch.setattr(run_module, "run_suites", started)

    def run(*arguments):
        try:
            code = commands.main([str(argument) for argument in arguments])
        except SystemExit as left:  # argparse
            code = left.code
        out, err = capfd.readouterr()
        assert code == 2
        assert out == ""
        return err.strip().splitlines()[-1]

    return run


def one_line(line):
    assert line.startswith("python -m benchmarks: ")
    return line.removeprefix("python -m benchmarks: ")


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("A text that is long enough. " * 200)
    return path


def test_data_that_is_not_there(refused, tmp_path):
    line = one_line(refused("demo", "--data", tmp_path / "none.txt", "--out", tmp_path / "out"))
    assert line == f"cannot use the text: cannot read {tmp_path}/none.txt: No such file or directory"
    assert not (tmp_path / "out").exists()


def test_data_that_is_empty(refused, tmp_path):
    (tmp_path / "empty").write_text("")
    assert one_line(refused("demo", "--data", tmp_path / "empty")).endswith("/empty is empty")


@pytest.mark.parametrize("content", (b"\x89PNG\r\n\x1a\n" * 999, b"zeros are valid UTF-8: " + bytes(9999)))
def test_data_that_is_not_text(refused, tmp_path, content):
    (tmp_path / "binary").write_bytes(content)
    line = one_line(refused("demo", "--data", tmp_path / "binary"))
    assert "is not UTF-8 text: byte 0 is 0x89" in line or "NUL character" in line


def test_data_that_is_too_short(refused, tmp_path):
    (tmp_path / "short").write_text("123456789")
    line = one_line(refused("demo", "--data", tmp_path / "short", "--seq-len", 16))
    assert line == "the text has 10 tokens; --seq-len 16 needs at least 17"


def test_data_that_cannot_be_read(refused, tmp_path):
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.fspath(path))
        assert one_line(refused("demo", "--data", path)).endswith("is a device, not a file")
    assert one_line(refused("demo", "--data", "/dev/null")).endswith("/dev/null is a device, not a file")


def test_an_empty_folder_as_data(refused, tmp_path):
    (tmp_path / "folder").mkdir()
    assert "no text" in one_line(refused("demo", "--data", tmp_path / "folder"))


@pytest.mark.usefixtures("no_interpreter")
@pytest.mark.parametrize("command", ("demo", "run"))
def test_folder_that_cannot_be_written(command, refused, text):
    data = ("--data", text, "--seq-len", 16) if command == "demo" else ()
    line = one_line(refused(command, *data, "--out", text / "sub"))
    assert line == f"cannot write results to {text}/sub: Not a directory"


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (("--steps", 0), "--steps 0 must be at least 1"),
        (("--batch-size", -1), "--batch-size -1 must be at least 1"),
        (("--seq-lens", 64, 0), "--seq-lens 0 must be at least 1"),
        (("--width", 100, "--heads", 3), "d_model=100 must be divisible by n_heads=3"),
        (("--learning-rate", "nan"), "--learning-rate nan must be above 0 and finite"),
        (("--device", "tpu"), "--device tpu must be cpu or cuda"),
    ),
)
def test_demo_options_out_of_range(arguments, message, refused, text):
    assert one_line(refused("demo", "--data", text, *arguments)) == message


def test_unknown_implementation_lists_the_known(refused):
    line = refused("demo", "--implementations", "flash")
    assert "invalid choice: 'flash'" in line
    assert "fastattn-compile" in line


def test_run_under_the_interpreter(refused, monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETING", True)
    assert one_line(refused("run")).startswith("TRITON_INTERPRET is set")


@pytest.mark.usefixtures("no_interpreter")
@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (
            "--suite matmul",
            f"suite 'matmul' is unknown; there are {', '.join(SUITES)}, train, ",
        ),
        ("--providers typo", "no provider has 'typo' in its name; there are fastattn, "),
        ("--suite mlp --cases typo", "no case has 'typo' in its name; there are fp32-erf-1024x4096, "),
        ("--rounds 0", "--rounds 0 must be at least 1"),
        (
            "--suite mlp --providers xformers",
            "no provider has 'xformers' in its name; there are fastattn, fastattn-",
        ),
        ("--suite host --providers torch", "no provider has 'torch' in its name; there are none"),
        ("--minutes 0", "--minutes 0 must be above 0"),
        ("--minutes nan", "--minutes nan must be above 0"),
        ("--device tpu", "--device tpu must be cpu or cuda"),
        ("--device cpu:foo", "--device cpu:foo must be cpu or cuda"),
        ("--device cuda", "--device cuda: PyTorch finds no GPU here"),
        ("--with none.py", "--with none.py: there is no such Python file"),
        ("--compare none.json", "--compare none.json: "),
    ),
)
def test_run_lists_what_is_known(arguments, message, refused, tmp_path):
    line = one_line(refused("run", *arguments.split(), "--out", tmp_path / "out"))
    assert line.startswith(message)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_interpreter")
def test_run_resumes_a_folder_only(refused):
    assert one_line(refused("run", "--resume")).startswith("--resume needs --out DIR")


@pytest.mark.usefixtures("no_interpreter")
@pytest.mark.parametrize("name", ("rows.jsonl", "rows.csv", "results.json", "report.html"))
def test_run_finds_out_first_whether_each_of_its_files_can_be_written(name, refused, tmp_path):
    (tmp_path / name).mkdir()
    line = one_line(refused("run", "--device", "cpu", "--out", tmp_path))
    assert line == f"cannot write results to {tmp_path / name}: Is a directory"


@pytest.mark.usefixtures("no_interpreter")
@pytest.mark.parametrize(
    "content",
    (
        "[]",
        '{"rows": 3, "environment": {}}',
        '{"rows": [3], "environment": {}}',
        '{"rows": [{"case": "x"}], "environment": {}}',
        '{"rows": [], "environment": []}',
    ),
)
def test_run_compares_with_nothing_but_a_run(content, refused, tmp_path):
    path = tmp_path / "old.json"
    path.write_text(content)
    line = one_line(refused("run", "--device", "cpu", "--compare", path))
    assert line == f"--compare {path} is no results.json of a run"


@pytest.mark.usefixtures("no_interpreter")
@pytest.mark.parametrize(
    "leave", ("import sys; sys.exit('used wrongly')", "raise SystemExit('used wrongly')")
)
def test_a_file_of_providers_that_leaves(leave, refused, tmp_path):
    path = tmp_path / "script.py"
    path.write_text(leave)
    line = one_line(refused("run", "--device", "cpu", "--with", path))
    assert line == f"--with {path}: SystemExit: used wrongly"


@pytest.fixture
def two_gpus(monkeypatch):
    """As far as PyTorch is asked; the one that was chosen."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


@pytest.mark.usefixtures("no_interpreter")
def test_a_gpu_that_is_not_there(refused, two_gpus):
    assert one_line(refused("run", "--device", "cuda:2")) == "--device cuda:2: there are 2, counted from 0"


def test_the_chosen_gpu_is_the_current_one(two_gpus):
    """Triton launches on the current device, and events are recorded on it, whatever the tensors say."""
    assert run_options._device("cuda:1") == torch.device("cuda:1")
    assert two_gpus == [torch.device("cuda:1")]


def test_the_driver_is_asked_about_the_gpu_by_its_own_name(monkeypatch):
    """nvidia-smi counts all GPUs of a machine, PyTorch those that it may see: the first was asked always."""
    asked = []

    def output(command):
        asked.append(command)
        return "580.1, 1980" if any(part == "--id=GPU-b" for part in command) else "0.0, 0"

    uuids = {1: SimpleNamespace(uuid="b"), 2: SimpleNamespace()}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: uuids[device.index])
    monkeypatch.setattr(environment, "_output", output)
    assert environment._nvidia_smi(torch.device("cuda:1"), "a", "b") == ["580.1", "1980"]
    assert environment._nvidia_smi(torch.device("cuda:2"), "a", "b") == ["0.0", "0"]


def test_bpe_without_its_package(refused, monkeypatch, text):
    find = commands.importlib.util.find_spec
    monkeypatch.setattr(
        commands.importlib.util, "find_spec", lambda name: None if name == "tokenizers" else find(name)
    )
    line = one_line(refused("demo", "--data", text, "--tokenizer", "bpe"))
    assert line == "--tokenizer bpe needs the package tokenizers: pip install tokenizers"


def test_plotting_without_its_package(refused, monkeypatch):
    find = commands.importlib.util.find_spec
    monkeypatch.setattr(
        commands.importlib.util, "find_spec", lambda name: None if name == "rich" else find(name)
    )
    assert one_line(refused("run")) == "the benchmarks need rich: pip install rich"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.usefixtures("no_interpreter")
def test_gpu_without_a_gpu(refused, tmp_path):
    line = one_line(refused("gpu", "--out", tmp_path / "out"))
    assert line.startswith("PyTorch finds no GPU here")
    assert not (tmp_path / "out").exists()
    line = one_line(refused("run", "--device", "cuda"))
    assert line == "--device cuda: PyTorch finds no GPU here"
    assert one_line(refused("demo", "--device", "cuda")) == line


def test_interruption_is_one_line(monkeypatch, capfd, text, tmp_path):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo.Demo, "run", interrupted)
    out = str(tmp_path / "out")
    assert commands.main(["demo", "--data", str(text), "--seq-len", "16", "--out", out]) == 130
    assert "interrupted; demo.jsonl" in one_line(capfd.readouterr().err.strip().splitlines()[-1])


def test_results_folders_of_the_demo_are_dated_and_never_reused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = demo.make_folder(None), demo.make_folder(None)
    assert first != second
    assert first.parent.name == second.parent.name == "demo-results"


def test_a_text_shorter_than_the_plot_is_enough(text):
    """Only the training needs so many tokens; the lengths of the plot repeat the text."""
    tokens, vocabulary = demo.load_tokens(DemoOptions(data=(str(text),), seq_len=64, seq_lens=(1 << 20,)))
    assert (len(tokens), vocabulary) == (200 * 28 + 1, 256)
