"""A chat reply to the program in it. Pure text: no model and no sandbox, nothing is run.

What is answer and what reasoning: answer.py; code blocks: fences.py; the model's own tests: self_tests.py.
"""

import ast
import json
import re
import textwrap
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import islice
from typing import NamedTuple

from fractal.generate import names
from fractal.generate.answer import INVISIBLE, answer
from fractal.generate.fences import LINE_WITH_FENCE, Block, fenced_blocks, indented_blocks
from fractal.generate.self_tests import comment_start, first_line, is_main_block, root_name, without_self_tests
from fractal.problems.syntax import syntax_tree

# Lines before which a program with a syntax error further down may be cut: self-tests, their comments, definitions,
# prose.
CUT_LINE = re.compile(
    r"assert\b|print\(|if __name__|# (?:Test|Example|Check)|(?:async )?def |class |@|[A-Z][a-z]*[:,]? [A-Za-z]"
)
TILDES = re.compile(r"^~~~", re.MULTILINE)
MARKS = r"(?:(?<!`)`{3,}(?!`)|(?<!~)~{3,}(?!~))"
FENCE = re.compile(rf"^[ \t>]*{MARKS}[^`\n]*$|{MARKS}[ \t]{{0,9}}[\w+#.-]{{0,40}}[ \t]{{0,9}}$", re.MULTILINE)
FIRST_LINE = re.compile(r"^(?:def |class |import |from \w|@|async def |[A-Za-z_]\w* *=[^=])", re.MULTILINE)
CODE_SPAN = re.compile(r"(?<!`)(`{1,3})(?!`)(?:python[ \t])?([^`\n]+)\1")
MAX_TRIES = 50  # starting lines, or cuts, that are tried
MAX_PARSED = 500_000  # characters for which all of them are

# What a program has of the entry point's definition. ASSIGNED: `f = g(x)`, which may be a use, too.
MISSING, STUB, BROKEN, ASSIGNED, WHOLE = range(5)


class Program(NamedTuple):
    """A candidate for the program that is looked for."""

    code: str
    tree: ast.Module | None  # None: it does not parse
    definition: int  # MISSING ... WHOLE


def extract_code(text: str, entry_point: str, prefix: str = "") -> str:
    """The program in a chat reply, without the model's own tests of it; the reply itself if there is none.

    `prefix` is code that the reply may rely on (HumanEval's prompt): it is put before a program that needs its imports
    or helpers, or that is the body of its function. `entry_point`: a function, `Solution().method`, or "" for a program
    that reads its standard input.

    Reasoning is no answer (`answer.answer`). The last fenced block with a whole definition of the entry point is the
    program; where no block has one, the last run of lines that is Python and has one. A function that only says `pass`
    is not whole. Where other blocks bind names that the program lacks, they are put before it. Where nothing is whole:
    a definition that does not parse, a stub, the first Python block, the longest block.

        >>> extract_code("So:\\n```python\\ndef f(a):\\n    return a\\n```\\nTry `f(1)`.", "f")
        'def f(a):\\n    return a\\n'
    """
    defines = definition_pattern(entry_point).search
    text = answer(text, defines)
    program, others = _find_program(text, entry_point)
    if prefix and not defines(text):
        program = _continued(prefix, [program.code, text], entry_point) or program
    if program.tree is None:
        return program.code
    try:
        if others or prefix:
            program = _with_what_it_needs(program, [_read(prefix, ""), *others] if prefix else others)
        return without_self_tests(program.code, entry_point, program.tree)
    except RecursionError:  # an expression of a thousand levels
        return program.code


@lru_cache(maxsize=1024)
def definition_pattern(entry_point: str) -> re.Pattern[str]:
    """Where a text defines the entry point, whether it parses or not; any text, where the entry point is ""."""
    if not entry_point:
        return re.compile(r"\S")
    name = re.escape(root_name(entry_point))
    return re.compile(
        rf"^[ \t]*(?:(?:async[ \t]+)?def|class)[ \t]+{name}\b|^[ \t]*{name}[ \t]*(?::[^=\n]+)?=(?!=)", re.M
    )


def _find_program(text: str, entry_point: str) -> tuple[Program, list[Program]]:
    """The program, and others that it may need, in the order in which they stand."""
    whole = None
    if not text.lstrip().startswith("```") and not TILDES.search(text):  # ~~~python is an expression, too
        whole = _parsed(text, entry_point)
        if whole and (whole.definition != MISSING or not entry_point):
            return whole, []
    blocks = [block for block in fenced_blocks(text) if block.code.strip()]
    programs = [_read(block.code, entry_point) for block in blocks]
    others: list[Program] = []
    chosen = _last(programs, WHOLE)
    if chosen is None:
        others = list(_unfenced_programs(text, blocks, entry_point))
        chosen = _last(others, WHOLE) or _last([*programs, *others], ASSIGNED)
    if chosen is None:
        chosen = next((p for p in _in_rare_forms(text, blocks, entry_point) if p.definition >= ASSIGNED), whole)
    if chosen is None:
        return _least_bad(text, blocks, programs, others), []
    return chosen, [p for p in programs if p.tree and p is not chosen] if len(programs) + len(others) > 1 else []


