"""The code blocks of a chat reply, as CommonMark has them. Pure text."""

import re
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from markdown_it import MarkdownIt

FENCE_MARKS = re.compile(r"`{3,}|~{3,}")
LINE_WITH_FENCE = re.compile(r"^(?P<marks>`{3,}|~{3,})(?P<info>.*)$", re.MULTILINE)
LANGUAGE = re.compile(r"[{. \t]*([\w+#-]*)")  # of `python`, `{python}`, `{.python .numberLines}`, `python:a.py`
PYTHON = ("python", "py", "python3", "ipython", "ipython3")


class Block(NamedTuple):
    """A fenced block."""

    language: str  # in lower case; "" where none is named
    code: str
    closed: bool = True  # not: the text ends, or the list around it does

    @property
    def is_python(self) -> bool:
        return self.language in PYTHON


def fenced_blocks(text: str) -> list[Block]:
    """Each fenced block of a text whose lines end in "\\n".

    Most replies have fences at the beginning of a line only. These are read here (11 us; the parser takes 150 us or
    more): such a line is never in a list or a quotation, so that CommonMark's rule for it needs no context.
    """
    if all(not m.start() or text[m.start() - 1] == "\n" for m in FENCE_MARKS.finditer(text)):
        return _blocks_of_unindented_fences(text)
    return parsed_blocks(text)


def _blocks_of_unindented_fences(text: str) -> list[Block]:
    blocks = []
    opening: re.Match[str] | None = None
    for fence in LINE_WITH_FENCE.finditer(text):
        if opening is None:
            if fence["marks"][0] == "~" or "`" not in fence["info"]:
                opening = fence
        elif fence["marks"].startswith(opening["marks"]) and not fence["info"].strip(" \t"):
            blocks.append(Block(_language(opening["info"]), text[opening.end() + 1 : fence.start()]))
            opening = None
    if opening is not None:
        blocks.append(Block(_language(opening["info"]), text[opening.end() + 1 :], closed=False))
    return blocks


def parsed_blocks(text: str) -> list[Block]:
    """Each fenced block, found by the parser; also in a list, in a quotation, and in a block that is indented whole."""
    blocks = []
    for token in _parser().parse(text):
        if token.type == "fence":
            first, end = token.map or (0, 0)
            lines = token.content.count("\n") + (not token.content.endswith("\n") and token.content != "")
            blocks.append(Block(_language(token.info), token.content, closed=end - first - lines == 2))
        elif token.type == "code_block" and FENCE_MARKS.match(token.content):
            blocks += fenced_blocks(token.content)
    return blocks


def indented_blocks(text: str) -> list[str]:
    """What is indented by four spaces or a tab, without that: Markdown's code blocks without fences."""
    return [token.content for token in _parser().parse(text) if token.type == "code_block"]


def _language(info: str) -> str:
    match = LANGUAGE.match(info)
    return match[1].lower() if match else ""


@lru_cache(maxsize=1)
def _parser() -> "MarkdownIt":
    """CommonMark's blocks that hold code or bear on where it stands; no HTML, no text within a paragraph."""
    from markdown_it import MarkdownIt  # takes 30 ms to import, and few replies need it

    parser = MarkdownIt("zero").enable(["fence", "code", "list", "blockquote"])
    parser.core.ruler.enableOnly(["normalize", "block"])
    return parser
