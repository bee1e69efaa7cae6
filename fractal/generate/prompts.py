"""The generator's prompts: a problem rendered, tokenised and turned into requests. The critic's: critic/prompt.py.

A prompt shows the task and its first test, as the MBPP paper does (Austin et al. 2021, arXiv:2108.07732, section 3),
in the model's own chat template. The reply is opened with a code fence, so that a model writes code at once and
sampling can stop at the closing fence.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fractal.errors import InputError
from fractal.generate import models
from fractal.generate.engine import Request, Sampling
from fractal.jsonl import KeySet
from fractal.problems.visible import visible_test
from fractal.records import Problem

VERSION = 2  # goes into the run's configuration: other prompts, other samples
OPENING = "```python\n"  # the beginning of the assistant's reply
FENCE_END = "\n```"
# Where sampling stops: at the closing fence, or where a model begins to test its own program (EvalPlus stops there,
# too). Such tests are often wrong, and then raise: 125 of 560 samples of a 0.5B model (docs/log.md, 2026-11-24).
STOPS = [FENCE_END, "\nassert ", "\nprint(", "\nif __name__", "\n# Test", "\n# Example", "\n# Check"]


def question(problem: Problem) -> str:
    """The user's message. Only the first test is shown, where it can be; the label uses all of them.

    Naming the function doubled SmolLM2-135M's pass rate on the starter set (docs/log.md, 2026-11-24).
    """
    example = visible_test(problem)
    if problem.kind == "stdin":
        task = f"{problem.prompt}\nThe program must read standard input and write to standard output."
        return f"{task} Example:\n{example}" if example else task
    if problem.prefix == problem.prompt != "":
        return f"Complete this function:\n```python\n{problem.prompt.rstrip()}\n```"
    what = "class" if problem.entry_point == "Solution" else "function"
    task = f"{problem.prompt}\nThe {what} must be named `{problem.entry_point}`."
    return f"{task} Example of its use:\n{example}" if example else task


def render(problem: Problem, apply_chat_template: Callable[..., Any]) -> str:
    """The text that the model continues: chat template, question, and the opened fence."""
    messages = [{"role": "user", "content": question(problem)}]
    return str(apply_chat_template(messages, add_generation_prompt=True, tokenize=False)) + OPENING


class Stop(NamedTuple):
    """Where a stop text stands in a completion, in characters."""

    start: int
    end: int


def find_stop(text: str) -> Stop | None:
    """The first of STOPS in a completion."""
    return min((Stop(start, start + len(stop)) for stop in STOPS if (start := text.find(stop)) >= 0), default=None)


def sample_seed(run_seed: int, task_id: str, sample_id: int) -> int:
    """A 31-bit seed that depends on the run, the problem and the sample only, not on batch, order or resumption."""
    return int.from_bytes(hashlib.sha256(f"{run_seed}/{task_id}/{sample_id}".encode()).digest()[:4], "big") >> 1


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a folder, hub id or the embedded model. Raises InputError if it has no chat template."""
    from transformers import AutoTokenizer  # takes two seconds to import

    source = str(models.resolve(name).path) if name == models.EMBEDDED else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or ["?"])[0][:200]
        raise InputError(
            f"--tokenizer {name}: neither a folder with a tokenizer nor one on the hub: {reason}"
        ) from error
    if not tokenizer.chat_template:
        raise InputError(f"--tokenizer {name}: has no chat template. Take the instruct version of the model.")
    return tokenizer


class Prompt(NamedTuple):
    """What the samples of one problem continue."""

    task_id: str
    text: str
    token_ids: list[int]  # empty where the server has the tokenizer


@dataclass(frozen=True, slots=True)
class MissingRequests:
    """The requests for the samples 0..n-1 of each prompt that are not in `done`, problem by problem.

    Each is made when it is iterated, so memory does not grow with n; they may be iterated more than once.
    """

    prompts: list[Prompt]
    n: int
    seed: int  # the run's
    done: KeySet

    def __len__(self) -> int:
        return sum(self.done.count_missing(prompt.task_id, self.n) for prompt in self.prompts)

    def __iter__(self) -> Iterator[Request]:
        for task_id, text, token_ids in self.prompts:
            for sample_id in self.done.missing(task_id, self.n):
                yield Request(task_id, sample_id, token_ids, sample_seed(self.seed, task_id, sample_id), text)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt; 0 where there is none."""
        return max((len(prompt.token_ids) for prompt in self.prompts), default=0)


def build_requests(
    problems: Sequence[Problem],
    tokenizer: Any,
    context: int,
    sampling: Sampling,
    skipped: dict[str, str],
    done: KeySet | None = None,
) -> MissingRequests:
    """The requests for the samples of `problems` that are not in `done`, in the problems' order.

    Problems whose prompt and completion exceed `context` tokens get none; the reason is added to `skipped` by task id.
    With `tokenizer` None (a server has it) a request's text is the question itself.
    """
    done = done or KeySet()
    found = []
    for problem in problems:
        if problem.task_id in skipped or not done.count_missing(problem.task_id, sampling.n):
            continue
        if tokenizer is None:
            found.append(Prompt(problem.task_id, question(problem), []))
            continue
        text = render(problem, tokenizer.apply_chat_template)
        token_ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if len(token_ids) + sampling.max_tokens > context:
            skipped[problem.task_id] = f"{len(token_ids)} + {sampling.max_tokens} tokens, context {context}"
        else:
            found.append(Prompt(problem.task_id, text, token_ids))
    return MissingRequests(found, sampling.n, sampling.seed, done)
