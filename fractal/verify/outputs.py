"""Outputs on the visible inputs, for execution consensus: samples, labels -> outputs.jsonl (a part of stage 2).

The calls that the first test makes, the one in the prompt, are made of every program once more, in the sandbox and
without the expected value; what they return is written down by the judge, in a canonical text. A program can return
what it likes, but the text is the judge's: objects that stay in the program's process (iterators, its own classes) have
none, so nothing can equal by claiming it. What decides is in fractal/sandbox/; who agrees is selection.py's.
"""

import ast
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from fractal import console
from fractal.jsonl import Appender, KeySet, decode, iter_lines
from fractal.records import Label, Output, Problem, Sample
from fractal.rundir import RunDir
from fractal.sandbox.host.container import Sandbox
from fractal.sandbox.host.limits import Limits

WRAPPERS = ("set", "frozenset", "sorted", "list", "tuple", "dict")  # a test's own say on which results are the same
NO_CALL = ("not_run", "missing", "timeout", "memory", "crashed", "forbidden")  # of the first test: nothing came back
LONGEST = 200  # characters of an output kept as they are; of a longer one its sha256
PAUSE_S = 0.2  # between writes
MARK = "fractal output "

# What the judge runs after the program. Names of its own: a program, or a call's arguments, may use any other.
PROBE = """
import builtins as fx_b, hashlib as fx_hash, collections as fx_c, datetime as fx_d, decimal as fx_e, fractions as fx_f
def fx_text(fx_value):
    fx_kind = fx_b.type(fx_value)
    if fx_value is None or fx_value is ... or fx_kind in (fx_b.str, fx_b.bytes, fx_b.complex):
        return fx_b.repr(fx_value)
    if fx_kind in (fx_b.bool, fx_b.int):  # True == 1
        return fx_b.str(fx_b.int(fx_value)) if -(10**300) < fx_value < 10**300 else fx_b.hex(fx_value)
    if fx_kind in (fx_b.float, fx_e.Decimal, fx_f.Fraction):  # 1.0 == 1
        fx_finite = fx_value - fx_value == 0
        return fx_text(fx_b.int(fx_value)) if fx_finite and fx_value % 1 == 0 else fx_b.repr(fx_value)
    if fx_b.isinstance(fx_value, fx_b.tuple):  # a named tuple equals a plain one
        return "(" + "".join([fx_text(fx_one) + "," for fx_one in fx_value]) + ")"
    if fx_kind in (fx_b.list, fx_c.deque):
        return fx_kind.__name__[:-4] + "[" + "".join([fx_text(fx_one) + "," for fx_one in fx_value]) + "]"
    if fx_kind in (fx_b.set, fx_b.frozenset, fx_b.type({}.keys())):
        return "{" + "".join([fx_one + "," for fx_one in fx_b.sorted([fx_text(fx_one) for fx_one in fx_value])]) + "}"
    if fx_b.isinstance(fx_value, fx_b.dict):
        fx_pairs = fx_b.sorted([fx_text(fx_key) + ":" + fx_text(fx_one) for fx_key, fx_one in fx_value.items()])
        return "dict{" + "".join([fx_one + "," for fx_one in fx_pairs]) + "}"
    if fx_kind in (fx_b.range, fx_b.bytearray, fx_d.date, fx_d.datetime, fx_d.time, fx_d.timedelta):
        return fx_b.repr(fx_value)
    raise fx_b.TypeError("an object that stays in the program")
"""
SAY = """
fx_said = fx_b.ascii(fx_text(({values},)))[1:-1]
if fx_b.len(fx_said) > {longest}:
    fx_said = "sha256 " + fx_hash.sha256(fx_said.encode()).hexdigest()
assert None, "{mark}" + fx_b.str(fx_b.len(fx_said)) + " " + fx_said
"""


