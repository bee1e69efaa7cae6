"""Summary -> one HTML page that needs nothing else, from page.html, which allows its one script by hash.

Foreign text is escaped, and characters that do not show, or that turn the direction of text, are spelt out.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from fractal.report import charts
from fractal.report.criteria import Verdict, measured
from fractal.report.findings import findings, headline
from fractal.report.number_text import dash, number, percent, plain_span, points, seconds, spaced, span, visible, when
from fractal.report.programs import CodeFilter, ProblemDetails
from fractal.report.summary import Summary
from fractal.selection.strategies import BASELINE, STRATEGIES

FILTERS = (dash, measured, number, percent, plain_span, points, seconds, spaced, span, when)


def page(
    summary: Summary,
    details: Mapping[str, ProblemDetails] | None = None,
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
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    environment.filters |= {function.__name__: function for function in FILTERS}
    environment.filters |= {"hash": _hash, "code": CodeFilter()}
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return template.render(
        s=summary,
        f=summary.facts,
        headline=headline(summary),
        findings=findings(summary),
        charts=_charts(summary),
        meaning=STRATEGIES,
        opened=details or {},
        verdicts=verdicts,
        manifest=json.dumps(manifest, indent=1, ensure_ascii=False) if manifest else "",
    )


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(str(script).encode()).digest()).decode()


def _charts(summary: Summary) -> dict[str, Markup]:
    """Chart name -> SVG; a chart without data is left out."""
    curves, critic = summary.curves, summary.critic
    data: dict[Callable[[Any], str], Any] = {
        charts.strategy_intervals: summary.strategies,
        charts.best_of_k: curves and len(curves.by_strategy[BASELINE]) > 1 and curves,
        charts.reliability: critic and critic.reliability,
        charts.training: summary.facts.epochs,
        charts.roc: summary.roc,
        charts.selective: summary.selective,
    }
    # Our own numbers; matplotlib escapes the names.
    return {draw.__name__: Markup(draw(values)) for draw, values in data.items() if values}
