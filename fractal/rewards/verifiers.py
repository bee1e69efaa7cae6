"""A reward of Prime Intellect's verifiers.

Up to 0.3 (`rubric`), the columns are the row's `info`, or its `answer`:

    environment = vf.SingleTurnEnv(dataset=dataset, rubric=rubric(partial=0.1))

From 0.4 on, in a task's reward method:

    class CodeTask(vf.Task):
        @vf.reward
        async def passes(self, trace):
            return await code_reward(trace.last_reply, info={"tests": self.data.tests})

What was not decided in time, or for which there is no sandbox, raises SandboxError. (A Rubric logs that and counts 0.)
"""

from collections.abc import Callable, Coroutine
from typing import Any

from fractal.errors import OutsideError
from fractal.rewards.rows import as_row
from fractal.rewards.scoring import Scoring
from fractal.sandbox.host.client import SandboxError


def make_reward(**settings: Any) -> Callable[..., Coroutine[Any, Any, float]]:
    """A reward function with these settings (scoring.Scoring)."""
    scoring = Scoring(**settings)

    async def code_reward(completion: Any, info: Any = None, answer: Any = None) -> float:
        row = as_row(info or answer, "info")
        (reward,) = await scoring.rewards_async([completion], [row])
        if reward is None:
            raise SandboxError(f"the program was not decided within {scoring.deadline_s:g} s.")
        return reward

    return code_reward


def rubric(**settings: Any) -> Any:
    """A Rubric whose only function is this reward."""
    try:
        from verifiers import Rubric
    except ImportError as error:
        raise OutsideError(
            "verifiers has no Rubric here: it is not installed, or 0.4 or later, where a task's reward method calls "
            "fractal.rewards.verifiers.code_reward (docs/rewards.md)."
        ) from error
    return Rubric(funcs=[make_reward(**settings)])


code_reward = make_reward()
