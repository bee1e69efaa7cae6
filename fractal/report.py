"""Stage 6: everything -> report/index.html, summary.json, and the table on the terminal.

One page without scripts, fonts or anything else from elsewhere; prompts and names in it are untrusted and escaped.
What is not known prints as a dash with its reason. `summary.build` measures, this module only shows.
"""

import datetime
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import jinja2
import msgspec
from markupsafe import Markup
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

from fractal import charts, console
from fractal.metrics import Interval
from fractal.outcomes import BASELINE, StrategyResult, recorded_splits
from fractal.records import Choice, InputError, Label, Sample, Score, encode, read_jsonl, write_whole
from fractal.run import RunDir
from fractal.summary import Epoch, Facts, Summary, build

DASH = "\u2013"
MEANING = {
    "critic": "highest score of the critic",
    "random": "any sample, exact expectation",
    "first": "the first sample",
    "mean_logprob": "highest log-probability per token",
    "sum_logprob": "highest log-probability",
    "shortest": "shortest program",
    "oracle": "a passing sample if there is one: the ceiling",
}


def run(folder: RunDir) -> None:
    """Write the report unless nothing changed since the last one, and print the table. Raises InputError."""
    problems = list(folder.problems().values())
    samples = read_jsonl(folder.file("samples.jsonl"), Sample)
    labels = read_jsonl(folder.file("labels.jsonl"), Label)
    if not labels:
        raise InputError(f"{folder.path}: has no labels yet. Run `fractal verify --run {folder.path}` first.")
    scores = read_jsonl(folder.file("scores.jsonl"), Score)
    choices = read_jsonl(folder.file("selection.jsonl"), Choice)
    page_file, table_file = folder.file("report/index.html"), folder.file("report/table.txt")
    inputs = folder.digest("problems.jsonl", "samples.jsonl", "labels.jsonl", "scores.jsonl", "selection.jsonl")
    if folder.manifest["config"].get("report") == inputs and page_file.exists() and table_file.exists():
        console.say("report: is there, nothing to do")
        console.out.file.write(table_file.read_text(encoding="utf-8"))
    else:
        splits = recorded_splits(folder.manifest["config"], problems, labels)
        facts = facts_of(folder)
        with folder.stage("report", "report/index.html"):
            found = build(facts, problems, samples, labels, scores, choices, splits=splits)
            write(folder.path, found)
            shown = table(found)
            with table_file.open("w", encoding="utf-8") as file:
                Console(file=file, width=100).print(shown)
            console.say(shown)
        folder.manifest["config"]["report"] = inputs
        folder.save()
    console.say(f"report: {page_file} and {folder.file('summary.json')}")


def facts_of(folder: RunDir) -> Facts:
    """What the manifest tells of a run."""
    manifest = folder.manifest
    drawn, stages = manifest["config"].get("generate", {}), manifest["stages"]
    generation, critic = stages.get("generate", {}), manifest["config"].get("train")
    epochs = msgspec.json.decode(b"[" + b",".join(_lines(folder.file("critic/metrics.jsonl"))) + b"]")
    sandbox = manifest["images"].get("sandbox", {})
    return Facts(
        run=manifest["name"],
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        command=f"fractal report --run {folder.path}",
        model=drawn.get("model", "unknown"),
        model_revision=drawn.get("revision"),
        weights_digest=drawn.get("weights_sha256"),
        backend=drawn.get("backend"),
        seed=drawn.get("seed"),
        temperature=drawn.get("temperature"),
        n=drawn.get("n"),
        problem_set=manifest["config"].get("problems", {}).get("name"),
        problem_set_digest=manifest["config"].get("problems", {}).get("digest"),
        stage_seconds={name: entry["seconds"] for name, entry in stages.items() if name != "report"},
        generate_tokens=generation.get("tokens"),
        generate_seconds=generation.get("decode_seconds"),
        sandbox_image=sandbox.get("name"),
        sandbox_digest=sandbox.get("digest"),
        git_commit=manifest["git_commit"],
        git_dirty=manifest["git_dirty"],
        packages={name: version for name, version in manifest["packages"].items() if version},
        critic=f"{critic['mode']} on {critic['base']}" if critic else None,
        epochs=[
            Epoch(epoch=e["epoch"], train_loss=e["train_loss"], val_acc=e["val_acc"], chosen=e is epochs[-1])
            for e in epochs
        ],
        skipped=Counter(
            "prompt and reply do not fit the model's context" for _ in generation.get("skipped", {}).values()
        ),
    )


