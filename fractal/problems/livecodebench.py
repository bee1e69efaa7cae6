"""LiveCodeBench (livecodebench/code_generation_lite): public and private tests, of standard input or of a method.

Private tests are JSON text, or that as a pickled string, compressed, in base64. The pickle is never loaded: its opcodes
are read as data, and only one text among opcodes that build nothing else is taken.
"""

import base64
import binascii
import json
import pickletools
import zlib
from typing import Any

from fractal.jsonl import Line
from fractal.problems.fields import json_field, refuse, task_id, text, unix_lines
from fractal.problems.solutions import EQUAL_AS_LISTS, IMPORTS, target
from fractal.problems.values import encode_value
from fractal.records import Problem

MOST_BYTES = 1 << 30  # of a problem's private tests, decompressed
# Opcodes of a pickled text: protocol, frame, memo, end. Anything else would make an object.
AROUND_TEXT = {"PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT", "STOP"}
TEXT = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"}


def problem_from_livecodebench(line: Line, value: dict[str, Any]) -> Problem:
    """One problem. All its tests are of one kind, which `testtype` says."""
    tests = []
    for field in ("public_test_cases", "private_test_cases"):
        tests += _cases(line, value, field)
    kinds = {test.get("testtype") for test in tests}
    if kinds not in ({"stdin"}, {"functional"}):
        refuse(
            line,
            "LiveCodeBench",
            "testtype",
            f"expected stdin or functional, one for all tests, got {sorted(map(str, kinds))}",
        )
    metadata = json_field(line, value, "metadata", {})
    starter = text(line, value, "starter_code", default="")
    inputs = [_text(line, test, "input") for test in tests]
    outputs = [_text(line, test, "output") for test in tests]
    name = metadata.get("func_name") if isinstance(metadata, dict) and kinds == {"functional"} else ""
    if kinds == {"functional"}:
        if not isinstance(name, str):
            raise line.error("field metadata: expected func_name, the method that the tests call")
        try:
            inputs = [encode_value([json.loads(row) for row in item.split("\n") if row.strip()]) for item in inputs]
            outputs = [encode_value(json.loads(item)) for item in outputs]
        except (ValueError, RecursionError) as error:
            raise line.error(f"field public_test_cases or private_test_cases: not JSON values: {error}") from error
    question = text(line, value, "question_content").strip()
    return Problem(
        task_id=task_id(line, value, "question_id", "task_id"),
        prompt=f"{question}\n\nBegin with:\n{starter.rstrip()}" if starter.strip() else question,
        reference="",
        tests=inputs,
        setup="",
        entry_point=target(name, starter) if name else "",
        split="test",
        kind="calls" if name else "stdin",
        expected=outputs,
        compare=EQUAL_AS_LISTS if name else "",
        prefix=IMPORTS if name else "",
    )


def _cases(line: Line, value: dict[str, Any], field: str) -> list[dict[str, Any]]:
    source = value.get(field)
    if isinstance(source, str) and source.strip()[:1] != "[":
        try:
            source = unpickled_text(base64.b64decode(source, validate=True))
        except (ValueError, binascii.Error, zlib.error) as error:
            raise line.error(
                f"LiveCodeBench, field {field}: neither JSON text nor a pickled text: {error}. No pickle is ever loaded"
            ) from error
    cases = json_field(line, {field: source}, field, [])
    if not isinstance(cases, list) or not all(isinstance(case, dict) for case in cases):
        raise line.error(f"field {field}: expected a list of input, output and testtype")
    return cases


def _text(line: Line, test: dict[str, Any], field: str) -> str:
    if not isinstance(test.get(field), str):
        raise line.error(f"a test's {field}: expected a string, got {type(test.get(field)).__name__}")
    return unix_lines(test[field])


def unpickled_text(data: bytes) -> str:
    """The text of a compressed pickle that holds a text and nothing else. Raises ValueError; nothing is executed."""
    decompressor = zlib.decompressobj()
    raw = decompressor.decompress(data, MOST_BYTES)
    if decompressor.unconsumed_tail or not decompressor.eof:
        raise ValueError("cut short, or larger than 1 GiB")
    found: list[str] = []
    for opcode, argument, _ in pickletools.genops(raw):
        if opcode.name in TEXT and isinstance(argument, str) and not found:
            found.append(argument)
        elif opcode.name not in AROUND_TEXT:
            raise ValueError(f"the opcode {opcode.name}, where a text alone is expected")
    if not found:
        raise ValueError("it holds no text")
    return found[0]
