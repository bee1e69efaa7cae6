"""The critic's loss, pairs, calibration, combination and files. No language model."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fractal.critic import checkpoint, held_out
from fractal.critic.arrays import Flags, Floats, Groups
from fractal.critic.head import Head
from fractal.critic.held_out import auc, within_problem_auc
from fractal.critic.loss import loss, problem_pairs
from fractal.critic.prompt import question
from fractal.records import Problem
from fractal.selection import metrics

rows = st.lists(st.tuples(st.booleans(), st.integers(0, 3)), min_size=1, max_size=30)
ABOUT = checkpoint.CriticInfo(
    mode="probe", base="m", weights_sha256="w", tokenizer_sha256="t", depth=3, inputs={"labels_sha256": "x"}, temperature=1.7,
    combination=checkpoint.Combination(0.5, 2.0, -1.0),
)  # fmt: skip


@given(rows)
def test_pairs_are_a_passing_and_a_failing_sample_of_one_problem(data: list[tuple[bool, int]]) -> None:
    passed, groups = np.array([d[0] for d in data]), np.array([d[1] for d in data], dtype=np.int64)
    pairs = problem_pairs(passed, groups, most=1000)
    expected = {(i, j) for i, a in enumerate(data) for j, b in enumerate(data) if a[0] and not b[0] and a[1] == b[1]}
    assert {tuple(pair) for pair in pairs.tolist()} == expected


def test_no_problem_has_more_pairs_than_allowed() -> None:
    passed, groups = np.arange(40) < 20, np.zeros(40, dtype=np.int64)
    assert len(problem_pairs(passed, groups, most=64)) == 64


def test_the_loss_is_the_formula() -> None:
    logits, passed = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1.0, 0.0, 0.0])
    entropy = [
        0.5 / (1 / 3) * np.log1p(np.exp(-2)),
        0.5 / (2 / 3) * np.log1p(np.exp(-1)),
        0.5 / (2 / 3) * np.log1p(np.exp(0.5)),
    ]
    pairwise = np.mean([np.log1p(np.exp(-1 - 2)), np.log1p(np.exp(0.5 - 2))])
    found = loss(logits, passed, torch.tensor([[0, 1], [0, 2]]))
    assert float(found) == pytest.approx(np.mean(entropy) + pairwise, rel=1e-6)


@settings(deadline=None, max_examples=30)
@given(st.floats(0.2, 5.0))
def test_temperature_recovers_what_the_logits_were_multiplied_by(factor: float) -> None:
    rng = np.random.default_rng(6)
    true = rng.normal(size=20_000)
    passed = rng.random(20_000) < 1 / (1 + np.exp(-true))
    assert held_out.fit_temperature(true * factor, passed) == pytest.approx(factor, rel=0.1)


def test_temperature_never_changes_a_ranking() -> None:
    logits = np.random.default_rng(0).normal(size=50)
    assert (np.argsort(logits / 3.7) == np.argsort(logits)).all()


def two_signals(seed: int) -> tuple[Floats, Floats, Flags, Groups]:
    """Logits and log-probabilities that each tell a part: 40 problems of 8 samples."""
    rng = np.random.default_rng(seed)
    passed = rng.random(320) < 0.4
    return (
        passed * 1.0 + rng.normal(size=320),
        0.1 * (passed * 1.0 + rng.normal(size=320)) - 0.5,
        passed,
        np.repeat(np.arange(40), 8),
    )


def test_the_combination_ranks_better_than_each_of_its_parts() -> None:
    logits, means, passed, groups = two_signals(0)
    both = held_out.fit_combination(logits, means, passed, groups)
    assert both is not None
    assert both.critic > 0
    assert both.mean_logprob > 0
    new_logits, new_means, truth, of = two_signals(1)
    joined = [both.logit(a, b) for a, b in zip(new_logits, new_means, strict=True)]
    found = [within_problem_auc(np.array(x), truth, of) for x in (joined, new_logits, new_means)]
    assert found[0] > max(found[1:])  # type: ignore[operator,type-var]


def test_the_combination_leaves_out_samples_without_a_log_probability() -> None:
    logits, means, passed, groups = two_signals(2)
    some = means.copy()
    some[::2] = np.nan
    assert held_out.fit_combination(logits, some, passed, groups) == held_out.fit_combination(
        logits[1::2], means[1::2], passed[1::2], groups[1::2]
    )
    assert held_out.fit_combination(logits, np.full(320, np.nan), passed, groups) is None
    assert held_out.fit_combination(logits, means, np.ones(320, dtype=bool), groups) is None
    assert checkpoint.Combination(1.0, 1.0, 0.0).logit(0.3, None) is None


def test_the_problem_comes_before_the_program_and_hidden_tests_are_not_shown() -> None:
    problem = Problem(
        "7", "Add two numbers.", "", ["assert add(1, 2) == 3", "assert add(5, 5) == 10"], "", "add", "test"
    )
    text = question(problem, "def add(a, b):\n    return a + b")
    assert text.index("Add two numbers.") < text.index("assert add(1, 2) == 3") < text.index("return a + b")
    assert "add(5, 5)" not in text


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_the_auc_of_training_is_that_of_the_report(data: list[tuple[bool, int, int]]) -> None:
    passed, groups = np.array([d[0] for d in data]), np.array([d[1] for d in data], dtype=np.int64)
    logits = np.array([float(d[2]) for d in data])
    assert auc(logits, passed) == pytest.approx(metrics.auc(logits, passed), abs=1e-12)
    expected = metrics.within_problem_auc(logits, passed, groups.tolist()).auc
    assert within_problem_auc(logits, passed, groups) == pytest.approx(expected, abs=1e-12)


# --- files


def saved(folder: Path) -> Path:
    checkpoint.save(folder, Head(np.arange(4, dtype=np.float32), 0.5), ABOUT)
    return folder


def test_a_saved_critic_is_the_same_critic(tmp_path: Path) -> None:
    head, about = checkpoint.load(saved(tmp_path / "best"))
    assert np.array_equal(head.weight, np.arange(4))
    assert head.bias == 0.5
    assert replace(about, files={}) == ABOUT
    assert head.logits(np.ones((2, 4), dtype=np.float16)).tolist() == [6.5, 6.5]


def cut_short(folder: Path) -> None:
    file = folder / "head.safetensors"
    file.write_bytes(file.read_bytes()[:-3])


def other_version(folder: Path) -> None:
    file = folder / checkpoint.INFO_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | {"prompt_version": 99}))


BROKEN = {
    "head cut short": (cut_short, "head.safetensors: is missing, damaged or cut short"),
    "head missing": (lambda f: (f / "head.safetensors").unlink(), "head.safetensors: is missing, damaged or cut short"),
    "description missing": (lambda f: (f / checkpoint.INFO_FILE).unlink(), "holds no critic"),
    "description cut short": (lambda f: (f / checkpoint.INFO_FILE).write_text('{"mode": "pro'), "not a critic's"),
    "description of something else": (lambda f: (f / checkpoint.INFO_FILE).write_text('{"a": 1}'), "not a critic's"),
    "description is a list": (lambda f: (f / checkpoint.INFO_FILE).write_text("[]"), "not a critic's"),
    "another question": (other_version, "version 99 of the critic's question"),
}


def test_a_broken_critic_is_named_with_its_file_and_the_remedy(tmp_path: Path) -> None:
    for name, (damage, words) in BROKEN.items():
        folder = saved(tmp_path / name)
        damage(folder)
        with pytest.raises(checkpoint.BrokenCriticError, match="rain it again") as error:
            checkpoint.load(folder)
        assert words in str(error.value), name
        assert str(folder) in str(error.value), name


def test_a_file_that_is_forgotten_is_not_missed(tmp_path: Path) -> None:
    folder = tmp_path / "epoch-1"
    folder.mkdir()
    (folder / "optimiser.pt").write_bytes(b"state")
    saved(folder)
    checkpoint.remove_file(folder, "optimiser.pt")
    assert not (folder / "optimiser.pt").exists()
    checkpoint.load(folder)
