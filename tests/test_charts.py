"""charts: every plot from the ends of what it may be given, as SVG that obeys the page."""

import html
import re

from fractal.report import charts
from fractal.report.facts import Epoch
from fractal.report.strategies import Curves, StrategyResult
from fractal.selection.bootstrap import Interval
from fractal.selection.curves import RocCurve, SelectiveCurve
from fractal.selection.metrics import Bin
from fractal.selection.strategies import BASELINE

ONE = Interval(0.5, 0.5, 0.5)
DRAWN = {
    "strategies": lambda: charts.strategy_intervals(
        [StrategyResult("critic", 1, ONE, ONE), StrategyResult("visible_test", 1, Interval(1, 0, 1), ONE)]
    ),
    "curves": lambda: charts.best_of_k(Curves(1, {BASELINE: [0.0, 0.0], "critic": [0.0, 1.0]}, {"critic": [ONE, ONE]})),
    "roc": lambda: charts.roc(
        [RocCurve("pooled", [0, 1], [0, 1], 0.5), RocCurve("within problem", [0, 0, 1], [0, 1, 1], 1.0)]
    ),
    "selective": lambda: charts.selective([SelectiveCurve("critic", [1.0], [ONE], [0.5], 0.5)]),
    "reliability": lambda: charts.reliability([Bin(0, 0.5, 0, None, None), Bin(0.5, 1, 3, 0.7, 1.0)]),
    "training": lambda: charts.training(
        [Epoch(epoch=0, train_loss=None, val_acc=None, dev_within_auc=0.5, chosen=True)]
    ),
}


def test_colours_are_the_style_sheets_and_numbers_are_finite():
    wrong = []
    for name, draw in DRAWN.items():
        svg = draw()
        plain = re.sub(r"url\(#\w+\)|href=\"#\w+\"|id=\"\w+\"", "", svg)
        if (
            re.search(r"#[0-9a-f]{6}\b|(?<![\w-])(black|white|rgb)", plain)
            or "var(--" not in svg
            or "nan" in svg.lower()
        ):
            wrong.append(name)
        if not re.match(r'<svg role="group" aria-label="[A-Z][^"]+" viewBox="[^"]+"[ >]', svg):
            wrong.append(f"{name}: {svg[:120]}")
    assert wrong == []


def test_the_same_numbers_give_the_same_bytes():
    assert DRAWN["curves"]() == DRAWN["curves"]()


def test_text_is_escaped():
    svg = charts.strategy_intervals([StrategyResult("<script>$a_b$", 1, Interval(0.1, 0.0, 0.2), ONE)])
    assert "<script" not in svg
    assert html.escape("<script>$a b$") in svg
