"""The results as tables for the terminal."""

import io
from collections.abc import Iterable

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

from fractal.report.criteria import Verdict, measured
from fractal.report.findings import findings, headline
from fractal.report.number_text import DASH, number, percent, points, seconds, span, visible
from fractal.report.summary import Summary
from fractal.selection.strategies import BASELINE

COLOURS = {"met": "green", "missed": "red", "not judged": "yellow"}


def table(summary: Summary, verdicts: Iterable[Verdict] = ()) -> Group:
    """Headline, criteria, strategies with intervals, the critic, labels by status, seconds by stage, warnings."""
    judged = _table("Criteria", "criterion", "verdict", "measured")
    for verdict in verdicts:
        note = f" ({escape(visible(verdict.reason))})" if verdict.reason else ""
        judged.add_row(
            escape(verdict.criterion),
            f"[{COLOURS[verdict.verdict]}]{verdict.verdict}[/]",
            escape(measured(verdict)) + note,
        )
    strategies = _table(f"Best of n on {summary.split}", "strategy", "problems", "passes", "95 %", "gain", "95 %")
    for result in summary.strategies:
        gain = result.gain_over_random
        compared = (DASH, "") if result.strategy == BASELINE else (points(gain.mean), span(gain, signed=True))
        rate = result.pass_rate
        strategies.add_row(*_plain(result.strategy, result.problems, percent(rate.mean), span(rate), *compared))
    critic = []
    if summary.critic is not None:
        critic.append(
            f"The critic on {summary.critic.samples:,} samples: AUC within a problem "
            f"{number(summary.critic.within_problem.auc)}, pooled {number(summary.critic.auc)}; accuracy "
            f"{percent(summary.critic.accuracy)} (majority class {percent(summary.critic.majority_accuracy)}, knowing "
            f"only the problem {percent(summary.critic.problem_mean_accuracy)})"
        )
    total = sum(summary.labels_by_status.values())
    labels = _table("Labels", "status", "samples", "share")
    for status, count in summary.labels_by_status.items():
        labels.add_row(*_plain(status, number(count), percent(count / total if total else None)))
    stages = _table("Seconds", "stage", "time")
    for stage, spent in summary.facts.stage_seconds.items():
        stages.add_row(*_plain(stage, seconds(spent)))
    return Group(
        f"[bold]{escape(headline(summary))}[/]",
        *map(escape, findings(summary)),
        *(part for part in (judged, strategies) if part.row_count),
        *map(escape, critic),
        *(part for part in (labels, stages) if part.row_count),
        *(f"[yellow]![/] {escape(warning)}" for warning in summary.warnings),
    )


def as_text(group: Group) -> str:
    """What a terminal of 100 columns without colours shows."""
    shown = io.StringIO()
    Console(file=shown, width=100, color_system=None, force_terminal=False, legacy_windows=False).print(group)
    return shown.getvalue()


def _table(title: str, first: str, *columns: str) -> Table:
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="dim")
    made.add_column(first)
    for column in columns:
        made.add_column(column, justify="right")
    return made


def _plain(*cells: object) -> Iterable[str]:
    return (escape(str(cell)) for cell in cells)
