"""Which programs a fine-tuning step holds, in which forward passes, and what each weighs in the loss."""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from fractal.critic.arrays import Flags, Groups
from fractal.critic.prompt import PromptTokenizer
from fractal.critic.training_settings import TrainingSettings
from fractal.records import task_order

DEV_SHARE = 0.2  # of the train problems, held out to say when to stop


@dataclass(frozen=True, slots=True)
class Example:
    """A program with its verdict; the same program drawn again counts in `weight`."""

    task_id: str
    token_ids: list[int]
    passed: bool
    weight: int


def dev_problems(task_ids: Iterable[str], seed: int = 0) -> set[str]:
    """Which train problems are held out: DEV_SHARE of them, by a hash of the id, whatever others there are.

    Empty for fewer than five problems.
    """
    tasks = sorted(set(task_ids), key=task_order)
    if len(tasks) < 5:
        return set()
    order = sorted(tasks, key=lambda task: hashlib.sha256(f"dev/{seed}/{task}".encode()).digest())
    return set(order[: max(1, round(DEV_SHARE * len(tasks)))])


def micro_batches(examples: list[Example], batch_tokens: int) -> list[list[Example]]:
    """One problem's programs in as few batches as hold `batch_tokens` padded tokens, like lengths together.

    Each batch gets its share of passing and of failing ones, so that pairs are left. A program longer than a batch
    stands alone.
    """
    ordered = sorted(examples, key=lambda example: len(example.token_ids))
    count = max(1, math.ceil(len(ordered[-1].token_ids) * len(ordered) / batch_tokens))
    while count < len(ordered):
        kinds = [[example for example in ordered if example.passed is kind] for kind in (True, False)]
        result = [
            [example for kind in kinds for example in kind[len(kind) * i // count : len(kind) * (i + 1) // count]]
            for i in range(count)
        ]
        result = [batch for batch in result if batch]
        if all(max(len(e.token_ids) for e in batch) * len(batch) <= batch_tokens for batch in result):
            return result
        count += 1
    return [ordered] if count == 1 else [[example] for example in ordered]


def pack(groups: list[list[Example]], batch_tokens: int) -> list[list[list[Example]]]:
    """Groups (of `micro_batches`) that go through the model together: at most `batch_tokens` padded tokens a pass.

    Like lengths together. A group is never split, so pairs are those of unpacked groups; 0 leaves each group alone.
    """
    passes: list[list[list[Example]]] = []
    rows = 0
    ordered = sorted(groups, key=lambda group: max(len(e.token_ids) for e in group)) if batch_tokens else groups
    for group in ordered:
        rows += len(group)
        if not passes or max(len(e.token_ids) for e in group) * rows > batch_tokens:
            passes.append([])
            rows = len(group)
        passes[-1].append(group)
    return passes


def steps_of_epoch(examples: list[Example], settings: TrainingSettings, epoch: int) -> list[list[Example]]:
    """The epoch's steps, each with the programs of `settings.problems` problems; epoch and seed decide the order."""
    problems = by_problem(examples)
    tasks = sorted(problems, key=task_order)
    order = np.random.default_rng([settings.seed, epoch]).permutation(len(tasks))
    return [
        [example for i in order[start : start + settings.problems] for example in problems[tasks[i]]]
        for start in range(0, len(tasks), settings.problems)
    ]


def by_problem(examples: list[Example]) -> dict[str, list[Example]]:
    problems: dict[str, list[Example]] = {}
    for example in examples:
        problems.setdefault(example.task_id, []).append(example)
    return problems


def loss_weights(
    groups: list[list[Example]], share: float, total: int, mixed: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights of the terms of `batch_loss`, on the CPU: (2, B) of passing and failing, and (B, B) of pairs.

    Rows of `groups` in order; pairs (passing, failing) are of one group. `share` of all training samples that pass;
    `total` weight of the step; `mixed` groups of the step that have pairs.
    """
    batch = [example for group in groups for example in group]
    y = np.array([example.passed for example in batch], dtype=np.float64)
    w = np.array([example.weight for example in batch], dtype=np.float64)
    entropy = np.stack([w * y * 0.5 / share, w * (1 - y) * 0.5 / (1 - share)]) / total
    pairs = np.zeros((len(batch), len(batch)))
    start = 0
    for group in groups:
        own = slice(start, start + len(group))
        start += len(group)
        both = np.outer(w[own] * y[own], w[own] * (1 - y[own]))
        if both.any():
            pairs[own, own] = both / both.sum() / mixed
    return torch.tensor(entropy, dtype=dtype), torch.tensor(pairs, dtype=dtype)


def batch_loss(logits: torch.Tensor, entropy: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """A forward pass's part of a step's loss: `loss.loss` with the weights of `loss_weights`; logits (B,)."""
    value = (functional.softplus(-logits) * entropy[0] + functional.softplus(logits) * entropy[1]).sum()
    return value + (functional.softplus(logits[None, :] - logits[:, None]) * pairs).sum()


def examples_of(
    tokenizer: PromptTokenizer, rows: list[tuple[str, str, bool]], keep: Callable[[str], bool] = lambda task: True
) -> list[Example]:
    """Training examples from (task_id, question, passed): equal questions once, with their number as weight."""
    counts = Counter(row for row in rows if keep(row[0]))
    return [Example(task, tokenizer.token_ids(text), passed, count) for (task, text, passed), count in counts.items()]


def mixed_problems(passed: Flags, groups: Groups) -> int:
    """How many problems have passing and failing samples."""
    return sum(0 < passed[groups == task].mean() < 1 for task in np.unique(groups))
