"""Reward functions of verl: reward.custom_reward_function.path is this file, name is `compute_score`.

verl asks for one completion at a time, from many threads, or with the reward manager `batch` for all at once
(`compute_scores`). `ground_truth` has the tests: a mapping of columns, its JSON text, a list of statements, or a text.
With `problems`, it, or `extra_info["task_id"]`, is the problem's id. What stands under reward_kwargs are settings
(scoring.Scoring).

The result is a dictionary: `score`, and for the metrics `passed`, `undecided` and the label's `status`. verl knows no
missing reward: where a program was not decided in time, `score` is 0 and `undecided` is 1.
"""

from collections.abc import Sequence
from typing import Any

from fractal.rewards.rows import as_row
from fractal.rewards.scoring import Scoring


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None, **settings: Any
) -> dict[str, Any]:
    """The score of one completion."""
    return compute_scores([data_source], [solution_str], [ground_truth], [extra_info], **settings)[0]


def compute_scores(
    data_sources: Sequence[str],
    solution_strs: Sequence[str],
    ground_truths: Sequence[Any],
    extra_infos: Sequence[Any] | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """The scores of a batch."""
    known = {name: value for name, value in settings.items() if name in Scoring.__dataclass_fields__}
    scoring = Scoring(**known)
    extras = extra_infos if extra_infos is not None else [None] * len(solution_strs)
    rows = [_row(truth, extra or {}, scoring) for truth, extra in zip(ground_truths, extras, strict=True)]
    labels = scoring.labels(list(solution_strs), rows)
    return [
        {
            "score": scoring.reward(label) or 0.0,
            "passed": float(label.passed),
            "undecided": float(label.status == "sandbox_error"),
            "status": label.status,
        }
        for label in labels
    ]


def _row(truth: Any, extra: Any, scoring: Scoring) -> dict[str, Any]:
    if scoring.problems is not None:
        return {"task_id": extra.get("task_id", truth)}
    return as_row(truth, "ground_truth")
