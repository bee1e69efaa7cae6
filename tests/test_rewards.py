"""Reward functions against a real sandbox, and against the trainers' own packages where these are installed."""

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fractal.errors import InputError
from fractal.problems.sets import STARTER
from fractal.rewards import scoring, trl, verifiers, verl
from fractal.rewards.rows import as_row, problem_from_row, reply_text
from fractal.sandbox.host.client import SandboxError
from fractal.sandbox.host.limits import Limits
from tests.conftest import ROOT

LIMITS = Limits(cpu_s=1.0, wall_s=60.0)
RIGHT = "Here:\n```python\ndef f(x):\n    return x * 2\n```"
HALF = "```python\ndef f(x):\n    return 2\n```"
WRONG = "```python\ndef f(x):\n    return None\n```"
CHEAT = "```python\nimport os\ndef f(x):\n    os._exit(0)\n```"
SLEEPS = "```python\nimport time\ndef f(x):\n    time.sleep(50)\n```"
TESTS = ["assert f(1) == 2", "assert f(2) == 4"]


@pytest.fixture(autouse=True, scope="module")
def _closed_afterwards(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    scoring._close_all()


@pytest.fixture
def settings(place: dict[str, Any]) -> dict[str, Any]:
    return {"limits": LIMITS, "socket": place.get("socket")}


# --- rows and replies: no sandbox ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "entry_point", "setup"),
    [
        ({"tests": TESTS}, "f", ""),
        (
            {"test_list": TESTS, "code": "def f(x):\n    return x\n", "test_imports": ["import math"]},
            "f",
            "import math",
        ),
        ({"test_list": TESTS, "test_setup_code": "y = 1"}, "f", "y = 1"),
        ({"tests": "def check(g):\n    assert g(1) == 2\ncheck(double)", "entry_point": "double"}, "double", ""),
        ({"tests": ["assert sorted(set(g([1]))) == [1]"]}, "g", ""),
        ({"tests": ["assert ("]}, "", ""),
    ],
)
def test_a_problem_of_columns(row: dict[str, Any], entry_point: str, setup: str) -> None:
    problem = problem_from_row(row, "3")
    assert (problem.entry_point, problem.setup) == (entry_point, setup)
    assert problem.tests == (
        [row["tests"]] if isinstance(row.get("tests"), str) else row.get("tests", row.get("test_list"))
    )


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"tests": []},
        {"tests": [1]},
        {"tests": {"a": 1}},
        {"tests": TESTS, "kind": "odd"},
        {"inputs": ["1"], "outputs": []},
        {"inputs": "1", "outputs": "2"},
        {"inputs": ["1"], "outputs": ["2"], "fn_name": "f"},
        {"tests": TESTS, "setup": 1},
        {"tests": TESTS, "entry_point": 1},
    ],
)
def test_columns_that_are_no_problem_are_refused_in_a_line(row: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="column"):
        problem_from_row(row, "0")


@pytest.mark.parametrize(
    ("completion", "text"),
    [
        ("a", "a"),
        ([{"role": "assistant", "content": "a"}], "a"),
        ([{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}], "a"),
        ([{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}], "ab"),
        ([{"role": "assistant", "content": None}], ""),
        ([], ""),
    ],
)
def test_the_text_of_a_reply(completion: object, text: str) -> None:
    assert reply_text(completion) == text


def test_humanevals_columns_call_their_check_and_a_body_is_no_reference() -> None:
    row = {
        "test": "def check(candidate):\n    assert candidate(1) == 2",
        "entry_point": "double",
        "canonical_solution": "    return x * 2\n",
    }
    problem = problem_from_row(row, "0")
    assert (problem.tests, problem.reference) == ([row["test"] + "\ncheck(double)\n"], "")


def test_columns_of_standard_input_and_of_our_own_kinds() -> None:
    for row in (
        {"inputs": ["1\n"], "outputs": ["2\n"]},
        {"input_output": json.dumps({"inputs": ["1\n"], "outputs": ["2\n"]})},
    ):
        problem = problem_from_row(row, "0")
        assert (problem.kind, problem.tests, problem.expected, problem.entry_point) == ("stdin", ["1\n"], ["2\n"], "")
    own = {"tests": ["[1]"], "expected": ["2"], "kind": "calls", "entry_point": "Solution().f", "atol": 0.1}
    problem = problem_from_row(own, "0")
    assert (problem.kind, problem.expected, problem.atol, problem.entry_point) == ("calls", ["2"], 0.1, "Solution().f")


