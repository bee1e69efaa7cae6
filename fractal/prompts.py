"""Problem to prompt, and completion to program. Pure text; no model, no sandbox.

A prompt shows the task and its first test, as the MBPP paper does (Austin et al. 2021, arXiv:2108.07732, section 3),
in the model's own chat template. The reply is opened with a code fence, so that a model writes code at once and
sampling can stop at the closing fence.
"""

import ast
import re
import warnings
from collections.abc import Callable
from typing import Any

from fractal.records import Problem

VERSION = 1  # goes into the run's configuration: other prompts, other samples
OPENING = "```python\n"  # put into the assistant's mouth
STOP = "\n```"


def question(problem: Problem) -> str:
    """What the user says. Only the first test is shown; the label uses all of them.

    Naming the function doubled SmolLM2-135M's pass rate on the starter set (docs/log.md, 2026-11-24).
    """
    return (
        f"{problem.prompt}\nThe function must be named `{problem.entry_point}`. Example of its use:\n{problem.tests[0]}"
    )


def render(problem: Problem, apply_chat_template: Callable[..., Any]) -> str:
    """The text that the model continues: chat template, question, and the opened fence."""
    messages = [{"role": "user", "content": question(problem)}]
    return str(apply_chat_template(messages, add_generation_prompt=True, tokenize=False)) + OPENING


FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([\w+#.-]*)[^\n`]*$", re.MULTILINE)
START = re.compile(r"^(?:def |class |import |from \w|@|async def |[A-Za-z_]\w* *=[^=])", re.MULTILINE)


def extract_code(text: str, entry_point: str) -> str:
    """The program in a chat reply: the first fenced block that defines the entry point, else the first Python block.

    An unclosed last fence (a reply cut at max_tokens) counts. Without a fence, the reply itself if it is Python, else
    what stands between its first line that looks like code and the last line with which that parses.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    blocks = fenced_blocks(text)
    if blocks:
        defines = re.compile(
            rf"^(?:(?:async )?def|class) +{re.escape(entry_point)}\b|^{re.escape(entry_point)} *=", re.M
        )
        for _, code in blocks:
            if defines.search(code):
                return code
        for language, code in blocks:
            if language.lower() in ("python", "py", "python3"):
                return code
        return max((code for _, code in blocks), key=len)
    if parses(text):
        return text
    start = START.search(text)
    return _longest_program(text[start.start() :]) if start else text


def fenced_blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of each fenced block, as CommonMark closes them: same character, at least as long, bare."""
    blocks: list[tuple[str, str]] = []
    opening: re.Match[str] | None = None
    for fence in FENCE.finditer(text):
        if opening is None:
            opening = fence
        elif fence[1].startswith(opening[1]) and not fence[2]:
            blocks.append((opening[2], text[opening.end() + 1 : fence.start()]))
            opening = None
    if opening is not None:
        blocks.append((opening[2], text[opening.end() + 1 :]))
    return blocks


def _longest_program(text: str) -> str:
    """The longest run of lines from the start that is Python; all of it if none is (the verifier will say so)."""
    lines = text.split("\n")
    for end in range(len(lines), max(0, len(lines) - 400), -1):
        candidate = "\n".join(lines[:end])
        if lines[end - 1].strip() and parses(candidate):
            return candidate + "\n"
    return text


def parses(text: str) -> bool:
    try:
        tree(text)
    except ValueError:
        return False
    return True


def tree(text: str) -> ast.Module:
    """The syntax tree of foreign Python, without the compiler's warnings about it. Raises ValueError if it is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(text)
        except (SyntaxError, RecursionError, MemoryError) as error:
            raise ValueError(str(error)) from error
