"""A run made by hand for the report's tests: records of all splits, hostile text everywhere, every part of a page."""

import math
import random
from dataclasses import replace

from fractal.records import STATUSES, Label, Problem, Sample, Score
from fractal.report import criteria, page, summary
from fractal.report.summary import (
    DifficultyRow,
    Duel,
    Epoch,
    Facts,
    FunnelStep,
    RocCurve,
    SelectiveCurve,
    SplitAccuracy,
)
from fractal.selection import stage
from fractal.selection.metrics import Interval

ATTACK = "</script></style></pre><img src=x onerror=alert(1)><script>alert('x')</script>"
HOSTILE = f"Write f.\n\n{ATTACK} <img src=http://evil.example/x.png> {{{{ 7*7 }}}} \u202e\ud800\x1b[31m & more"
PROGRAM = '''from functools import lru_cache  # {note}


@lru_cache(maxsize=None)
def f{task}(text: str, k: int = {k}) -> list[int]:
    """Positions of the k-th letter."""
    found = [i for i, one in enumerate(text) if ord(one) % k == {k} and not one.isspace()]
    for position in reversed(range(len(found))):
        if found[position] > 0x1F or found[position] == 3.5e2:
            raise ValueError(f"at {{position!r}}: {{text[:10]}}")
    return sorted(found, key=lambda x: -x)
'''
FACTS = Facts(
    run="toy",
    date="2026-11-24T10:00:00+00:00",
    command="fractal report --check --run runs/toy",
    model="tiny/model",
    model_revision="abc123",
    weights_digest="sha256:feed",
    backend="transformers",
    seed=7,
    temperature=0.8,
    n=8,
    problem_set="starter",
    problem_set_digest="sha256:beef",
    stage_seconds={"generate": 410.0, "verify": 61.25, "train": 7400.0},
    generate_tokens=12_000,
    generate_seconds=400.0,
    sandbox_image="fractal-sandbox:0.1",
    sandbox_digest="sha256:cafe",
    git_commit="deadbeef",
    git_dirty=True,
    packages={"torch": "2.13.0"},
    critic="tiny/model, probe",
    epochs=(
        Epoch(epoch=0, train_loss=None, val_acc=0.51, val_within_auc=0.53, dev_within_auc=0.52),
        Epoch(epoch=1, train_loss=0.66, val_acc=0.62, val_within_auc=0.66, dev_within_auc=0.7, chosen=True),
        Epoch(epoch=2, train_loss=math.nan, val_acc=0.6, val_within_auc=0.64, dev_within_auc=0.69),
    ),
    skipped={"its reference fails its own tests": 2},
)


def run(tests=12, n=8, seed=1, words=HOSTILE, repeat=1):
    """Problems of all splits with samples, labels and scores that know a little."""
    rng = random.Random(seed)
    problems, samples, labels, scores = [], [], [], []
    for task_id in range(1, tests + 7):
        split = "train" if task_id <= 4 else "validation" if task_id <= 6 else "test"
        tests_ = [f"assert f{task_id}('a') == [{i}]" for i in range(3)]
        problems.append(Problem(task_id, f"Write f{task_id}. {words}", "", tests_, "", f"f{task_id}", split))
        easy = rng.random()
        for sample_id in range(n):
            passed = rng.random() < easy
            status = "passed" if passed else rng.choice(STATUSES[1:8])
            code = PROGRAM.format(task=task_id, k=rng.randint(1, 99), note=words.splitlines()[-1]) * repeat
            samples.append(Sample(task_id, sample_id, code, code, "stop", 40, rng.gauss(-20, 5), 0, "tiny/model"))
            detail = "" if passed else f"AssertionError: {words}"
            labels.append(Label(task_id, sample_id, status, passed, [], 0.1, 0.1, detail, ""))
            logit = rng.gauss(0.8 if passed else -0.8, 1)
            scores.append(Score(task_id, sample_id, logit, 1 / (1 + math.exp(-logit))))
    return problems, samples, labels, scores


def choose(problems, samples, labels, scores=(), *, split="test"):
    tasks = {one.task_id for one in problems if one.split == split}
    return stage.choose(*([one for one in rows if one.task_id in tasks] for rows in (samples, labels, scores)))


