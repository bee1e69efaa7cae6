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

from fractal.report.summary import Curves, DifficultyRow, Duel, Epoch, RocCurve, SelectiveCurve, SplitAccuracy
from fractal.selection.metrics import Bin, Interval

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
        axes.set_yticks(range(len(results)), [_words(name) for name, _ in results])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_ylim(len(results) - 0.4, -0.7)
        axes.grid(axis="y", visible=False)
        _percent(axes, "x")
        return _svg(figure, "strategies", "Pass rate of each strategy with its interval")


def best_of_k(curves: Curves) -> str:
    """Expected pass rate of the pick among k samples, k = 1..n; shaded: 95 % of the critic and of mean log-probability.

    More bands than two would hide each other.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(3.2)
        for name, (color, line) in SERIES.items():
            if values := curves.by_strategy.get(name):
                label = {"oracle": "oracle (pass@k)"}.get(name, _words(name))
                ks = range(1, len(values) + 1)
                axes.plot(ks, values, line, color=color, label=label, marker="o" if len(values) <= 16 else "", ms=3.5)
                if name in ("critic", "mean_logprob") and (bands := curves.bands.get(name)):
                    _band(axes, list(ks), bands, color)
        axes.set_xlabel("k, samples to choose from")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _percent(axes, "y")
        _legend(figure, axes, columns=2)
        return _svg(figure, "curves", "Pass rate of the chosen program against the number of samples")


def roc(curves: Sequence[RocCurve]) -> str:
    """True against false positive rate, all samples pooled and within a problem."""
    styles = {"pooled": (ORANGE, "--"), "within problem": (BLUE, "-")}
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(3.6)
        axes.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1.2)
        for one in curves:
            color, line = styles.get(one.name, (INK, "-"))
            label = f"{one.name}: {one.area:.3f}"
            axes.plot(one.false_positive_rate, one.true_positive_rate, line, color=color, label=label)
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("share of failing samples above the threshold")
        axes.set_ylabel("share of passing ones")
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        _legend(figure, axes, columns=2)
        return _svg(figure, "roc", "ROC curves of the critic")


def selective(curves: Sequence[SelectiveCurve]) -> str:
    """Pass rate of the problems answered against their share; shaded: 95 % of the first curve."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(3.2)
        for row, one in enumerate(curves):
            color, line = SERIES.get(one.strategy, (INK, "-"))
            rates = [interval.mean for interval in one.pass_rate]
            axes.plot(one.coverage, rates, line, color=color, label=_words(one.strategy))
            if row == 0:
                _band(axes, one.coverage, one.pass_rate, color)
        axes.set_xlabel("share of problems answered, surest first")
        axes.set_xlim(-0.02, 1.02)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        _percent(axes, "y")
        _legend(figure, axes, columns=2)
        return _svg(figure, "selective", "Pass rate against the share of problems answered")


def difficulty(rows: Sequence[DifficultyRow]) -> str:
    """Pass rate of the pick where few, some or most samples pass; under each group, its number of problems."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(3.3)
        names = [name for name in SERIES if any(name in one.pass_rates for one in rows)]
        for name in names:
            color, line = SERIES[name]
            at = [(x, one.pass_rates[name]) for x, one in enumerate(rows) if name in one.pass_rates]
            axes.plot([x for x, _ in at], [y for _, y in at], line, color=color, label=_words(name), marker="o", ms=4)
        axes.set_xticks(range(len(rows)), [f"{_share(one)}\nn = {one.problems}" for one in rows])
        axes.tick_params(axis="x", labelsize=8.5)
        axes.margins(x=0.06)
        axes.set_xlabel("share of the problem's samples that pass")
        _percent(axes, "y")
        _legend(figure, axes, columns=2)
        return _svg(figure, "difficulty", "Pass rate of the pick by difficulty of the problem")


def _share(row: DifficultyRow) -> str:
    if row.low == row.high:
        return f"{row.low:.0%}"
    return f"to {row.high:.0%}" if row.high < 1 else "below 100%"


def duels(rows: Sequence[Duel]) -> str:
    """Problems where the critic's pick is better (to the right) and worse (to the left) than another strategy's."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(0.34 * len(rows) + 0.75)
        left, right = max(one.losses for one in rows), max(one.wins for one in rows)
        room = 0.16 * max(1, left + right)  # for the numbers
        for row, one in enumerate(rows):
            axes.barh(row, one.wins, color=BLUE, height=0.62)
            axes.barh(row, -one.losses, color=ORANGE, height=0.62)
            _note(axes, f"{one.wins}", (one.wins, row), (4, 0), ha="left", va="center")
            _note(axes, f"{one.losses}", (-one.losses, row), (-4, 0), ha="right", va="center")
        axes.axvline(0, color=MUTED, linewidth=0.8)
        axes.set_yticks(range(len(rows)), [f"against {_words(one.strategy)}" for one in rows])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_xlim(-left - room, right + room)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xticks([])
        axes.grid(False)
        axes.spines["bottom"].set_visible(False)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("critic worse  \u2190  problems  \u2192  critic better")
        return _svg(figure, "duels", "Problems won and lost by the critic against each strategy")


