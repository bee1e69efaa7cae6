"""A chat reply to the program in it, and a program to the same without the model's own tests. Pure text.

No model and no sandbox: nothing is run.
"""

import ast
import re
from collections.abc import Iterator
from itertools import chain, islice

from fractal.problems.syntax import syntax_tree

# Lines before which a program with a syntax error further down may be cut: self-tests, their comments, definitions.
CUT_LINE = re.compile(r"assert\b|print\(|if __name__|# (?:Test|Example|Check)|(?:async )?def |class |@")
FENCE_LINE = re.compile(
    r"^(?P<indent>[ \t]*)(?P<marks>`{3,}|~{3,})[ \t]*(?P<language>[\w+#.-]*)(?P<rest>[^\n`]*)$", re.MULTILINE
)
TILDES = re.compile(r"^~~~", re.MULTILINE)
FIRST_LINE = re.compile(r"^(?:def |class |import |from \w|@|async def |[A-Za-z_]\w* *=[^=])", re.MULTILINE)
MAX_TRIES = 50  # starting lines, or cuts, that are tried


def extract_code(text: str, entry_point: str) -> str:
    """The program in a chat reply: itself if it is Python, else the first fenced block that defines the entry point.

    Where no block does: a program between the lines that does (a fence opened in mid-line), the first Python block, the
    longest block. Without a fence: what stands between a line that looks like code and the last line with which that
    parses. An unclosed last fence (a reply cut at max_tokens) counts. The model's own tests of the program are left out
    (`without_self_tests`).
    """
    return without_self_tests(_find_program(text.replace("\r\n", "\n").replace("\r", "\n"), entry_point), entry_point)


def without_self_tests(code: str, entry_point: str) -> str:
    """The program without what a model adds to test it; EvalPlus's sanitize drops that, too (arXiv:2305.01210).

    Top-level asserts, prints, main blocks and calls of its own functions go where they stand after the entry point
    (after the first definition, if that is missing), with the comment lines right above them. Of a program that does
    not parse, the last test or definition before the break goes with all behind it, until the rest parses; nothing
    goes if the break is not behind the entry point.
    """
    try:
        program = syntax_tree(code)
    except ValueError:
        head = _before_the_break(code, entry_point)
        return without_self_tests(head, entry_point) if head else code
    own = {n.name for n in program.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)} | {entry_point}
    places = [i for i, n in enumerate(program.body) if entry_point in _bound_names(n)]
    places = places or [i for i, n in enumerate(program.body) if getattr(n, "name", None)]
    drop = [n for n in program.body[places[0] + 1 :] if _is_self_test(n, own)] if places else []
    lines = code.split("\n")
    for node in reversed(drop):
        del lines[_comment_start(lines, node.lineno - 1) : node.end_lineno]
    rest = "\n".join(lines)
    return rest if is_python(rest) else code  # statements joined by semicolons share a line


def _before_the_break(code: str, entry_point: str) -> str:
    """What stands before the test or definition in which a program breaks; "" if the entry point is not whole in it."""
    begun = definition_pattern(entry_point).search(code)
    if begun is None:
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
            return "\n".join(lines[: _comment_start(lines, end)]) + "\n"
    return ""


def _comment_start(lines: list[str], start: int) -> int:
    """Where the comment that stands right above a line begins; the line itself if there is none."""
    while start and lines[start - 1].startswith("#"):
        start -= 1
    return start


def definition_pattern(name: str) -> re.Pattern[str]:
    """Where a program defines a name at its top level, whether it parses or not."""
    name = re.escape(name)
    return re.compile(rf"^(?:(?:async )?def|class) +{name}\b|^{name} *=(?!=)", re.MULTILINE)


def _bound_names(node: ast.stmt) -> set[str]:
    """The names that a definition or a plain assignment binds."""
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    return {str(getattr(node, "name", ""))}


def _is_self_test(node: ast.stmt, own: set[str]) -> bool:
    if isinstance(node, ast.Assert):
        return True
    if isinstance(node, ast.If):
        return any(isinstance(n, ast.Name) and n.id == "__name__" for n in ast.walk(node.test))
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name):
        return node.value.func.id in own | {"print"}
    return False


def _find_program(text: str, entry_point: str) -> str:
    if is_python(text) and not TILDES.search(text):  # ~~~python is an expression, too
        return text
    defines = definition_pattern(entry_point)
    fenced = fenced_blocks(text)
    blocks = [block for block in fenced if block[1].strip()]
    for code in chain((code for _, code in blocks), _unfenced_programs(text)):
        if defines.search(code):
            return code
    for language, code in blocks:
        if language.lower() in ("python", "py", "python3"):
            return code
    if blocks:
        return max((code for _, code in blocks), key=len)
    return next(_unfenced_programs(text), fenced[0][1] if fenced else text)


def fenced_blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of each fenced block, nearly as CommonMark has it.

    A fence is closed by the same character, at least as long, bare, and indented by less than four more: not by one in
    a docstring. A content that is indented like its fence (in a list) loses that. A fence opened twice counts once.
    """
    blocks: list[tuple[str, str]] = []
    opening: re.Match[str] | None = None
    for fence in FENCE_LINE.finditer(text):
        if opening is None:
            opening = fence
        elif _closes(opening, fence):
            blocks.append((opening["language"], _dedented(opening, text[opening.end() + 1 : fence.start()])))
            opening = None
        elif fence["language"] and not text[opening.end() : fence.start()].strip():
            opening = fence
    if opening is not None:
        blocks.append((opening["language"], _dedented(opening, text[opening.end() + 1 :])))
    return blocks


def _closes(opening: re.Match[str], fence: re.Match[str]) -> bool:
    bare = not fence["language"] and not fence["rest"].strip()
    return bare and fence["marks"].startswith(opening["marks"]) and _indent_width(fence) < _indent_width(opening) + 4


def _indent_width(fence: re.Match[str]) -> int:
    return len(fence["indent"].expandtabs(4))


def _dedented(opening: re.Match[str], text: str) -> str:
    indent, lines = opening["indent"], text.split("\n")
    if not all(line.startswith(indent) for line in lines if line.strip()):
        return text
    return "\n".join(line.removeprefix(indent) for line in lines)


def _unfenced_programs(text: str) -> Iterator[str]:
    """For each line that looks like the start of a program: the longest run of lines from there that is Python."""
    for start in islice(FIRST_LINE.finditer(text), MAX_TRIES):
        if program := _longest_program(text[start.start() :]):
            yield program


def _longest_program(text: str) -> str:
    """The longest run of lines from the start that is Python, "" if none is."""
    lines = text.split("\n")
    end = len(lines)
    while end > 0:
        candidate = "\n".join(lines[:end])
        try:
            syntax_tree(candidate)
        except ValueError as error:
            if not isinstance(error.__cause__, SyntaxError):
                return ""
            end = min(end, error.__cause__.lineno or end) - 1  # what breaks in a line breaks with any lines behind it
        else:
            return candidate.rstrip() + "\n"
    return ""


def is_python(text: str) -> bool:
    try:
        syntax_tree(text)
    except ValueError:
        return False
    return True
