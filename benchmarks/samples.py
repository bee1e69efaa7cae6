"""The samples that every contestant gets: references, seeded mutants of references, and real generations.

Pure: the same problems, counts and seed give the same samples on any machine. Nothing here runs a program.
"""

import ast
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fractal.generate.extraction import extract_code
from fractal.jsonl import decode_object, read_lines
from fractal.problems.syntax import syntax_tree
from fractal.records import Problem, Sample, task_order

OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.FloorDiv, ast.FloorDiv: ast.Div,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitOr,
    ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
COMPARISONS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.GtE, ast.LtE: ast.Gt, ast.Gt: ast.LtE, ast.GtE: ast.Lt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
BOUNDARIES: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Mutant:
    """A program that differs from its original in one place."""

    kind: str  # operator, comparison, off_by_one, constant, delete, swap or return_none
    code: str


@dataclass(frozen=True, slots=True)
class Edit:
    """One change that a syntax tree allows; `apply` makes it in the tree that it was found in."""

    kind: str
    apply: Callable[[], None]


def mutants(code: str, seed: str) -> Iterator[Mutant]:
    """All mutants of a program in a seeded order, each once, none equal to the original; the kinds take turns.

    Raises ValueError if `code` is not Python.
    """
    original = ast.unparse(syntax_tree(code))
    by_kind: dict[str, list[int]] = {}
    for index, edit in enumerate(edits(syntax_tree(code))):
        by_kind.setdefault(edit.kind, []).append(index)
    rng = random.Random(f"{seed}/mutants")
    kinds = sorted(by_kind)
    for kind in kinds:
        rng.shuffle(by_kind[kind])
    seen = {original}
    while kinds:
        rng.shuffle(kinds)
        for kind in kinds:
            fresh = syntax_tree(code)
            edits(fresh)[by_kind[kind].pop()].apply()
            try:
                mutated = ast.unparse(fresh)
                compile(mutated, "mutant", "exec", dont_inherit=True)
            except (SyntaxError, ValueError):  # a deleted `global` or `nonlocal`, say
                continue
            if mutated not in seen:
                seen.add(mutated)
                yield Mutant(kind, mutated + "\n")
        kinds = [kind for kind in kinds if by_kind[kind]]


def edits(program: ast.Module) -> list[Edit]:
    """Every change that we know, in the order of the tree."""
    return [edit for node in ast.walk(program) for edit in _edits_of(node)]


def _edits_of(node: ast.AST) -> Iterator[Edit]:
    match node:
        case ast.BinOp(op=op) | ast.AugAssign(op=op) | ast.BoolOp(op=op) if type(op) in OPERATORS:
            yield _set("operator", node, "op", OPERATORS[type(op)]())
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield _set("operator", node, "operand", ast.UnaryOp(ast.Not(), operand))
        case ast.Compare(ops=ops):
            for place, one in enumerate(ops):
                if type(one) in COMPARISONS:
                    yield _put("comparison", ops, place, COMPARISONS[type(one)]())
                if type(one) in BOUNDARIES:
                    yield _put("off_by_one", ops, place, BOUNDARIES[type(one)]())
        case ast.Subscript(slice=ast.expr() as index) if not isinstance(index, ast.Slice | ast.Tuple):
            yield _set("off_by_one", node, "slice", _plus(index, 1))
        case ast.Constant(value=bool() as value):
            yield _set("constant", node, "value", not value)
        case ast.Constant(value=int() | float() as value):
            yield _set("constant", node, "value", value + 1)
            yield _set("constant", node, "value", 0 if value else 2)
        case ast.Constant(value=str() as value):
            yield _set("constant", node, "value", "" if value else "x")
        case ast.Call(func=ast.Name(id="range"), args=[*_, last]):
            yield _put("off_by_one", node.args, -1, _plus(last, 1))
            yield _put("off_by_one", node.args, -1, _plus(last, -1))
        case ast.Call(args=[first, second, *_]):
            yield _set("swap", node, "args", [second, first, *node.args[2:]])
        case ast.Return(value=ast.expr()):
            yield _set("return_none", node, "value", None)
        case ast.arguments(args=[first, second, *_]):
            yield _set("swap", node, "args", [second, first, *node.args[2:]])
    if isinstance(node, ast.FunctionDef | ast.For | ast.While | ast.If):
        for place, statement in enumerate(node.body):
            if not isinstance(statement, ast.Return | ast.Pass):
                yield _put("delete", node.body, place, ast.Pass())


def _set(kind: str, node: ast.AST, field: str, value: object) -> Edit:
    return Edit(kind, lambda: setattr(node, field, value))


