"""Tests that are calls: their arguments as they are sent to a program, and how a result is compared.

Trusted, in the judge, and pure: it runs nothing (call_runner.py does). Standard library only.
"""

import base64
import hashlib
import json
import zlib
from dataclasses import dataclass
from functools import cached_property
from types import CodeType
from typing import Any

from fractal.sandbox.inside.protocol import Decoder, Encoder, ProtocolError, Reference, Unencodable, frame

RELATIVE = 1e-7  # tolerance beside `atol`: numpy.allclose's in EvalPlus (evalplus/eval/__init__.py, version 0.3.1)
COMPRESSED = "zlib:"  # before a text in base64
LARGE = 1 << 16  # bytes of a text that are compressed
FLOAT_ATOL = 1e-6  # `atol` where the problem has none and floats are expected: EvalPlus's


class ExpectedValue:
    """What a call is expected to return, kept as text: most answers are the same bytes, and need not be decoded.

    Large texts are compressed (HumanEval+ has a problem with 147 MB of them), and come so from the host.
    """

    __slots__ = ("_data", "_digest")

    def __init__(self, text: str) -> None:
        self._digest = b""
        if text.startswith(COMPRESSED):
            self._data = base64.b64decode(text.removeprefix(COMPRESSED))
            self._digest = _digest(zlib.decompress(self._data))
        else:
            self._data = text.encode("utf-8")

    def is_text(self, data: bytes) -> bool:
        """Whether an encoded result is this very text; NaN equals nothing, so it is not."""
        same = data == self._data if not self._digest else _digest(data) == self._digest
        return same and b"NaN" not in data

    def value(self) -> Any:
        return _decode(zlib.decompress(self._data) if self._digest else self._data)


@dataclass
class Calls:
    """A problem's calls as the judge uses them."""

    frames: list[bytes]  # what is sent for each
    arguments: list[str]  # tagged JSON
    expected: list[ExpectedValue] | None  # None: record what the program returns; it is the reference
    compare: CodeType | None
    atol: float

    @cached_property
    def tolerance(self) -> float:
        """`atol`, or FLOAT_ATOL where there is none and floats are expected somewhere, as EvalPlus has it."""
        floats = any(_is_floats(expected.value()) for expected in self.expected or ())
        return self.atol or (FLOAT_ATOL if floats else 0.0)


def prepare_calls(problem: dict[str, Any]) -> Calls:
    """Raises SyntaxError or ProtocolError for a problem whose comparison or values cannot be read."""
    target = json.dumps(problem["entry_point"]).encode()
    return Calls(
        frames=[frame(b'["q","run",%b,%b]' % (target, text.encode("utf-8"))) for text in problem["tests"]],
        arguments=problem["tests"],
        expected=None if problem["record"] else [*map(ExpectedValue, problem["expected"])],
        compare=compile(problem["compare"], "<compare>", "eval") if problem["compare"] else None,
        atol=problem["atol"],
    )


def recorded(data: bytes) -> str:
    """What a reference returned, encoded, as the text of an expected value. Raises ProtocolError if it is not plain."""
    _decode(data)
    if len(data) < LARGE:
        return data.decode("utf-8")
    return COMPRESSED + base64.b64encode(zlib.compress(data)).decode("ascii")


def _decode(data: bytes) -> Any:
    return Decoder(_refuse_reference).decode(data)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=32).digest()


def is_right(calls: Calls, number: int, result: Any, expected: Any) -> bool:
    """Whether a call's result is what is expected: as `compare` says, or equal, or within the tolerance."""
    if calls.compare is not None:
        args = _decode(calls.arguments[number].encode("utf-8"))
        try:
            if eval(calls.compare, {"args": args, "result": result, "expected": expected}):
                return True
        except Exception:  # the result is not what the comparison is made for
            return False
    elif result == expected:
        return True
    return type(result) is type(expected) and calls.tolerance > 0 and _is_close(result, expected, calls.tolerance)


def _is_floats(value: Any) -> bool:
    """As EvalPlus decides that a result is compared with tolerance: a float, or a list or tuple of floats."""
    if isinstance(value, list | tuple):
        return bool(value) and all(isinstance(item, float) for item in value)
    return isinstance(value, float)


def _is_close(result: Any, expected: Any, atol: float) -> bool:
    if isinstance(expected, list | tuple):
        if not isinstance(result, list | tuple) or len(result) != len(expected):
            return False
        return all(_is_close(a, b, atol) for a, b in zip(result, expected, strict=True))
    if not isinstance(expected, int | float | complex) or not isinstance(result, int | float | complex):
        return False
    try:
        return result == expected or abs(result - expected) <= atol + RELATIVE * abs(expected)
    except OverflowError:  # an integer beyond any float
        return False


def shorten(value: Any) -> str:
    """A value for a label's detail; no proxy in it is asked for its text."""
    try:
        text = json.dumps(Encoder(refuse_object).encode(value))
    except (Unencodable, RecursionError, ValueError):
        return f"a {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:100]}..."


def _refuse_reference(reference: Reference) -> Any:
    raise ProtocolError(f"not a plain value: {reference.data}")


def refuse_object(value: Any) -> dict[str, Any]:
    raise Unencodable(type(value).__name__)