def _lines(path: Path) -> list[bytes]:
    return [line for line in path.read_bytes().split(b"\n") if line] if path.exists() else []


def write(run_dir: Path, summary: Summary) -> Path:
    """Write report/index.html and summary.json of a run folder; return the page's path."""
    write_whole(run_dir / "summary.json", msgspec.json.format(encode(summary_fields(summary)), indent=2) + b"\n")
    write_whole(run_dir / "report" / "index.html", page(summary).encode("utf-8", "replace"))
    return run_dir / "report" / "index.html"


def summary_fields(summary: Summary) -> dict[str, object]:
    """summary.json: what most readers want under short names, and the whole Summary under `details`."""
    facts, every = summary.facts, summary.splits[-1]
    return {
        "run": facts.run,
        "date": facts.date,
        "model": facts.model,
        "model_revision": facts.model_revision,
        "weights_sha256": facts.weights_digest,
        "backend": facts.backend,
        "problems": sum(summary.problems_by_split.values()),
        "problems_by_split": summary.problems_by_split,
        "samples": summary.samples,
        "labels": summary.labels_by_status,
        "pass_rate": every.pass_rate,
        "evaluation_split": summary.split,
        "strategies": {one.strategy: one for one in summary.strategies},
        "seconds": facts.stage_seconds,
        "tokens_per_s": summary.tokens_per_s,
        "sandbox_image": {"name": facts.sandbox_image, "digest": facts.sandbox_digest},
        "details": summary,
    }