def _last(programs: list[Program], definition: int) -> Program | None:
    return next((program for program in reversed(programs) if program.definition == definition), None)


def _least_bad(text: str, blocks: list[Block], programs: list[Program], others: list[Program]) -> Program:
    """What to take where no definition is whole."""
    found = max([*programs, *others], key=lambda p: p.definition, default=None)
    if found and found.definition != MISSING:
        return found
    for block, program in zip(blocks, programs, strict=True):
        if block.is_python:
            return program
    if programs:
        return max(programs, key=lambda p: len(p.code))
    if others:
        return others[0]
    return Program(next((block.code for block in fenced_blocks(text)), text), None, MISSING)


def _read(code: str, entry_point: str) -> Program:
    """A block's content as a program: from its first column, and without a test in which it breaks."""
    code = code.lstrip(INVISIBLE)
    if program := _parsed(code, entry_point):
        return program
    if code[:1] in " \t" or code.lstrip("\n")[:1] in " \t":
        for shifted in (textwrap.dedent(code), code.lstrip()):
            if program := _parsed(shifted, entry_point):
                return program
    if head := _before_the_break(code, entry_point):
        return _parsed(head, entry_point) or Program(head, None, BROKEN)
    return Program(code, None, BROKEN if entry_point and definition_pattern(entry_point).search(code) else MISSING)


def _parsed(code: str, entry_point: str) -> Program | None:
    try:
        tree = syntax_tree(code)
    except ValueError:
        return None
    return Program(code, tree, _definition(tree, entry_point))


def _definition(tree: ast.Module, entry_point: str) -> int:
    """What a program has of the definition: WHOLE, STUB or MISSING. Of "": WHOLE if it reads its standard input."""
    if not entry_point:
        read = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        read |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        return WHOLE if read & {"input", "stdin", "open"} else STUB if "print" in read else MISSING
    root, method = root_name(entry_point), entry_point.rpartition(".")[2] if "." in entry_point else ""
    definition = MISSING
    for statement in tree.body:
        if is_main_block(statement):
            continue
        for node in names.executed(statement):
            if isinstance(node, names.DEFINITIONS) and node.name == root:
                definition = _of_definition(node, method)
            elif isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr) and node.value:
                if root in names.bound_names(node) and root not in names.read_names(node.value):
                    definition = _of_value(node.value)
            elif isinstance(node, ast.ImportFrom) and root in names.bound_names(node):
                definition = max(definition, STUB)
    return definition


def _of_definition(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, method: str) -> int:
    if method and isinstance(node, ast.ClassDef):
        methods = [n for n in node.body if isinstance(n, names.DEFINITIONS) and n.name == method]
        return _of_definition(methods[-1], "") if methods else WHOLE if node.bases else STUB
    empty = all(
        isinstance(n, ast.Pass)
        or (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))
        or (isinstance(n, ast.Raise) and any(getattr(part, "id", "") == "NotImplementedError" for part in ast.walk(n)))
        for n in node.body
    )
    return STUB if empty else WHOLE


def _of_value(value: ast.expr) -> int:
    if isinstance(value, ast.Lambda):
        return WHOLE
    return ASSIGNED if isinstance(value, ast.Call | ast.Name | ast.Attribute | ast.Subscript | ast.IfExp) else STUB


def _before_the_break(code: str, entry_point: str) -> str:
    """What stands before the test, definition or prose in which a program breaks; "" if that lacks the entry point."""
    begun = definition_pattern(entry_point).search(code)
    if begun is None or not entry_point:
        return ""
    lines = code.split("\n")
    first, end = code.count("\n", 0, begun.start()), len(lines)
    for _ in range(MAX_TRIES):
        try:
            syntax_tree("\n".join(lines[:end]))
        except ValueError as error:
            if not isinstance(error.__cause__, SyntaxError):
                return ""
            broken = min(error.__cause__.lineno or end, end) - 1  # the line in which it breaks, from 0
            end = next((i for i in range(broken, first, -1) if CUT_LINE.match(lines[i])), 0)
            if not end:
                return ""
        else:
            return "\n".join(lines[: comment_start(lines, end)]) + "\n"
    return ""


def _unfenced_programs(text: str, blocks: Iterable[Block], entry_point: str) -> Iterator[Program]:
    """The first program between any two fences, where there is one that has the definition.

    A fence here is any line that begins or ends like one, since a model may open a block in mid-line, glue its end to
    the last line of code, or begin its reply within a block. A block that is closed is left out: what does not parse
    there is the model's error.
    """
    kept = [block.code for block in blocks if block.closed and not FENCE.search(block.code)]
    parts = [
        part for part in FENCE.split(text) if part.strip() and not any(code.strip() == part.strip() for code in kept)
    ]
    if not any(definition_pattern(entry_point).search(part) for part in parts):
        return
    for part in parts:
        yield from _first_program(part.lstrip("\n"), entry_point)


