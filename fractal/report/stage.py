"""Stage 6: everything -> report/index.html, summary.json, a row of LOG.md, and the table on the terminal.

`summary.build` measures, `page` shows, `criteria` judges; this module joins them. All that it writes follows from the
records and the manifest, and from nothing else: `check` computes it again and compares.
"""

import copy
import hashlib
import os
import shlex
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

from fractal import console
from fractal.errors import InputError, RecordError
from fractal.jsonl import encode, read_jsonl, write_whole
from fractal.records import Choice, Label, Sample, Score
from fractal.report import criteria, run_log
from fractal.report.criteria import Verdict
from fractal.report.page import (
    DASH,
    findings,
    headline,
    measured,
    number,
    open_rows,
    page,
    percent,
    points,
    seconds,
    span,
    visible,
)
from fractal.report.summary import Epoch, Facts, SplitAccuracy, Summary, build
from fractal.rundir import RunDir
from fractal.selection.outcomes import BASELINE, recorded_splits

RECORDS = ("problems.jsonl", "samples.jsonl", "labels.jsonl", "scores.jsonl", "selection.jsonl")
INPUTS = (*RECORDS, "outputs.jsonl", "critic/metrics.jsonl", "critic/splits.json")  # all that a report reads
PAGE, TABLE, NUMBERS = "report/index.html", "report/table.txt", "summary.json"


@dataclass(frozen=True, slots=True)
class Report:
    """What a run found, and the files that say so."""

    summary: Summary
    verdicts: list[Verdict]
    choices: list[Choice]  # as a fresh selection makes them
    files: dict[str, bytes]  # name within the run folder -> content
    fields: dict[str, Any]  # summary.json


def run(folder: RunDir) -> None:
    """Write the report unless nothing changed since the last one, and print the table. Raises InputError."""
    _labelled(folder)
    now = inputs(folder)
    last = folder.manifest["config"].get("report")
    there = all(folder.file(name).exists() for name in (PAGE, TABLE, NUMBERS))
    if there and isinstance(last, dict) and {**last, "bill": None} == {**now, "bill": None}:
        console.say("report: is there, nothing to do")
        console.out.file.write(folder.file(TABLE).read_text(encoding="utf-8"))
    else:
        with folder.stage("report", PAGE):
            made = make(folder, now["bill"])
            for name, content in made.files.items():
                write_whole(folder.file(name), content)
            console.say(table(made.summary, made.verdicts))
        place = folder.path.resolve()
        cells = run_log.row(
            made.summary, made.verdicts, now["bill"]["cost_usd"], f"{place.parent.name}/{place.name}/{NUMBERS}"
        )
        run_log.add(place.parent / "LOG.md", cells)
        folder.manifest["config"]["report"] = now
        folder.save()
    console.say(f"report: {folder.file(PAGE)} and {folder.file(NUMBERS)}")


def _labelled(folder: RunDir) -> list[Label]:
    labels = read_jsonl(folder.file("labels.jsonl"), Label)
    if not labels:
        raise InputError(f"{folder.path}: has no labels yet. Run `fractal verify --run {folder.path}` first.")
    return labels


def make(folder: RunDir, bill: dict[str, Any], choices: list[Choice] | None = None) -> Report:
    """The report of a run folder, which stays as it is. `choices` stand in for those of selection.jsonl."""
    problems = list(folder.problems().values())
    samples = read_jsonl(folder.file("samples.jsonl"), Sample)
    labels = _labelled(folder)
    scores = read_jsonl(folder.file("scores.jsonl"), Score)
    if choices is None:
        choices = read_jsonl(folder.file("selection.jsonl"), Choice)
    found = build(
        facts_of(folder), problems, samples, labels, scores, choices,
        splits=recorded_splits(folder.manifest["config"], problems, labels), split_accuracies=_splits(folder),
    )  # fmt: skip
    cost_usd = bill.get("cost_usd")
    verdicts = criteria.judge(folder.manifest, found, cost_usd)
    shown = {row.task_id for row in found.by_problem}
    opened = open_rows([one for one in problems if one.task_id in shown], samples, labels, scores, choices)
    fields = summary_fields(found, verdicts, cost_usd)
    files = {
        NUMBERS: msgspec.json.format(encode(fields), indent=2) + b"\n",
        PAGE: page(found, opened, verdicts, lasting(folder.manifest, bill)).encode("utf-8"),
        TABLE: _text(table(found, verdicts)).encode("utf-8"),
    }
    return Report(found, verdicts, choices, files, fields)


