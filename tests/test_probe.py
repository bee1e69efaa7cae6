"""The linear head on frozen states: what it learns, what it must not see, and how splits flatter. No language model."""

import numpy as np
import pytest

from fractal.critic import probe
from fractal.critic.arrays import Flags, Floats, Groups, Half
from fractal.critic.head import Head
from fractal.selection import metrics


def made(problems: int, each: int, seed: int, signal: float) -> tuple[Half, Flags, Groups]:
    """States (N, 2, 6): layer 0 is noise, layer 1 holds `signal` times the label in its first place."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(problems), each)
    passed = rng.random(problems * each) < 0.4
    states = rng.normal(size=(problems * each, 2, 6)).astype(np.float32)
    states[:, 1, 0] += signal * passed
    return states.astype(np.float16), passed, groups


def named(seed: int) -> tuple[Half, Flags, Groups]:
    """States (240, 2, 64) that name the problem and nothing else; most problems are nearly all easy or all hard."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(30), 8)
    easy = rng.random(30) < 0.5
    passed = np.where(rng.random(240) < 0.9, easy[groups], ~easy[groups])
    name = rng.normal(size=(30, 64)).astype(np.float16)[groups]
    return np.repeat(name[:, None, :], 2, axis=1), passed, groups


def within(logits: Floats, passed: Flags, groups: Groups) -> float:
    found = metrics.within_problem_auc(logits, passed, groups.tolist()).auc
    assert found is not None
    return found


def test_cross_validation_finds_the_layer_that_tells() -> None:
    states, passed, groups = made(24, 6, 0, 3.0)
    chosen = probe.cross_validate(states, passed, groups, [7, 9])
    assert (chosen.index, chosen.layer) == (1, 9)
    assert chosen.within_auc is not None
    assert chosen.within_auc > 0.9
    assert chosen.within_auc == within(chosen.logits, passed, groups)


