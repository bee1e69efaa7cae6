"""The records that join the stages: Problem, Sample, Label, Score, Output, Choice.

One frozen dataclass each, one JSON object a line in a run folder's files (jsonl.py reads and writes them).
"""

import hashlib
import re
from dataclasses import dataclass, field
from typing import Literal, get_args

Split = Literal["train", "validation", "test", "prompt"]
Status = Literal[
    "passed",  # every test held
    "failed",  # a test's assertion was false
    "error",  # the program, or a test calling it, raised
    "syntax_error",  # does not compile
    "missing",  # the entry point is not defined
    "timeout",  # CPU or wall limit
    "memory",  # memory limit
    "crashed",  # died by a signal, or left with os._exit or sys.exit
    "forbidden",  # stopped by the sandbox
    "sandbox_error",  # our fault: never a label to learn from
]
TestStatus = Literal["passed", "failed", "error", "missing", "timeout", "memory", "crashed", "forbidden", "not_run"]
SPLITS: tuple[str, ...] = get_args(Split)
STATUSES: tuple[str, ...] = get_args(Status)
TestKind = Literal[
    "asserts",  # Python statements that the judge runs: asserts, a check script, a unittest class
    "calls",  # arguments of the entry point, and the value expected
    "stdin",  # what a script reads from standard input, and what it is to print
]


@dataclass(frozen=True, slots=True)
class Problem:
    """One programming problem with the tests that decide."""

    task_id: str  # unique in its problem set: "11", "Mbpp/2"; a file may have it as an integer
    prompt: str  # what the program has to do, in words
    reference: str  # a program that passes; "" where the set has none
    # The first one is shown in the prompt. asserts: Python statements. calls: each call's arguments, as a list in the
    # tagged JSON of sandbox/inside/protocol.py, where {"t": [1, 2]} is a tuple. stdin: the input texts.
    tests: list[str]
    setup: str  # runs after the program and before the tests, in one namespace with both; often empty
    entry_point: str  # what the tests call: a name, or "Solution().name"; "" for stdin
    split: Split
    kind: TestKind = "asserts"
    expected: list[str] = field(default_factory=list)  # one for each test: tagged JSON, or text; empty: as reference
    base_tests: int | None = None  # the first so many are the base tests, the others plus tests; None: no such groups
    # calls: a Python expression of `args`, `result` and `expected`, run by the judge: whether a result is right;
    # "": they are equal, or floats that differ by `atol` at most (and 1e-7 of the expected), as EvalPlus compares.
    compare: str = ""
    atol: float = (
        0.0  # calls: of floats, 1e-6 where it is 0 and floats are expected; stdin: of numbers, absolute or relative
    )
    test_limit_s: float | None = None  # CPU seconds for each test, where the problem has them
    prefix: str = ""  # code that a `completion` continues: HumanEval's prompt


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion that a model drew for a Problem."""

    task_id: str
    sample_id: int  # 0..n-1 within the problem
    completion: str  # the assistant's whole reply, with the fence that it was given and that ended it
    code: str  # the program found in it
    finish_reason: str  # "stop", or "length" when cut at max_tokens
    tokens: int  # sampled tokens
    sum_logprob: float | None  # natural log, at temperature 1, over the sampled tokens; None if the source gave none
    seed: int | None
    model: str
    temperature: float | None = None  # this and the rest: None if the source did not say
    top_p: float | None = None
    max_tokens: int | None = None
    prompt_sha256: str | None = None  # of the text that the model continued

    @property
    def mean_logprob(self) -> float | None:
        """Log-probability of a token; None if the source gave none, or for an empty completion."""
        return None if self.sum_logprob is None or self.tokens < 1 else self.sum_logprob / self.tokens


@dataclass(frozen=True, slots=True)
class Label:
    """The hard verifier's verdict on one Sample, run against its Problem's tests."""

    task_id: str
    sample_id: int
    status: Status
    passed: bool  # status == "passed"
    tests: list[TestStatus]  # one for each of the problem's tests
    seconds: float  # wall time in the sandbox, start-up excluded
    cpu_seconds: float  # of the candidate's process
    detail: str  # type and message of what went wrong, cut
    code_sha256: str


@dataclass(frozen=True, slots=True)
class Score:
    """The critic's score of one Sample."""

    task_id: str
    sample_id: int
    score: float  # logit of "passes"
    probability: float  # calibrated, 0..1
    zero_shot: float | None = None  # logit of Yes minus logit of No, before any training
    combined: float | None = None  # critic and mean log-probability, weights fitted on train problems


@dataclass(frozen=True, slots=True)
class Output:
    """What one Sample's program returns on the inputs of the test that its prompt shows; no expected value is used."""

    task_id: str
    sample_id: int
    output: str | None  # equal texts are equal outputs; None if there is none: it raised, timed out, does not compile


@dataclass(frozen=True, slots=True)
class Choice:
    """What one selection strategy picked for one Problem."""

    task_id: str
    strategy: str
    sample_id: int | None  # None where the strategy is an expectation over all samples
    passed: float  # 1 or 0; a share between them for an expectation


def task_order(task_id: str) -> tuple[str, str]:
    """The key of the natural order of problems: numbers in their names count as numbers.

    >>> sorted(["Mbpp/10", "Mbpp/2", "11", "2"], key=task_order)
    ['2', '11', 'Mbpp/2', 'Mbpp/10']
    """
    return re.sub(r"[0-9]+", _with_its_length, task_id), task_id


def _with_its_length(number: re.Match[str]) -> str:
    """Digits that sort as their number does, of any length: the count of digits stands before them."""
    digits = number[0].lstrip("0")
    return f"{len(digits):09}{digits}"


def digest_id(task_id: str) -> str | int:
    """A task_id as it enters digests: a number as an integer, as it did when every task_id was one."""
    return int(task_id) if task_id.isdecimal() else task_id


def code_sha256(code: str) -> str:
    """By which a Label names the program that it is of."""
    return hashlib.sha256(code.encode("utf-8", "surrogatepass")).hexdigest()
