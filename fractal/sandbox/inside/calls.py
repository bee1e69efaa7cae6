"""Tests that are calls: their arguments as they are sent to a program, and how a result is compared.

Trusted, in the judge, and pure: it runs nothing (call_runner.py does). Standard library only.
"""

import json
from dataclasses import dataclass
from types import CodeType
from typing import Any

from fractal.sandbox.inside.protocol import Decoder, Encoder, ProtocolError, Reference, Unencodable, frame

RELATIVE = 1e-7  # tolerance beside `atol`: numpy.allclose's in EvalPlus (evalplus/eval/__init__.py, version 0.3.1)
FLOAT_ATOL = 1e-6  # `atol` where the problem has none and floats are expected: EvalPlus's


@dataclass(frozen=True)
class Calls:
    """A problem's calls as the judge uses them."""

    frames: list[bytes]  # what is sent for each
    arguments: list[str]  # tagged JSON
    expected: list[Any] | None  # None: record what the program returns; it is the reference
    compare: CodeType | None
    atol: float


def prepare_calls(problem: dict[str, Any]) -> Calls:
    """Raises SyntaxError or ProtocolError for a problem whose comparison or values cannot be read."""
    target, decode = json.dumps(problem["entry_point"]).encode(), Decoder(_refuse_reference).decode
    expected = None if problem["record"] else [decode(text.encode("utf-8")) for text in problem["expected"]]
    atol = problem["atol"]
    if not atol and expected and any(map(_is_floats, expected)):
        atol = FLOAT_ATOL
    return Calls(
        frames=[frame(b'["q","run",%b,%b]' % (target, text.encode("utf-8"))) for text in problem["tests"]],
        arguments=problem["tests"],
        expected=expected,
        compare=compile(problem["compare"], "<compare>", "eval") if problem["compare"] else None,
        atol=atol,
    )


def is_right(calls: Calls, number: int, result: Any, expected: Any) -> bool:
    """Whether a call's result is what is expected: as `compare` says, or equal, or within the tolerance."""
    if calls.compare is not None:
        args = Decoder(_refuse_reference).decode(calls.arguments[number].encode("utf-8"))
        try:
            if eval(calls.compare, {"args": args, "result": result, "expected": expected}):
                return True
        except Exception:  # the result is not what the comparison is made for
            return False
    elif result == expected:
        return True
    return calls.atol > 0 and type(result) is type(expected) and _is_close(result, expected, calls.atol)


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
