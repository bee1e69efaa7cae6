"""Outputs on the visible inputs, for execution consensus: samples, labels -> outputs.jsonl (a part of stage 2).

The calls that the first test makes, the one in the prompt, are made of every program once more, in the sandbox and
without the expected value; what they return is written down by the judge, in a canonical text. A program can return
what it likes, but the text is the judge's: objects that stay in the program's process (iterators, its own classes) have
none, so nothing can equal by claiming it. What decides is in fractal/sandbox/; who agrees is selection's.
"""

import ast
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from fractal import console
from fractal.jsonl import read_keys
from fractal.records import Label, Output, Problem, Sample
from fractal.rundir import RunDir
from fractal.sandbox.host.container import Sandbox
from fractal.sandbox.host.limits import Limits
from fractal.verify.counts import count
from fractal.verify.labelling import SampleFile, append_records
from fractal.verify.resume import labelled

WRAPPERS = ("set", "frozenset", "sorted", "list", "tuple", "dict")  # the test says so which results are the same
NO_ANSWER = ("not_run", "missing", "timeout", "memory", "crashed", "forbidden")  # of the first test
MAX_LENGTH = 200  # characters of an output kept as they are; of a longer one its sha256
MARK = "fractal output "

# What the judge runs after the program, with the calls' values. Values that are equal have the same text: True, 1 and
# 1.0, a named tuple and a plain one, a set in any order. It imports what it uses, since the program may have given any
# meaning to a name outside; under names of its own where the calls may use a class that the program imports.
REPORT_VALUES = f"""
def fractal_report(fractal_values):
    from builtins import TypeError, bool, bytearray, bytes, complex, dict, float, frozenset, int, list, set, str, tuple
    from builtins import ascii, hex, isinstance, len, range, repr, sorted, type
    from collections import deque as deque_type
    from datetime import date as date_type, datetime as datetime_type, time as time_type, timedelta as timedelta_type
    from decimal import Decimal as decimal_type
    from fractions import Fraction as fraction_type
    from hashlib import sha256 as sha256_digest

    def joined(fractal_texts):
        return "".join([fractal_text + "," for fractal_text in fractal_texts])

    def canonical(fractal_value):
        kind = type(fractal_value)
        if fractal_value is None or fractal_value is ... or kind in (str, bytes, complex):
            return repr(fractal_value)
        if kind in (bool, int):
            few_digits = -(10**300) < fractal_value < 10**300
            return str(int(fractal_value)) if few_digits else hex(fractal_value)
        if kind in (float, decimal_type, fraction_type):
            is_finite = fractal_value - fractal_value == 0
            is_whole = is_finite and fractal_value % 1 == 0
            return canonical(int(fractal_value)) if is_whole else repr(fractal_value)
        if isinstance(fractal_value, tuple):
            return "(" + joined([canonical(item) for item in fractal_value]) + ")"
        if kind is list:
            return "[" + joined([canonical(item) for item in fractal_value]) + "]"
        if kind is deque_type:
            return "d[" + joined([canonical(item) for item in fractal_value]) + "]"
        if kind in (set, frozenset, type({{}}.keys())):
            return "{{" + joined(sorted([canonical(item) for item in fractal_value])) + "}}"
        if isinstance(fractal_value, dict):
            pairs = sorted([canonical(key) + ":" + canonical(item) for key, item in fractal_value.items()])
            return "dict{{" + joined(pairs) + "}}"
        if kind in (range, bytearray, date_type, datetime_type, time_type, timedelta_type):
            return repr(fractal_value)
        raise TypeError("an object that stays in the program")

    report = ascii(canonical(fractal_values))[1:-1]
    if len(report) > {MAX_LENGTH}:
        report = "sha256 " + sha256_digest(report.encode()).hexdigest()
    assert None, "{MARK}" + str(len(report)) + " " + report
"""


