"""Worker processes seen from the parent: start, ask, and turn every way to die into a reason."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.environment import REPOSITORY

Event = dict[str, Any]

# Longer than any compilation or step; a process that is silent for so long hangs.
_PATIENCE_S = 900.0
# What a process that is asked to end may take for it.
_GOODBYE_S = 5.0


class WorkerFailed(Exception):
    """A process died, hangs or gave up; the message is the reason in one line."""


class WorkerRefused(Exception):
    """A process could not do one thing and lives on; the message is the reason in one line."""


class WorkerProcess:
    """A child that reads JSON commands and answers with JSON events, one a line.

    Args:
        module: run as `python -m module`.
        setup: its first line of input.
        log: file that takes what it writes to its standard error.
        environment: its environment variables.
    """

    def __init__(self, module: str, setup: dict[str, Any], log: Path, environment: dict[str, str]) -> None:
        self.log = log
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                encoding="utf-8",
                cwd=REPOSITORY,
                env=environment,
            )
        self._events: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self._send(setup)

    def ask(self, command: dict[str, Any], on_event: Callable[[Event], None] | None = None) -> Event:
        """Sends a command, hands each event before the last to `on_event`, returns the last.

        Raises:
            WorkerFailed: the process is gone or silent.
            WorkerRefused: it lives, but could not do this.
        """
        self.begin(command)
        return self.wait("done", on_event)

    def begin(self, command: dict[str, Any]) -> None:
        """Sends a command without waiting for its answer; `wait("done")` takes that."""
        self._send(command)

    def wait(self, last: str, on_event: Callable[[Event], None] | None = None) -> Event:
        while True:
            event = self._next()
            if event["event"] == last:
                return event
            if event["event"] == "failed":
                raise WorkerFailed(event["reason"])
            if event["event"] == "refused":
                raise WorkerRefused(event["reason"])
            if on_event is not None:
                on_event(event)

    def stop(self) -> None:
        """Ends the process, politely first."""
        try:
            if self._process.stdin is not None:
                self._process.stdin.close()
            self._process.wait(timeout=_GOODBYE_S)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it is gone; the next read says why

    def _next(self) -> Event:
        try:
            line = self._events.get(timeout=_PATIENCE_S)
        except queue.Empty:
            raise WorkerFailed(f"no answer within {_PATIENCE_S:.0f} s") from None
        if line is None:
            raise WorkerFailed(self._epitaph())
        event: Event = json.loads(line)
        return event

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._events.put(line)
        self._events.put(None)

    def _epitaph(self) -> str:
        code = self._process.wait()
        if code < 0:
            hint = ", which is how a machine out of memory ends a process" if code == -signal.SIGKILL else ""
            return f"killed by {signal.Signals(-code).name}{hint}"
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return f"exit code {code}: {lines[-1][:160]}" if lines else f"exit code {code}"


def worker_environment(extra: dict[str, str]) -> dict[str, str]:
    """This process's environment for a worker: the checkout importable, Triton's interpreter off."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = [str(REPOSITORY), *filter(None, [environment.get("PYTHONPATH")])]
    return {**environment, "PYTHONPATH": os.pathsep.join(paths), **extra}