def _first_program(text: str, entry_point: str) -> Iterator[Program]:
    """For each line that looks like the start of a program: the longest run of lines from there that is Python."""
    other: Program | None = None
    shifted = [text.lstrip(), *indented_blocks(text)] if re.search(r"^[ \t]", text, re.MULTILINE) else [text]
    for version in shifted:
        tries = min(MAX_TRIES, 3 + MAX_PARSED // (len(version) + 1))
        for start in islice(FIRST_LINE.finditer(version), tries):
            program, rest = _longest_program(version[start.start() :])
            found = _parsed(program, entry_point) if program else None
            if found and rest.lstrip("\n").startswith((" ", "\t")):
                found = _without_what_is_cut(found, entry_point)
            if found and found.definition == WHOLE:
                yield found
                return
            other = other or found
    if other:
        yield other


def _without_what_is_cut(program: Program, entry_point: str) -> Program:
    """A program that breaks within its last statement, without that if the definition is in what stands before it."""
    assert program.tree
    if len(program.tree.body) > 1:
        lines = program.code.split("\n")
        end = comment_start(lines, first_line(program.tree.body[-1]) - 1)
        head = _parsed("\n".join(lines[:end]) + "\n", entry_point)
        if head and head.definition == WHOLE:
            return head
    return program._replace(definition=MISSING)


def _longest_program(text: str) -> tuple[str, str]:
    """The longest run of lines from the start that is Python, "" if none is; and the lines behind it."""
    lines = text.split("\n")
    end = len(lines)
    while end > 0:
        candidate = "\n".join(lines[:end])
        try:
            syntax_tree(candidate)
        except ValueError as error:
            if not isinstance(error.__cause__, SyntaxError):
                return "", text
            end = min(end, error.__cause__.lineno or end) - 1  # what breaks in a line breaks with any lines behind it
        else:
            return candidate.rstrip() + "\n", "\n".join(lines[end:])
    return "", text


def _in_rare_forms(text: str, blocks: list[Block], entry_point: str) -> Iterator[Program]:
    """Programs that stand neither in one block nor between fences."""
    if not definition_pattern(entry_point).search(text) and root_name(entry_point) not in text:
        return
    openings = list(LINE_WITH_FENCE.finditer(text))
    for opening in openings[:1]:  # a docstring with fences of its own ends the block too early
        for closing in openings[1:MAX_TRIES]:
            yield _read(text[opening.end() + 1 : closing.start()], entry_point)
    for code in [*(block.code for block in blocks), text]:
        if ">>> " in code:
            lines = [line[4:] for line in code.split("\n") if line.startswith((">>> ", "... "))]
            yield _read("\n".join(lines) + "\n", entry_point)
        if code.lstrip().startswith(("{", "[")):
            for value in _json_texts(code):
                yield from (_read(block.code, entry_point) for block in fenced_blocks(value))
                yield _read(value, entry_point)
    for span in islice(CODE_SPAN.finditer(text), MAX_TRIES):
        yield _read(span[2].strip() + "\n", entry_point)


def _json_texts(text: str) -> Iterator[str]:
    """The strings in a JSON value; none if it is not JSON."""
    try:
        pending = [json.loads(text, strict=False)]
    except (ValueError, RecursionError):
        return
    while pending:
        value = pending.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            pending += value.values() if isinstance(value, dict) else value


def _continued(prefix: str, bodies: list[str], entry_point: str) -> Program | None:
    """The prefix with a body of its function, where the two make a whole definition."""
    for body in bodies:
        for shifted in (body, textwrap.indent(textwrap.dedent(body), "    ")):
            program = _parsed(f"{prefix.rstrip()}\n{shifted}", entry_point)
            if program and program.definition == WHOLE:
                return program
    return None


def _with_what_it_needs(program: Program, others: list[Program]) -> Program:
    """The program behind the other programs that bind names which it, or one of these, lacks."""
    assert program.tree
    trees = [(other, other.tree, names.bound_in(other.tree)) for other in others if other.tree]
    bound = names.bound_in(program.tree)
    needed: dict[int, Program] = {}
    missing = names.unbound_names(program.tree) if trees else set()
    while missing:
        name = missing.pop()
        i = next((i for i in reversed(range(len(trees))) if name in trees[i][2]), None)
        if i is not None and i not in needed:
            needed[i] = trees[i][0]
            bound |= trees[i][2]
            missing = (missing | names.unbound_names(trees[i][1])) - bound
    if not needed:
        return program
    parts = [needed[i].code.rstrip() for i in sorted(needed)]
    code = "\n\n\n".join([*parts, program.code])
    return _parsed(code, "") or program
