"""A run made by hand for the report's tests: records of all splits, hostile text everywhere, every part of a page."""

import math
import random
from dataclasses import asdict, replace

from fractal.records import STATUSES, Label, Problem, Sample, Score
from fractal.report import criteria, make, page, summary
from fractal.report.facts import Epoch, Facts, SplitAccuracy
from fractal.report.programs import problem_details
from fractal.selection import strategies
from fractal.selection.outcomes import outcomes

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
    for number in range(1, tests + 7):
        task_id, split = str(number), "train" if number <= 4 else "validation" if number <= 6 else "test"
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
    inside = {problem.task_id for problem in problems if problem.split == split}
    return strategies.choose(outcomes([sample for sample in samples if sample.task_id in inside], labels, scores))


def build(problems, samples, labels, scores=(), *, facts=FACTS, split="test"):
    choices = choose(problems, samples, labels, scores, split=split)
    return summary.build(facts, problems, samples, labels, scores, choices, splits=(split,))


def full(measured):
    """The summary with every optional part."""
    split_accuracies = [
        SplitAccuracy("sample", 0.884, 0.94, 0.74, 0.889),
        SplitAccuracy("problem", 0.713, 0.78, 0.72, 0.617),
    ]
    return replace(measured, split_accuracies=split_accuracies)


MANIFEST = {"name": "toy", "config": {"generate": {"model": HOSTILE}}, "stages": {}, "images": {}}


def judge(measured, *rows, cost_usd=None):
    """Verdicts on criteria given as text and how many samples there were when they were recorded."""
    recorded = []
    for text, samples in rows:
        criterion = criteria.parse(text)
        recorded.append({**asdict(criterion), "recorded": "2026-11-24T08:00:00+00:00", "samples": samples})
    fields = make.as_json(make.summary_fields(measured, cost_usd))
    return criteria.judge({"criteria": recorded}, fields, measured.reasons)


def verdicts(measured):
    """Three criteria: met, missed and added late, not judged."""
    return judge(measured, ("val_accuracy >= 0.5", 0), ("critic >= 0.99", 400), ("cost_usd <= 1", 0))


def whole_page(tests=12, n=8, seed=8, words=HOSTILE, repeat=1):
    """A page with every part."""
    records = run(tests, n, seed, words, repeat)
    measured = full(build(*records))
    return page.page(measured, problem_details(*records, choose(*records)), verdicts(measured), MANIFEST)