def run(folder: RunDir, limits: Limits, **options: Any) -> None:
    """Write what is missing of the run's outputs.jsonl: one Output for each labelled sample. `options`: of Sandbox.

    Killed, it goes on at the first missing one. A program that gave no answer to the first test is not run again, and
    has no output; neither has one whose first test calls the entry point nowhere that can be taken out of it.
    """
    path = folder.file("outputs.jsonl")
    done, silent, judged = KeySet(), KeySet(), KeySet()
    for line in iter_lines(path, own=True):
        one = decode(line, Output)
        done.add(one.task_id, one.sample_id)
    for line in iter_lines(folder.file("labels.jsonl"), own=True):
        label = decode(line, Label)
        if label.status != "sandbox_error":
            judged.add(label.task_id, label.sample_id)
            if label.tests and label.tests[0] in NO_CALL:
                silent.add(label.task_id, label.sample_id)
    if len(done) >= len(judged):
        return
    problems = {task_id: probe(problem) for task_id, problem in folder.problems().items()}

    def todo() -> Iterator[Sample]:
        for line in iter_lines(folder.file("samples.jsonl"), own=True):
            sample = decode(line, Sample)
            key = (sample.task_id, sample.sample_id)
            if key in judged and key not in done:
                yield sample

    askable = {task_id: problem for task_id, problem in problems.items() if problem is not None}

    def asked(sample: Sample) -> bool:
        return sample.task_id in askable and (sample.task_id, sample.sample_id) not in silent

    with folder.stage("verify", "outputs.jsonl"), Appender(path) as file:
        file.write(Output(sample.task_id, sample.sample_id, None) for sample in todo() if not asked(sample))
        count = sum(map(asked, todo()))
        if not count:
            return
        begin = time.monotonic()
        with Sandbox(limits=limits, **options) as sandbox, console.bar("outputs", count) as bar:
            labels = sandbox.verify(filter(asked, todo()), askable)
            _write(labels, file, bar)
        console.say(f"verify: outputs of {count:,} samples on the visible inputs, {time.monotonic() - begin:.1f} s")


def _write(labels: Iterable[Label], file: Appender, bar: console.Bar) -> None:
    """Outputs as they come, in few writes; ours is the fault in a sandbox_error, which the next call tries again."""
    batch: list[Output] = []
    due = time.monotonic() + PAUSE_S
    since = 0
    try:
        for label in labels:
            since += 1
            if label.status != "sandbox_error":
                batch.append(Output(label.task_id, label.sample_id, output_of(label)))
            if time.monotonic() >= due:
                ready, batch = batch, []
                file.write(ready)
                bar.advance(since)
                due, since = time.monotonic() + PAUSE_S, 0
    finally:
        file.write(batch)


def probe(problem: Problem) -> Problem | None:
    """The problem with one test, which tells what the calls of the entry point in its first test return.

    The calls are taken out of the test's first assert, with what stands before it. The test's own say on which results
    are the same is kept: a wrapper such as `set(...)` around a call, and that it looks only at the truth of one. The
    expected value is not in it. None without such a call, or if it uses a name that only the rest of the assert binds.
    """
    try:
        body = ast.parse(problem.tests[0]).body if problem.tests else []
    except (SyntaxError, ValueError, RecursionError):
        return None
    place = next((i for i, node in enumerate(body) if isinstance(node, ast.Assert)), None)
    if place is None:
        return None
    statement = body[place]
    assert isinstance(statement, ast.Assert)
    bound = {node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    bound |= {node.arg for node in ast.walk(statement) if isinstance(node, ast.arg)}
    calls = list(_calls(statement.test, problem.entry_point))
    used = {node.id for call in calls for node in ast.walk(call) if isinstance(node, ast.Name)}
    if not calls or used & bound:
        return None
    before = "\n".join(map(ast.unparse, body[:place]))
    whole = statement.test
    while isinstance(whole, ast.UnaryOp) and isinstance(whole.op, ast.Not):
        whole = whole.operand
    values = ", ".join(map(ast.unparse, calls)) if whole not in calls else f"not not {ast.unparse(whole)}"
    say = SAY.format(values=values, longest=LONGEST, mark=MARK)
    return replace(problem, tests=[f"{before}\n{PROBE}{say}"])


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
    """What the probe's verdict tells: the canonical text of the values returned, or the sha256 of a long one.

    The judge's words only: a false assertion of the probe's own. A program that raises the same words is an `error`,
    and what it printed stands behind, where the length in front does not reach.
    """
    start = f"test 1: assertion false: {MARK}"
    if label.status != "failed" or not label.detail.startswith(start):
        return None
    length, _, rest = label.detail.removeprefix(start).partition(" ")
    return rest[: int(length)]
