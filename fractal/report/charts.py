"""Numbers -> inline SVG, for light and dark pages.

matplotlib draws with stand-in colours that are then replaced by CSS variables (`var(--ink)`, ...), so the page's style
sheet decides, also after the reader switches the scheme. Text stays text. Nothing is read or written.
"""

import functools
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fractal.report.facts import Epoch, SplitAccuracy
from fractal.report.number_text import spaced
from fractal.report.strategies import Curves, DifficultyRow, Duel
from fractal.selection.bootstrap import Interval
from fractal.selection.curves import RocCurve, SelectiveCurve
from fractal.selection.metrics import Bin

# Stand-in -> CSS variable. The page defines each for both schemes.
INK, MUTED, GRID = "#010101", "#020202", "#030303"
BLUE, ORANGE, GREEN, GREY, PURPLE = "#040404", "#050505", "#060606", "#070707", "#080808"
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    BLUE: "--blue",
    ORANGE: "--orange",
    GREEN: "--green",
    GREY: "--grey",
    PURPLE: "--purple",
}
SERIES: dict[str, tuple[str, str]] = {  # those that get a line of their own in a chart of several strategies
    "critic": (BLUE, "-"),
    "critic_logprob": (PURPLE, "-"),
    "mean_logprob": (ORANGE, "--"),
    "random": (GREY, ":"),
    "oracle": (GREEN, "-."),
}
WIDTH = 4.7  # inches; at 96 px each about a phone's width, so that text keeps its size there

_STYLE: dict[Any, Any] = {  # matplotlib types the keys as a Literal of 300 names
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "fractal",  # the same numbers give the same bytes
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}


P = ParamSpec("P")


def chart(name: str, title: str) -> Callable[[Callable[P, Figure]], Callable[P, str]]:
    """Decorates a function that draws a figure: it is called with our style, and returns the figure as SVG."""

    def decorate(draw: Callable[P, Figure]) -> Callable[P, str]:
        @functools.wraps(draw)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> str:
            with matplotlib.rc_context(_STYLE):
                return _svg(draw(*args, **kwargs), name, title)

        return wrapper

    return decorate


@chart("labels", "Labels by status")
def status_bars(counts: Mapping[str, int]) -> Figure:
    """Labels by status: one bar each, with count and share. `counts` holds at least one label."""
    total = sum(counts.values())
    figure, axes = _figure(0.27 * len(counts) + 0.4)
    names, values = [spaced(name) for name in counts], list(counts.values())
    axes.barh(names, values, color=[GREEN if name == "passed" else GREY for name in counts], height=0.66)
    for row, value in enumerate(values):
        _note(axes, f"{value:,}  ({value / total:.1%})", (value, row), (4, 0), ha="left", va="center")
    axes.set_xlim(0, max(values) * 1.32)
    axes.invert_yaxis()
    axes.grid(False)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    return figure


@chart("strategies", "Pass rate of each strategy with its interval")
def strategy_intervals(results: Sequence[tuple[str, Interval]], baseline: str = "random") -> Figure:
    """One dot with its interval per strategy, and a line at the baseline."""
    figure, axes = _figure(0.34 * len(results) + 0.6)
    for row, (name, interval) in enumerate(results):
        color = SERIES.get(name, (INK, ""))[0]
        axes.plot([interval.low, interval.high], [row, row], color=color, solid_capstyle="round", linewidth=2.4)
        axes.plot([interval.mean], [row], "o", color=color, markersize=7)
        _note(axes, f"{interval.mean:.1%}", (interval.mean, row), (0, 6), ha="center", va="bottom")
        if name == baseline:
            axes.axvline(interval.mean, color=GREY, linestyle=":", linewidth=1.2, zorder=0)
    _rows(axes, [spaced(name) for name, _ in results])
    axes.set_ylim(len(results) - 0.4, -0.7)
    axes.grid(axis="y", visible=False)
    _percent(axes, "x")
    return figure


@chart("curves", "Pass rate of the chosen program against the number of samples")
def best_of_k(curves: Curves) -> Figure:
    """Expected pass rate of the pick among k samples, k = 1..n; shaded: 95 % of the critic and of mean log-probability.

    More bands than two would hide each other.
    """
    figure, axes = _figure(3.2)
    for name, (color, line) in SERIES.items():
        if values := curves.by_strategy.get(name):
            label = "oracle (pass@k)" if name == "oracle" else spaced(name)
            ks = range(1, len(values) + 1)
            axes.plot(ks, values, line, color=color, label=label, marker="o" if len(values) <= 16 else "", ms=3.5)
            if name in ("critic", "mean_logprob") and (bands := curves.bands.get(name)):
                _band(axes, list(ks), bands, color)
    axes.set_xlabel("k, samples to choose from")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _percent(axes, "y")
    _legend(figure, axes)
    return figure


