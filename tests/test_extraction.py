"""Replies as models write them: does the program that is taken out of them get the verdict that it should?

The replies in data/replies.jsonl are made for this test, by kinds; a kind is what models do, not one reply of theirs.
"""

import ast
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fractal.generate import self_tests
from fractal.generate.extraction import extract_code
from fractal.generate.fences import Block, fenced_blocks, parsed_blocks
from fractal.problems.formats import read_problems
from fractal.problems.syntax import is_python
from fractal.records import Label, Sample
from fractal.sandbox.host.container import Sandbox
from tests.conftest import SHARED

REPLIES = Path(__file__).parent / "data" / "replies.jsonl"
F = "def f(a):\n    return a\n"


def labels_of(sandbox: Sandbox, problems: Iterable[dict[str, Any]], codes: list[str], folder: Path) -> list[Label]:
    """The label of each program, with the tests of the problem that stands at its place."""
    path = folder / "problems.jsonl"
    path.write_text("".join(json.dumps({**problem, "task_id": i}) + "\n" for i, problem in enumerate(problems, 1)))
    read = read_problems(path)
    samples = [Sample(p.task_id, 0, "", code, "stop", 0, None, None, "t") for p, code in zip(read, codes, strict=True)]
    by_id = {label.task_id: label for label in sandbox.verify(samples, {p.task_id: p for p in read})}
    return [by_id[p.task_id] for p in read]


@pytest.mark.docker
def test_programs_taken_out_of_replies_get_the_right_verdict(sandbox: Sandbox, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in REPLIES.read_text().splitlines()]
    codes = [extract_code(row["reply"], row["entry_point"], row.get("prefix", "")) for row in rows]
    problems = [
        {
            "prompt": "p",
            "reference": "x = 1",
            "tests": [row["test"]],
            "setup": "",
            "entry_point": row["entry_point"].partition("(")[0],
            "split": "test",
        }
        for row in rows
    ]
    labels = labels_of(sandbox, problems, codes, tmp_path)
    wrong = [
        f"{row['kind']}: {row['name']}: {label.status} {label.detail}"
        for row, label in zip(rows, labels, strict=True)
        if label.passed != row["passes"]
    ]
    kinds = Counter(row["kind"] for row in rows)
    assert wrong == [], f"{len(wrong)} of {len(rows)}"
    assert len(kinds) >= 10
    assert min(kinds.values()) >= 5


@pytest.mark.docker
def test_replies_of_public_reports_get_the_status_of_the_program_in_them(sandbox: Sandbox, tmp_path: Path) -> None:
    path = SHARED / "reports" / "extraction.jsonl"
    if not path.exists():
        pytest.skip("no public reports beside the checkout")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    codes = [extract_code(row["reply"], "digit_sum") for row in rows]
    labels = labels_of(sandbox, [row["problem"] for row in rows], codes, tmp_path)
    wrong = [
        (row["case"], row["name"], label.status, label.detail)
        for row, label in zip(rows, labels, strict=True)
        if label.status != row["expected"]
    ]
    assert len(wrong) <= 0.05 * len(rows), wrong


PIECES = ["```", "```python", "~~~", "~~~ x", "````", "text", "- a", "> b", F.strip(), "", "1. y", "``` a`b", "<div>"]


@given(st.lists(st.sampled_from([*PIECES, "  x", "\t", "```\t", "   y"]), max_size=12).map("\n".join))
@settings(max_examples=500, deadline=None)
def test_fences_at_the_beginning_of_lines_are_read_as_the_parser_reads_them(text: str) -> None:
    def shown(blocks: list[Block]) -> list[tuple[str, str, bool]]:
        return [(b.language, b.code if b.closed else b.code.rstrip(), b.closed) for b in blocks]

    assert shown(fenced_blocks(text)) == shown(parsed_blocks(text))


DRAFTS = st.lists(st.sampled_from([*PIECES, "def f(a):", "    return -a", "f = -1", "'''", '"'])).map("\n".join)
MARKS = st.sampled_from([("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<reasoning>", "</reasoning>")])


WORDS = st.sampled_from(["", "Let's do it", "It's this", 'say "a', "call `f", "I wrote 'b"])


@given(DRAFTS, MARKS, WORDS, WORDS)
@settings(max_examples=300, deadline=None)
def test_reasoning_is_no_answer(draft: str, marks: tuple[str, str], words: str, more: str) -> None:
    begin, end = marks
    reply = f"```python\n{F}```"
    assert extract_code(f"{begin}\n{draft}\n{end}\n{reply}", "f") == F
    assert extract_code(f"{draft}\n{end}\n{reply}", "f") == F, "the prompt opened it"
    assert extract_code(f"{begin} {words} {end} {more}\n{reply}", "f") == F, "on one line"
    assert "f" not in extract_code(f"{begin}\n{draft}", "f"), "cut"


def test_what_goes_at_a_glance_is_what_goes_after_a_look_at_all_names() -> None:
    rows = [json.loads(line) for line in REPLIES.read_text().splitlines()]
    compared = 0
    for code in {block.code for row in rows for block in fenced_blocks(row["reply"])}:
        tree = ast.parse(code) if is_python(code) else ast.Module([], [])
        glance = self_tests._at_a_glance(tree, "area")
        if glance is not None:
            compared += 1
            assert glance == self_tests._SelfTests(tree, "area").statements(), code
    assert compared >= 20


SUM = "import sys\nprint(sum(map(int, sys.stdin.read().split())))\n"
MAIN = "def main():\n    print(int(input()) * 2)\n\n\nif __name__ == '__main__':\n    main()\n"
SCRIPTS = {
    SUM: SUM,
    f"```python\n{SUM}```": SUM,
    f"It reads:\n```python\n{MAIN}```\nInput:\n```\n1\n```\nOutput:\n```\n2\n```": MAIN,
    f"A draft:\n```python\nprint(1 + 1)\n```\nSo:\n```python\n{SUM}```": SUM,
    f"Sure.\n\n{SUM}\nIt's simple, isn't it?": SUM,
    f"<think>\n```python\n{MAIN}```\n</think>{SUM}": SUM,
}


def test_a_program_that_reads_its_standard_input_keeps_what_it_runs() -> None:
    assert [reply for reply, code in SCRIPTS.items() if extract_code(reply, "") != code] == []
