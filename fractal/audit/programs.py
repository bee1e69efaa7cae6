"""Reads files of programs, the attacks here and those of tests/data: blocks, each a program with its tests.

A line `## name | option, option=value` begins a block, the program follows; `--- test`, `--- setup` and `--- expected`
begin its further parts. What stands before the first block is a comment. With the option `escapes` the program is
written with Python's backslash escapes, for what a text file does not keep: some characters, and a missing line end.
"""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Program:
    """A program, its tests, and what its header says of it."""

    name: str
    code: str
    tests: tuple[str, ...] = ()
    setup: str = ""
    expected: tuple[str, ...] = ()  # for each test, where it is no statement
    options: dict[str, str] = field(default_factory=dict)  # an option without a value has ""


def read_programs(path: Path) -> dict[str, Program]:
    """The programs of a file by name. Raises ValueError for a name that stands twice, or an unknown part."""
    programs: dict[str, Program] = {}
    for block in path.read_bytes().decode().split("\n## ")[1:]:
        head, _, body = block.partition("\n")
        name, _, words = head.partition(" | ")
        options = dict(_option(word) for word in words.split(", ")) if words else {}
        code, *parts = ("\n" + body.rstrip("\n")).split("\n--- ")
        code = code.removeprefix("\n")
        code = code.encode("ascii").decode("unicode_escape") if "escapes" in options else code + "\n"
        tests = [part.removeprefix("test\n") for part in parts if part.startswith("test\n")]
        setups = [part.removeprefix("setup\n") for part in parts if part.startswith("setup\n")]
        expected = [part.removeprefix("expected\n") for part in parts if part.startswith("expected\n")]
        if name in programs or len(tests) + len(setups) + len(expected) != len(parts):
            raise ValueError(f"{path}: the block {name!r} stands twice, or has an unknown part")
        programs[name] = Program(name, code, tuple(tests), "".join(setups), tuple(expected), options)
    return programs


def _option(word: str) -> tuple[str, str]:
    key, _, value = word.partition("=")
    return key.strip(), value.strip()
