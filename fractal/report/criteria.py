"""Success criteria, written down before a run and judged by its report: `val_accuracy >= 0.80`.

They are kept in the manifest with the time and with how many samples were there; they can be added to, never changed.
Each carries a seal over itself and those before it, so that one edited by hand, or taken out from among others, shows.
"""

import datetime
import hashlib
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast

import msgspec

from fractal.errors import InputError, RecordError
from fractal.report.summary import Summary
from fractal.rundir import RunDir
from fractal.selection.metrics import Interval
from fractal.selection.outcomes import BASELINE
from fractal.selection.stage import STRATEGIES

Comparison = Literal[">=", "<=", "==", ">", "<"]
COMPARE: dict[Comparison, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}
SHARES = {  # 0..1, or a difference of two such
    "val_accuracy": "validation samples that the chosen checkpoint judges rightly",
    "accuracy": "the critic on the samples of the evaluation split",
    "auc": "its AUC over all of these samples",
    "within_auc": "its AUC over pairs of samples of the same problem",
    "pairwise_accuracy": "share of these pairs that it orders rightly, ties being wrong",
    "brier": "mean squared error of its probabilities",
    "calibration_error": "expected calibration error",
    "pass_rate": "samples that pass, mean over all problems",
    "gap_closed": "share of the way from random to the oracle that the critic goes",
    "gap_closed_low": "lower end of its interval",
    "leaky_accuracy": "the critic where samples of a problem lie on both sides of the split",
    "honest_accuracy": "the same critic where problems are split",
    **{name: f"pass rate of the pick of {name}" for name in STRATEGIES},
    **{f"{name}_gain": f"{name} minus random, paired" for name in STRATEGIES if name != BASELINE},
    **{f"{name}_gain_low": "lower end of its interval" for name in STRATEGIES if name != BASELINE},
    **{f"over_{name}": f"critic minus {name}, paired" for name in STRATEGIES if name not in ("critic", BASELINE)},
    **{f"over_{name}_low": "lower end of its interval" for name in STRATEGIES if name not in ("critic", BASELINE)},
}
NUMBERS = {
    "problems": "in the run, of all splits",
    "samples": "drawn",
    "sandbox_errors": "samples that the sandbox could not judge",
    "samples_per_s": "samples over the seconds of generation",
    "tokens_per_s": "sampled tokens over the seconds of decoding",
    "verified_per_s": "labels over the seconds of verification",
    "total_s": "seconds of all stages but the report",
    "cost_usd": "of the rented machine until the report",
}
NAMES = SHARES | NUMBERS
_FORM = re.compile(r"\s*([A-Za-z_]\w*)\s*(>=|<=|==|>|<)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*(%?)\s*")


@dataclass(frozen=True, slots=True)
class Criterion:
    name: str  # one of NAMES
    comparison: Comparison
    value: float  # a share for a percentage

    @property
    def text(self) -> str:
        return f"{self.name} {self.comparison} {self.value:.12g}"


@dataclass(frozen=True, slots=True)
class Recorded:
    """A criterion as the manifest holds it."""

    name: str
    comparison: Comparison
    value: float
    recorded: str  # ISO 8601
    samples: int  # that were there when it was recorded
    seal: str  # sha256 over this and the seal before it

    @property
    def criterion(self) -> Criterion:
        return Criterion(self.name, self.comparison, self.value)


@dataclass(frozen=True, slots=True)
class Measured:
    value: float
    interval: Interval | None
    source: str  # which file, and what of it


@dataclass(frozen=True, slots=True)
class Verdict:
    """A criterion judged. `reason` says why it is not, and anything else the reader must know."""

    criterion: str
    verdict: Literal["met", "missed", "not judged"]
    value: float | None
    interval: Interval | None
    source: str
    reason: str
    recorded: str
    samples: int  # that were there when it was recorded: 0 means before the run
    share: bool  # value is a share


def parse(text: str, where: str = "--criterion") -> Criterion:
    """`NAME OP NUMBER`, the number with % or not. Raises InputError that names what is wrong and what is known."""
    shown = " ".join(text.split())
    found = _FORM.fullmatch(text)
    if found is None:
        raise InputError(
            f"{where} {shown!r}: not a criterion. Write NAME OP NUMBER with OP one of >= <= == > <, as "
            "'critic_gain_low > 0' or 'val_accuracy >= 80 %'."
        )
    name, comparison, digits, percent = found.groups()
    if name not in NAMES:
        raise InputError(f"{where} {shown!r}: unknown name {name!r}. Known: {', '.join(NAMES)}.")
    value = float(digits) / (100 if percent else 1)
    if percent and name not in SHARES:
        raise InputError(f"{where} {shown!r}: {name} is no share. Write a number without %.")
    if name in SHARES and abs(value) > 1:
        raise InputError(f"{where} {shown!r}: {name} is a share: write {digits} % or a number from -1 to 1.")
    if value in (float("inf"), float("-inf")):
        raise InputError(f"{where} {shown!r}: the number is too large.")
    return Criterion(name, cast(Comparison, comparison), value)