def test_a_row_from_what_trainers_pass_as_ground_truth() -> None:
    row = {"tests": TESTS}
    assert [as_row(value, "x") for value in (row, json.dumps(row), TESTS, json.dumps(TESTS))] == [row] * 4
    assert as_row("assert f(1) == 2", "x") == {"tests": ["assert f(1) == 2"]}
    with pytest.raises(InputError, match="ground_truth"):
        as_row(3, "ground_truth")


# --- with a sandbox -----------------------------------------------------------------------------------------------------


@pytest.mark.sandbox
def test_trl_columns_texts_and_messages(settings: dict[str, Any]) -> None:
    reward = trl.make_reward(partial=0.5, **settings)
    replies = [RIGHT, HALF, WRONG, CHEAT]
    for completions in (replies, [[{"role": "assistant", "content": text}] for text in replies]):
        got = reward(
            prompts=["p"] * 4, completions=completions, completion_ids=[[1]] * 4, tests=[TESTS] * 4,
            setup=[None] * 4, trainer_state=object(), log_metric=print,
        )  # fmt: skip
        assert got == [1.0, 0.25, 0.0, 0.0]
    assert reward.__name__ == "code_reward"


@pytest.mark.sandbox
def test_trl_by_task_id_and_as_a_coroutine(settings: dict[str, Any]) -> None:
    problems = json.loads("[" + ",".join(STARTER.read_text().splitlines()) + "]")[:3]
    reward = trl.make_async_reward(problems=STARTER, **settings)
    assert asyncio.iscoroutinefunction(reward)
    replies = [f"```python\n{problem['reference']}\n```" for problem in problems]
    ids = [problem["task_id"] for problem in problems]
    assert asyncio.run(reward(completions=replies, task_id=ids)) == [1.0] * 3
    with pytest.raises(InputError, match="no problem of"):
        asyncio.run(reward(completions=["x"], task_id=["nothing"]))
    with pytest.raises(InputError, match="without a column task_id"):
        asyncio.run(reward(completions=["x"]))


@pytest.mark.sandbox
def test_a_batch_ends_at_its_deadline_and_what_is_undecided_has_no_reward(settings: dict[str, Any]) -> None:
    reward = trl.make_reward(deadline_s=2.0, **settings)
    sleepers = [SLEEPS + f"\n<!-- {n} -->" for n in range(8)]
    sleepers = [text.replace("50)", f"50 + {n})") for n, text in enumerate(sleepers)]
    assert reward(completions=[RIGHT, *sleepers], tests=[TESTS] * 9) == [1.0] + [None] * 8
    # Nothing of the first batch is in the way of the next.
    assert reward(completions=[HALF.replace("2", "7"), RIGHT + "\n"], tests=[TESTS] * 2) == [0.0, 1.0]


@pytest.mark.sandbox
def test_verl_scores_one_by_one_and_in_batches(settings: dict[str, Any]) -> None:
    one = verl.compute_score("mbpp", RIGHT, json.dumps({"tests": TESTS}), {"index": 0}, **settings)
    assert one == {"score": 1.0, "passed": 1.0, "undecided": 0.0, "status": "passed"}
    many = verl.compute_scores(["mbpp"] * 3, [RIGHT, CHEAT, SLEEPS], [TESTS] * 3, None, deadline_s=1.0, **settings)
    assert [(one["score"], one["undecided"], one["status"]) for one in many] == [
        (1.0, 0.0, "passed"), (0.0, 0.0, "crashed"), (0.0, 1.0, "sandbox_error"),
    ]  # fmt: skip
    problem = json.loads(STARTER.read_text().splitlines()[0])
    named = {"task_id": problem["task_id"], "num_turns": 1}
    by_id = verl.compute_score("mbpp", problem["reference"], "", named, problems=STARTER, **settings)
    assert by_id["score"] == 1.0


