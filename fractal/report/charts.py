"""Numbers -> inline SVG, for light and dark pages.

matplotlib draws with stand-in colours that are then replaced by CSS variables, so that the page's style sheet decides.
"""

import functools
import io
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fractal.report.facts import Epoch
from fractal.report.number_text import spaced
from fractal.report.strategies import Curves, StrategyResult
from fractal.selection.bootstrap import Interval
from fractal.selection.curves import RocCurve, SelectiveCurve
from fractal.selection.metrics import Bin
from fractal.selection.strategies import BASELINE

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


T = TypeVar("T")


def chart(title: str) -> Callable[[Callable[[T], Figure]], Callable[[T], str]]:
    """Decorates a function that draws a figure: it is called with our style, and returns the figure as SVG."""

    def decorate(draw: Callable[[T], Figure]) -> Callable[[T], str]:
        @functools.wraps(draw)
        def wrapper(data: T) -> str:
            # Ids of clip paths and markers differ between charts, and the same numbers give the same bytes.
            with matplotlib.rc_context(_STYLE | {"svg.hashsalt": title}):
                return _svg(draw(data), title)

        return wrapper

    return decorate


@chart("Pass rate of each strategy with its interval")
def strategy_intervals(results: Sequence[StrategyResult]) -> Figure:
    figure, axes = _figure(0.34 * len(results) + 0.6)
    for row, result in enumerate(results):
        name, interval = result.strategy, result.pass_rate
        color = SERIES.get(name, (INK, ""))[0]
        axes.plot([interval.low, interval.high], [row, row], color=color, solid_capstyle="round", linewidth=2.4)
        axes.plot([interval.mean], [row], "o", color=color, markersize=7)
        at = (interval.mean, row)
        axes.annotate(f"{interval.mean:.1%}", at, (0, 6), textcoords="offset points", ha="center", fontsize=8.5)
        if name == BASELINE:
            axes.axvline(interval.mean, color=GREY, linestyle=":", linewidth=1.2, zorder=0)
    axes.set_yticks(range(len(results)), [spaced(result.strategy) for result in results])
    axes.tick_params(axis="y", labelcolor=INK)
    axes.set_ylim(len(results) - 0.4, -0.7)
    axes.grid(axis="y", visible=False)
    _percent(axes, "x")
    return figure


@chart("Pass rate of the chosen program against the number of samples")
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


@chart("ROC curves of the critic")
def roc(curves: Sequence[RocCurve]) -> Figure:
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


@chart("Pass rate against the share of problems answered")
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


@chart("Reliability of the critic's probabilities")
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


@chart("Learning curves of the critic")
def training(epochs: Sequence[Epoch]) -> Figure:
    """Accuracy, AUC within a problem and train loss by epoch; the chosen checkpoint is circled."""
    figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
    accuracy, auc, loss = figure.subplots(3, sharex=True)
    _line(accuracy, epochs, "val_acc", BLUE)
    _line(auc, epochs, "val_within_auc", BLUE, "validation")
    _line(auc, epochs, "dev_within_auc", PURPLE, "held-out train")
    _line(loss, epochs, "train_loss", ORANGE)
    accuracy.yaxis.set_major_formatter(PercentFormatter(1))
    if len(auc.lines) > 1:
        auc.legend(fontsize=8)
    for axes, name in ((accuracy, "val accuracy"), (auc, "within-problem AUC"), (loss, "train loss")):
        axes.set_ylabel(name)
        axes.margins(y=0.25)
        if axes is not accuracy:  # a percentage's own formatter has none
            axes.ticklabel_format(axis="y", useOffset=False)
    figure.align_ylabels()
    loss.set_xlabel("epoch (0 = before training)")
    loss.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _line(axes: Axes, epochs: Sequence[Epoch], measure: str, color: str, label: str = "_") -> None:
    """The known values of a measure by epoch, with a ring around the chosen epoch."""
    points = [(epoch, value) for epoch in epochs if (value := getattr(epoch, measure)) is not None]
    if points:
        numbers, values = [epoch.epoch for epoch, _ in points], [value for _, value in points]
        axes.plot(numbers, values, color=color, marker="o", ms=4, label=label)
    for epoch, value in points:
        if epoch.chosen:
            axes.plot([epoch.epoch], [value], "o", ms=11, mfc="none", mec=GREEN, mew=1.8)


def _band(axes: Axes, xs: Sequence[float], intervals: Sequence[Interval], color: str) -> None:
    low, high = [interval.low for interval in intervals], [interval.high for interval in intervals]
    axes.fill_between(xs, low, high, color=color, alpha=0.14, lw=0)


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


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


def _svg(figure: Figure, title: str) -> str:
    """An <svg> element to stand in a page: no ids that clash, no fixed size, the page's font and colours."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = re.sub(r"^.*?(?=<svg)|<metadata>.*?</metadata>|<style .*?</style>", "", out.getvalue(), flags=re.S)
    opening, rest = svg.split(">", 1)
    svg = re.sub(r' (?:xmlns(?::xlink)?|version|width|height)="[^"]*"', "", opening) + ">" + rest
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: var(--sans)", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    return svg.replace("<svg", f'<svg role="group" aria-label="{title}"', 1)
