"""Numbers -> inline SVG, for light and dark pages.

matplotlib draws with stand-in colours that are then replaced by CSS variables (`var(--ink)`, ...), so the page's style
sheet decides, also after the reader switches the scheme. Text stays text. Nothing is read or written.
"""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fractal.metrics import Bin, Interval
from fractal.summary import Curves, Epoch

# Stand-in -> CSS variable. The page defines each for both schemes.
INK, MUTED, GRID = "#010101", "#020202", "#030303"
BLUE, ORANGE, GREEN, GREY = "#040404", "#050505", "#060606", "#070707"
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    BLUE: "--blue",
    ORANGE: "--orange",
    GREEN: "--green",
    GREY: "--grey",
}
SERIES = {"critic": (BLUE, "-"), "oracle": (GREEN, "-."), "mean_logprob": (ORANGE, "--"), "random": (GREY, ":")}
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


def status_bars(counts: Mapping[str, int]) -> str:
    """Labels by status: one bar each, with count and share. `counts` holds at least one label."""
    total = sum(counts.values())
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(0.27 * len(counts) + 0.4)
        names = [name.replace("_", " ") for name in counts]
        values = list(counts.values())
        axes.barh(names, values, color=[GREEN if name == "passed" else GREY for name in counts], height=0.66)
        for row, value in enumerate(values):
            _note(axes, f"{value:,}  ({value / total:.1%})", (value, row), (4, 0), ha="left", va="center")
        axes.set_xlim(0, max(values) * 1.32)
        axes.invert_yaxis()
        axes.grid(False)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        return _svg(figure, "labels", "Labels by status")


def strategy_intervals(results: Sequence[tuple[str, Interval]], baseline: str = "random") -> str:
    """One dot with its interval per strategy, and a line at the baseline."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(0.34 * len(results) + 0.6)
        for row, (name, interval) in enumerate(results):
            color = SERIES.get(name, (INK, ""))[0]
            axes.plot([interval.low, interval.high], [row, row], color=color, solid_capstyle="round", linewidth=2.4)
            axes.plot([interval.mean], [row], "o", color=color, markersize=7)
            _note(axes, f"{interval.mean:.1%}", (interval.mean, row), (0, 6), ha="center", va="bottom")
            if name == baseline:
                axes.axvline(interval.mean, color=GREY, linestyle=":", linewidth=1.2, zorder=0)
        axes.set_yticks(range(len(results)), [name.replace("_", " ") for name, _ in results])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_ylim(len(results) - 0.4, -0.7)
        axes.grid(axis="y", visible=False)
        _percent(axes, "x")
        return _svg(figure, "strategies", "Pass rate of each strategy with its interval")


def best_of_k(curves: Curves) -> str:
    """Expected pass rate of the pick among k samples, k = 1..n."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(3.0)
        for name, (color, line) in SERIES.items():
            if values := curves.by_strategy.get(name):
                label = {"oracle": "oracle (pass@k)"}.get(name, name.replace("_", " "))
                ks = range(1, len(values) + 1)
                axes.plot(ks, values, line, color=color, label=label, marker="o" if len(values) <= 16 else "", ms=3.5)
        axes.set_xlabel("k, samples to choose from")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _percent(axes, "y")
        _legend(figure, axes, columns=2)
        return _svg(figure, "curves", "Pass rate of the chosen program against the number of samples")


def reliability(bins: Sequence[Bin]) -> str:
    """Pass rate against predicted probability; below, how many samples each bin holds."""
    full = [one for one in bins if one.samples]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
        top, bottom = figure.subplots(2, sharex=True, height_ratios=[3.2, 1])
        top.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1.2)
        top.plot([one.probability or 0 for one in full], [one.pass_rate or 0 for one in full], "o-", color=BLUE, ms=5)
        top.set_ylabel("share that passes")
        top.set_xlim(-0.02, 1.02)
        top.set_ylim(-0.04, 1.04)
        top.yaxis.set_major_formatter(PercentFormatter(1))
        middles = [(one.low + one.high) / 2 for one in bins]
        bottom.bar(middles, [one.samples for one in bins], width=0.9 / len(bins), color=GREY)
        bottom.set_ylabel("samples")
        bottom.yaxis.set_major_locator(MaxNLocator(2, integer=True))
        bottom.grid(axis="x", visible=False)
        bottom.set_xlabel("critic's probability of passing")
        bottom.xaxis.set_major_formatter(PercentFormatter(1))
        return _svg(figure, "reliability", "Reliability of the critic's probabilities")


def training(epochs: Sequence[Epoch]) -> str:
    """Train loss and validation accuracy by epoch; the chosen checkpoint is circled."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
        top, bottom = figure.subplots(2, sharex=True)
        accuracies = [(one.epoch, one.val_acc) for one in epochs if one.val_acc is not None]
        losses = [(one.epoch, one.train_loss) for one in epochs if one.train_loss is not None]
        top.plot([x for x, _ in accuracies], [y for _, y in accuracies], "o-", color=BLUE, ms=4)
        for one in epochs:
            if one.chosen and one.val_acc is not None:
                top.plot([one.epoch], [one.val_acc], "o", ms=11, mfc="none", mec=GREEN, mew=1.8)
        top.set_ylabel("validation accuracy")
        top.margins(y=0.25)
        top.yaxis.set_major_formatter(PercentFormatter(1))
        bottom.plot([x for x, _ in losses], [y for _, y in losses], "o-", color=ORANGE, ms=4)
        bottom.set_ylabel("train loss")
        bottom.margins(y=0.25)
        bottom.set_xlabel("epoch (0 = before training)")
        bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
        return _svg(figure, "training", "Training curve of the critic")


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _note(axes: Axes, text: str, at: tuple[float, float], offset: tuple[float, float], *, ha: str, va: str) -> None:
    axes.annotate(text, at, offset, textcoords="offset points", ha=ha, va=va, fontsize=8.5)


def _percent(axes: Axes, side: str) -> None:
    """A percent axis that stays within 0..100 % and gives the extremes room."""
    low, high = axes.get_xlim() if side == "x" else axes.get_ylim()
    limits = (max(low, -0.03), min(high, 1.04))
    if side == "x":
        axes.set_xlim(*limits)
    else:
        axes.set_ylim(*limits)
    (axes.xaxis if side == "x" else axes.yaxis).set_major_formatter(PercentFormatter(1, decimals=0))


def _legend(figure: Figure, axes: Axes, columns: int) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=columns, handlelength=2.6)


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
