"""The critic's prompt: a problem, a program, and whether it passes. The generator's is in generate/prompts.py."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from fractal.generate.models import context_length
from fractal.problems.visible import visible_test
from fractal.records import Problem, Sample

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja")


def question(problem: Problem, code: str) -> str:
    """The user's message. It shows what the generator saw (the first test) and the program.

    The problem comes first: its tokens are the same for all samples, so that their states are computed once.
    """
    example = visible_test(problem)
    shown = f"It should pass this test and others that are not shown:\n{example}\n\n" if example else ""
    return (
        f"Task:\n{problem.prompt}\n\n{shown}"
        f"Program:\n```python\n{code.strip()}\n```\n\nDoes the program pass all tests? Answer Yes or No."
    )


@dataclass(frozen=True, slots=True)
class TokenizedPrompt:
    """One prompt to be read by a model. Prompts of the same `task_id` begin with the same tokens."""

    key: str  # unique among those that are read together
    task_id: str
    token_ids: list[int]


class PromptTokenizer:
    """Turns questions into token ids by the chat template of one model."""

    def __init__(self, model: Path) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self._limit = context_length(model)
        self.pad = int(
            next(i for i in (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id, 0) if i is not None)
        )

    def token_ids(self, text: str) -> list[int]:
        """Token ids of a question; one too long for the context loses its middle."""
        messages = [{"role": "user", "content": text}]
        prompt = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = list(self._tokenizer(prompt, add_special_tokens=False)["input_ids"])
        return ids if len(ids) <= self._limit else ids[: self._limit // 2] + ids[-(self._limit - self._limit // 2) :]

    def prompts(self, pairs: list[tuple[Problem, Sample]]) -> list[TokenizedPrompt]:
        """The prompt of each problem with its sample; the keys are the places in `pairs`."""
        return [
            TokenizedPrompt(str(i), problem.task_id, self.token_ids(question(problem, sample.code)))
            for i, (problem, sample) in enumerate(pairs)
        ]

    def answers(self) -> tuple[int, int]:
        """The tokens with which a reply of "Yes" and one of "No" begin."""
        yes, no = (self._tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in ("Yes", "No"))
        return int(yes), int(no)


def tokenizer_digest(model: Path) -> str:
    """sha256 of the files that turn text into tokens: with another tokenizer, a critic is another one."""
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        if (model / name).exists():
            digest.update(name.encode() + (model / name).read_bytes())
    return digest.hexdigest()