def page(summary: Summary) -> str:
    """The whole page as HTML."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters.update(percent=percent, points=points, span=span, number=number, seconds=seconds, dash=dash)
    template = environment.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    return template.render(
        s=summary, f=summary.facts, headline=headline(summary), charts=_charts(summary), meaning=MEANING
    )


def headline(summary: Summary) -> str:
    """The result in a sentence or two, with what it is to be held against."""
    results = {one.strategy: one for one in summary.strategies}
    critic, random, oracle = (results.get(name) for name in ("critic", BASELINE, "oracle"))
    if random is None:
        return f"No strategy measured: {summary.reasons.get('strategies', 'there are no choices')}."
    ceiling = f", the oracle {percent(oracle.pass_rate.mean)}" if oracle else ""
    if critic is None:
        return (
            f"No critic yet. A random sample passes on {percent(random.pass_rate.mean)} "
            f"{span(random.pass_rate)} of {_problems(random, summary)}{ceiling}."
        )
    # on the critic's own problems, which may be fewer
    held_against = critic.pass_rate.mean - critic.gain_over_random.mean
    return (
        f"The critic picks a passing program for {percent(critic.pass_rate.mean)} {span(critic.pass_rate)} of "
        f"{_problems(critic, summary)}; random {percent(held_against)}{ceiling}. {_verdict(critic)}"
    )


def _verdict(critic: StrategyResult) -> str:
    gain = critic.gain_over_random
    text = f"Gain over random: {points(gain.mean)} points {span(gain, signed=True)}"
    if gain.low == gain.high:
        return f"{text}: no interval, so nothing is shown."
    if gain.low > 0:
        return f"{text}."
    return f"{text}: worse than random." if gain.high < 0 else f"{text}: the interval includes zero."


def _problems(result: StrategyResult, summary: Summary) -> str:
    return f"{result.problems} {summary.split} problem{'' if result.problems == 1 else 's'}"


def _charts(summary: Summary) -> dict[str, Markup]:
    """Chart name -> SVG; a chart without data is left out."""
    drawn: dict[str, str] = {}
    if any(summary.labels_by_status.values()):
        drawn["status"] = charts.status_bars(summary.labels_by_status)
    if summary.strategies:
        drawn["strategies"] = charts.strategy_intervals([(one.strategy, one.pass_rate) for one in summary.strategies])
    if summary.curves and len(summary.curves.by_strategy[BASELINE]) > 1:
        drawn["curves"] = charts.best_of_k(summary.curves)
    if summary.critic:
        drawn["reliability"] = charts.reliability(summary.critic.reliability)
    if summary.facts.epochs:
        drawn["training"] = charts.training(summary.facts.epochs)
    return {name: Markup(svg) for name, svg in drawn.items()}  # our own numbers; matplotlib escapes the names


# ---- numbers as text -------------------------------------------------------------------------------------------------


def percent(value: float | None, decimals: int = 1) -> str:
    """0.4123 -> "41.2 %"; None and NaN -> a dash."""
    return DASH if value is None or value != value else f"{100 * value:.{decimals}f}\u00a0%"


def points(value: float) -> str:
    """Percentage points with their sign: 0.111 -> "+11.1"."""
    return f"{round(100 * value, 1) + 0.0:+.1f}".replace("-", "\u2212")  # + 0.0: never "-0.0"


def span(interval: Interval, signed: bool = False) -> str:
    """The interval in percent, "[20.1, 62.5]"; a dash where the bootstrap saw no variation and so knows nothing."""
    if interval.low == interval.high:
        return f"[{DASH}]"
    low, high = (points(x) if signed else f"{100 * x:.1f}" for x in (interval.low, interval.high))
    return f"[{low},\u00a0{high}]"


def number(value: float | None, decimals: int = 3) -> str:
    if value is None or value != value:
        return DASH
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{decimals}f}"


def seconds(value: float | None) -> str:
    """Seconds as "4.2 s", "12 min 05 s" or "3 h 20 min"."""
    if value is None:
        return DASH
    if value < 100:
        return f"{value:.1f}\u00a0s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 100:
        return f"{minutes}\u00a0min\u00a0{rest:02}\u00a0s"
    return f"{minutes // 60}\u00a0h\u00a0{minutes % 60:02}\u00a0min"


def dash(value: object) -> object:
    return DASH if value is None or value == "" else value


# ---- the terminal ----------------------------------------------------------------------------------------------------


def table(summary: Summary) -> Group:
    """Headline, strategies with intervals, labels by status, seconds by stage, and the warnings, for rich."""
    strategies = _table(f"Best of n on {summary.split}", "strategy", "problems", "passes", "95 %", "gain", "95 %")
    for one in summary.strategies:
        gain = one.gain_over_random
        compared = (DASH, "") if one.strategy == BASELINE else (points(gain.mean), span(gain, signed=True))
        strategies.add_row(
            *_plain(one.strategy, one.problems, percent(one.pass_rate.mean), span(one.pass_rate), *compared)
        )
    total = sum(summary.labels_by_status.values())
    labels = _table("Labels", "status", "samples", "share")
    for status, count in summary.labels_by_status.items():
        labels.add_row(*_plain(status, number(count), percent(count / total if total else None)))
    stages = _table("Seconds", "stage", "time")
    for stage, took in summary.facts.stage_seconds.items():
        stages.add_row(*_plain(stage, seconds(took)))
    warnings = [f"[yellow]![/] {escape(text)}" for text in summary.warnings]
    shown = [one for one in (strategies, labels, stages) if one.row_count]
    return Group(f"[bold]{escape(headline(summary))}[/]", *shown, *warnings)


def _table(title: str, first: str, *columns: str) -> Table:
    made = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="dim")
    made.add_column(first)
    for column in columns:
        made.add_column(column, justify="right")
    return made


def _plain(*cells: object) -> Iterable[str]:
    return (escape(str(cell)) for cell in cells)
