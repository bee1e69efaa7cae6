"""Lines, tables and progress on the terminal, and the same text in a stage's log file.

rich is imported with the first table, colour or bar: lines alone need none of its 0.15 s.
"""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING

from fractal.errors import InputError, OutsideError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.progress import Progress

LINE_EVERY_S = 10.0  # between progress lines where stderr is no terminal
_log: IO[str] | None = None


@cache
def err() -> "Console":
    """For progress and colours."""
    from rich.console import Console

    return Console(stderr=True)


def say(*parts: "RenderableType") -> None:
    """Print to the terminal, and to the log of the stage that is running."""
    texts = [part for part in parts if isinstance(part, str)]
    if len(texts) == len(parts):
        for file in filter(None, (sys.stdout, _log)):
            print(*texts, file=file, flush=True)
        return
    from rich.console import Console
    from rich.text import Text

    plain = [Text(part) if isinstance(part, str) else part for part in parts]  # a path may hold [brackets]
    Console(soft_wrap=True).print(*plain, highlight=False)
    if _log is not None:
        Console(file=_log, width=120).print(*plain, highlight=False)
        _log.flush()


def colored(text: str, style: str) -> None:
    """A line on stderr, in colour where that is a terminal."""
    if not sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)
        return
    from rich.text import Text

    err().print(Text(text), style=style, highlight=False, soft_wrap=True)


def warn(text: str) -> None:
    colored(text, "yellow")
    if _log is not None:
        _log.write(f"warning: {text}\n")
        _log.flush()


@contextmanager
def logged(path: Path) -> Iterator[None]:
    """Append what the stage prints, and what libraries log, to a file; library messages stay off the terminal."""
    global _log
    path.parent.mkdir(parents=True, exist_ok=True)
    root = logging.getLogger()
    with path.open("a", encoding="utf-8") as file:
        handler = logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        before, root.handlers, _log = root.handlers, [handler], file
        level = root.level
        root.setLevel(logging.INFO)
        try:
            yield
        finally:
            root.handlers, _log = before, None
            root.setLevel(level)


@contextmanager
def quiet(activity: str) -> Iterator[None]:
    """Redirect what libraries write to standard output and error into the stage's log, and show a spinner instead.

    Outside a stage there is no log, and it is lost.
    """
    sink = _log or open(os.devnull, "a")  # noqa: SIM115
    sys.stdout.flush()
    sys.stderr.flush()
    from rich.console import Console

    saved = [os.dup(1), os.dup(2)]
    terminal = Console(file=os.fdopen(os.dup(2), "w"), force_terminal=sys.stderr.isatty())
    begin = time.monotonic()
    try:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
        with terminal.status(activity):
            yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, fd in enumerate(saved, 1):
            os.dup2(fd, number)
            os.close(fd)
        terminal.file.close()
        sink.write(f"{activity}: {time.monotonic() - begin:.1f} s\n")
        if sink is not _log:
            sink.close()


@contextmanager
def activity(name: str) -> Iterator[Callable[[str], None]]:
    """A spinner with seconds and what is being done; where stderr is no terminal, a plain line now and then."""
    if not sys.stderr.isatty():
        begin, doing, done = time.monotonic(), "", threading.Event()

        def update(text: str) -> None:
            nonlocal doing
            doing = text

        def print_lines() -> None:
            while not done.wait(LINE_EVERY_S):
                print(f"{name}: {time.monotonic() - begin:.0f} s, {doing}", file=sys.stderr, flush=True)

        thread = threading.Thread(target=print_lines, daemon=True)
        thread.start()
        try:
            yield update
        finally:
            done.set()
            thread.join()
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.text import Text

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[doing]}"),
    )
    with Progress(*columns, console=err(), transient=True) as progress:
        task = progress.add_task(name, total=None, doing="")
        yield lambda doing: progress.update(task, doing=Text(doing[:80]).plain)


class Bar:
    """One progress line on stderr; where that is no terminal (no `progress`), a plain line now and then."""

    def __init__(self, name: str, total: int, progress: "Progress | None" = None) -> None:
        self._name, self._total, self._progress = name, total, progress
        self._task = progress.add_task(name, total=total, note="") if progress is not None else None
        self._begin = time.monotonic()
        self._done = 0
        self._next_line_s = LINE_EVERY_S

    def beside(self, name: str, total: int) -> "Bar":
        """Another line below this one, for what runs at the same time; gone with this one."""
        return Bar(name, total, self._progress)

    def advance(self, count: int = 1, note: str = "") -> None:
        self._done += count
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, advance=count, note=note)
            return
        elapsed_s = time.monotonic() - self._begin
        if elapsed_s >= self._next_line_s:
            self._next_line_s = elapsed_s + LINE_EVERY_S
            parts = [f"{self._done}/{self._total}", f"{elapsed_s:.0f} s"]
            if self._done:
                parts.append(f"about {elapsed_s / self._done * (self._total - self._done):.0f} s left {note}".rstrip())
            elif note:
                parts.append(note)
            print(f"{self._name}: {', '.join(parts)}", file=sys.stderr, flush=True)


@contextmanager
def bar(name: str, total: int) -> Iterator[Bar]:
    """A progress bar with count, rate of progress and time left."""
    if not sys.stderr.isatty():
        yield Bar(name, total)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=err(), transient=True) as progress:
        yield Bar(name, total, progress)


def note(text: str, what: str = "image") -> None:
    """A line on stderr that begins with the name of the task."""
    print(f"{what}: {text}", file=sys.stderr, flush=True)


def report_errors(work: Callable[[], int | None], what: str = "image") -> int:
    """Run `work` and return an exit code: what it returned, or that of its error, which becomes one line on stderr."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that `finally` blocks still run
    try:
        return work() or 0
    except OutsideError as error:
        note(str(error), what)
        return 3
    except InputError as error:
        note(str(error), what)
        return 2
    except KeyboardInterrupt:
        note("interrupted. Run the command again, it goes on where it stopped.", what)
        return 130
    except BrokenPipeError:  # what reads our output has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
