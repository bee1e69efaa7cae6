"""The report's files from a run folder: `summary.build` measures, `page` and `table` show, `criteria` judges."""

from dataclasses import dataclass
from typing import Any

import msgspec

from fractal import console
from fractal.jsonl import encode, parse, read_jsonl, write_whole
from fractal.records import Choice, Sample, Score
from fractal.report import criteria, run_log
from fractal.report.criteria import Verdict
from fractal.report.facts import read_facts, read_split_accuracies
from fractal.report.findings import headline
from fractal.report.inputs import NUMBERS, PAGE, TABLE, without_report
from fractal.report.page import page
from fractal.report.programs import problem_details
from fractal.report.summary import Summary, build
from fractal.report.table import as_text, table
from fractal.rundir import RunDir
from fractal.selection.splits import measured_splits


@dataclass(frozen=True, slots=True)
class Report:
    summary: Summary
    verdicts: list[Verdict]
    files: dict[str, bytes]  # name within the run folder -> content


def write(folder: RunDir, bill: dict[str, Any]) -> None:
    """Write the files, print the table, add the row to LOG.md."""
    report = make(folder, bill, read_jsonl(folder.file("selection.jsonl"), Choice))
    for name, content in report.files.items():
        write_whole(folder.file(name), content)
    console.say(table(report.summary, report.verdicts))
    path = folder.path.resolve()
    source = f"{path.parent.name}/{path.name}/{NUMBERS}"
    run_log.add(path.parent / "LOG.md", run_log.row(report.summary, report.verdicts, bill["cost_usd"], source))


def make(folder: RunDir, bill: dict[str, Any], choices: list[Choice]) -> Report:
    """The report of a run folder, which stays as it is. `bill` holds price and cost when the report began."""
    problems = list(folder.problems().values())
    samples = read_jsonl(folder.file("samples.jsonl"), Sample)
    labels = folder.labels()
    scores = read_jsonl(folder.file("scores.jsonl"), Score)
    summary = build(
        read_facts(folder),
        problems,
        samples,
        labels,
        scores,
        choices,
        splits=measured_splits(folder.manifest["config"], problems, labels),
        split_accuracies=read_split_accuracies(folder),
    )
    fields = summary_fields(summary, bill.get("cost_usd"))
    verdicts = criteria.judge(folder.manifest, as_json(fields), summary.reasons)
    measured = {row.task_id for row in summary.by_problem}
    details = problem_details(
        (problem for problem in problems if problem.task_id in measured), samples, labels, scores, choices
    )
    html = page(summary, details, verdicts, without_report(folder.manifest, bill))
    files = {
        NUMBERS: msgspec.json.format(encode(fields | {"criteria": verdicts}), indent=2) + b"\n",
        PAGE: html.encode("utf-8"),
        TABLE: as_text(table(summary, verdicts)).encode("utf-8"),
    }
    return Report(summary, verdicts, files)


def as_json(value: object) -> Any:
    """The value as a reader of its JSON gets it."""
    return parse(encode(value), Any)


def summary_fields(summary: Summary, cost_usd: float | None = None) -> dict[str, Any]:
    """summary.json without its criteria: what most readers want, and the whole Summary under `details`."""
    facts = summary.facts
    labelled = sum(summary.labels_by_status.values())
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
        "pass_rate": summary.splits[-1].pass_rate,
        "evaluation_split": summary.split,
        "strategies": {result.strategy: result for result in summary.strategies},
        "gap_closed": summary.gap_closed,
        "seconds": facts.stage_seconds,
        "total_s": sum(facts.stage_seconds.values()) or None,
        "samples_per_s": _rate(summary.samples, facts.stage_seconds.get("generate")),
        "tokens_per_s": summary.tokens_per_s,
        "verified_per_s": _rate(labelled, facts.stage_seconds.get("verify")),
        "cost_usd": cost_usd,
        "sandbox_image": {"name": facts.sandbox_image, "digest": facts.sandbox_digest},
        "details": summary,
    }


def _rate(count: int, seconds: float | None) -> float | None:
    return count / seconds if count and seconds else None
