"""One progress bar on the terminal; a line now and then where there is no terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# Without a terminal, a line for every tenth of the work.
_LINES = 10


@contextmanager
def progress_bar(total: float) -> Iterator[Callable[[str, float], None]]:
    """Yields `advance(what goes on, units done)`. Drawn on standard error, so that results can be piped."""
    console = Console(stderr=True)
    if not console.is_terminal:
        advance = _lines(total)
        yield advance
        advance("done", total)  # rows that could not run leave the count short
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("starting", total=total)
        yield lambda text, units: bar.update(task, description=text, advance=units)
        bar.update(task, completed=total, description="done")


def _lines(total: float) -> Callable[[str, float], None]:
    done, shown = 0.0, -1

    def advance(text: str, units: float) -> None:
        nonlocal done, shown
        done = min(done + units, total)
        tenth = int(_LINES * done / total)
        if tenth > shown:
            shown = tenth
            print(f"{100 * done / total:3.0f} %  {text}", file=sys.stderr, flush=True)

    return advance