def test_no_problem_is_on_both_sides_of_a_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every head that cross-validation fits is watched: no problem that it is tested on was in its data."""
    states, passed, groups = made(12, 5, 1, 1.0)
    states[:, :, 5] = groups[:, None]  # a mark that survives: which problem a row belongs to
    seen: list[set[float]] = []
    tested: list[set[float]] = []
    original = probe.HeadFit.__init__

    def watch(self: probe.HeadFit, rows: Half, *rest: object) -> None:  # rows (N, D)
        seen.append(set(rows[:, 5].tolist()))
        original(self, rows, *rest)  # type: ignore[arg-type]

    def look(self: Head, rows: Half) -> Floats:
        tested.append(set(rows[:, 5].tolist()))
        return np.zeros(len(rows))

    monkeypatch.setattr(probe.HeadFit, "__init__", watch)
    monkeypatch.setattr(Head, "logits", look)
    probe.cross_validate(states, passed, groups, [3, 4])
    assert len(seen) == len(tested) == 2 * len(probe.RIDGES) * probe.FOLDS
    assert all(not a & b for a, b in zip(seen, tested, strict=True))
    assert all(a | b == set(range(12)) for a, b in zip(seen, tested, strict=True))


def test_features_that_only_name_the_problem_are_worth_nothing_on_new_problems() -> None:
    states, passed, groups = named(1)
    chosen = probe.cross_validate(states, passed, groups, [1, 2])
    assert chosen.pooled_auc is not None
    assert chosen.pooled_auc < 0.75


def test_the_leaky_split_flatters_exactly_such_features() -> None:
    """FACTS: looking up the majority label of the same problem gives 88.9 % where samples lie on both sides."""
    states, passed, groups = named(2)
    leaky, honest = probe.compare_splits(states[:, 0], passed, groups, 1e-3)
    assert (leaky["by"], honest["by"]) == ("sample", "problem")
    assert leaky["accuracy"] > 0.8
    assert leaky["lookup_accuracy"] > 0.8
    assert honest["accuracy"] < 0.7
    assert honest["lookup_accuracy"] < 0.7
    assert leaky["lookup_accuracy"] <= metrics.problem_mean_accuracy(passed, groups.tolist()) + 1e-9


def test_the_head_learns_what_can_be_learned_and_its_loss_falls() -> None:
    states, passed, groups = made(20, 6, 2, 2.5)
    fit = probe.HeadFit(states[:, 1], passed, groups, 1e-3)
    losses = [fit.epoch() for _ in range(3)]
    assert losses[-1] <= losses[0] + 1e-9
    new, truth, of = made(20, 6, 3, 2.5)
    assert within(fit.head().logits(new[:, 1]), truth, of) > 0.85


def test_a_start_is_kept_where_the_ridge_is_strong_and_left_where_it_misleads() -> None:
    """`start` points where layer 1 tells (or elsewhere): a strong ridge leaves its ranking as it is."""
    states, passed, groups = made(20, 6, 8, 2.5)
    good = np.eye(6, dtype=np.float32)[0]
    held = probe.HeadFit(states[:, 1], passed, groups, 1e4, good)
    held.epoch()
    alone = Head(good, 0.0).logits(states[:, 1])
    assert np.corrcoef(held.head().logits(states[:, 1]), alone)[0, 1] > 0.999
    bad = np.eye(6, dtype=np.float32)[3]
    free = probe.HeadFit(states[:, 1], passed, groups, 1e-3, bad)
    free.epoch()
    assert within(free.head().logits(states[:, 1]), passed, groups) > 0.85


def test_cross_validation_starts_from_the_zero_shot_critic_where_that_is_better() -> None:
    """Few problems and a good zero-shot critic: what is learned from so little cannot beat it."""
    rng = np.random.default_rng(9)
    groups = np.repeat(np.arange(10), 6)
    passed = rng.random(60) < 0.4
    states = rng.normal(size=(60, 2, 300)).astype(np.float32)
    direction = rng.normal(size=300).astype(np.float32)
    direction /= np.linalg.norm(direction)
    states[:, 1] += 3.0 * passed[:, None] * direction
    chosen = probe.cross_validate(states.astype(np.float16), passed, groups, [3, 4], direction)
    assert chosen.start
    assert chosen.layer == 4
    assert chosen.within_auc is not None
    assert chosen.within_auc > 0.9


def test_the_same_data_give_the_same_head() -> None:
    states, passed, groups = made(10, 4, 4, 1.0)
    heads = []
    for _ in range(2):
        fit = probe.HeadFit(states[:, 0], passed, groups, 1e-2)
        fit.epoch()
        heads.append(fit.head())
    assert np.array_equal(heads[0].weight, heads[1].weight)
    assert heads[0].bias == heads[1].bias


def test_the_head_takes_states_as_they_come() -> None:
    """Standardisation is folded into weight and bias: shifted and scaled states give the same logits."""
    states, passed, groups = made(20, 6, 5, 2.0)
    plain = probe.HeadFit(states[:, 1].astype(np.float32), passed, groups, 1e-2)
    moved = probe.HeadFit(states[:, 1].astype(np.float32) * 3 + 7, passed, groups, 1e-2)
    plain.epoch()
    moved.epoch()
    a = plain.head().logits(states[:, 1])
    b = moved.head().logits(states[:, 1].astype(np.float32) * 3 + 7)
    assert np.allclose(a, b, atol=0.02)


def test_logits_mean_the_share_that_passes() -> None:
    """Rare passes: the balanced loss would put them at one half; the prior correction undoes that."""
    rng = np.random.default_rng(5)
    states = rng.normal(size=(2000, 4)).astype(np.float32)
    passed = rng.random(2000) < 0.1
    fit = probe.HeadFit(states, passed, np.arange(2000), 1e-1)
    fit.epoch()
    assert np.mean(1 / (1 + np.exp(-fit.head().logits(states)))) == pytest.approx(0.1, abs=0.02)


def test_a_fold_with_one_class_only_is_no_error() -> None:
    states, passed, groups = made(3, 4, 6, 1.0)
    passed[:] = False
    passed[:2] = True  # only the first problem has passing ones: its fold has nothing to learn from
    chosen = probe.cross_validate(states, passed, groups, [1, 2])
    assert chosen.logits[groups == 0].tolist() == [0.0] * 4


def test_folds_are_those_of_scikit_learn() -> None:
    """Critics that were trained by its folds come out the same; the expected ones are scikit-learn 1.9.1's."""
    groups = np.array([3, 3, 3, 3, 1, 1, 7, 7, 7, 0, 0, 5, 5, 5, 5, 5, 2, 8])
    by_problem = [test.tolist() for _, test in probe._splits(probe.problem_folds(groups, 3))]
    assert by_problem == [[11, 12, 13, 14, 15, 17], [0, 1, 2, 3, 9, 10], [4, 5, 6, 7, 8, 16]]
    by_sample = [test.tolist() for _, test in probe._splits(probe.sample_folds(len(groups), 4))]
    assert by_sample == [[1, 6, 8, 10, 14], [2, 4, 9, 16, 17], [3, 7, 11, 13], [0, 5, 12, 15]]