def splits(rows: Sequence[SplitAccuracy]) -> str:
    """Accuracy of the same critic under each way to split, joined with that of looking the problem's majority up."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(0.5 * len(rows) + 1.0)
        for row, one in enumerate(rows):
            axes.plot([one.lookup_accuracy, one.accuracy], [row, row], color=GRID, linewidth=3, zorder=1)
            names = ("_", "_") if row else ("critic", "looking up the problem's majority")  # once in the legend
            axes.plot([one.accuracy], [row], "o", color=BLUE, ms=8, linestyle="", label=names[0])
            axes.plot([one.lookup_accuracy], [row], "D", color=ORANGE, ms=6, linestyle="", label=names[1])
        axes.set_yticks(range(len(rows)), [f"by {one.by}" for one in rows])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.margins(x=0.2)
        axes.set_xlabel("accuracy on the samples held out")
        _percent(axes, "x")
        _legend(figure, axes, columns=2)
        return _svg(figure, "splits", "Accuracy when samples are split and when problems are split")


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
    """Accuracy, AUC within a problem where it is known, and train loss by epoch; the chosen checkpoint is circled."""
    aucs: dict[str, tuple[list[float | None], str, str]] = {
        "validation": ([one.val_within_auc for one in epochs], BLUE, "-"),
        "held-out train": ([one.dev_within_auc for one in epochs], PURPLE, "--"),
    }
    known = {name: line for name, line in aucs.items() if any(value is not None for value in line[0])}
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, 4.4 if known else 3.2), layout="constrained")
        panels = list(figure.subplots(3 if known else 2, sharex=True))
        panels[0].set_ylabel("val accuracy")
        panels[0].yaxis.set_major_formatter(PercentFormatter(1))
        _line(panels[0], epochs, [one.val_acc for one in epochs], BLUE, "-")
        if known:
            panels[1].set_ylabel("within-problem AUC")
            for name, (values, color, line) in known.items():
                _line(panels[1], epochs, values, color, line, name)
            if len(known) > 1:
                panels[1].legend(fontsize=8)
        panels[-1].set_ylabel("train loss")
        _line(panels[-1], epochs, [one.train_loss for one in epochs], ORANGE, "-")
        for axes in panels:
            axes.margins(y=0.25)
            if axes is not panels[0]:  # a percentage's own formatter has none
                axes.ticklabel_format(axis="y", useOffset=False)
        figure.align_ylabels()
        panels[-1].set_xlabel("epoch (0 = before training)")
        panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        return _svg(figure, "training", "Learning curves of the critic")


def _line(
    axes: Axes, epochs: Sequence[Epoch], values: Sequence[float | None], color: str, line: str, label: str = ""
) -> None:
    """What is known of a measure by epoch, with a ring around the chosen epoch."""
    at = [(one.epoch, value) for one, value in zip(epochs, values, strict=True) if value is not None]
    axes.plot([x for x, _ in at], [y for _, y in at], line, color=color, marker="o", ms=4, label=label or "_")
    for one, value in zip(epochs, values, strict=True):
        if one.chosen and value is not None:
            axes.plot([one.epoch], [value], "o", ms=11, mfc="none", mec=GREEN, mew=1.8)


def _band(axes: Axes, xs: Sequence[float], intervals: Sequence[Interval], color: str) -> None:
    axes.fill_between(
        xs, [one.low for one in intervals], [one.high for one in intervals], color=color, alpha=0.14, lw=0
    )


def _words(strategy: str) -> str:
    return strategy.replace("_", " ")


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
