"""Every way a worker process can end becomes a reason; none of them hangs or ends the parent."""

import os
import signal
import sys

import pytest

from benchmarks import processes
from benchmarks.processes import WorkerFailed, WorkerProcess, WorkerRefused, worker_environment

ECHO = """
import json, sys
setup = json.loads(sys.stdin.readline())
for line in sys.stdin:
    command = json.loads(line)
    for step in range(command.get("steps", 0)):
        print(json.dumps({"event": "step", "step": step}), flush=True)
    print(json.dumps({"event": command.get("answer", "done"), "reason": "because", **setup}), flush=True)
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "_PATIENCE_S", 30)  # a broken protocol fails rather than waits
    started = []

    def start_worker(source):
        name = f"worker_{len(started)}"
        (tmp_path / f"{name}.py").write_text(source)
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        worker = WorkerProcess(name, {"given": 7}, tmp_path / f"{name}.log", environment)
        started.append(worker)
        return worker

    yield start_worker
    for worker in started:
        worker.stop()


def test_answers_and_events_arrive_in_order(start):
    worker, events = start(ECHO), []
    last = worker.ask({"do": "train", "steps": 3}, events.append)
    assert [event["step"] for event in events] == [0, 1, 2]
    assert (last["event"], last["given"]) == ("done", 7)
    assert worker.ask({"do": "again"})["event"] == "done"


def test_refusal_leaves_the_worker_alive(start):
    worker = start(ECHO)
    with pytest.raises(WorkerRefused, match="because"):
        worker.ask({"do": "much", "answer": "refused"})
    assert worker.ask({"do": "little"})["event"] == "done"


@pytest.mark.parametrize(
    ("source", "reason"),
    (
        ("raise ValueError('no such thing')", "exit code 1: ValueError: no such thing"),
        ("raise SystemExit(3)", "exit code 3"),
        (
            "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
            "killed by SIGKILL, which is how a machine out",
        ),
        ("import os; os.abort()", "killed by SIGABRT"),
        ("import json; print(json.dumps({'event': 'failed', 'reason': 'no compiler'}))", "no compiler"),
    ),
)
def test_death_is_a_reason(start, source, reason):
    with pytest.raises(WorkerFailed) as failure:
        start(source).ask({"do": "anything"})
    assert str(failure.value).startswith(reason)


def test_death_after_some_answers(start):
    worker = start(ECHO.replace("command = json.loads(line)", "command = json.loads(line); command['steps']"))
    worker.ask({"do": "train", "steps": 1})
    with pytest.raises(WorkerFailed, match="exit code 1: KeyError: 'steps'"):
        worker.ask({"do": "memory"})


def test_silence_is_not_waited_out(start, monkeypatch):
    monkeypatch.setattr(processes, "_PATIENCE_S", 0.2)
    monkeypatch.setattr(processes, "_GOODBYE_S", 0.1)
    worker = start("import time; time.sleep(60)")
    with pytest.raises(WorkerFailed, match="no answer within 0 s"):
        worker.ask({"do": "anything"})
    worker.stop()
    assert worker._process.returncode == -signal.SIGKILL


def test_workers_run_without_tritons_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    environment = worker_environment({"ADDED": "1"})
    assert "TRITON_INTERPRET" not in environment
    assert environment["ADDED"] == "1"
    paths = environment["PYTHONPATH"].split(os.pathsep)
    assert paths == [str(processes.REPOSITORY), "elsewhere"]
    assert sys.executable
