"""A few steps of GRPO with the sandbox as its reward: `python docs/grpo.py MODEL [STEPS]`; pip install trl.

Each completion is run against the tests of its problem. MODEL is a folder or a hub id, for example
HuggingFaceTB/SmolLM2-135M-Instruct.
"""

import json
import sys

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from fractal.problems.sets import STARTER
from fractal.rewards.trl import make_reward


def data_set() -> Dataset:
    """The starter problems as TRL wants them: a prompt, and a column that the reward function reads."""
    problems = [json.loads(line) for line in STARTER.read_text().splitlines()]
    ask = "{prompt} Answer with Python code only. It has to pass: {test}"
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": ask.format(prompt=p["prompt"], test=p["tests"][0])}],
                "task_id": p["task_id"],
            }
            for p in problems
        ]
    )


def main(model: str, steps: int) -> None:
    config = GRPOConfig(
        output_dir="runs/grpo",
        max_steps=steps,
        per_device_train_batch_size=8,
        num_generations=8,
        max_completion_length=96,
        temperature=0.6,
        learning_rate=1e-6,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        model_init_kwargs={"dtype": "float32"},
    )
    reward = make_reward(problems=str(STARTER), partial=0.1, deadline_s=30)
    GRPOTrainer(model=model, reward_funcs=reward, args=config, train_dataset=data_set()).train()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 3)
