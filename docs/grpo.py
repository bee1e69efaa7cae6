"""A few steps of GRPO with the sandbox as its reward: `python docs/grpo.py MODEL [STEPS]`; pip install trl.

Each completion is run against the tests in its row. MODEL is a folder or a hub id, for example
HuggingFaceTB/SmolLM2-135M-Instruct: on a CPU a step takes a minute or two.
"""

import sys

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from fractal.rewards.trl import make_reward

TASKS = {
    "double(x), which returns x times 2": ["assert double(1) == 2", "assert double(-4) == -8"],
    "add(a, b), which returns the sum of a and b": ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"],
    "is_even(n), which tells whether n is even": ["assert is_even(4) == True", "assert is_even(7) == False"],
    "largest(numbers), which returns the largest number of a list": ["assert largest([3, 9, 2]) == 9"],
}


def main(model: str, steps: int) -> None:
    ask = "Write a Python function {task}. Answer with the code only."
    rows = [
        {"prompt": [{"role": "user", "content": ask.format(task=task)}], "tests": tests}
        for task, tests in TASKS.items()
    ]
    config = GRPOConfig(
        output_dir="runs/grpo",
        max_steps=steps,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=64,
        temperature=0.7,
        learning_rate=1e-6,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        model_init_kwargs={"dtype": "float32"},
    )
    reward = make_reward(partial=0.1, deadline_s=30)
    GRPOTrainer(model=model, reward_funcs=reward, args=config, train_dataset=Dataset.from_list(rows)).train()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 4)
