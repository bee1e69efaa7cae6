"""The result in sentences that claim no more than the intervals do."""

from fractal.report.number_text import percent, points, span
from fractal.report.strategies import Duel, StrategyResult
from fractal.report.summary import Summary
from fractal.selection.bootstrap import Interval
from fractal.selection.strategies import BASELINE


def headline(summary: Summary) -> str:
    """The result in one sentence."""
    results = {result.strategy: result for result in summary.strategies}
    critic = results.get("critic")
    if BASELINE not in results:
        return f"No strategy measured: {summary.reasons.get('strategies', 'there are no choices')}."
    if critic is None:
        return "No critic yet: nothing chooses better than chance here."
    # Whatever a critic does on problems that it was trained on is no result.
    subject = "On train problems, which it has seen, the critic" if summary.split == "train" else "The critic"
    against_random = _comparison(critic.gain_over_random)
    duel = _duel(summary, "mean_logprob")
    if duel is None:
        return f"{subject} {against_random} random choice."
    against_logprob = _comparison(duel.gain)
    if against_random == against_logprob:
        joint = "or" if against_random.endswith("from") else "and"
        return f"{subject} {against_random} random choice {joint} mean log-probability."
    return f"{subject} {against_random} random choice and {against_logprob} mean log-probability."


def findings(summary: Summary) -> list[str]:
    """The numbers behind the headline, one sentence each."""
    results = {result.strategy: result for result in summary.strategies}
    critic, random, oracle = (results.get(name) for name in ("critic", BASELINE, "oracle"))
    if random is None:
        return []
    ceiling = f", the oracle {percent(oracle.pass_rate.mean)}" if oracle else ""
    if critic is None:
        share = f"{percent(random.pass_rate.mean)} {span(random.pass_rate)}"
        return [f"A random sample passes on {share} of {_problems(random, summary)}{ceiling}."]
    # Random on the critic's own problems, which may be fewer.
    baseline = critic.pass_rate.mean - critic.gain_over_random.mean
    sentences = [
        f"It picks a passing program for {percent(critic.pass_rate.mean)} {span(critic.pass_rate)} of "
        f"{_problems(critic, summary)}; random {percent(baseline)}{ceiling}.",
        f"Gain over random: {_gain(critic.gain_over_random)}",
    ]
    if duel := _duel(summary, "mean_logprob"):
        sentences.append(f"Gain over mean log-probability: {_gain(duel.gain)}")
    if gap := summary.gap_closed:
        sentences.append(f"It goes {percent(gap.mean, 0)} {span(gap)} of the way from random to the oracle.")
    return sentences


def _comparison(gain: Interval) -> str:
    if gain.low > 0 and gain.low != gain.high:
        return "beats"
    if gain.high < 0 and gain.low != gain.high:
        return "loses to"
    return "cannot be told apart from"


def _gain(gain: Interval) -> str:
    text = f"{points(gain.mean)} points {span(gain, signed=True)}"
    if gain.low == gain.high:
        return f"{text}: no interval, so nothing is shown."
    if gain.low > 0:
        return f"{text}."
    return f"{text}: worse." if gain.high < 0 else f"{text}: the interval includes zero."


def _duel(summary: Summary, strategy: str) -> Duel | None:
    return next((duel for duel in summary.duels if duel.strategy == strategy), None)


def _problems(result: StrategyResult, summary: Summary) -> str:
    return f"{result.problems} {summary.split} problem{'' if result.problems == 1 else 's'}"