def inputs(folder: RunDir) -> dict[str, Any]:
    """What a report is made from: digests of records, manifest and code, versions, and the bill until now."""
    steady = lasting(folder.manifest, {"price_usd_per_hour": None, "cost_usd": None})
    return {
        "files": {
            name: hashlib.sha256(folder.file(name).read_bytes()).hexdigest()
            for name in INPUTS
            if folder.file(name).exists()
        },
        "manifest": hashlib.sha256(encode(steady)).hexdigest(),
        "code": code_digest(),
        "packages": {name: metadata.version(name) for name in ("matplotlib", "numpy", "pygments", "scikit-learn")},
        "bill": {name: folder.manifest.get(name) for name in ("price_usd_per_hour", "cost_usd")},
    }


def code_digest() -> str:
    """sha256 over the sources of the stages and of what they share."""
    total = hashlib.sha256()
    package = Path(__file__).parents[1]
    for file in sorted(package.rglob("*.[ph]*")):
        name = file.relative_to(package)
        if file.suffix in {".py", ".html"} and name.parts[0] not in {"cloud", "images", "install", "sandbox"}:
            total.update(str(name).encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def lasting(manifest: dict[str, Any], bill: dict[str, Any]) -> dict[str, Any]:
    """The manifest without what the report itself leaves there: its time, its inputs, and what its seconds cost.

    `bill` holds price and cost as they were when the report began.
    """
    kept = copy.deepcopy(manifest)
    kept["stages"].pop("report", None)
    kept["config"].pop("report", None)
    return kept | bill


def facts_of(folder: RunDir) -> Facts:
    """What the manifest tells of a run."""
    manifest = folder.manifest
    drawn, stages = manifest["config"].get("generate", {}), manifest["stages"]
    generation, critic = stages.get("generate", {}), manifest["config"].get("train")
    epochs = msgspec.json.decode(b"[" + b",".join(_lines(folder.file("critic/metrics.jsonl"))) + b"]")
    sandbox = manifest["images"].get("sandbox", {})
    ends = [entry["end"] for name, entry in stages.items() if name != "report" and entry.get("end")]
    chosen = [one for one in epochs if one.get("chosen")] or epochs[-1:]
    return Facts(
        run=manifest["name"],
        date=max([manifest.get("created", ""), *ends]),
        command=f"fractal report --check --run {shlex.quote('runs/' + manifest['name'])}",
        model=drawn.get("model", "unknown"),
        model_revision=drawn.get("revision"),
        weights_digest=drawn.get("weights_sha256"),
        backend=drawn.get("backend"),
        seed=drawn.get("seed"),
        temperature=drawn.get("temperature"),
        n=drawn.get("n"),
        problem_set=manifest["config"].get("problems", {}).get("name"),
        problem_set_digest=manifest["config"].get("problems", {}).get("digest"),
        stage_seconds={
            name: entry["seconds"] for name, entry in stages.items() if name != "report" and "seconds" in entry
        },
        generate_tokens=generation.get("tokens"),
        generate_seconds=generation.get("decode_seconds"),
        sandbox_image=sandbox.get("name"),
        sandbox_digest=sandbox.get("digest"),
        git_commit=manifest["git_commit"],
        git_dirty=manifest["git_dirty"],
        packages={name: version for name, version in manifest["packages"].items() if version},
        critic=f"{critic['mode']} on {critic['base']}" if critic else None,
        epochs=[
            Epoch(
                epoch=one["epoch"],
                train_loss=one["train_loss"],
                val_acc=one["val_acc"],
                val_within_auc=one.get("val_within_auc"),
                dev_within_auc=one.get("dev_within_auc"),
                chosen=any(one is other for other in chosen),
            )
            for one in epochs
        ],
        skipped=Counter(
            "prompt and reply do not fit the model's context" for _ in generation.get("skipped", {}).values()
        ),
    )


def _splits(folder: RunDir) -> list[SplitAccuracy]:
    """Stage 3's comparison of two ways to split. Raises RecordError."""
    file = folder.file("critic/splits.json")
    if not file.exists():
        return []
    try:
        return msgspec.json.decode(file.read_bytes(), type=list[SplitAccuracy])
    except msgspec.DecodeError as error:
        raise RecordError(f"{file}: not a list of split accuracies: {error}. Train again: fractal train.") from error


def _lines(path: Path) -> list[bytes]:
    return [line for line in path.read_bytes().split(b"\n") if line] if path.exists() else []


def summary_fields(summary: Summary, verdicts: Iterable[Verdict] = (), cost_usd: float | None = None) -> dict[str, Any]:
    """summary.json: what most readers want under short names, and the whole Summary under `details`."""
    facts, every = summary.facts, summary.splits[-1]
    return {
        "run": facts.run,
        "date": facts.date,
        "model": facts.model,
        "model_revision": facts.model_revision,
        "weights_sha256": facts.weights_digest,
        "backend": facts.backend,
        "headline": headline(summary),
        "problems": sum(summary.problems_by_split.values()),
        "problems_by_split": summary.problems_by_split,
        "samples": summary.samples,
        "labels": summary.labels_by_status,
        "pass_rate": every.pass_rate,
        "evaluation_split": summary.split,
        "strategies": {one.strategy: one for one in summary.strategies},
        "gap_closed": summary.gap_closed,
        "criteria": list(verdicts),
        "seconds": facts.stage_seconds,
        "tokens_per_s": summary.tokens_per_s,
        "cost_usd": cost_usd,
        "sandbox_image": {"name": facts.sandbox_image, "digest": facts.sandbox_digest},
        "details": summary,
    }


# ---- the terminal ----------------------------------------------------------------------------------------------------


def _text(shown: Group) -> str:
    """What a terminal of 100 columns without colours shows."""
    with open(os.devnull, "w") as nowhere:
        plain = Console(
            file=nowhere, width=100, record=True, color_system=None, force_terminal=False, legacy_windows=False
        )
        plain.print(shown)
        return plain.export_text(styles=False)


def table(summary: Summary, verdicts: Iterable[Verdict] = ()) -> Group:
    """Headline, criteria, strategies with intervals, the critic, labels by status, seconds by stage, warnings."""
    judged = _table("Criteria", "criterion", "verdict", "measured")
    for verdict in verdicts:
        colour = {"met": "green", "missed": "red"}.get(verdict.verdict, "yellow")
        note = f" ({escape(visible(verdict.reason))})" if verdict.reason else ""
        cells = _plain(verdict.criterion, verdict.verdict, measured(verdict))
        name, word, value = cells
        judged.add_row(name, f"[{colour}]{word}[/]", value + note)
    strategies = _table(f"Best of n on {summary.split}", "strategy", "problems", "passes", "95 %", "gain", "95 %")
    for one in summary.strategies:
        gain = one.gain_over_random
        compared = (DASH, "") if one.strategy == BASELINE else (points(gain.mean), span(gain, signed=True))
        strategies.add_row(
            *_plain(one.strategy, one.problems, percent(one.pass_rate.mean), span(one.pass_rate), *compared)
        )
    if summary.critic is not None:
        within = summary.critic.within_problem
        critic = [
            f"The critic on {summary.critic.samples:,} samples: AUC within a problem {number(within.auc)}, "
            f"pooled {number(summary.critic.auc)}; accuracy {percent(summary.critic.accuracy)} (majority class "
            f"{percent(summary.critic.majority_accuracy)}, knowing only the problem "
            f"{percent(summary.critic.problem_mean_accuracy)})"
        ]
    else:
        critic = []
    total = sum(summary.labels_by_status.values())
    labels = _table("Labels", "status", "samples", "share")
    for status, count in summary.labels_by_status.items():
        labels.add_row(*_plain(status, number(count), percent(count / total if total else None)))
    stages = _table("Seconds", "stage", "time")
    for stage, took in summary.facts.stage_seconds.items():
        stages.add_row(*_plain(stage, seconds(took)))
    warnings = [f"[yellow]![/] {escape(text)}" for text in summary.warnings]
    above, below = ([one for one in some if one.row_count] for some in ((judged, strategies), (labels, stages)))
    found = [escape(one) for one in findings(summary)]
    return Group(f"[bold]{escape(headline(summary))}[/]", *found, *above, *map(escape, critic), *below, *warnings)


def _table(title: str, first: str, *columns: str) -> Table:
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="dim")
    made.add_column(first)
    for column in columns:
        made.add_column(column, justify="right")
    return made


def _plain(*cells: object) -> Iterable[str]:
    return (escape(str(cell)) for cell in cells)