def build(problems, samples, labels, scores=(), *, facts=FACTS, split="test"):
    choices = choose(problems, samples, labels, scores, split=split)
    return summary.build(facts, problems, samples, labels, scores, choices, splits=(split,))


def full(found):
    """The summary with every optional part filled, by hand."""
    shares = [i / 20 for i in range(1, 21)]

    def around(value, width=0.09):
        return Interval(value, max(0.0, value - width), min(1.0, value + width))

    return replace(
        found,
        curves=replace(
            found.curves,
            bands={name: [around(v) for v in values] for name, values in found.curves.by_strategy.items()},
        ),
        funnel=[
            FunnelStep("samples drawn", 1889, ""),
            FunnelStep("with a label", 1887, "2 could not be judged: the sandbox failed"),
            FunnelStep("in problems with both kinds", 1104, "783 in problems that all samples pass or fail"),
            FunnelStep("of new problems", 96, "1,008 belong to train problems"),
        ],
        roc=[
            RocCurve("pooled", [0, 0.1, 0.3, 0.6, 1], [0, 0.5, 0.75, 0.92, 1], 0.812),
            RocCurve("within problem", [0, 0.15, 0.4, 0.7, 1], [0, 0.4, 0.68, 0.9, 1], 0.731),
        ],
        selective=[
            SelectiveCurve("critic", shares, [around(0.95 - 0.4 * x) for x in shares], [1 - x for x in shares], 0.74),
            SelectiveCurve(
                "mean_logprob", shares, [around(0.8 - 0.25 * x) for x in shares], [-x for x in shares], 0.67
            ),
        ],
        difficulty=[
            DifficultyRow(0.0, 0.0, 3, {"critic": 0.0, "random": 0.0, "mean_logprob": 0.0, "oracle": 0.0}),
            DifficultyRow(0.0, 0.25, 2, {"critic": 0.4, "random": 0.15, "mean_logprob": 0.2, "oracle": 1.0}),
            DifficultyRow(0.25, 0.5, 2, {"critic": 0.6, "random": 0.4, "mean_logprob": 0.55, "oracle": 1.0}),
            DifficultyRow(0.5, 1.0, 3, {"critic": 0.9, "random": 0.8, "mean_logprob": 0.75, "oracle": 1.0}),
            DifficultyRow(1.0, 1.0, 2, {"critic": 1.0, "random": 1.0, "mean_logprob": 1.0, "oracle": 1.0}),
        ],
        duels=[
            Duel("random", 7, 2, 3, Interval(0.21, 0.05, 0.37), 0.18),
            Duel("mean_logprob", 3, 2, 7, Interval(0.08, -0.08, 0.25), 1.0),
            Duel("shortest", 5, 0, 7, Interval(0.42, 0.17, 0.67), 0.0625),
        ],
        gap_closed=Interval(0.43, 0.12, 0.71),
        split_accuracies=[
            SplitAccuracy("sample", 0.884, 0.94, 0.74, 0.889),
            SplitAccuracy("problem", 0.713, 0.78, 0.72, 0.617),
        ],
        strategies=[
            replace(one, gain_over_random=Interval(0.21, 0.05, 0.37)) if one.strategy == "critic" else one
            for one in found.strategies
        ],
    )


MANIFEST = {"name": "toy", "config": {"generate": {"model": HOSTILE}}, "stages": {}, "images": {}}


def verdicts(found):
    """Three criteria: met, missed and added late, not judged."""
    seal, rows = "", []
    for name, comparison, value, samples in (
        ("val_accuracy", ">=", 0.5, 0), ("critic", ">=", 0.99, 400), ("cost_usd", "<=", 1.0, 0),
    ):  # fmt: skip
        one = criteria.Recorded(name, comparison, value, "2026-11-24T08:00:00+00:00", samples, "")
        seal = criteria._seal(one, seal)
        rows.append(
            {**{key: getattr(one, key) for key in ("name", "comparison", "value", "recorded", "samples")}, "seal": seal}
        )
    return criteria.judge({"criteria": rows}, found)


def whole_page(tests=12, n=8, seed=8, words=HOSTILE, repeat=1):
    """A page with every part."""
    records = run(tests, n, seed, words, repeat)
    found = full(build(*records))
    opened = page.open_rows(*records, choose(*records))
    return page.page(found, opened, verdicts(found), MANIFEST)