@chart("roc", "ROC curves of the critic")
def roc(curves: Sequence[RocCurve]) -> Figure:
    """True against false positive rate, all samples pooled and within a problem."""
    styles = {"pooled": (ORANGE, "--"), "within problem": (BLUE, "-")}
    figure, axes = _figure(3.6)
    axes.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1.2)
    for curve in curves:
        color, line = styles.get(curve.name, (INK, "-"))
        label = f"{curve.name}: {curve.area:.3f}"
        axes.plot(curve.false_positive_rate, curve.true_positive_rate, line, color=color, label=label)
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("share of failing samples above the threshold")
    axes.set_ylabel("share of passing ones")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    _legend(figure, axes)
    return figure


@chart("selective", "Pass rate against the share of problems answered")
def selective(curves: Sequence[SelectiveCurve]) -> Figure:
    """Pass rate of the problems answered against their share; shaded: 95 % of the first curve."""
    figure, axes = _figure(3.2)
    for row, curve in enumerate(curves):
        color, line = SERIES.get(curve.strategy, (INK, "-"))
        rates = [interval.mean for interval in curve.pass_rate]
        axes.plot(curve.coverage, rates, line, color=color, label=spaced(curve.strategy))
        if row == 0:
            _band(axes, curve.coverage, curve.pass_rate, color)
    axes.set_xlabel("share of problems answered, surest first")
    axes.set_xlim(-0.02, 1.02)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    _percent(axes, "y")
    _legend(figure, axes)
    return figure


@chart("difficulty", "Pass rate of the pick by difficulty of the problem")
def difficulty(rows: Sequence[DifficultyRow]) -> Figure:
    """Pass rate of the pick where few, some or most samples pass; under each group, its number of problems."""
    figure, axes = _figure(3.3)
    for name, (color, line) in SERIES.items():
        points = [(x, row.pass_rates[name]) for x, row in enumerate(rows) if name in row.pass_rates]
        if points:
            xs, ys = [x for x, _ in points], [y for _, y in points]
            axes.plot(xs, ys, line, color=color, label=spaced(name), marker="o", ms=4)
    axes.set_xticks(range(len(rows)), [f"{_share(row)}\nn = {row.problems}" for row in rows])
    axes.tick_params(axis="x", labelsize=8.5)
    axes.margins(x=0.06)
    axes.set_xlabel("share of the problem's samples that pass")
    _percent(axes, "y")
    _legend(figure, axes)
    return figure


def _share(row: DifficultyRow) -> str:
    if row.low == row.high:
        return f"{row.low:.0%}"
    return f"to {row.high:.0%}" if row.high < 1 else "below 100%"


@chart("duels", "Problems won and lost by the critic against each strategy")
def duels(rows: Sequence[Duel]) -> Figure:
    """Problems where the critic's pick is better (to the right) and worse (to the left) than another strategy's."""
    figure, axes = _figure(0.34 * len(rows) + 0.75)
    left, right = max(duel.losses for duel in rows), max(duel.wins for duel in rows)
    margin = 0.16 * max(1, left + right)  # for the numbers
    for row, duel in enumerate(rows):
        axes.barh(row, duel.wins, color=BLUE, height=0.62)
        axes.barh(row, -duel.losses, color=ORANGE, height=0.62)
        _note(axes, f"{duel.wins}", (duel.wins, row), (4, 0), ha="left", va="center")
        _note(axes, f"{duel.losses}", (-duel.losses, row), (-4, 0), ha="right", va="center")
    axes.axvline(0, color=MUTED, linewidth=0.8)
    _rows(axes, [f"against {spaced(duel.strategy)}" for duel in rows])
    axes.set_xlim(-left - margin, right + margin)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xticks([])
    axes.grid(False)
    axes.spines["bottom"].set_visible(False)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("critic worse  \u2190  problems  \u2192  critic better")
    return figure


@chart("splits", "Accuracy when samples are split and when problems are split")
def splits(rows: Sequence[SplitAccuracy]) -> Figure:
    """Accuracy of the same critic under each way to split, joined with that of looking the problem's majority up."""
    figure, axes = _figure(0.5 * len(rows) + 1.0)
    for row, split in enumerate(rows):
        axes.plot([split.lookup_accuracy, split.accuracy], [row, row], color=GRID, linewidth=3, zorder=1)
        names = ("_", "_") if row else ("critic", "looking up the problem's majority")  # once in the legend
        axes.plot([split.accuracy], [row], "o", color=BLUE, ms=8, linestyle="", label=names[0])
        axes.plot([split.lookup_accuracy], [row], "D", color=ORANGE, ms=6, linestyle="", label=names[1])
    _rows(axes, [f"by {split.by}" for split in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.2)
    axes.set_xlabel("accuracy on the samples held out")
    _percent(axes, "x")
    _legend(figure, axes)
    return figure


@chart("reliability", "Reliability of the critic's probabilities")
def reliability(bins: Sequence[Bin]) -> Figure:
    """Pass rate against predicted probability; below, how many samples each bin holds."""
    full = [part for part in bins if part.samples]
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    top, bottom = figure.subplots(2, sharex=True, height_ratios=[3.2, 1])
    top.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1.2)
    top.plot([part.probability or 0 for part in full], [part.pass_rate or 0 for part in full], "o-", color=BLUE, ms=5)
    top.set_ylabel("share that passes")
    top.set_xlim(-0.02, 1.02)
    top.set_ylim(-0.04, 1.04)
    top.yaxis.set_major_formatter(PercentFormatter(1))
    middles = [(part.low + part.high) / 2 for part in bins]
    bottom.bar(middles, [part.samples for part in bins], width=0.9 / len(bins), color=GREY)
    bottom.set_ylabel("samples")
    bottom.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    bottom.grid(axis="x", visible=False)
    bottom.set_xlabel("critic's probability of passing")
    bottom.xaxis.set_major_formatter(PercentFormatter(1))
    return figure


