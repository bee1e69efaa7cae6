"""Standard input and output, `input` and `print`, where a test has put its own in their place.

The test's streams are the judge's, so a call that it makes meanwhile takes along what the program may read, and brings
back what the program printed. Standard library only; `Patched` is the judge's part, `call_with` the candidate's.
"""

import builtins
import io
import sys
from collections.abc import Callable
from typing import Any

FUNCTIONS = ("input", "print")
STREAMS = ("stdout", "stderr")
MENTIONS = ("stdin", "stdout", "stderr", "builtins", "patch")  # words of tests that may do such a thing
_FUNCTIONS = {name: getattr(builtins, name) for name in FUNCTIONS}
_STREAMS = {name: getattr(sys, name) for name in ("stdin", *STREAMS)}


def restore() -> None:
    """Put back what the tests replaced."""
    for name, function in _FUNCTIONS.items():
        setattr(builtins, name, function)
    for name, stream in _STREAMS.items():
        setattr(sys, name, stream)


def patched() -> bool:
    """Whether the test has replaced any of them. It is asked before every call."""
    return (
        sys.stdout is not _STREAMS["stdout"]
        or builtins.input is not _FUNCTIONS["input"]
        or builtins.print is not _FUNCTIONS["print"]
        or sys.stdin is not _STREAMS["stdin"]
        or sys.stderr is not _STREAMS["stderr"]
    )


class Patched:
    """The test's streams during one call."""

    def __init__(self) -> None:
        self.functions = {
            n: calling(getattr(builtins, n)) for n in FUNCTIONS if getattr(builtins, n) is not _FUNCTIONS[n]
        }
        self.captured = [n for n in STREAMS if getattr(sys, n) is not _STREAMS[n]]
        self.text: str | None = None
        self._start: Any = None
        stream = sys.stdin
        if stream is not _STREAMS["stdin"] and isinstance(stream, io.TextIOBase):
            self._start = stream.tell() if stream.seekable() else None
            self.text = stream.read()
        self.binary = hasattr(stream, "buffer")

    def data(self, encode: Callable[[Any], Any]) -> list[Any]:
        """What goes with the call."""
        return [self.text, self.binary, self.captured, [[n, encode(f)] for n, f in self.functions.items()]]

    def take(self, printed: Any, left: Any) -> None:
        """Give the test what the program printed and did not read. Raises ValueError for what is no answer."""
        if type(printed) is not list or type(left) is not int or not all(type(text) is str for text in printed):
            raise ValueError("not what was printed")
        for name, text in zip(self.captured, printed, strict=True):
            if text:
                getattr(sys, name).write(text)
        if self.text is not None and self._start is not None and 0 < left <= len(self.text):
            sys.stdin.seek(self._start)
            sys.stdin.read(len(self.text) - left)


def calling(function: Any) -> Callable[..., Any]:
    """A function that can cross, for a mock, say."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return call


class _Output(io.TextIOWrapper):
    """A text that has a buffer, too, as standard output has."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO(), "utf-8", "surrogatepass", newline="\n", write_through=True)

    def text(self) -> str:
        self.flush()
        data: bytes = self.buffer.getvalue()  # type: ignore[attr-defined]
        return data.decode("utf-8", "replace")


class Replaced:
    """The program's streams during one call that came with the test's."""

    def __init__(self, text: str | None, binary: bool, captured: list[str], functions: list[list[Any]]) -> None:
        self._before = {name: getattr(sys, name) for name in ("stdin", *STREAMS)}
        self._functions = {name: getattr(builtins, name) for name, _ in functions}
        self._outputs = {name: _Output() for name in captured}
        self._input: Any = None
        if text is not None:
            data = io.BytesIO(text.encode("utf-8", "surrogatepass"))
            self._input = sys.stdin = io.TextIOWrapper(data, "utf-8", "surrogatepass") if binary else io.StringIO(text)
        for name, output in self._outputs.items():
            setattr(sys, name, output)
        for name, function in functions:
            setattr(builtins, name, function)

    def restore(self) -> list[Any]:
        """Put the program's own back: what was printed, by stream, and how many characters were not read."""
        for name, stream in self._before.items():
            setattr(sys, name, stream)
        for name, function in self._functions.items():
            setattr(builtins, name, function)
        try:
            left = len(self._input.read()) if self._input is not None else 0
        except ValueError:  # closed
            left = 0
        return [[output.text() for output in self._outputs.values()], left]