def read_plan(path: Path) -> list[Criterion]:
    """One criterion a line; blank lines and what follows a # are left out. Raises InputError with file and line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"--plan {path}: is not UTF-8 text: {error.reason}. Save it as UTF-8.") from error
    except OSError as error:
        raise InputError(f"--plan {path}: cannot be read: {error.strerror}. Check the path.") from error
    found = [
        parse(line.split("#")[0], f"{path}: line {number}:")
        for number, line in enumerate(lines, 1)
        if line.split("#")[0].strip()
    ]
    if not found:
        raise InputError(f"--plan {path}: holds no criterion. Write one a line, as: critic_gain_low > 0")
    return found


def asked(texts: Sequence[str] | None, plan: Path | None) -> list[Criterion]:
    """Those of the command line: `--plan` first, then each `--criterion`; the same one twice is one."""
    found = [*(read_plan(plan) if plan else []), *(parse(text) for text in texts or [])]
    return list(dict.fromkeys(found))


def record(folder: RunDir, criteria: Iterable[Criterion]) -> list[Recorded]:
    """Add to the manifest those that it does not hold, at once; return these."""
    before = recorded(folder.manifest)
    known = {one.criterion for one in before}
    seal = before[-1].seal if before else ""
    added: list[Recorded] = []
    for one in criteria:
        if one not in known:
            draft = Recorded(one.name, one.comparison, one.value, _now(), _samples(folder), "")
            seal = _seal(draft, seal)
            added.append(Recorded(**{**asdict(draft), "seal": seal}))
    if added:
        folder.manifest["criteria"] = [asdict(one) for one in [*before, *added]]
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


def judge(manifest: Mapping[str, Any], summary: Summary, cost_usd: float | None = None) -> list[Verdict]:
    """Every recorded criterion against what the run measured, in the order of recording."""
    found, verdicts, seal = measure(summary, cost_usd), [], ""
    for one in recorded(manifest):
        broken = one.seal != _seal(one, seal)
        seal = one.seal
        late = f"added after {one.samples:,} samples were there" if one.samples else ""
        notes = [late, "changed by hand after it was recorded, or one before it taken out" if broken else ""]
        what = found.get(one.name)
        if what is None or what.value != what.value:
            notes.insert(0, _why_not(one.name, summary) if what is None else "its value is not a number")
            what = None
        verdicts.append(
            Verdict(
                criterion=one.criterion.text,
                verdict=_word(one, what),
                value=what.value if what else None,
                interval=what.interval if what else None,
                source=what.source if what else "",
                reason="; ".join(note for note in notes if note),
                recorded=one.recorded,
                samples=one.samples,
                share=one.name in SHARES,
            )
        )
    return verdicts


def _word(one: Recorded, what: Measured | None) -> Literal["met", "missed", "not judged"]:
    if what is None:
        return "not judged"
    return "met" if COMPARE[one.comparison](what.value, one.value) else "missed"


def measure(summary: Summary, cost_usd: float | None = None) -> dict[str, Measured]:
    """Every one of NAMES that this run can tell, with its interval over problems where it has one."""
    found: dict[str, Measured] = {}
    _of_training(summary, found)
    _of_critic(summary, found)
    _of_strategies(summary, found)
    _of_the_run(summary, cost_usd, found)
    return found


def _of_training(summary: Summary, found: dict[str, Measured]) -> None:
    for epoch in summary.facts.epochs:
        if epoch.chosen and epoch.val_acc is not None:
            found["val_accuracy"] = Measured(epoch.val_acc, None, f"critic/metrics.jsonl, epoch {epoch.epoch}")
    for one in summary.split_accuracies:
        name = {"sample": "leaky_accuracy", "problem": "honest_accuracy"}.get(one.by)
        if name:
            found[name] = Measured(one.accuracy, None, f"critic/splits.json, split by {one.by}")


def _of_critic(summary: Summary, found: dict[str, Measured]) -> None:
    critic = summary.critic
    if critic is None:
        return
    source = f"labels.jsonl and scores.jsonl, {critic.samples:,} {summary.split} samples"
    within = critic.within_problem
    values = {
        "auc": critic.auc,
        "pairwise_accuracy": within.accuracy,
        "brier": critic.brier,
        "calibration_error": critic.expected_calibration_error,
    }
    found.update({name: Measured(value, None, source) for name, value in values.items() if value is not None})
    found["accuracy"] = Measured(critic.accuracy, critic.accuracy_interval, source)
    if within.auc is not None:
        found["within_auc"] = Measured(within.auc, within.interval, f"{source}, {within.pairs:,} pairs")


def _of_strategies(summary: Summary, found: dict[str, Measured]) -> None:
    pairs: dict[str, tuple[Interval, str]] = {}
    for one in summary.strategies:
        source = f"selection.jsonl, {one.problems} {summary.split} problems"
        found[one.strategy] = Measured(one.pass_rate.mean, one.pass_rate, source)
        if one.strategy != BASELINE:
            pairs[f"{one.strategy}_gain"] = (one.gain_over_random, source)
    for duel in summary.duels:
        if duel.strategy == BASELINE:  # critic_gain says it
            continue
        count = duel.wins + duel.losses + duel.ties
        pairs[f"over_{duel.strategy}"] = (duel.gain, f"selection.jsonl, {count} {summary.split} problems")
    if summary.gap_closed is not None:
        pairs["gap_closed"] = (summary.gap_closed, "selection.jsonl, critic, random and oracle")
    for name, (interval, source) in pairs.items():
        found[name] = Measured(interval.mean, interval, source)
        if interval.low != interval.high:  # else the bootstrap saw no variation and knows nothing
            found[f"{name}_low"] = Measured(interval.low, interval, source)


def _of_the_run(summary: Summary, cost_usd: float | None, found: dict[str, Measured]) -> None:
    seconds = summary.facts.stage_seconds
    rate = summary.splits[-1].pass_rate
    if rate is not None:
        found["pass_rate"] = Measured(rate.mean, rate, f"labels.jsonl, {summary.splits[-1].problems_measured} problems")
    found["problems"] = Measured(sum(summary.problems_by_split.values()), None, "problems.jsonl")
    if summary.samples:
        found["samples"] = Measured(summary.samples, None, "samples.jsonl")
    labels = sum(summary.labels_by_status.values())
    if labels:
        found["sandbox_errors"] = Measured(summary.labels_by_status["sandbox_error"], None, "labels.jsonl")
    for name, stage, count in (("samples_per_s", "generate", summary.samples), ("verified_per_s", "verify", labels)):
        if count and seconds.get(stage):
            found[name] = Measured(count / seconds[stage], None, f"manifest.json, seconds of {stage}")
    if summary.tokens_per_s is not None:
        found["tokens_per_s"] = Measured(summary.tokens_per_s, None, "manifest.json, tokens and decode_seconds")
    if seconds:
        found["total_s"] = Measured(sum(seconds.values()), None, "manifest.json, seconds of the stages")
    if cost_usd is not None:
        found["cost_usd"] = Measured(cost_usd, None, "manifest.json")


def _why_not(name: str, summary: Summary) -> str:
    """Why a known name has no value in this run."""
    reasons = summary.reasons
    if name not in NAMES:
        return "no measure of this name is known"
    if name == "val_accuracy":
        return reasons.get("epochs", "no validation accuracy of the chosen checkpoint was recorded")
    if name in ("leaky_accuracy", "honest_accuracy"):
        return reasons.get("split_accuracies", "the two ways to split were not compared (critic/splits.json)")
    if name in ("accuracy", "auc", "within_auc", "pairwise_accuracy", "brier", "calibration_error"):
        of_critic = reasons.get("critic")
        own = reasons.get({"auc": "auc"}.get(name, "within_problem"))
        return of_critic or own or "the critic has no such value here"
    if name == "pass_rate":
        return "no sample has a usable label"
    if name in NUMBERS:
        return reasons.get(name, "it was not recorded")
    if name.endswith("_low"):
        return "the difference, or its interval, could not be measured"
    if name == "gap_closed":
        return reasons.get("gap_closed", "there is no critic, or the oracle is no better than random")
    return reasons.get("strategies") or f"nothing was selected that gives {name}"


def _seal(one: Recorded, before: str) -> str:
    text = "\n".join([before, one.name, one.comparison, repr(float(one.value)), one.recorded, str(one.samples)])
    return hashlib.sha256(text.encode()).hexdigest()


def _samples(folder: RunDir) -> int:
    file = folder.file("samples.jsonl")
    if not file.exists():
        return 0
    with file.open("rb") as lines:
        return sum(line.endswith(b"\n") for line in lines)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
