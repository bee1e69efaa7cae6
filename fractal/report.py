"""Stage 6: a Summary -> report/index.html, report/summary.json, and the table on the terminal.

One page without scripts, fonts or anything else from elsewhere; prompts and names in it are untrusted and escaped.
What is not known prints as a dash with its reason. `summary.build` measures, this module only shows.
"""

from collections.abc import Iterable
from pathlib import Path

import jinja2
import msgspec
from markupsafe import Markup
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from fractal import charts
from fractal.metrics import Interval
from fractal.outcomes import BASELINE, StrategyResult
from fractal.records import encode, write_whole
from fractal.summary import Summary

DASH = "\u2013"
MEANING = {
    "critic": "highest score of the critic",
    "random": "any sample, exact expectation",
    "first": "the first sample",
    "mean_logprob": "highest log-probability per token",
    "sum_logprob": "highest log-probability",
    "shortest": "shortest program",
    "oracle": "a passing sample if there is one: the ceiling",
}


def write(run_dir: Path, summary: Summary) -> Path:
    """Write report/index.html and report/summary.json of a run folder; return the page's path."""
    folder = run_dir / "report"
    write_whole(folder / "summary.json", msgspec.json.format(encode(summary), indent=2) + b"\n")
    write_whole(folder / "index.html", page(summary).encode("utf-8", "replace"))
    return folder / "index.html"


def page(summary: Summary) -> str:
    """The whole page as HTML."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters.update(percent=percent, points=points, span=span, number=number, seconds=seconds, dash=dash)
    template = environment.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    return template.render(
        s=summary, f=summary.facts, headline=headline(summary), charts=_charts(summary), meaning=MEANING
    )


def headline(summary: Summary) -> str:
    """The result in a sentence or two, with what it is to be held against."""
    results = {one.strategy: one for one in summary.strategies}
    critic, random, oracle = (results.get(name) for name in ("critic", BASELINE, "oracle"))
    if random is None:
        return f"No strategy measured: {summary.reasons.get('strategies', 'there are no choices')}."
    ceiling = f", the oracle {percent(oracle.pass_rate.mean)}" if oracle else ""
    if critic is None:
        return (
            f"No critic yet. A random sample passes on {percent(random.pass_rate.mean)} "
            f"{span(random.pass_rate)} of {_problems(random, summary)}{ceiling}."
        )
    # on the critic's own problems, which may be fewer
    held_against = critic.pass_rate.mean - critic.gain_over_random.mean
    return (
        f"The critic picks a passing program for {percent(critic.pass_rate.mean)} {span(critic.pass_rate)} of "
        f"{_problems(critic, summary)}; random {percent(held_against)}{ceiling}. {_verdict(critic)}"
    )


def _verdict(critic: StrategyResult) -> str:
    gain = critic.gain_over_random
    text = f"Gain over random: {points(gain.mean)} points {span(gain, signed=True)}"
    if gain.low == gain.high:
        return f"{text}: no interval, so nothing is shown."
    if gain.low > 0:
        return f"{text}."
    return f"{text}: worse than random." if gain.high < 0 else f"{text}: the interval includes zero."


def _problems(result: StrategyResult, summary: Summary) -> str:
    return f"{result.problems} {summary.split} problem{'' if result.problems == 1 else 's'}"


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
    return {name: Markup(svg) for name, svg in drawn.items()}  # our own numbers; matplotlib escapes the names


# ---- numbers as text -------------------------------------------------------------------------------------------------


def percent(value: float | None, decimals: int = 1) -> str:
    """0.4123 -> "41.2 %"; None and NaN -> a dash."""
    return DASH if value is None or value != value else f"{100 * value:.{decimals}f}\u00a0%"


def points(value: float) -> str:
    """Percentage points with their sign: 0.111 -> "+11.1"."""
    return f"{round(100 * value, 1) + 0.0:+.1f}".replace("-", "\u2212")  # + 0.0: never "-0.0"


def span(interval: Interval, signed: bool = False) -> str:
    """The interval in percent, "[20.1, 62.5]"; a dash where the bootstrap saw no variation and so knows nothing."""
    if interval.low == interval.high:
        return f"[{DASH}]"
    low, high = (points(x) if signed else f"{100 * x:.1f}" for x in (interval.low, interval.high))
    return f"[{low},\u00a0{high}]"


def number(value: float | None, decimals: int = 3) -> str:
    if value is None or value != value:
        return DASH
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{decimals}f}"


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


def dash(value: object) -> object:
    return DASH if value is None or value == "" else value


# ---- the terminal ----------------------------------------------------------------------------------------------------


def table(summary: Summary) -> Group:
    """Headline, strategies with intervals, labels by status, seconds by stage, and the warnings, for rich."""
    strategies = _table(f"Best of n on {summary.split}", "strategy", "problems", "passes", "95 %", "gain", "95 %")
    for one in summary.strategies:
        gain = one.gain_over_random
        compared = (DASH, "") if one.strategy == BASELINE else (points(gain.mean), span(gain, signed=True))
        strategies.add_row(
            *_plain(one.strategy, one.problems, percent(one.pass_rate.mean), span(one.pass_rate), *compared)
        )
    total = sum(summary.labels_by_status.values())
    labels = _table("Labels", "status", "samples", "share")
    for status, count in summary.labels_by_status.items():
        labels.add_row(*_plain(status, number(count), percent(count / total if total else None)))
    stages = _table("Seconds", "stage", "time")
    for stage, took in summary.facts.stage_seconds.items():
        stages.add_row(*_plain(stage, seconds(took)))
    warnings = [f"[yellow]![/] {escape(text)}" for text in summary.warnings]
    shown = [one for one in (strategies, labels, stages) if one.row_count]
    return Group(f"[bold]{escape(headline(summary))}[/]", *shown, *warnings)


def _table(title: str, first: str, *columns: str) -> Table:
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="dim")
    made.add_column(first)
    for column in columns:
        made.add_column(column, justify="right")
    return made


def _plain(*cells: object) -> Iterable[str]:
    return (escape(str(cell)) for cell in cells)