@pytest.mark.sandbox
def test_verifiers_functions(settings: dict[str, Any]) -> None:
    reward = verifiers.make_reward(**settings)
    message = [{"role": "assistant", "content": RIGHT}]
    assert asyncio.run(reward(completion=message, info={"tests": TESTS})) == 1.0
    assert asyncio.run(reward(completion=WRONG, answer=json.dumps(TESTS))) == 0.0
    late = verifiers.make_reward(deadline_s=0.5, **settings)
    with pytest.raises(SandboxError, match="not decided"):
        asyncio.run(late(completion=SLEEPS, info={"tests": TESTS}))


@pytest.mark.sandbox
def test_threads_share_one_sandbox(settings: dict[str, Any]) -> None:
    reward = trl.make_reward(**settings)
    got: dict[int, object] = {}

    def work(number: int) -> None:
        code = f"```python\ndef f(x):\n    return x * 2 + 0 * {number}\n```"
        got[number] = reward(completions=[code, WRONG], tests=[TESTS] * 2)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {number: [1.0, 0.0] for number in range(12)}
    assert len([place for place in scoring._verifiers if place[3] == LIMITS]) == 1


@pytest.mark.sandbox
def test_without_a_sandbox_there_is_an_error_and_no_reward(tmp_path: Path) -> None:
    for reward in (
        trl.make_reward(socket=tmp_path / "none.sock"),
        trl.make_reward(endpoints=("http://127.0.0.1:9",), deadline_s=3.0),
    ):
        with pytest.raises(SandboxError):
            reward(completions=[RIGHT], tests=[TESTS])


@pytest.mark.sandbox
def test_a_process_forked_from_one_with_a_sandbox_has_its_own_and_both_end(place: dict[str, Any]) -> None:
    """As verl's and torch's worker processes are made. The script ends by itself: nothing is left that holds it."""
    text = f"""
import os
from fractal.rewards.trl import code_reward
tests = [{TESTS!r}]
print(code_reward(completions=[{RIGHT!r}], tests=tests), flush=True)
child = os.fork()
if child == 0:
    print(code_reward(completions=[{HALF!r}], tests=tests), flush=True)
    raise SystemExit
os.waitpid(child, 0)
print(code_reward(completions=[{WRONG!r}], tests=tests), flush=True)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", text]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.stdout.splitlines() == ["[1.0]", "[0.0]", "[0.0]"], done.stderr


# --- the trainers' packages ---------------------------------------------------------------------------------------------


@pytest.mark.sandbox
def test_a_rubric_of_verifiers(settings: dict[str, Any]) -> None:
    package = pytest.importorskip("verifiers")
    if not hasattr(package, "Rubric"):
        with pytest.raises(Exception, match=r"0\.4"):
            verifiers.rubric()
        return
    rubric = verifiers.rubric(**settings)
    state = {"prompt": "", "completion": RIGHT, "answer": "", "info": {"tests": TESTS}, "input": {}}
    assert asyncio.run(rubric._call_individual_reward_func(rubric.funcs[0], state)) == 1.0


@pytest.mark.sandbox
def test_a_task_of_verifiers_from_0_4(settings: dict[str, Any]) -> None:
    vf = pytest.importorskip("verifiers.v1")
    from types import SimpleNamespace

    reward = verifiers.make_reward(**settings)

    class Data(vf.TaskData):  # type: ignore[misc, name-defined]
        tests: list[str]

    class CodeTask(vf.Task[Data]):  # type: ignore[misc, name-defined]
        @vf.reward  # type: ignore[untyped-decorator]
        async def passes(self, trace: Any) -> float:
            return await reward(trace.last_reply, info={"tests": self.data.tests})

    for text, value in ((RIGHT, 1.0), (WRONG, 0.0)):
        task = CodeTask(Data(prompt="p", tests=TESTS))
        assert asyncio.run(task.passes(SimpleNamespace(last_reply=text))) == value


@pytest.mark.sandbox
def test_trl_takes_the_functions_for_what_they_are() -> None:
    utils = pytest.importorskip("trl.trainer.utils")
    assert utils.get_callable_name(trl.code_reward) == "code_reward"
    assert utils.is_async_callable(trl.async_code_reward)
    assert not utils.is_async_callable(trl.code_reward)
