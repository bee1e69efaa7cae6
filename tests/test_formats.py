"""Problem files of other projects: each becomes what its tests are, and what cannot be read is refused by name."""

import base64
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fractal.errors import InputError, RecordError
from fractal.generate.prompts import question
from fractal.generate.sample_files import read_samples
from fractal.problems.formats import read_problems
from fractal.problems.livecodebench import unpickled_text
from fractal.problems.sets import load
from fractal.problems.solutions import IMPORTS
from fractal.problems.task_ids import TaskIds
from fractal.problems.values import decode_value, encode_value
from fractal.problems.visible import visible_test
from fractal.records import Problem
from tests.conftest import SHARED

# --- the published files ------------------------------------------------------------------------------------------------

REAL = [  # file, problems, kind, tests in all
    ("evalplus/HumanEval.jsonl.gz", 164, "asserts", 164),
    ("evalplus/HumanEvalPlus.jsonl.gz", 164, "calls", None),
    ("evalplus/MbppPlus.jsonl.gz", 378, "calls", None),
    ("evalplus/MbppPlus-v0.1.0.jsonl.gz", 399, "calls", None),
    ("stdin/code_contests.json.gz", 165, "stdin", None),
    ("stdin/leetcode.json.gz", 200, "asserts", 200),
]


@pytest.mark.parametrize(("name", "count", "kind", "tests"), REAL, ids=[row[0] for row in REAL])
def test_the_real_files_are_read(name: str, count: int, kind: str, tests: int | None) -> None:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"no {name} beside the checkout: the product does not contain it")
    problems = read_problems(path)
    assert len(problems) == count
    assert {problem.kind for problem in problems} == {kind}
    assert tests in (None, sum(len(problem.tests) for problem in problems))
    assert all(question(problem) for problem in problems)


def test_apps_has_both_kinds() -> None:
    path = SHARED / "stdin" / "apps.jsonl.gz"
    if not path.exists():
        pytest.skip("no apps.jsonl.gz beside the checkout: the product does not contain it")
    by_id = {problem.task_id: problem for problem in read_problems(path)}
    assert {task_id: problem.kind for task_id, problem in by_id.items()} == {
        "1": "stdin",
        "111": "stdin",
        "2404": "calls",
    }
    method = by_id["2404"]
    assert (method.entry_point, method.tests, method.expected) == (
        "Solution().findKthPositive",
        ["[[2,3,4,7,11],5]"],
        ["9"],
    )
    assert method.reference.startswith(IMPORTS)
    assert "Solution().findKthPositive([2, 3, 4, 7, 11], 5) == 9" in question(method)


def test_the_hubs_script_has_the_calls_of_the_release() -> None:
    """Two files of one set: the same arguments and tolerance; the script's expected values are its references'."""
    script, release = (SHARED / "evalplus" / name for name in ("MbppPlus-OriginFmt.jsonl.gz", "MbppPlus.jsonl.gz"))
    if not script.exists():
        pytest.skip("no MBPP+ beside the checkout: the product does not contain it")
    of_release = {problem.task_id.removeprefix("Mbpp/"): problem for problem in read_problems(release)}
    of_script = read_problems(script)
    assert len(of_script) == 378
    same = [p for p in of_script if p.tests == of_release[p.task_id].tests]
    assert len(same) > 300, "the others have a few more or fewer"
    assert [p.task_id for p in of_script if p.compare != of_release[p.task_id].compare] == []
    assert [p.task_id for p in of_script if not p.expected] == ["88", "255", "630"], "these have a function instead"


# --- one record of each schema ----------------------------------------------------------------------------------------