@chart("training", "Learning curves of the critic")
def training(epochs: Sequence[Epoch]) -> Figure:
    """Accuracy, AUC within a problem where it is known, and train loss by epoch; the chosen checkpoint is circled."""
    measures = [
        ("validation", [epoch.val_within_auc for epoch in epochs], BLUE, "-"),
        ("held-out train", [epoch.dev_within_auc for epoch in epochs], PURPLE, "--"),
    ]
    aucs = [measure for measure in measures if any(value is not None for value in measure[1])]
    figure = Figure(figsize=(WIDTH, 4.4 if aucs else 3.2), layout="constrained")
    panels = list(figure.subplots(3 if aucs else 2, sharex=True))
    panels[0].set_ylabel("val accuracy")
    panels[0].yaxis.set_major_formatter(PercentFormatter(1))
    _line(panels[0], epochs, [epoch.val_acc for epoch in epochs], BLUE, "-")
    if aucs:
        panels[1].set_ylabel("within-problem AUC")
        for label, values, color, line in aucs:
            _line(panels[1], epochs, values, color, line, label)
        if len(aucs) > 1:
            panels[1].legend(fontsize=8)
    panels[-1].set_ylabel("train loss")
    _line(panels[-1], epochs, [epoch.train_loss for epoch in epochs], ORANGE, "-")
    for axes in panels:
        axes.margins(y=0.25)
        if axes is not panels[0]:  # a percentage's own formatter has none
            axes.ticklabel_format(axis="y", useOffset=False)
    figure.align_ylabels()
    panels[-1].set_xlabel("epoch (0 = before training)")
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _line(
    axes: Axes, epochs: Sequence[Epoch], values: Sequence[float | None], color: str, line: str, label: str = ""
) -> None:
    """The known values of a measure by epoch, with a ring around the chosen epoch."""
    points = [(epoch, value) for epoch, value in zip(epochs, values, strict=True) if value is not None]
    numbers = [epoch.epoch for epoch, _ in points]
    axes.plot(numbers, [value for _, value in points], line, color=color, marker="o", ms=4, label=label or "_")
    for epoch, value in points:
        if epoch.chosen:
            axes.plot([epoch.epoch], [value], "o", ms=11, mfc="none", mec=GREEN, mew=1.8)


def _band(axes: Axes, xs: Sequence[float], intervals: Sequence[Interval], color: str) -> None:
    low, high = [interval.low for interval in intervals], [interval.high for interval in intervals]
    axes.fill_between(xs, low, high, color=color, alpha=0.14, lw=0)


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", labelcolor=INK)


def _note(axes: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], *, ha: str, va: str) -> None:
    axes.annotate(text, at, offset, textcoords="offset points", ha=ha, va=va, fontsize=8.5)


def _percent(axes: Axes, side: str) -> None:
    """A percent axis that stays within 0..100 % and leaves a margin at the extremes."""
    get, set_, axis = (
        (axes.get_xlim, axes.set_xlim, axes.xaxis) if side == "x" else (axes.get_ylim, axes.set_ylim, axes.yaxis)
    )
    low, high = get()
    set_(max(low, -0.03), min(high, 1.04))
    axis.set_major_formatter(PercentFormatter(1, decimals=0))


def _legend(figure: Figure, axes: Axes) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=2, handlelength=2.6)


def _svg(figure: Figure, name: str, title: str) -> str:
    """An <svg> element to stand in a page: no ids that clash, no fixed size, the page's font and colours."""
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):  # ids of clip paths and markers differ between charts
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style .*?</style>", "", svg, flags=re.S)
    svg = (
        re.sub(r' (?:xmlns(?::xlink)?|version|width|height)="[^"]*"', "", svg[: svg.index(">")]) + svg[svg.index(">") :]
    )
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: var(--sans)", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    return svg.replace("<svg", f'<svg role="group" aria-label="{title}"', 1)
