"""Reward functions of TRL's trainers (GRPO, RLOO).

    from fractal.rewards.trl import code_reward, make_reward

    GRPOTrainer(reward_funcs=code_reward, ...)                            # the tests are columns of the data set
    GRPOTrainer(reward_funcs=make_reward(problems="mbpp", partial=0.1), ...)    # it has a column task_id

A program that passes gets 1. One that was not decided in time gets None, which TRL leaves out of the group.
"""

from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from fractal.rewards.scoring import Scoring

Rewards = list[float | None]


def make_reward(**settings: Any) -> Callable[..., Rewards]:
    """A reward function with these settings (scoring.Scoring)."""
    scoring = Scoring(**settings)

    def code_reward(completions: Sequence[Any], **columns: Any) -> Rewards:
        """One reward for each completion: texts, or lists of messages."""
        return scoring.rewards(completions, _rows(len(completions), columns))

    return code_reward


def make_async_reward(**settings: Any) -> Callable[..., Coroutine[Any, Any, Rewards]]:
    """The same as a coroutine: TRL runs such functions at the same time as its others."""
    scoring = Scoring(**settings)

    async def code_reward(completions: Sequence[Any], **columns: Any) -> Rewards:
        return await scoring.rewards_async(completions, _rows(len(completions), columns))

    return code_reward


def _rows(count: int, columns: dict[str, Any]) -> list[dict[str, Any]]:
    """The data set's columns by row; what else a trainer passes (its state, functions) is no column."""
    lists = {
        name: values
        for name, values in columns.items()
        if isinstance(values, list) and len(values) == count and name not in ("prompts", "completion_ids")
    }
    return [{name: values[i] for name, values in lists.items() if values[i] is not None} for i in range(count)]


code_reward = make_reward()
async_code_reward = make_async_reward()
