"""What a run found -> one HTML page that needs nothing else: numbers as words, programs as coloured text, charts.

Prompts, programs, details and names are foreign: all are escaped, and characters that do not show, or that turn the
direction of text, are spelt out. The page's policy allows its one script by hash and no request at all; without
scripts everything can still be read. Pure; `report` writes the file.
"""

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape
from pygments.lexers.python import PythonLexer  # type: ignore[import-untyped]
from pygments.token import Token  # type: ignore[import-untyped]

from fractal.records import Choice, Label, Problem, Sample, Score
from fractal.report import charts
from fractal.report.criteria import Verdict
from fractal.report.summary import Duel, FunnelStep, Summary
from fractal.selection.metrics import Interval
from fractal.selection.outcomes import BASELINE, StrategyResult, outcomes

DASH = "\u2013"
MEANING = {
    "critic": "highest score of the critic",
    "random": "any sample, exact expectation",
    "first": "the first sample",
    "mean_logprob": "highest log-probability per token",
    "sum_logprob": "highest log-probability",
    "shortest": "shortest program",
    "zero_shot": "the model's own yes or no, before any training",
    "critic_logprob": "critic and log-probability, weights from train problems",
    "consensus": "the output most samples agree on, on visible inputs",
    "visible_test": "any that passes the test in the prompt, exact expectation",
    "visible_test_critic": "highest score among those that pass it",
    "oracle": "a passing sample if there is one: the ceiling",
}
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
class Shown:
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
class Opened:
    """What a row of the table of problems opens to; `absent` says in words which programs there are none of."""

    prompt: str
    tests: list[str]
    programs: list[Shown]
    absent: list[str] = field(default_factory=list)


# ---- the page --------------------------------------------------------------------------------------------------------


