"""The critic's head: its loss, its pairs, its cross-validation by problem, and what it must not see. No language model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fractal import critic, metrics

rows = st.lists(st.tuples(st.booleans(), st.integers(0, 3)), min_size=1, max_size=30)


@given(rows)
def test_pairs_are_a_passing_and_a_failing_sample_of_one_problem(data: list[tuple[bool, int]]) -> None:
    passed, groups = np.array([d[0] for d in data]), np.array([d[1] for d in data], dtype=np.int64)
    pairs = critic.problem_pairs(passed, groups, most=1000)
    expected = {(i, j) for i, a in enumerate(data) for j, b in enumerate(data) if a[0] and not b[0] and a[1] == b[1]}
    assert {tuple(pair) for pair in pairs.tolist()} == expected


def test_no_problem_has_more_pairs_than_allowed() -> None:
    passed, groups = np.arange(40) < 20, np.zeros(40, dtype=np.int64)
    assert len(critic.problem_pairs(passed, groups, most=64)) == 64


def test_the_loss_is_the_formula() -> None:
    logits, passed = torch.tensor([2.0, -1.0, 0.5]), torch.tensor([1.0, 0.0, 0.0])
    entropy = [
        0.5 / (1 / 3) * np.log1p(np.exp(-2)),
        0.5 / (2 / 3) * np.log1p(np.exp(-1)),
        0.5 / (2 / 3) * np.log1p(np.exp(0.5)),
    ]
    pairwise = np.mean([np.log1p(np.exp(-1 - 2)), np.log1p(np.exp(0.5 - 2))])
    found = critic.loss(logits, passed, torch.tensor([[0, 1], [0, 2]]))
    assert float(found) == pytest.approx(np.mean(entropy) + pairwise, rel=1e-6)


def made(problems: int, each: int, seed: int, signal: float) -> tuple[critic.Array, critic.Flags, NDArray[np.int64]]:
    """States (N, 2, 6): layer 0 is noise, layer 1 holds `signal` times the label in its first place."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(problems), each)
    passed = rng.random(problems * each) < 0.4
    states = rng.normal(size=(problems * each, 2, 6)).astype(np.float32)
    states[:, 1, 0] += signal * passed
    return states, passed, groups


def test_cross_validation_finds_the_layer_that_tells() -> None:
    states, passed, groups = made(24, 6, 0, 3.0)
    choice = critic.cross_validate(states, passed, groups, [7, 9])
    assert choice.layer == 1
    assert choice.within_auc is not None
    assert choice.within_auc > 0.9


def test_no_problem_leaks_from_train_to_held_out() -> None:
    """Features that name the problem and nothing else: held out by problem, they are worth nothing.

    With samples of one problem on both sides of a split the same features would look good (FACTS: 88.9 %).
    """
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(30), 8)
    easy = rng.random(30) < 0.5
    passed = np.where(rng.random(240) < 0.9, easy[groups], ~easy[groups])
    name = rng.normal(size=(30, 64)).astype(np.float32)[groups]
    states = np.repeat(name[:, None, :], 2, axis=1)
    choice = critic.cross_validate(states, passed, groups, [1, 2])
    assert choice.pooled_auc is not None
    assert choice.pooled_auc < 0.75
    leaky = critic.HeadFit(states[::2], passed[::2], groups[::2], 0, 1e-3)  # the other half has the same problems
    leaky.epoch()
    found = metrics.auc(leaky.head().logits(states[1::2]), passed[1::2])
    assert found is not None
    assert found > 0.85


def test_the_head_learns_what_can_be_learned_and_its_loss_falls() -> None:
    states, passed, groups = made(20, 6, 2, 2.5)
    fit = critic.HeadFit(states, passed, groups, 1, 1e-3)
    losses = [fit.epoch() for _ in range(3)]
    assert losses[-1] <= losses[0] + 1e-9
    new, truth, of = made(20, 6, 3, 2.5)
    found = metrics.within_problem_auc(fit.head().logits(new), truth, of.tolist()).auc
    assert found is not None
    assert found > 0.85


def test_the_same_data_give_the_same_head() -> None:
    states, passed, groups = made(10, 4, 4, 1.0)
    heads = []
    for _ in range(2):
        fit = critic.HeadFit(states, passed, groups, 0, 1e-2)
        fit.epoch()
        heads.append(fit.head())
    assert np.array_equal(heads[0].weight, heads[1].weight)


def test_probabilities_mean_the_share_that_passes() -> None:
    """Rare passes: the balanced loss would put them at one half; the prior correction undoes that."""
    rng = np.random.default_rng(5)
    states = rng.normal(size=(2000, 1, 4)).astype(np.float32)
    passed = rng.random(2000) < 0.1
    fit = critic.HeadFit(states, passed, np.arange(2000), 0, 1e-1)
    fit.epoch()
    assert np.mean(1 / (1 + np.exp(-fit.head().logits(states)))) == pytest.approx(0.1, abs=0.02)


@settings(deadline=None, max_examples=30)
@given(st.floats(0.2, 5.0))
def test_temperature_recovers_what_the_logits_were_multiplied_by(factor: float) -> None:
    rng = np.random.default_rng(6)
    true = rng.normal(size=20_000)
    passed = rng.random(20_000) < 1 / (1 + np.exp(-true))
    assert critic.temperature_of(true * factor, passed) == pytest.approx(factor, rel=0.1)


def test_a_saved_head_is_the_same_head(tmp_path: Path) -> None:
    states, passed, groups = made(8, 4, 7, 1.0)
    fit = critic.HeadFit(states, passed, groups, 1, 1e-2)
    fit.epoch()
    fit.head(1.7).save(tmp_path / "best", {"inputs": {}})
    back = critic.Head.load(tmp_path / "best")
    assert np.allclose(back.logits(states), fit.head().logits(states))
    assert (back.layer, back.temperature) == (1, 1.7)


def test_batches_keep_order_and_bound() -> None:
    asked = {str(n): [0] * n for n in (10, 20, 3000, 3000, 5000)}
    batches = critic._batches(list(asked), asked)
    assert [key for batch in batches for key in batch] == list(asked)
    assert all(len(batch) == 1 or len(asked[batch[-1]]) * len(batch) <= critic.BATCH_TOKENS for batch in batches)