PLUS: dict[str, Any] = {
    "task_id": "Mbpp/2", "prompt": '"""\nShared.\nassert f((1,), (1,)) == (1,)\n"""\n', "entry_point": "similar_elements",
    "canonical_solution": "\ndef similar_elements(a, b):\n    return tuple(set(a) & set(b))\n",
    "base_input": [[[1, 2], [2]]], "plus_input": [[[], []], [[1], [1]]], "atol": 0, "contract": "", "assertion": "",
}  # fmt: skip
CASES = [{"input": "1\n", "output": "2\n", "testtype": "stdin"}]
LIVE: dict[str, Any] = {
    "question_id": "abc", "question_content": "Double.", "starter_code": "", "metadata": "{}",
    "public_test_cases": json.dumps(CASES),
    "private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(json.dumps(CASES * 2)))).decode(),
}  # fmt: skip
CONTEST: dict[str, Any] = {
    "name": "1_A. Double", "description": "Double.", "public_tests": {"input": ["1\n"], "output": ["2\n"]},
    "private_tests": {"input": ["2\n"], "output": ["4\n"]}, "generated_tests": {"input": [], "output": []},
    "solutions": {"language": [1, 3], "solution": ["print 2", "print(int(input()) * 2)"]},
    "time_limit": {"seconds": 1, "nanos": 500_000_000}, "input_file": "", "output_file": "",
}  # fmt: skip
TACO: dict[str, Any] = {
    "question": "Double.", "solutions": json.dumps(["print 2", "print(int(input()) * 2)"]), "starter_code": "",
    "input_output": json.dumps({"inputs": [["1"], "2\n"], "outputs": ["2", "4\n"]}), "time_limit": "2.0 seconds",
}  # fmt: skip
HUMAN: dict[str, Any] = {
    "task_id": "HumanEval/0", "prompt": "def f(x):\n    \"\"\"Double.\"\"\"\n", "entry_point": "f",
    "canonical_solution": "    return x * 2\n", "test": "def check(candidate):\n    assert candidate(1) == 2\n",
}  # fmt: skip
LEET: dict[str, Any] = {
    "problem": "Double.", "solutions": "class Solution:\n    def f(self, x: List[int]):\n        return x * 2\n",
    "tests": {"functional": "def check(candidate):\n    assert candidate([1]) == [1, 1]\n\n\ncheck(Solution().f)"},
}  # fmt: skip


def read(tmp_path: Path, *rows: Any) -> list[Problem]:
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_problems(path)


def test_each_schema_is_known_by_its_fields(tmp_path: Path) -> None:
    plus, live, contest, taco, human, leet = read(tmp_path, PLUS, LIVE, CONTEST, TACO, HUMAN, LEET)
    assert plus.tests == ['[{"t":[1,2]},{"t":[2]}]', '[{"t":[]},{"t":[]}]', '[{"t":[1]},{"t":[1]}]']
    assert (plus.kind, plus.base_tests, plus.compare, plus.expected) == ("calls", 1, "set(result) == set(expected)", [])
    assert (live.task_id, live.kind, live.tests, live.expected) == ("abc", "stdin", ["1\n"] * 3, ["2\n"] * 3)
    assert (contest.tests, contest.expected, contest.test_limit_s) == (["1\n", "2\n"], ["2\n", "4\n"], 1.5)
    assert contest.reference == "print(int(input()) * 2)\n", "the first that is Python 3"
    assert (taco.tests, taco.expected, taco.test_limit_s) == (["1", "2\n"], ["2", "4\n"], 2.0)
    assert (taco.task_id, taco.reference) == ("3", contest.reference)
    assert human.tests == ["def check(candidate):\n    assert candidate(1) == 2\n\ncheck(f)"]
    assert (human.prefix, human.reference) == (HUMAN["prompt"], HUMAN["prompt"] + HUMAN["canonical_solution"])
    assert (leet.entry_point, leet.prefix) == ("Solution", IMPORTS)
    assert [visible_test(p) for p in (plus, human, leet)] == ["", "", ""]
    assert visible_test(live) == "Input:\n1\nOutput:\n2"
    assert "standard input" in question(live)
    exec(compile(leet.reference, "leet", "exec"), {})  # List is there


def test_a_list_of_input_and_output_is_one_problem_or_a_problems_tests(tmp_path: Path) -> None:
    pairs = [{"input": "1\n", "output": "2\n"}, {"input": "2\n", "output": "4\n"}]
    (alone,) = read(tmp_path, *pairs)
    (named,) = read(tmp_path, {"id": "double", "problem": "Double.", "tests": pairs})
    assert (alone.task_id, named.task_id) == ("problems", "double")
    for problem in (alone, named):
        assert (problem.kind, problem.tests, problem.expected) == ("stdin", ["1\n", "2\n"], ["2\n", "4\n"])


