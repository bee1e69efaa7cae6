"""The hard verifier as the reward of a reinforcement-learning loop: `python docs/reward.py`.

A trainer (TRL's GRPOTrainer, say) calls a reward function with a batch of completions and wants a float for each.
One sandbox serves all batches, from any number of threads; a program that comes again costs nothing.
"""

from collections.abc import Sequence

from fractal.generate.extraction import extract_code
from fractal.problems.formats import read_problems
from fractal.problems.sets import STARTER
from fractal.records import Problem, Sample
from fractal.sandbox.host.container import Sandbox
from fractal.sandbox.host.limits import Limits


class Reward:
    """1 for a completion that passes all tests, else the share of tests passed, times `partial`."""

    def __init__(self, sandbox: Sandbox, partial: float = 0.1) -> None:
        self._sandbox = sandbox
        self._partial = partial

    def __call__(self, completions: Sequence[str], problems: Sequence[Problem]) -> list[float | None]:
        """One reward for each completion; None where the sandbox could not judge (leave it out of the batch)."""
        by_id = {problem.task_id: problem for problem in problems}
        samples = [
            Sample(problem.task_id, i, text, extract_code(text, problem.entry_point), "stop", 0, None, None, "policy")
            for i, (text, problem) in enumerate(zip(completions, problems, strict=True))
        ]
        rewards: list[float | None] = []
        for label in self._sandbox.verify(samples, by_id):  # in the order of the samples
            share = sum(status == "passed" for status in label.tests) / len(label.tests)
            lost = label.status == "sandbox_error"
            rewards.append(None if lost else 1.0 if label.passed else self._partial * share)
        return rewards


def main() -> None:
    problem = next(p for p in read_problems(STARTER) if p.entry_point)
    right = f"Here it is:\n```python\n{problem.reference}\n```"
    wrong = f"```python\ndef {problem.entry_point}(*args):\n    return None\n```"
    cheat = "```python\nimport os\nos._exit(0)\n```"
    with Sandbox(limits=Limits(cpu_s=2.0, wall_s=6.0)) as sandbox:
        reward = Reward(sandbox)
        for step in range(3):
            print(f"step {step}:", reward([right, wrong, cheat], [problem] * 3))


if __name__ == "__main__":
    main()