def run(folder: RunDir, limits: Limits, **options: Any) -> None:
    """Write what is missing of the run's outputs.jsonl: one Output for each labelled sample. `options`: of Sandbox.

    Samples and labels are read side by side: labels stand in the order of their samples, as `make_plan` leaves them.
    Killed, it goes on at the first missing one. A program that gave no answer to the first test is not run again, and
    has no output; neither has one whose first test has no call of the entry point that can be taken out of it.
    """
    path, labels = folder.file("outputs.jsonl"), folder.file("labels.jsonl")
    done, tally = read_keys(path), count(labels)
    if len(done) >= tally.total - tally.errors:
        return
    source = SampleFile(folder.file("samples.jsonl"), folder.problems(), own=True)
    problems = {
        task_id: changed for task_id, problem in source.problems.items() if (changed := output_problem(problem))
    }

    def missing(is_run: bool) -> Iterator[Sample]:
        """The labelled samples without an output whose program has to be run for it, or those whose has not."""
        for sample, label in labelled(source.read(), labels):
            if label.status == "sandbox_error" or (sample.task_id, sample.sample_id) in done:
                continue
            answered = not label.tests or label.tests[0] not in NO_ANSWER
            if (sample.task_id in problems and answered) == is_run:
                yield sample

    with folder.stage("verify", "outputs.jsonl"):
        none = (Output(sample.task_id, sample.sample_id, None) for sample in missing(is_run=False))
        append_records(none, path, lambda *_: None)
        total = sum(1 for _ in missing(is_run=True))
        if not total:
            return
        begin = time.monotonic()
        with Sandbox(limits=limits, **options) as sandbox, console.bar("outputs", total) as bar:
            append_records(_outputs(sandbox.verify(missing(is_run=True), problems)), path, bar.advance)
        console.say(f"verify: outputs of {total:,} samples on the visible inputs, {time.monotonic() - begin:.1f} s")


def _outputs(labels: Iterable[Label]) -> Iterator[Output]:
    """A sandbox_error is the sandbox's fault: it has no output yet, and the next call tries again."""
    for label in labels:
        if label.status != "sandbox_error":
            yield Output(label.task_id, label.sample_id, output_of(label))


def output_problem(problem: Problem) -> Problem | None:
    """The problem with one test, which reports what the calls of the entry point in its first test return.

    The calls are taken out of the test's first assert, with what stands before it. What the test says of which results
    are the same is kept: a wrapper such as `set(...)` around a call, and that it looks only at the truth of one. The
    expected value is not in it. None without such a call, or if it uses a name that only the rest of the assert binds.
    """
    try:
        body = ast.parse(problem.tests[0]).body if problem.tests else []
    except (SyntaxError, ValueError, RecursionError):
        return None
    number, statement = next(((i, node) for i, node in enumerate(body) if isinstance(node, ast.Assert)), (0, None))
    if statement is None:
        return None
    bound = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    bound |= {node.arg for node in ast.walk(statement) if isinstance(node, ast.arg)}
    calls = list(_calls(statement.test, problem.entry_point))
    used = {node.id for call in calls for node in ast.walk(call) if isinstance(node, ast.Name)}
    if not calls or used & bound:
        return None
    before = "\n".join(map(ast.unparse, body[:number]))
    whole = statement.test
    while isinstance(whole, ast.UnaryOp) and isinstance(whole.op, ast.Not):
        whole = whole.operand
    values = ", ".join(map(ast.unparse, calls)) if whole not in calls else f"not not {ast.unparse(whole)}"
    return replace(problem, tests=[f"{before}\n{REPORT_VALUES}fractal_report(({values},))\n"])


def _calls(node: ast.AST, entry_point: str) -> Iterator[ast.expr]:
    """The outermost calls of the entry point, in their order, with the wrappers that the test puts around them."""
    inner: ast.AST = node
    while _is_call_of(inner, WRAPPERS) and len(inner.args) == 1 and not inner.keywords:  # type: ignore[attr-defined]
        inner = inner.args[0]  # type: ignore[attr-defined]
    if _is_call_of(inner, (entry_point,)):
        assert isinstance(node, ast.expr)
        yield node
        return
    for child in ast.iter_child_nodes(node):
        yield from _calls(child, entry_point)


def _is_call_of(node: ast.AST, names: tuple[str, ...]) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names


def output_of(label: Label) -> str | None:
    """The canonical text of the values returned, or the sha256 of a long one; None where the judge reported none.

    Only a false assertion of the judge's is a report. A program that raises the same text is an `error`, and what it
    printed stands behind the report, where the length in front does not reach.
    """
    start = f"test 1: assertion false: {MARK}"
    if label.status != "failed" or not label.detail.startswith(start):
        return None
    length, _, rest = label.detail.removeprefix(start).partition(" ")
    return rest[: int(length)]
