"""Programs side by side for the page: the critic's pick, the best others that passed and failed; coloured as HTML."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pygments  # type: ignore[import-untyped]
from markupsafe import Markup, escape
from pygments.formatters import HtmlFormatter  # type: ignore[import-untyped]
from pygments.lexers.python import PythonLexer  # type: ignore[import-untyped]

from fractal.records import Choice, Label, Problem, Sample, Score
from fractal.report.number_text import visible
from fractal.selection.outcomes import Outcome, outcomes

CODE_CHARS = 4000  # of a program on the page
COLOURED_BYTES = 4_000_000  # of coloured programs; what comes after it is plain and shorter: 500 problems take 10 MB
PLAIN_CHARS = 1500
_lexer = PythonLexer(stripnl=False, ensurenl=False)
_formatter = HtmlFormatter(nowrap=True)


@dataclass(frozen=True, slots=True)
class ProblemDetails:
    """What a row of the table of problems opens to: programs by their role, None where the problem has no such."""

    problem: Problem
    programs: dict[str, Outcome | None]


def problem_details(
    problems: Iterable[Problem],
    samples: Iterable[Sample],
    labels: Sequence[Label],
    scores: Iterable[Score],
    choices: Iterable[Choice],
) -> dict[str, ProblemDetails]:
    """For each problem with usable samples: the critic's pick, and of the other programs the best passed and failed.

    Best is the highest score, or without scores the lowest sample_id; a program that reads like the pick is no other.
    """
    by_task = {problem.task_id: problem for problem in problems}
    picked = {choice.task_id: choice.sample_id for choice in choices if choice.strategy == "critic"}
    details = {}
    own = (sample for sample in samples if sample.task_id in by_task)
    for task_id, candidates in outcomes(own, labels, scores).items():
        ranked = sorted(candidates, key=lambda outcome: -(outcome.logit or 0.0))
        pick = next((outcome for outcome in ranked if outcome.sample.sample_id == picked.get(task_id)), None)
        others = [outcome for outcome in ranked if pick is None or outcome.sample.code != pick.sample.code]
        programs = {"the critic's pick": pick}
        for verdict, passed in (("passed", True), ("failed", False)):
            another = "another" if pick is not None and pick.passed == passed else "one"
            best = next((outcome for outcome in others if outcome.passed == passed), None)
            programs[f"{another} that {verdict}"] = best
        details[task_id] = ProblemDetails(by_task[task_id], programs)
    return details


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
    """Python as escaped HTML, with the short classes of pygments."""
    return Markup(pygments.highlight(code, _lexer, _formatter))