def page(
    summary: Summary,
    opened: Mapping[int, Opened] | None = None,
    verdicts: Sequence[Verdict] = (),
    manifest: Mapping[str, Any] | None = None,
) -> str:
    """The whole page as HTML. `opened` holds the programs by task_id, `manifest` is shown as it is."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    environment.filters.update(
        percent=percent, points=points, span=span, number=number, seconds=seconds, dash=dash, hash=_hash,
        code=_Colours(), interval=plain_span, words=words, when=when, measured=measured,
    )  # fmt: skip
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return template.render(
        s=summary,
        f=summary.facts,
        headline=headline(summary),
        findings=findings(summary),
        charts=_charts(summary),
        meaning=MEANING,
        opened=opened or {},
        verdicts=verdicts,
        manifest=json.dumps(manifest, indent=1, ensure_ascii=False) if manifest else "",
        duels={one.strategy: one for one in summary.duels},
        funnel=_funnel(summary.funnel),
        kinds={row.task_id: _kind(row.critic, row.random) for row in summary.by_problem},
    )


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(str(script).encode()).digest()).decode()


def _kind(critic: float | None, random: float | None) -> str:
    if critic is None or random is None or critic == random:
        return "same"
    return "wins" if critic > random else "loses"


def _funnel(steps: Sequence[FunnelStep]) -> list[tuple[FunnelStep, str, float]]:
    """Each step with what it counts and its share, in percent, of the largest step that counts the same."""
    units = ["problems" if "problem" in one.name and "sample" not in one.name else "samples" for one in steps]
    most = {unit: max([1, *(s.count for s, u in zip(steps, units, strict=True) if u == unit)]) for unit in set(units)}
    return [(one, unit, 100 * one.count / most[unit]) for one, unit in zip(steps, units, strict=True)]


def _charts(summary: Summary) -> dict[str, Markup]:
    """Chart name -> SVG; a chart without data is left out."""
    drawn: dict[str, str] = {}
    if any(summary.labels_by_status.values()):
        drawn["status"] = charts.status_bars(summary.labels_by_status)
    if summary.strategies:
        drawn["strategies"] = charts.strategy_intervals([(one.strategy, one.pass_rate) for one in summary.strategies])
    if summary.curves and len(summary.curves.by_strategy[BASELINE]) > 1:
        drawn["curves"] = charts.best_of_k(summary.curves)
    if summary.critic:
        drawn["reliability"] = charts.reliability(summary.critic.reliability)
    if summary.facts.epochs:
        drawn["training"] = charts.training(summary.facts.epochs)
    if summary.roc:
        drawn["roc"] = charts.roc(summary.roc)
    if summary.selective:
        drawn["selective"] = charts.selective(summary.selective)
    if summary.difficulty:
        drawn["difficulty"] = charts.difficulty(summary.difficulty)
    if summary.duels:
        drawn["duels"] = charts.duels(summary.duels)
    if summary.split_accuracies:
        drawn["splits"] = charts.splits(summary.split_accuracies)
    return {name: Markup(svg) for name, svg in drawn.items()}  # our own numbers; matplotlib escapes the names


# ---- programs side by side -------------------------------------------------------------------------------------------


def open_rows(
    problems: Iterable[Problem],
    samples: Iterable[Sample],
    labels: Sequence[Label],
    scores: Iterable[Score],
    choices: Iterable[Choice],
) -> dict[int, Opened]:
    """For each problem with usable samples: the critic's pick, and of the other programs the best passed and failed.

    Best is the highest score, or without scores the lowest sample_id; a program that reads like the pick is no other.
    """
    by_task = {one.task_id: one for one in problems}
    said = {(one.task_id, one.sample_id): one for one in labels}
    picked = {one.task_id: one.sample_id for one in choices if one.strategy == "critic"}
    opened = {}
    for task_id, rows in outcomes((one for one in samples if one.task_id in by_task), labels, scores).items():
        ranked = sorted(rows, key=lambda one: (-(one.logit if one.logit is not None else 0.0), one.sample.sample_id))
        pick = next((one for one in ranked if one.sample.sample_id == picked.get(task_id)), None)
        others = [one for one in ranked if pick is None or one.sample.code != pick.sample.code]
        columns = [("the critic's pick", pick, "the critic picked none")]
        for word, passed in (("passed", True), ("failed", False)):
            best = next((one for one in others if one.passed == passed), None)
            also = pick is not None and pick.passed == passed
            role = f"another that {word}" if also else f"one that {word}"
            columns.append((role, best, f"no other program {word}" if also else f"no program {word}"))
        shown = []
        for role, one, _ in columns:
            if one is not None:
                label = said[task_id, one.sample.sample_id]
                shown.append(
                    Shown(
                        role=role,
                        sample_id=one.sample.sample_id,
                        status=label.status,
                        detail=_cut(label.detail, DETAIL_CHARS),
                        score=one.logit,
                        probability=one.score.probability if one.score else None,
                        code=one.sample.code,
                        tokens=one.sample.tokens,
                    )
                )
        absent = [reason for _, one, reason in columns if one is None]
        opened[task_id] = Opened(_cut(by_task[task_id].prompt, PROMPT_CHARS), by_task[task_id].tests, shown, absent)
    return opened


def _cut(text: str, chars: int) -> str:
    return text if len(text) <= chars else text[:chars] + "…"


class _Colours:
    """Programs as coloured HTML, while the page's budget lasts."""

    def __init__(self) -> None:
        self._left = COLOURED_BYTES

    def __call__(self, code: str) -> Markup:
        text = visible(code.replace("\r\n", "\n"))
        most = CODE_CHARS if self._left > 0 else PLAIN_CHARS
        rest = len(text) - most
        html = coloured(text[:most]) if self._left > 0 else escape(text[:most])
        self._left -= len(html)
        return html + (Markup('<span class="i">… {} more characters</span>').format(f"{rest:,}") if rest > 0 else "")


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


