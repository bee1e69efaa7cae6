"""The answer in a reply: without the model's reasoning, special tokens, and the marks around it. Pure text.

A mark within a program, in a string or a comment, is no mark: nothing is cut inside of what is Python as it stands.
"""

import html
import re
from collections.abc import Callable, Iterator

from fractal.generate.fences import fenced_blocks
from fractal.problems.syntax import is_python

INVISIBLE = "\ufeff\u200b\u200c\u200d\u2060\0"
LINE_SEPARATORS = re.compile(r"(?<![\x85\u2028\u2029])[\x85\u2028\u2029]+(?=[ \t]*(?:```|~~~))")
# Is there any mark? Most replies have none; what the patterns below find begins so.
ANY_MARK = re.compile(
    r"<(?:[|/\uff5c]|\w+:|s>|eos|bos|pad|EOT|end_of|start_of|"
    r"(?i:think|thought|reason|reflect|scratch|analy|inner|internal|answer|final|solution|code|python|pre))"
    r"|\u25c1|\[/?[A-Z]+\]"
)

THOUGHT = r"(?:think|thinking|thoughts?|reasoning|reflection|scratchpad|analysis|(?:inner|internal)_monologue)"
# (opening, closing) of reasoning: most models; Mistral; Kimi; Sky-T1 and OpenThinker.
REASONING = [
    (rf"<(?:\w+:)?{THOUGHT}>", rf"</(?:\w+:)?{THOUGHT}>"),
    (r"\[THINK\]", r"\[/THINK\]"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),
]
REASONING_MARK = re.compile(
    "|".join(f"(?P<open{i}>{a})|(?P<close{i}>{b})" for i, (a, b) in enumerate(REASONING)), re.IGNORECASE
)
# gpt-oss: channels of its format; the second form is the first without its special tokens.
CHANNEL = re.compile(r"<\|channel\|>(\w{1,20})[^<\n]{0,80}(?:<\|constrain\|>\w+)?<\|message\|>")
BARE_CHANNELS = re.compile(r"\Aanalysis(?=[A-Z]).*?assistantfinal", re.DOTALL)

SPECIAL_TOKEN = re.compile(
    r"<\|[\w\u2581.:/-]{1,40}\|>|<\uff5c[^\uff5c\n<>]{1,40}\uff5c>|</?(?:eos|bos|pad|EOT|end_of_turn|start_of_turn)>"
    r"|\A\s*<s>|</s>[ \t]*$|\[/?INST\]",
    re.MULTILINE,
)
ROLES = ("", "assistant", "model", "Assistant")
MAX_DEPTH = 3  # of tags in tags: <answer><pre><code>
QUOTES = ("'", '"', "`")
NEAR = 200  # characters of a line on each side in which quotes are looked for

# MBPP's marks in its paper's prompt, and CodeLlama's; at the beginning of a line.
BEGIN_LINE = re.compile(r"^ {0,3}\[(?:BEGIN|PYTHON|ANSWER|CODE|SOLUTION)\][ \t]*\n?", re.MULTILINE)
END_LINE = re.compile(r"^ {0,3}\[(?:DONE|END|/?TESTS?|BEGIN|/?(?:PYTHON|ANSWER|CODE|SOLUTION))\]", re.MULTILINE)
GLUED_DONE = re.compile(r"\[DONE\][ \t]*$", re.MULTILINE)
NAME_DONE = re.compile(r"(?<!\[)\bDONE\b")
TAG = re.compile(
    r"<(?P<name>answer|final_answer|solution|code|python|pre(?![^<>]*>\s*<code))(?: [^<>\n]*)?>"
    r"(?P<content>.*?)(?:</(?P=name)>|\Z)",
    re.DOTALL | re.IGNORECASE,
)


