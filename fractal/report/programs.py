"""Programs side by side for the page: the critic's pick, the best others that passed and failed; coloured as HTML."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape
from pygments.lexers.python import PythonLexer  # type: ignore[import-untyped]
from pygments.token import Token  # type: ignore[import-untyped]

from fractal.records import Choice, Label, Problem, Sample, Score
from fractal.report.number_text import visible
from fractal.selection.outcomes import outcomes

CODE_CHARS = 4000  # of a program on the page
COLOURED_BYTES = 4_000_000  # of coloured programs; what comes after it is plain and shorter: 500 problems take 10 MB
PLAIN_CHARS = 1500
PROMPT_CHARS, DETAIL_CHARS = 2000, 400
_CLASSES = (  # the first that holds the token; short names, many tokens
    (Token.Comment, "c"),
    (Token.Literal.String, "s"),
    (Token.Literal.Number, "m"),
    (Token.Keyword, "k"),
    (Token.Operator.Word, "k"),
    (Token.Name.Function, "f"),
    (Token.Name.Class, "f"),
    (Token.Name.Decorator, "f"),
    (Token.Name.Builtin, "b"),
)
_lexer = PythonLexer(stripnl=False, ensurenl=False)


@dataclass(frozen=True, slots=True)
class Program:
    """A program beside others of its problem."""

    role: str
    sample_id: int
    status: str
    detail: str
    score: float | None
    probability: float | None
    code: str
    tokens: int


@dataclass(frozen=True, slots=True)
class ProblemDetails:
    """What a row of the table of problems opens to; `absent` names the kinds of program that the problem has not."""

    prompt: str
    tests: list[str]
    programs: list[Program]
    absent: list[str] = field(default_factory=list)


def problem_details(
    problems: Iterable[Problem],
    samples: Iterable[Sample],
    labels: Sequence[Label],
    scores: Iterable[Score],
    choices: Iterable[Choice],
) -> dict[int, ProblemDetails]:
    """For each problem with usable samples: the critic's pick, and of the other programs the best passed and failed.

    Best is the highest score, or without scores the lowest sample_id; a program that reads like the pick is no other.
    """
    by_task = {problem.task_id: problem for problem in problems}
    label_of = {(label.task_id, label.sample_id): label for label in labels}
    picked = {choice.task_id: choice.sample_id for choice in choices if choice.strategy == "critic"}
    details = {}
    own = (sample for sample in samples if sample.task_id in by_task)
    for task_id, candidates in outcomes(own, labels, scores).items():
        ranked = sorted(candidates, key=lambda outcome: (-(outcome.logit or 0.0), outcome.sample.sample_id))
        pick = next((outcome for outcome in ranked if outcome.sample.sample_id == picked.get(task_id)), None)
        others = [outcome for outcome in ranked if pick is None or outcome.sample.code != pick.sample.code]
        columns = [("the critic's pick", pick, "the critic picked none")]
        for verdict, passed in (("passed", True), ("failed", False)):
            best = next((outcome for outcome in others if outcome.passed == passed), None)
            another = pick is not None and pick.passed == passed
            role = f"another that {verdict}" if another else f"one that {verdict}"
            columns.append((role, best, f"no other program {verdict}" if another else f"no program {verdict}"))
        programs = []
        for role, outcome, _ in columns:
            if outcome is not None:
                label = label_of[task_id, outcome.sample.sample_id]
                programs.append(
                    Program(
                        role=role,
                        sample_id=outcome.sample.sample_id,
                        status=label.status,
                        detail=_cut(label.detail, DETAIL_CHARS),
                        score=outcome.logit,
                        probability=outcome.score.probability if outcome.score else None,
                        code=outcome.sample.code,
                        tokens=outcome.sample.tokens,
                    )
                )
        absent = [reason for _, outcome, reason in columns if outcome is None]
        problem = by_task[task_id]
        details[task_id] = ProblemDetails(_cut(problem.prompt, PROMPT_CHARS), problem.tests, programs, absent)
    return details


def _cut(text: str, chars: int) -> str:
    return text if len(text) <= chars else text[:chars] + "…"


class CodeFilter:
    """Programs as coloured HTML, while the page's budget lasts."""

    def __init__(self) -> None:
        self._left = COLOURED_BYTES

    def __call__(self, code: str) -> Markup:
        text = visible(code.replace("\r\n", "\n"))
        limit = CODE_CHARS if self._left > 0 else PLAIN_CHARS
        html = coloured(text[:limit]) if self._left > 0 else escape(text[:limit])
        self._left -= len(html)
        if len(text) > limit:
            html += Markup('<span class="i">… {} more characters</span>').format(f"{len(text) - limit:,}")
        return html


def coloured(code: str) -> Markup:
    """Python as escaped HTML with one-letter classes, neighbours of one class together."""
    parts: list[tuple[str, str]] = []
    for kind, text in _lexer.get_tokens(code):
        name = next((short for token, short in _CLASSES if kind in token), "")
        if parts and (parts[-1][0] == name or not text.strip()):
            parts[-1] = (parts[-1][0], parts[-1][1] + text)
        else:
            parts.append((name, text))
    return Markup("").join(
        Markup("<i class={}>{}</i>").format(name, text) if name else escape(text) for name, text in parts
    )