def test_numbers_that_json_lacks_are_read_as_python_writes_them(tmp_path: Path) -> None:
    (problem,) = read(tmp_path, PLUS | {"task_id": "Mbpp/3", "base_input": [[float("nan"), float("inf"), 10**40]]})
    nan, infinity, large = decode_value(problem.tests[0])
    assert (nan != nan, infinity, large) == (True, float("inf"), 10**40)
    path = tmp_path / "array.json"
    path.write_text(json.dumps([PLUS | {"base_input": [[[float("nan")], []]]}]))
    assert decode_value(read_problems(path)[0].tests[0])[0][0] != 0


def test_live_code_bench_calls_a_method(tmp_path: Path) -> None:
    case = {"input": "[1, 2]\n3", "output": "[4, 5]", "testtype": "functional"}
    row = LIVE | {"starter_code": "class Solution:\n    def add(self, a, b):\n", "metadata": '{"func_name": "add"}'}
    (problem,) = read(tmp_path, row | {"public_test_cases": json.dumps([case]), "private_test_cases": "[]"})
    assert (problem.entry_point, problem.tests, problem.expected) == ("Solution().add", ["[[1,2],3]"], ["[4,5]"])


class Attack:
    ran = False

    def __reduce__(self) -> Any:
        return exec, (f"import {__name__} as m\nm.Attack.ran = True",)


@pytest.mark.parametrize(
    "pickled",
    [
        pickle.dumps(Attack()), pickle.dumps([Attack()]), pickle.dumps(b"bytes"), pickle.dumps(["[]"]),
        pickle.dumps("[]")[:-1], pickle.dumps(len), b"", b"cos\nsystem\n(S'true'\ntR.",
    ],
)  # fmt: skip
def test_a_pickle_of_anything_but_a_text_is_refused_and_not_loaded(tmp_path: Path, pickled: bytes) -> None:
    row = LIVE | {"private_test_cases": base64.b64encode(zlib.compress(pickled)).decode()}
    with pytest.raises(RecordError, match="LiveCodeBench, field private_test_cases: neither JSON text nor a pickled"):
        read(tmp_path, row)
    assert not Attack.ran


@given(st.text(), st.integers(0, 5))
def test_a_pickled_text_is_read_in_every_protocol(text: str, protocol: int) -> None:
    try:
        pickled = pickle.dumps(text, protocol)
    except UnicodeEncodeError:
        return
    assert unpickled_text(zlib.compress(pickled)) == text


# --- refused ----------------------------------------------------------------------------------------------------------

REFUSED = [
    (PLUS | {"base_input": [1]}, "field base_input: expected a list of lists"),
    (PLUS | {"base_input": [[1, 2]]}, "field base_input or plus_input: not the arguments of Mbpp/2"),
    (PLUS | {"atol": "1"}, "field atol"),
    (PLUS | {"base_input": [], "plus_input": []}, "field base_input: is empty"),
    (LIVE | {"public_test_cases": json.dumps([CASES[0] | {"testtype": "file"}])}, "LiveCodeBench, field testtype"),
    (LIVE | {"private_test_cases": "####"}, "field private_test_cases: neither"),
    (CONTEST | {"input_file": "input.txt"}, "CodeContests, field input_file"),
    (CONTEST | {"time_limit": {"seconds": -1}}, "field time_limit: expected seconds"),
    (CONTEST | {"public_tests": {"input": ["1"], "output": []}}, "as many outputs as inputs"),
    (TACO | {"input_output": "{"}, "field input_output: not JSON text"),
    (TACO | {"input_output": ""}, "field input_output: expected JSON text"),
    (TACO | {"time_limit": "soon"}, "field time_limit"),
    (HUMAN | {"test": "assert f(1) == 2"}, "HumanEval, field test"),
    (LEET | {"tests": {"functional": "assert True"}}, "LeetCode, field tests.functional"),
    ({"id": 1, "tests": [{"input": "1", "output": "2", "checker": "any"}]}, "checker: not known"),
    ({"id": 1, "tests": [{"input": "1", "output": "2", "type": "generator"}]}, "generator: not known"),
    ({"question": "?"}, "no known schema: it has question; expected those of a format in docs/formats.md"),
]


