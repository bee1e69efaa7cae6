"""Summary -> one HTML page that needs nothing else, from page.html.

Prompts, programs, details and names are foreign: all are escaped, and characters that do not show, or that turn the
direction of text, are spelt out. The page's policy allows its one script by hash and no request at all; without
scripts everything can still be read. Pure.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from fractal.report import charts, number_text
from fractal.report.criteria import Verdict, measured
from fractal.report.dataset import FunnelStep
from fractal.report.findings import findings, headline
from fractal.report.programs import CodeFilter, ProblemDetails
from fractal.report.summary import Summary
from fractal.selection.strategies import BASELINE

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
FILTERS = {
    "percent": number_text.percent,
    "points": number_text.points,
    "span": number_text.span,
    "interval": number_text.plain_span,
    "number": number_text.number,
    "seconds": number_text.seconds,
    "when": number_text.when,
    "words": number_text.spaced,
    "dash": number_text.dash,
    "measured": measured,
}


def page(
    summary: Summary,
    details: Mapping[int, ProblemDetails] | None = None,
    verdicts: Sequence[Verdict] = (),
    manifest: Mapping[str, Any] | None = None,
) -> str:
    """The whole page as HTML. `details` holds the programs by task_id, `manifest` is shown as it is."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: number_text.visible(value) if type(value) is str else value,
    )
    environment.filters.update(FILTERS, hash=_hash, code=CodeFilter())
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return template.render(
        s=summary,
        f=summary.facts,
        headline=headline(summary),
        findings=findings(summary),
        charts=_charts(summary),
        meaning=MEANING,
        opened=details or {},
        verdicts=verdicts,
        manifest=json.dumps(manifest, indent=1, ensure_ascii=False) if manifest else "",
        duels={duel.strategy: duel for duel in summary.duels},
        funnel=_funnel_bars(summary.funnel),
        kinds={row.task_id: _kind(row.critic, row.random) for row in summary.by_problem},
    )


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(str(script).encode()).digest()).decode()


def _kind(critic: float | None, random: float | None) -> str:
    if critic is None or random is None or critic == random:
        return "same"
    return "wins" if critic > random else "loses"


def _funnel_bars(steps: Sequence[FunnelStep]) -> list[tuple[FunnelStep, str, float]]:
    """Each step with what it counts and its share, in percent, of the largest step that counts the same."""
    units = ["problems" if "problem" in step.name and "sample" not in step.name else "samples" for step in steps]
    largest = {"problems": 1, "samples": 1}
    for step, unit in zip(steps, units, strict=True):
        largest[unit] = max(largest[unit], step.count)
    return [(step, unit, 100 * step.count / largest[unit]) for step, unit in zip(steps, units, strict=True)]


def _charts(summary: Summary) -> dict[str, Markup]:
    """Chart name -> SVG; a chart without data is left out."""
    drawn: dict[str, str] = {}
    if any(summary.labels_by_status.values()):
        drawn["status"] = charts.status_bars(summary.labels_by_status)
    if summary.strategies:
        rates = [(result.strategy, result.pass_rate) for result in summary.strategies]
        drawn["strategies"] = charts.strategy_intervals(rates)
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
