"""What a push shows: a line for each layer under way; where stderr is no terminal, a plain line now and then."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from fractal.console import err

PLAIN_S = 10.0
DONE = ("Layer already exists", "Mounted from", "Pushed")


class Board:
    """Told every event of an engine's push."""

    def __init__(self, name: str, progress: Progress) -> None:
        self._name, self._progress = name, progress
        self._lines: dict[str, TaskID] = {}
        self._done: dict[str, bool] = {}
        self._bytes: dict[str, tuple[int, int]] = {}  # of layers under way or sent: so far, in all; uncompressed
        self._whole = progress.add_task(name, total=None, amount="")
        self._begun = time.monotonic()
        self._next_line = self._begun + PLAIN_S

    def see(self, event: dict[str, Any]) -> None:
        layer, status = event.get("id"), str(event.get("status", ""))
        if layer is None:
            return
        self._done[layer] = status.startswith(DONE)
        detail = event.get("progressDetail") or {}
        if status == "Pushing" and "current" in detail:
            total = max(detail.get("total", 0), detail["current"])  # tar's own blocks come on top of the files' sizes
            self._bytes[layer] = detail["current"], total
        self._show(layer, status)
        if not sys.stderr.isatty() and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + PLAIN_S
            print(self.line(), file=sys.stderr, flush=True)

    def line(self) -> str:
        """All of it in one line."""
        done, total = (sum(pair[end] for pair in self._bytes.values()) / 1e6 for end in (0, 1))
        layers = f"{sum(self._done.values())} of {len(self._done)} layers are there"
        return f"{self._name}: {layers}, {done:.0f} of {total:.0f} MB sent, {time.monotonic() - self._begun:.0f} s"

    def _show(self, layer: str, status: str) -> None:
        finished = sum(self._done.values())
        self._progress.update(
            self._whole, total=len(self._done), completed=finished, amount=f"{finished}/{len(self._done)}"
        )
        line = self._lines.get(layer)
        if self._done[layer]:
            if line is not None:
                self._progress.update(line, visible=False)
            return
        done, total = self._bytes.get(layer, (0, 0))
        if total:
            amount = f"{done / 1e6:.1f}/{total / 1e6:.1f} MB" if status == "Pushing" else status.lower()
            if line is None:
                line = self._lines[layer] = self._progress.add_task(f"  {layer}", total=total, amount="")
            self._progress.update(line, total=total, completed=done, amount=amount, visible=True)


@contextmanager
def board(name: str) -> Iterator[Board]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(30),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not sys.stderr.isatty()) as progress:
        yield Board(name, progress)