@pytest.mark.parametrize(("row", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_decides_a_verdict_is_read_or_refused_by_name(tmp_path: Path, row: Any, words: str) -> None:
    with pytest.raises(RecordError) as caught:
        read(tmp_path, row)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/problems.jsonl: line 1: ")
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("data", "words"),
    [("x".encode("utf-16"), "UTF-16"), (b"PK\x03\x04rest", "a zip archive"), (b"PAR1", "Parquet"), (b"BZh9", "bzip2")],
)
def test_other_kinds_of_files_are_refused_by_name(tmp_path: Path, data: bytes, words: str) -> None:
    (tmp_path / "p").write_bytes(data)
    with pytest.raises(RecordError, match=words):
        read_problems(tmp_path / "p")


# --- groups of tests --------------------------------------------------------------------------------------------------


def test_base_and_plus_tests_are_chosen(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(PLUS))
    count = {tests: len(load(str(path), tests=tests).problems[0].tests) for tests in ("all", "base", "plus")}
    assert count == {"all": 3, "base": 1, "plus": 2}
    assert len({load(str(path), tests=tests).digest for tests in count}) == 3
    with pytest.raises(InputError, match="--tests minus: expected all, base, plus"):
        load(str(path), tests="minus")
    with pytest.raises(InputError, match="has no plus tests"):
        load("starter", tests="plus")


# --- names and samples ------------------------------------------------------------------------------------------------


def test_names_are_found_as_people_write_them() -> None:
    numbers, human, mixed = TaskIds(["0", "11"]), TaskIds(["HumanEval/0", "HumanEval/11"]), TaskIds(["Mbpp/11", "A/11"])
    for name in ("11", "011", "Mbpp/11", "mbpp_11", "MBPP-11"):
        assert numbers.find(name) == "11", name
    for name in ("11", "HumanEval/11", "HumanEval_11", "humaneval/011"):
        assert human.find(name) == "HumanEval/11", name
    assert [human.find(name) for name in ("Mbpp/11", "12", "x", "", "-11", "1.0", "\u0661\u0661")] == [None] * 7
    assert mixed.find("mbpp_11") == "Mbpp/11"
    with pytest.raises(InputError, match=r"'11' may be problem Mbpp/11 or A/11. Write the whole name"):
        mixed.find("11")


def test_a_folder_of_programs_is_a_samples_file(tmp_path: Path) -> None:
    (human,) = read(tmp_path, HUMAN)
    problems = {p.task_id: p for p in (human, Problem("11", "", "", ["assert f(1)"], "", "f", "test"))}
    folder = tmp_path / "samples"
    for name in ("HumanEval_0/1.py", "HumanEval_0/0.py", "11.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"# {name}\n")
    found = [one.extracted() for one in read_samples(folder, problems)]
    assert [(s.task_id, s.sample_id, s.code) for s in found] == [
        ("11", 0, "# 11.py\n"), ("HumanEval/0", 0, "# HumanEval_0/0.py\n"), ("HumanEval/0", 1, "# HumanEval_0/1.py\n"),
    ]  # fmt: skip
    (folder / "12.py").write_text("")
    with pytest.raises(RecordError, match=r"12\.py: line 1: field task_id: problem '12' is not among"):
        list(read_samples(folder, problems))
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecordError, match="holds no programs"):
        list(read_samples(tmp_path / "empty", problems))


def test_a_completion_continues_the_prompt_and_a_solution_stands_alone(tmp_path: Path) -> None:
    (human, leet) = read(tmp_path, HUMAN, LEET)
    problems = {problem.task_id: problem for problem in (human, leet)}
    whole = "def f(x):\n    return 2 * x\n"
    rows = [
        ({"task_id": "HumanEval/0", "completion": "    return x + x\n"}, HUMAN["prompt"] + "    return x + x\n"),
        ({"task_id": "humaneval_0", "completion": whole}, HUMAN["prompt"] + whole),
        (
            {"task_id": "humaneval_0", "completion": whole + "n = int(input())"},
            HUMAN["prompt"] + whole + "n = int(input())",
        ),
        ({"task_id": "humaneval_0", "completion": f"Sure:\n```python\n{whole}```\n"}, whole),
        ({"task_id": "humaneval_0", "completion": f"Here it is:\n\n{whole}"}, whole),
        ({"task_id": "0", "solution": "    return x + x\n"}, "    return x + x\n"),
        ({"task_id": "1", "solution": LEET["solutions"]}, f"{IMPORTS}\n{LEET['solutions']}"),
    ]
    path = tmp_path / "s.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row, _ in rows))
    assert [one.extracted().code for one in read_samples(path, problems)] == [code for _, code in rows]


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=6))
def test_arguments_come_back(value: Any) -> None:
    assert decode_value(encode_value([value, (value,)])) == [value, (value,)]
