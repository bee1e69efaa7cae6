"""The hard verifier against the real thing: a real container, hostile programs, and honest ones that look odd."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import docker
import pytest

from fractal.errors import InputError
from fractal.problems.formats import read_problems
from fractal.records import Label, Problem, Sample
from fractal.sandbox.host import engine, launch
from fractal.sandbox.host.conformance import run_conformance
from fractal.sandbox.host.container import Sandbox, SandboxError
from fractal.sandbox.host.limits import Limits
from tests.conftest import ROOT, SHARED, until

pytestmark = pytest.mark.sandbox
CORRECT = "def f(x):\n    return x * 2\n"
TESTS = ["assert f(1) == 2", "assert f(21) == 42", "assert f('ab') == 'abab'"]


def problem(tests: list[str] = TESTS, reference: str = CORRECT, setup: str = "", task_id: str = "1") -> Problem:
    return Problem(task_id, "double", reference, tests, setup, "f", "test")


def sample(code: str, sample_id: int = 0, task_id: str = "1") -> Sample:
    return Sample(task_id, sample_id, "", code, "stop", 0, None, None, "test")


def judge(sandbox: Sandbox, code: str, tests: list[str] = TESTS, setup: str = "", reference: str = CORRECT) -> Label:
    (label,) = sandbox.verify([sample(code)], {"1": problem(tests, reference, setup)})
    return label


def plain(code: str, tests: list[str], setup: str = "") -> bool:
    """Plain evaluation in a fresh interpreter: program, setup and tests in one namespace."""
    text = "import sys\nns = {}\nfor part in sys.argv[1:]:\n    exec(part, ns)\n"
    command = [sys.executable, "-I", "-S", "-c", text, code, setup, *tests]
    with tempfile.TemporaryDirectory() as folder:  # programs may write files
        done = subprocess.run(command, cwd=folder, capture_output=True, timeout=60, stdin=subprocess.DEVNULL)
    return done.returncode == 0


def test_every_protection_is_in_force_as_seen_from_inside(sandbox: Sandbox) -> None:
    assert {name: check["ok"] for name, check in sandbox.checks.items()} == dict.fromkeys(sandbox.checks, True)
    assert len(sandbox.checks) >= 10


def test_the_conformance_programs_get_their_status(sandbox: Sandbox) -> None:
    wrong = [(one.name, label) for one, label in run_conformance(sandbox) if label.status != one.status]
    assert wrong == []


WRONG = "def f(x):\n    return None\n"


def test_a_program_of_200_000_lines_passes(place: dict[str, Any]) -> None:
    """At the limits that a user has: compiling it takes about the second of CPU that the shared sandbox gives."""
    with Sandbox(**place) as one:
        label = judge(one, "x = 1\n" * 200_000 + CORRECT)
        assert label.status == "passed", label
        assert judge(one, CORRECT + "# after passed").status == "passed"


def test_all_tests_run_and_the_first_that_fails_decides(sandbox: Sandbox) -> None:
    label = judge(sandbox, "def f(x):\n    if x == 1:\n        return 0\n    if x == 2:\n        return 1 / 0\n    return 7\n", ["assert f(1) == 1", "assert f(2) == 1", "assert f(3) == 7"])  # fmt: skip
    assert (label.status, label.tests) == ("failed", ["failed", "error", "passed"])


def test_the_detail_keeps_type_message_and_what_was_printed(sandbox: Sandbox) -> None:
    label = judge(sandbox, "def f(x):\n    print('so far')\n    raise KeyError('nope')\n")
    assert "KeyError" in label.detail
    assert "nope" in label.detail
    assert "so far" in label.detail


def test_files_of_one_sample_are_gone_for_the_next(sandbox: Sandbox) -> None:
    write = "import os\ndef f(x):\n    not os.path.exists('a') and os.makedirs('a/b')\n    os.chmod('a', 0)\n    return x * 2\n"
    look = "import os\ndef f(x):\n    return x * 2 if os.listdir('.') == [] else None\n"
    codes = [write, look + "#1", write + "#2", look + "#3"] * 2
    labels = sandbox.verify([sample(code + "#" * i, i) for i, code in enumerate(codes)], {"1": problem()})
    assert [label.status for label in labels] == ["passed"] * 8


def test_labels_come_in_the_order_of_the_samples_one_each(sandbox: Sandbox) -> None:
    slow = "import time\ndef f(x):\n    time.sleep(0.3)\n    return x * 2\n"
    samples = [sample(slow if i % 7 == 0 else CORRECT + f"#{i}", i) for i in range(60)]
    labels = list(sandbox.verify(samples, {"1": problem()}))
    assert [label.sample_id for label in labels] == list(range(60))
    assert all(label.passed for label in labels)


def test_identical_programs_run_once(image: str) -> None:
    sleepy = "import time\ndef f(x):\n    time.sleep(0.5)\n    return x * 2\n"
    with Sandbox(image=image) as sandbox:
        start = time.monotonic()
        labels = list(sandbox.verify([sample(sleepy, i) for i in range(50)], {"1": problem()}))
    assert all(label.passed for label in labels)
    assert len({label.seconds for label in labels}) == 1
    assert time.monotonic() - start < 20  # not 75: a deadline for a hang, no measurement


def test_a_slow_reference_raises_the_limit(image: str) -> None:
    """A program that needs as long as its reference is not a timeout, however short the default."""
    busy = "import time\ndef f(x):\n    while time.process_time() < %s:\n        pass\n    return x * 2\n"
    with Sandbox(limits=Limits(cpu_s=0.3, wall_s=5), image=image) as sandbox:
        patient = problem(reference=busy % 0.6)
        hasty = problem(task_id="2")
        (first,) = sandbox.verify([sample(busy % 0.8)], {"1": patient})
        (second,) = sandbox.verify([sample(busy % 0.8, task_id="2")], {"2": hasty})
    assert (first.status, second.status) == ("passed", "timeout")


def test_a_program_may_be_given_more_memory_than_the_judge_has(image: str) -> None:
    large = "def f(x):\n    return x * (len(bytearray(1500 << 20)) >> 20) // 750\n"
    with Sandbox(limits=Limits(cpu_s=5, wall_s=20, memory_mib=2048), image=image) as sandbox:
        (label,) = sandbox.verify([sample(large)], {"1": problem(["assert f(1) == 2"])})
    assert label.status == "passed", label


def test_a_container_killed_in_the_middle_loses_nothing(image: str) -> None:
    slow = "import time\ndef f(x):\n    time.sleep(0.05)\n    return x * 2\n"
    samples = [sample(slow + f"#{i}", i) for i in range(60)]
    with Sandbox(image=image, cache=False) as sandbox:
        labels = []
        for label in sandbox.verify(samples, {"1": problem()}):
            labels.append(label)
            if len(labels) == 10:
                engine.request("POST", f"/containers/{sandbox._connection.container}/kill")
    assert [(label.sample_id, label.status) for label in labels] == [(i, "passed") for i in range(60)]


def test_no_container_is_left_when_the_client_is_killed(image: str, tmp_path: Path) -> None:
    script = tmp_path / "client.py"
    script.write_text(
        "import sys, time\nfrom fractal.sandbox.host.container import Sandbox\n"
        f"with Sandbox(image={image!r}) as s:\n    print(s._connection.container, flush=True)\n    time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    container = child.stdout.readline().strip()
    assert container
    child.kill()
    child.wait()
    child.stdout.close()
    client = docker.from_env()
    until(lambda: container not in {found["Id"] for found in client.api.containers(all=True)})
    client.close()


def test_nothing_is_left_after_many_samples(image: str) -> None:
    """No zombie, no process, no growing memory in the container."""
    codes = [
        CORRECT,
        "import ctypes\ndef f(x):\n    ctypes.string_at(0)\n",
        "import os\ndef f(x):\n    os._exit(0)\n",
        WRONG,
    ]
    with Sandbox(image=image) as sandbox:
        processes = f"/containers/{sandbox._connection.container}/top"
        samples = [sample(codes[i % 4] + f"#{i}", i) for i in range(400)]
        first = list(sandbox.verify(samples[:100], {"1": problem()}))
        before = engine.request("GET", processes)["Processes"]
        list(sandbox.verify(samples[100:], {"1": problem()}))
        after = engine.request("GET", processes)["Processes"]
    assert len(after) == len(before), after
    assert not [row for row in after if "defunct" in " ".join(row)]
    assert Counter(label.status for label in first) == {"passed": 25, "crashed": 50, "failed": 25}


def test_a_container_asked_for_ahead_is_taken_once_and_gone_at_the_end(image: str) -> None:
    with launch.ContainerAhead(image=image) as ahead:
        with Sandbox(image=image, ahead=ahead) as first, Sandbox(image=image, ahead=ahead) as second:
            used = [first._connection.container, second._connection.container]
            assert judge(first, CORRECT).passed
            assert judge(second, CORRECT).passed
        assert first.image_id == second.image_id != ""
    with launch.ContainerAhead(image=image) as unused:
        pass
    assert unused._started is not None
    assert used[0] != used[1]
    there = {container["Id"] for container in engine.request("GET", "/containers/json?all=1")}
    assert there.isdisjoint([*used, unused._started.container])
    with launch.ContainerAhead(image="fractal-sandbox:none"):
        pass  # whoever needs no container hears of no error
    with launch.ContainerAhead(image="none:1") as ahead, pytest.raises(SandboxError, match=r"fractal\.images\.build"):
        Sandbox(image="none:1", ahead=ahead).__enter__()


@pytest.mark.docker
def test_an_unknown_image_says_how_to_build_it() -> None:
    with pytest.raises(SandboxError, match=r"fractal\.images\.build"), Sandbox(image="fractal-sandbox:none"):
        pass


@pytest.mark.docker
@pytest.mark.parametrize("dropped", [{"NetworkMode": "bridge"}, {"ReadonlyRootfs": False}, {"CapAdd": ["SETUID", "SETGID", "KILL", "SYS_CHROOT"]}, {"SecurityOpt": ["seccomp=unconfined"]}])  # fmt: skip
def test_a_dropped_protection_is_found_out(
    image: str, dropped: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = launch.hardening
    monkeypatch.setattr(launch, "hardening", lambda *a: {**full(*a), **dropped})
    with pytest.raises(SandboxError, match="not safe"), Sandbox(image=image):
        pass


def test_a_named_protection_may_be_missing_and_that_is_noted(image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    full = launch.hardening
    monkeypatch.setattr(launch, "hardening", lambda *a: {**full(*a), "ReadonlyRootfs": False})
    with Sandbox(image=image, allow=["read_only_root", "writable"]) as sandbox:
        assert judge(sandbox, CORRECT).passed
        assert sandbox.checks["read_only_root"] == {**sandbox.checks["read_only_root"], "ok": False, "allowed": True}
    with pytest.raises(InputError, match="no such protection"), Sandbox(image=image, allow=["fire_wall"]):
        pass


@pytest.mark.long
@pytest.mark.parametrize(("file", "count"), [("mbpp.jsonl", 974), ("sanitized-mbpp.json", 427)])
def test_every_reference_of_mbpp_passes(image: str, file: str, count: int) -> None:
    path = SHARED / "mbpp" / file
    if not path.exists():
        pytest.skip(f"no {path.name} beside the checkout: the product does not contain MBPP")
    problems = {p.task_id: p for p in read_problems(path)}
    samples = [sample(p.reference, task_id=p.task_id) for p in problems.values()]
    with Sandbox(image=image) as sandbox:
        labels = list(sandbox.verify(samples, problems))
    assert [(v.task_id, v.status, v.detail) for v in labels if not v.passed] == []
    assert len(labels) == count


def test_every_starter_reference_passes(sandbox: Sandbox) -> None:
    from fractal.problems.sets import STARTER

    problems = {p.task_id: p for p in read_problems(STARTER)}
    labels = sandbox.verify([sample(p.reference, task_id=p.task_id) for p in problems.values()], problems)
    assert [(v.task_id, v.status, v.detail) for v in labels if not v.passed] == []


@pytest.mark.long
def test_real_samples_get_the_label_of_plain_evaluation(image: str) -> None:
    """1,889 real completions of Qwen2.5-Coder-0.5B against a fresh interpreter each."""
    import gzip
    from concurrent.futures import ThreadPoolExecutor

    from fractal.generate.extraction import extract_code

    path = SHARED / "generations" / "qwen2.5-coder-0.5b-mbpp.jsonl.gz"
    if not path.exists():
        pytest.skip("no real generations beside the checkout")
    problems = {p.task_id: p for p in read_problems(SHARED / "mbpp" / "sanitized-mbpp.json")}
    rows = [json.loads(line) for line in gzip.open(path)]
    samples = [
        sample(
            extract_code(r["completion"], problems[str(r["task_id"])].entry_point), r["sample_id"], str(r["task_id"])
        )
        for r in rows
    ]
    with Sandbox(image=image) as sandbox:
        labels = list(sandbox.verify(samples, problems))

    def expected(one: Sample) -> bool:
        found = problems[one.task_id]
        try:
            return plain(one.code, found.tests, found.setup)
        except (subprocess.TimeoutExpired, ValueError, OSError):
            return False

    with ThreadPoolExecutor(2) as pool:
        plainly = list(pool.map(expected, samples))
    both = zip(samples, labels, plainly, strict=True)
    differing = [(one.task_id, one.sample_id, v.status, v.detail[:80]) for one, v, fine in both if fine != v.passed]
    assert differing == []
    assert len(labels) >= 1000


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own process"])
def test_recursion_goes_exactly_as_deep_as_in_plain_evaluation(sandbox: Sandbox, own: bool) -> None:
    code = "def f(n):\n    return 0 if n == 0 else 1 + f(n - 1)\n" + ("class C: pass\n" if own else "")
    depths = range(990, 1003)
    problems = {str(n): problem([f"assert f({n}) == {n}"], task_id=str(n)) for n in depths}
    found = [label.passed for label in sandbox.verify([sample(code, task_id=str(n)) for n in depths], problems)]
    assert found == [plain(code, problems[str(n)].tests) for n in depths]
    assert len(set(found)) == 2


@pytest.mark.parametrize(
    "error", ["TimeoutError", "MemoryError", "ConnectionResetError", "BrokenPipeError", "EOFError"]
)
def test_an_error_that_we_know_ourselves_is_the_programs_when_it_raises_it(sandbox: Sandbox, error: str) -> None:
    label = judge(sandbox, f"def f(x):\n    raise {error}('mine')\n")
    assert label.status == ("memory" if error == "MemoryError" else "error"), label


def test_the_reward_example_runs(image: str) -> None:
    done = subprocess.run([sys.executable, ROOT / "docs/reward.py"], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == [f"step {n}: [1.0, 0.0, 0.0]" for n in range(3)], done.stderr


@pytest.mark.docker
def test_own_processes_only(sandbox: Sandbox) -> None:
    """The sandbox's container runs as one container, with no mount of the host's."""
    attributes = docker.from_env().api.inspect_container(sandbox._connection.container)
    assert attributes["Mounts"] == []
    assert attributes["HostConfig"]["Privileged"] is False
    assert os.getpid() > 0


def test_what_a_deadline_leaves_undecided_is_dropped_and_delays_nobody(place: dict[str, Any]) -> None:
    sleepers = [sample(f"import time\ndef f(x):\n    time.sleep(600)\n    return {n}\n", n) for n in range(30)]
    with Sandbox(limits=Limits(cpu_s=60.0, wall_s=100.0), slots=2, **place) as sandbox:
        labels = list(sandbox.verify([sample(CORRECT), *sleepers], {"1": problem()}, deadline_s=1.5))
        assert [label.status for label in labels] == ["passed"] + ["sandbox_error"] * 30
        assert labels[1].detail == "not decided within 1.5 s"
        # Without the cancellation both slots would sleep for minutes.
        labels = list(
            sandbox.verify([sample(f"{CORRECT}\n#{n}", n) for n in range(9)], {"1": problem()}, deadline_s=10)
        )
        assert [label.status for label in labels] == ["passed"] * 9
        late = list(
            sandbox.verify([sample(f"# {n}\n{CORRECT}n = {n}") for n in range(3)], {"1": problem()}, deadline_s=0)
        )
        assert {label.detail for label in late} == {"not decided within 0 s"}


def test_a_call_that_is_left_early_frees_the_sandbox(place: dict[str, Any]) -> None:
    sleepers = [sample(f"import time\ndef f(x):\n    time.sleep(600)\n    return {n}\n", n) for n in range(30)]
    with Sandbox(limits=Limits(cpu_s=60.0, wall_s=100.0), slots=2, **place) as sandbox:
        for label in sandbox.verify([sample(CORRECT), *sleepers], {"1": problem()}):
            assert label.passed
            break
        (label,) = sandbox.verify([sample(CORRECT + "n = 1")], {"1": problem()}, deadline_s=10)
        assert label.passed
