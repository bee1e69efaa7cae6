"""Success criteria, recorded before a run and judged by its report: `strategies.critic.gain_over_random.low > 0`.

A criterion is NAME OP NUMBER. NAME is a dotted path into summary.json, where a list's element is named by its
strategy, name or split (`details.duels.mean_logprob.gain.low`), or one of the short names of NAMES. The manifest keeps
each with the time and with how many samples there were; they are added to, never changed.
"""

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, cast, get_args, get_type_hints

import msgspec

from fractal.errors import InputError, RecordError
from fractal.jsonl import iter_blocks
from fractal.report.number_text import DASH, percent, span
from fractal.report.strategies import StrategyResult
from fractal.report.summary import Summary
from fractal.rundir import RunDir, now
from fractal.selection.bootstrap import Interval
from fractal.selection.strategies import BASELINE, STRATEGIES

Comparison = Literal[">=", "<=", "==", ">", "<"]
COMPARE: dict[Comparison, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
OTHERS = [name for name in STRATEGIES if name != BASELINE]
NAMES = {
    "val_accuracy": "details.facts.epochs.chosen.val_acc",
    "accuracy": "details.critic.accuracy",
    "auc": "details.critic.auc",
    "within_auc": "details.critic.within_problem.auc",
    "pairwise_accuracy": "details.critic.within_problem.accuracy",
    "brier": "details.critic.brier",
    "calibration_error": "details.critic.expected_calibration_error",
    "pass_rate": "pass_rate.mean",
    "gap_closed": "gap_closed.mean",
    "gap_closed_low": "gap_closed.low",
    "leaky_accuracy": "details.split_accuracies.sample.accuracy",
    "honest_accuracy": "details.split_accuracies.problem.accuracy",
    "sandbox_errors": "labels.sandbox_error",
    **{name: f"strategies.{name}.pass_rate.mean" for name in STRATEGIES},
    **{f"{name}_gain": f"strategies.{name}.gain_over_random.mean" for name in OTHERS},
    **{f"{name}_gain_low": f"strategies.{name}.gain_over_random.low" for name in OTHERS},
    **{f"over_{name}": f"details.duels.{name}.gain.mean" for name in OTHERS if name != "critic"},
    **{f"over_{name}_low": f"details.duels.{name}.gain.low" for name in OTHERS if name != "critic"},
}
COUNTS = ("problems", "samples", "samples_per_s", "tokens_per_s", "verified_per_s", "total_s", "cost_usd")
ROOTS: dict[str, Any] = {  # the first part of a path: the type of what is there
    "details": Summary,
    "strategies": dict[str, StrategyResult],
    "pass_rate": Interval,
    "gap_closed": Interval,
    "labels": dict[str, int],
    "problems_by_split": dict[str, int],
    "seconds": dict[str, float],
}
# A path that ends so is a share, 0..1, or a difference of two shares.
SHARES = (
    "mean", "low", "high", "accuracy", "auc", "within_auc", "lookup_accuracy", "majority_accuracy", "brier",
    "problem_mean_accuracy", "expected_calibration_error", "val_acc", "val_within_auc", "dev_within_auc", "area",
)  # fmt: skip
KEYS = ("strategy", "task_id", "split", "epoch", "criterion", "name", "by", "k", "low")  # what names a list's element
_FORM = re.compile(r"\s*([A-Za-z_][\w.]*)\s*(>=|<=|==|>|<)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*(%?)\s*")


@dataclass(frozen=True, slots=True)
class Criterion:
    name: str  # a key of NAMES, one of COUNTS, or a dotted path
    comparison: Comparison
    value: float  # a share for a percentage

    @property
    def text(self) -> str:
        return f"{self.name} {self.comparison} {self.value:.12g}"

    @property
    def path(self) -> str:
        return NAMES.get(self.name, self.name)

    @property
    def is_share(self) -> bool:
        return self.path.rpartition(".")[2] in SHARES


@dataclass(frozen=True, slots=True)
class Recorded(Criterion):
    """A criterion as the manifest holds it."""

    recorded: str  # ISO 8601
    samples: int  # that were there when it was recorded


@dataclass(frozen=True, slots=True)
class Verdict:
    """A criterion judged. `reason` says why it is not, and that it was recorded late."""

    criterion: str
    verdict: Literal["met", "missed", "not judged"]
    value: float | None
    interval: Interval | None
    source: str  # the path in summary.json
    reason: str
    recorded: str
    samples: int  # that were there when it was recorded: 0 means before the run
    share: bool  # value is a share


def parse(text: str, where: str = "--criterion") -> Criterion:
    """`NAME OP NUMBER`, the number with % or not. Raises InputError that names what is wrong and what is known."""
    shown = " ".join(text.split())
    match = _FORM.fullmatch(text)
    if match is None:
        raise InputError(
            f"{where} {shown!r}: not a criterion. Write NAME OP NUMBER with OP one of >= <= == > <, as "
            "'critic_gain_low > 0' or 'val_accuracy >= 80 %'."
        )
    name, comparison, digits, percentage = match.groups()
    if name not in NAMES and name not in COUNTS and not _is_path(name):
        raise InputError(
            f"{where} {shown!r}: unknown name {name!r}. Known: {', '.join([*NAMES, *COUNTS])}, and paths into "
            "summary.json, as strategies.critic.gain_over_random.low."
        )
    criterion = Criterion(name, cast(Comparison, comparison), float(digits) / (100 if percentage else 1))
    if percentage and not criterion.is_share:
        raise InputError(f"{where} {shown!r}: {name} is no share. Write a number without %.")
    if criterion.is_share and abs(criterion.value) > 1:
        raise InputError(f"{where} {shown!r}: {name} is a share: write {digits} % or a number from -1 to 1.")
    return criterion


def _is_path(name: str) -> bool:
    """Whether summary.json can hold a value under this path, by the types of its parts."""
    root, *parts = name.split(".")
    kind = ROOTS.get(root)
    for part in parts:
        if isinstance(kind, UnionType):  # X | None
            kind = get_args(kind)[0]
        kind = get_type_hints(kind).get(part) if is_dataclass(kind) else next(reversed(get_args(kind)), None)
    return bool(parts) and kind is not None


def read_plan(path: Path) -> list[Criterion]:
    """One criterion a line; blank lines and what follows a # are left out. Raises InputError with file and line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--plan {path}: cannot be read: {error}. Name a file of UTF-8 text.") from error
    texts = [(number, line.split("#")[0]) for number, line in enumerate(lines, 1)]
    criteria = [parse(text, f"{path}: line {number}:") for number, text in texts if text.strip()]
    if not criteria:
        raise InputError(f"--plan {path}: holds no criterion. Write one a line, as: critic_gain_low > 0")
    return criteria


def parse_all(texts: Sequence[str] | None, plan: Path | None) -> list[Criterion]:
    """Those of `--plan` first, then each `--criterion`, without repetitions."""
    criteria = [*(read_plan(plan) if plan else []), *(parse(text) for text in texts or [])]
    return list(dict.fromkeys(criteria))


def record(folder: RunDir, criteria: Iterable[Criterion]) -> list[Recorded]:
    """Add to the manifest those that it does not hold, at once; return these."""
    before = recorded(folder.manifest)
    known = {entry.text for entry in before}
    samples = sum(block.count(b"\n") for block in iter_blocks(folder.file("samples.jsonl")))
    added = [
        Recorded(**asdict(entry), recorded=now(), samples=samples) for entry in criteria if entry.text not in known
    ]
    if added:
        folder.manifest["criteria"] = [asdict(entry) for entry in [*before, *added]]
        folder.save()
    return added


def recorded(manifest: Mapping[str, Any]) -> list[Recorded]:
    """The manifest's criteria. Raises RecordError if they are no such."""
    try:
        return msgspec.convert(manifest.get("criteria", []), list[Recorded])
    except msgspec.ValidationError as error:
        raise RecordError(
            f"manifest.json: criteria: {error}. They are not to be edited: restore the file from a copy."
        ) from error


def judge(manifest: Mapping[str, Any], fields: Any, reasons: Mapping[str, str]) -> list[Verdict]:
    """Every recorded criterion against summary.json's `fields`, as read from JSON, in the order of recording.

    `reasons` says why a part of the summary has no value: field -> why.
    """
    verdicts = []
    for entry in recorded(manifest):
        value, interval = lookup(fields, entry.path)
        notes = [f"added after {entry.samples:,} samples were there"] if entry.samples else []
        verdict: Literal["met", "missed", "not judged"] = "not judged"
        if value is None:
            parts = entry.path.split(".")
            notes.insert(0, next((reasons[part] for part in parts if part in reasons), "this run has no such value"))
        elif interval and interval.low == interval.high and entry.path.endswith((".low", ".high")):
            notes.insert(0, "all problems are alike, so the bootstrap gives no interval")
            value = interval = None
        else:
            verdict = "met" if COMPARE[entry.comparison](value, entry.value) else "missed"
        verdicts.append(
            Verdict(
                entry.text, verdict, value, interval, f"summary.json: {entry.path}", "; ".join(notes), entry.recorded,
                entry.samples, entry.is_share,
            )
        )  # fmt: skip
    return verdicts


def lookup(fields: Any, path: str) -> tuple[float | None, Interval | None]:
    """A number of summary.json and its interval over problems; None for what is not there."""
    parent: Any = None
    value = fields
    leaf = ""
    for leaf in path.split("."):
        parent, value = value, _child(value, leaf)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None, None
    if leaf in ("mean", "low", "high"):
        interval = parent
    else:
        interval = parent.get(f"{leaf}_interval") or (parent.get("interval") if leaf == "auc" else None)
    is_interval = isinstance(interval, dict) and interval.keys() == {"mean", "low", "high"}
    return value, Interval(**interval) if is_interval else None


def _child(value: Any, name: str) -> Any:
    """A dict's value, or a list's element: the one that `name` names, or in which the flag `name` is true."""
    if isinstance(value, dict):
        return value.get(name)
    if isinstance(value, list):
        for element in value:
            if isinstance(element, dict) and (element.get(name) is True or element_name(element) == name):
                return element
    return None


def element_name(element: Any) -> str | None:
    """The value that tells a list's element from its neighbours."""
    if isinstance(element, dict):
        for key in KEYS:
            if isinstance(element.get(key), str | int):
                return str(element[key])
    return None


def measured(verdict: Verdict) -> str:
    """A verdict's value with its interval; a dash where there is none."""
    if verdict.value is None:
        return DASH
    if verdict.share:
        return percent(verdict.value) + (f" {span(verdict.interval)}" if verdict.interval else "")
    return f"{verdict.value:,.0f}" if verdict.value == round(verdict.value) else f"{verdict.value:,.3f}"