def answer(text: str, defines: Callable[[str], object]) -> str:
    """What a reply says besides its reasoning, as far as its end; its lines end in "\\n".

    Of several parts that are marked as answers it is the first that `defines` what is asked for between [BEGIN] and
    [DONE], where base models go on with tasks of their own, and the last between tags such as <answer>.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").strip(INVISIBLE)
    if "```" in text or "~~~" in text:
        text = LINE_SEPARATORS.sub("\n", text)
        text = "\n".join(_visible_fence(line) for line in text.split("\n")) if not text.isascii() else text
    if not ANY_MARK.search(text) and not text.startswith("analysis"):
        return text
    text = _without_reasoning(text)
    text = _as_far_as_the_end(text)
    text = _between_brackets(text, defines)
    return _between_tags(text, defines)


def _visible_fence(line: str) -> str:
    """A line with a fence, without invisible characters and with plain spaces around it."""
    stripped = line.strip(INVISIBLE + "\xa0\u3000 \t")
    if not stripped.startswith(("```", "~~~")):
        return line
    start = line.index(stripped[:3])
    return re.sub(f"[{INVISIBLE}]", "", line[:start]).replace("\xa0", " ") + stripped


def _program_spans(text: str) -> list[tuple[int, int]]:
    """Where programs stand in a text: all of it, or its fenced blocks that are Python."""
    if is_python(text):
        return [(0, len(text))]
    spans = []
    for block in fenced_blocks(text):
        start = text.find(block.code) if block.code.strip() and is_python(block.code) else -1
        if start >= 0:
            spans.append((start, start + len(block.code)))
    return spans


def _outside_programs(pattern: re.Pattern[str], text: str) -> Iterator[re.Match[str]]:
    """Matches that stand neither in a program nor in quotes."""
    spans: list[tuple[int, int]] | None = None
    for match in pattern.finditer(text):
        if spans is None:
            spans = _program_spans(text)
        at_line_start = match.start() == 0 or text[match.start() - 1] == "\n"
        list_of_a_name = match[0].startswith("[") and at_line_start  # [THINK] alone is Python, too
        inside = any(start <= match.start() < end for start, end in spans) and not list_of_a_name
        if not inside and not _quoted(text, match):
            yield match


def _quoted(text: str, match: re.Match[str]) -> bool:
    """Whether a quote or backtick touches the mark, and the same stands on its other side in the line."""
    line_start = text.rfind("\n", 0, match.start()) + 1
    line_end = text.find("\n", match.end())
    line_end = line_end if line_end >= 0 else len(text)
    before = text[max(line_start, match.start() - NEAR) : match.start()]
    after = text[match.end() : min(line_end, match.end() + NEAR)]
    if "```" in before + after:
        return False
    return (after[:1] in QUOTES and after[:1] in before) or (before[-1:] in QUOTES and before[-1:] in after)


def _without_reasoning(text: str) -> str:
    """The text without what stands between marks of reasoning, before a closing mark, and behind an opening one."""
    if channels := list(_outside_programs(CHANNEL, text)):
        final = [channel for channel in channels if channel[1] == "final"]
        return text[final[-1].end() :] if final else text[: channels[0].start()]
    text = BARE_CHANNELS.sub("", text)
    kept: list[str] = []
    start, opened = 0, ""  # of what is not yet decided; the mark that opened it
    for mark in _outside_programs(REASONING_MARK, text):
        kind = str(mark.lastgroup)
        if opened and kind == opened.replace("open", "close"):
            start, opened = mark.end(), ""
        elif not opened and kind.startswith("open"):
            kept.append(text[start : mark.start()])
            opened = kind
        elif not opened:
            kept.clear()  # the prompt opened it
            start = mark.end()
    return "".join(kept) + ("" if opened else text[start:])


def _as_far_as_the_end(text: str) -> str:
    """The text to its first special token; those that stand before any text, with the role they name, are left out."""
    start = 0
    for token in _outside_programs(SPECIAL_TOKEN, text):
        if text[start : token.start()].strip() in ROLES:
            start = token.end()
        else:
            return _from(text, start, token.start())
    return _from(text, start, len(text)) if start else text


def _from(text: str, start: int, end: int) -> str:
    part = text[start:end]
    return re.sub(r"\A\s*(?:assistant|model|Assistant)[ \t]*\n", "", part) if start else part


def _between_brackets(text: str, defines: Callable[[str], object]) -> str:
    """The first part between [BEGIN] and [DONE] that has the definition, or what stands before the first [DONE]."""
    if "[DONE]" in text and not NAME_DONE.search(text):
        text = GLUED_DONE.sub("\n[DONE]", text)
    starts = [begin.end() for begin in BEGIN_LINE.finditer(text)]
    for start in [*starts, 0]:
        end = END_LINE.search(text, start)
        part = text[start : end.start()] if end else text[start:]
        if (starts or end) and defines(part):
            return part
    return text


def _between_tags(text: str, defines: Callable[[str], object]) -> str:
    """The last part between tags that has the definition; HTML's escapes are read where that makes a program of it."""
    for _ in range(MAX_DEPTH):
        parts = [tag["content"] for tag in _outside_programs(TAG, text) if defines(tag["content"])]
        if not parts:
            break
        text = parts[-1]
        plain = html.unescape(text)
        if plain != text and not is_python(text) and is_python(plain):
            text = plain
    return text