def _put(kind: str, items: list[Any], place: int, value: ast.AST) -> Edit:
    return Edit(kind, lambda: items.__setitem__(place, value))


def _plus(value: ast.expr, by: int) -> ast.expr:
    return ast.BinOp(value, ast.Add() if by > 0 else ast.Sub(), ast.Constant(abs(by)))


def choose(problems: Sequence[Problem], generations: Sequence[Sample], count: int, seed: int) -> list[Sample]:
    """`count` samples in a seeded order, or fewer where there are no more: a third references, a third generations, the
    rest mutants. `model` says what a sample is: reference, mutant/KIND, or the generator's name.
    """
    rng = random.Random(f"{seed}/choose")
    problems = sorted(problems, key=lambda p: task_order(p.task_id))
    picked = rng.sample(problems, min(len(problems), -(-count // 3)))
    drawn = rng.sample(list(generations), min(len(generations), count // 3))
    found = [(p.task_id, p.reference, "reference") for p in picked]
    found += [(s.task_id, s.code, s.model) for s in drawn]
    sources = [(p.task_id, mutants(p.reference, f"{seed}/{p.task_id}")) for p in rng.sample(problems, len(problems))]
    while sources and len(found) < count:
        left = []
        for task_id, source in sources:
            mutant = next(source, None)
            if mutant is not None and len(found) < count:
                found.append((task_id, mutant.code, f"mutant/{mutant.kind}"))
                left.append((task_id, source))
        sources = left
    rng.shuffle(found)
    return number(found)


def number(found: Sequence[tuple[int, str, str]]) -> list[Sample]:
    """Samples of (task_id, code, what it is), numbered within their problem."""
    counts: Counter[int] = Counter()
    samples = []
    for task_id, code, model in found:
        samples.append(Sample(task_id, counts[task_id], code, code, "stop", 0, None, None, model))
        counts[task_id] += 1
    return samples


def repeat(samples: Sequence[Sample], count: int) -> list[Sample]:
    """`count` samples: the given ones over and over, each told apart by a comment at its end."""
    turns = ((samples[i % len(samples)], i) for i in range(count))
    return number([(s.task_id, f"{s.code.rstrip()}\n# {i}\n", s.model) for s, i in turns])


def read_generations(path: Path, problems: Sequence[Problem]) -> list[Sample]:
    """Completions of a model: JSON lines with task_id and completion. Those of other problems are left out."""
    entry_points = {p.task_id: p.entry_point for p in problems}
    found = []
    for line in read_lines(path):
        value = decode_object(line)
        task_id, text = value.get("task_id"), value.get("completion")
        if type(task_id) not in (int, str) or not isinstance(text, str):
            raise line.error("expected a task_id and a string completion")
        task_id = str(task_id)
        if task_id in entry_points:
            found.append((task_id, extract_code(text, entry_points[task_id]), str(value.get("model", "generation"))))
    return number(found)


def literal_tests(problem: Problem) -> tuple[list[list[object]], list[object]] | None:
    """Inputs and expected outputs, where every test is `assert ENTRY_POINT(literals) == literal`; else None."""
    inputs: list[list[object]] = []
    expected: list[object] = []
    for test in problem.tests:
        match syntax_tree(test).body:
            case [ast.Assert(test=ast.Compare(left=ast.Call() as call, ops=[ast.Eq()], comparators=[right]))]:
                pass
            case _:
                return None
        if not isinstance(call.func, ast.Name) or call.func.id != problem.entry_point or call.keywords:
            return None
        try:
            inputs.append([ast.literal_eval(arg) for arg in call.args])
            expected.append(ast.literal_eval(right))
        except (ValueError, TypeError):
            return None
    return inputs, expected


def job_rows(samples: Sequence[Sample], problems: dict[str, Problem]) -> list[dict[str, object]]:
    """What harnesses.py is told of each sample. Literals travel as their repr: JSON has no tuples."""
    literal: dict[str, str | None] = {}
    rows: list[dict[str, object]] = []
    for sample in samples:
        problem = problems[sample.task_id]
        if sample.task_id not in literal:
            pair = literal_tests(problem)
            literal[sample.task_id] = None if pair is None else repr(pair)
        rows.append({"id": name(sample), "task_id": sample.task_id, "code": sample.code, "setup": problem.setup,
                     "tests": "\n".join(problem.tests), "entry_point": problem.entry_point,
                     "literal": literal[sample.task_id]})  # fmt: skip
    return rows


def name(sample: Sample) -> str:
    return f"{sample.task_id}/{sample.sample_id}"
