"""The hard verifier as the reward of a reinforcement-learning loop: `python docs/reward.py`.

A trainer calls a reward function with a batch of completions and wants a float for each. This one is TRL's
(docs/rewards.md has those of verl and verifiers); docs/grpo.py trains with it.
"""

from fractal.problems.formats import read_problems
from fractal.problems.sets import STARTER
from fractal.rewards.trl import make_reward
from fractal.sandbox.host.limits import Limits


def main() -> None:
    problem = next(p for p in read_problems(STARTER) if p.entry_point)
    right = f"Here it is:\n```python\n{problem.reference}\n```"
    wrong = f"```python\ndef {problem.entry_point}(*args):\n    return None\n```"
    cheat = "```python\nimport os\nos._exit(0)\n```"
    reward = make_reward(problems=STARTER, partial=0.1, deadline_s=30, limits=Limits(cpu_s=2.0, wall_s=6.0))
    for step in range(3):
        print(f"step {step}:", reward([right, wrong, cheat], task_id=[problem.task_id] * 3))


if __name__ == "__main__":
    main()