def visible(text: str) -> str:
    """The text with every character that does not show, or that turns others round, as ⟨U+202E⟩."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one in "\n\t\u00a0" else f"\u27e8U+{ord(one):04X}\u27e9" for one in text)


# ---- the result in words ---------------------------------------------------------------------------------------------


def headline(summary: Summary) -> str:
    """The result in one sentence that claims no more than the intervals do."""
    results = {one.strategy: one for one in summary.strategies}
    critic = results.get("critic")
    if BASELINE not in results:
        return f"No strategy measured: {summary.reasons.get('strategies', 'there are no choices')}."
    if critic is None:
        return "No critic yet: nothing chooses better than chance here."
    # whatever a critic does on problems that it was trained on is no result
    who = "On train problems, which it has seen, the critic" if summary.split == "train" else "The critic"
    ours = _standing(critic.gain_over_random)
    duel = _duel(summary, "mean_logprob")
    if duel is None:
        return f"{who} {ours} random choice."
    theirs = _standing(duel.gain)
    if ours == theirs:
        return f"{who} {ours} random choice {'or' if ours.endswith('from') else 'and'} mean log-probability."
    return f"{who} {ours} random choice and {theirs} mean log-probability."


def findings(summary: Summary) -> list[str]:
    """The numbers behind the headline, one sentence each."""
    results = {one.strategy: one for one in summary.strategies}
    critic, random, oracle = (results.get(name) for name in ("critic", BASELINE, "oracle"))
    if random is None:
        return []
    ceiling = f", the oracle {percent(oracle.pass_rate.mean)}" if oracle else ""
    if critic is None:
        share = f"{percent(random.pass_rate.mean)} {span(random.pass_rate)}"
        return [f"A random sample passes on {share} of {_problems(random, summary)}{ceiling}."]
    # on the critic's own problems, which may be fewer
    held_against = critic.pass_rate.mean - critic.gain_over_random.mean
    found = [
        f"It picks a passing program for {percent(critic.pass_rate.mean)} {span(critic.pass_rate)} of "
        f"{_problems(critic, summary)}; random {percent(held_against)}{ceiling}.",
        f"Gain over random: {_gain(critic.gain_over_random)}",
    ]
    if duel := _duel(summary, "mean_logprob"):
        found.append(f"Gain over mean log-probability: {_gain(duel.gain)}")
    if gap := summary.gap_closed:
        found.append(f"It goes {percent(gap.mean, 0)} {span(gap)} of the way from random to the oracle.")
    return found


def _standing(gain: Interval) -> str:
    if gain.low > 0 and gain.low != gain.high:
        return "beats"
    if gain.high < 0 and gain.low != gain.high:
        return "loses to"
    return "cannot be told apart from"


def _gain(gain: Interval) -> str:
    text = f"{points(gain.mean)} points {span(gain, signed=True)}"
    if gain.low == gain.high:
        return f"{text}: no interval, so nothing is shown."
    if gain.low > 0:
        return f"{text}."
    return f"{text}: worse." if gain.high < 0 else f"{text}: the interval includes zero."


def _duel(summary: Summary, strategy: str) -> Duel | None:
    return next((one for one in summary.duels if one.strategy == strategy), None)


def _problems(result: StrategyResult, summary: Summary) -> str:
    return f"{result.problems} {summary.split} problem{'' if result.problems == 1 else 's'}"


# ---- numbers as text -------------------------------------------------------------------------------------------------


def percent(value: float | None, decimals: int = 1) -> str:
    """0.4123 -> "41.2 %"; None and NaN -> a dash."""
    return DASH if value is None or value != value else f"{100 * value:.{decimals}f}\u00a0%".replace("-", "\u2212")


def points(value: float) -> str:
    """Percentage points with their sign: 0.111 -> "+11.1"."""
    return f"{round(100 * value, 1) + 0.0:+.1f}".replace("-", "\u2212")  # + 0.0: never "-0.0"


def span(interval: Interval, signed: bool = False) -> str:
    """The interval in percent, "[20.1, 62.5]"; a dash where the bootstrap saw no variation and so knows nothing."""
    if interval.low == interval.high:
        return f"[{DASH}]"
    low, high = (
        points(x) if signed else f"{100 * x:.1f}".replace("-", "\u2212") for x in (interval.low, interval.high)
    )
    return f"[{low},\u00a0{high}]"


def plain_span(interval: Interval | None) -> str:
    """The interval as numbers, "[0.612, 0.741]"."""
    if interval is None or interval.low == interval.high:
        return f"[{DASH}]"
    return f"[{interval.low:.3f},\u00a0{interval.high:.3f}]"


def number(value: float | None, decimals: int = 3) -> str:
    if value is None or value != value:
        return DASH
    return (f"{value:,}" if isinstance(value, int) else f"{value:,.{decimals}f}").replace("-", "\u2212")


def seconds(value: float | None) -> str:
    """Seconds as "4.2 s", "12 min 05 s" or "3 h 20 min"."""
    if value is None:
        return DASH
    if value < 100:
        return f"{value:.1f}\u00a0s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 100:
        return f"{minutes}\u00a0min\u00a0{rest:02}\u00a0s"
    return f"{minutes // 60}\u00a0h\u00a0{minutes % 60:02}\u00a0min"


def measured(one: Verdict) -> str:
    """A verdict's value with its interval; a dash where there is none."""
    if one.value is None:
        return DASH
    if one.share:
        return percent(one.value) + (f" {span(one.interval)}" if one.interval else "")
    return f"{one.value:,.0f}" if one.value == round(one.value) else f"{one.value:,.3f}"


def when(date: str) -> str:
    """2026-11-24T10:00:00+00:00 -> "2026-11-24 10:00 UTC"; anything else stays as it is."""
    if date[10:11] == "T" and date.endswith("+00:00"):
        return f"{date[:10]} {date[11:16]} UTC"
    return date


def words(strategy: str) -> str:
    return strategy.replace("_", " ")


def dash(value: object) -> object:
    return DASH if value is None or value == "" else value
