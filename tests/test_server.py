"""The server on a real port with a real sandbox: verdicts, SandboxFusion's shapes, limits, and a batch over several servers."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests

from fractal.__main__ import run_command
from fractal.errors import InputError
from fractal.records import Problem, Sample
from fractal.rewards import endpoints as endpoints_module
from fractal.rewards.endpoints import Endpoints
from fractal.sandbox.host.client import SandboxError
from fractal.server.run import Address, access_token, parse_address
from tests.conftest import ROOT

pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")

DOUBLE = Problem(
    "1", "double", "def f(x):\n    return x * 2\n", ["assert f(1) == 2", "assert f(2) == 4"], "", "f", "test"
)
RIGHT, HALF = "def f(x):\n    return x * 2\n", "def f(x):\n    return 2\n"
CHEAT = "import os\ndef f(x):\n    os._exit(0)\n"
TOKEN = "t" * 32


def free_port() -> int:
    with closing(socket.socket()) as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextmanager
def serving(sandbox: Any, **settings: Any) -> Iterator[str]:
    """The application in a thread of this process."""
    from fractal.server.app import make_app

    port = free_port()
    app = make_app(sandbox, {"1": DOUBLE}, problems_name="doubles", **settings)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def url(sandbox: Any) -> Iterator[str]:
    with serving(sandbox) as url:
        yield url


def post(url: str, path: str, body: object, **options: Any) -> requests.Response:
    return requests.post(url + path, json=body, timeout=60, **options)


def as_json(problem: Problem) -> dict[str, Any]:
    import dataclasses

    return dataclasses.asdict(problem)


# --- without a sandbox --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "address"),
    [("8080", Address("127.0.0.1", 8080)), ("0.0.0.0:80", Address("0.0.0.0", 80)), ("[::1]:81", Address("::1", 81))],
)
def test_an_address(text: str, address: Address) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize("text", ["", "x", "localhost", "0", "70000", "1.2.3.4:"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--http"):
        parse_address(text)


def test_without_a_token_only_loopback_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FRACTAL_TOKEN", raising=False)
    assert access_token(Address("127.0.0.1", 1), None) is None
    assert access_token(Address("::1", 1), None) is None
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.com"):
        with pytest.raises(InputError, match="token"):
            access_token(Address(host, 1), None)
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    assert access_token(Address("0.0.0.0", 1), file) == TOKEN
    file.write_text("short")
    with pytest.raises(InputError, match="5 characters"):
        access_token(Address("0.0.0.0", 1), file)
    with pytest.raises(InputError, match="cannot be read"):
        access_token(Address("0.0.0.0", 1), tmp_path / "none")


# --- verdicts -----------------------------------------------------------------------------------------------------------


@pytest.mark.sandbox
def test_a_batch_gets_its_labels_in_order(url: str) -> None:
    other = as_json(DOUBLE) | {"task_id": 7, "tests": ["assert f('a') == 'aa'"]}
    samples = [
        {"task_id": 1, "code": RIGHT},
        {"task_id": 7, "code": HALF},
        {"task_id": 1, "completion": f"Sure:\n```python\n{HALF}```", "sample_id": 9},
        {"task_id": 7, "code": CHEAT},
    ]
    answer = post(url, "/verify", {"samples": samples, "problems": [other]})
    assert answer.status_code == 200, answer.text
    labels = answer.json()["labels"]
    assert [(x["task_id"], x["sample_id"], x["status"], x["passed"]) for x in labels] == [
        ("1", 0, "passed", True), ("7", 1, "failed", False), ("1", 9, "failed", False), ("7", 3, "crashed", False),
    ]  # fmt: skip
    assert labels[2]["tests"] == ["passed", "failed"]


@pytest.mark.sandbox
@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"samples": [{"task_id": 2, "code": ""}]}, "no problem has task_id '2'"),
        ({"samples": [{"task_id": 1}]}, "either code or completion"),
        ({"samples": [{"task_id": 1, "code": "", "completion": ""}]}, "either code or completion"),
        ({"samples": [{"task_id": 1, "code": "", "timeout": 3}]}, "Extra inputs are not permitted"),
        ({"samples": [{"task_id": 1, "code": ""}], "deadline_s": 0}, "greater than 0"),
        ({"samples": [{"task_id": 1, "code": ""}] * 5000}, "at most 4096"),
        ({}, "Field required"),
    ],
)
def test_a_request_that_is_none_is_refused_by_name(url: str, body: object, words: str) -> None:
    answer = post(url, "/verify", body)
    assert (answer.status_code, words in answer.text) == (422, True), answer.text[:500]


@pytest.mark.sandbox
def test_what_is_not_decided_in_time_says_so(url: str) -> None:
    sleeps = "import time\ndef f(x):\n    time.sleep(2.5)\n"
    answer = post(url, "/verify", {"samples": [{"task_id": 1, "code": sleeps}], "deadline_s": 0.3})
    (label,) = answer.json()["labels"]
    assert (label["status"], label["detail"]) == ("sandbox_error", "not decided within 0.3 s")


@pytest.mark.sandbox
def test_submit_has_sandbox_fusions_shape_and_our_verdict(url: str) -> None:
    request = {"dataset": "doubles", "id": 1, "completion": f"```python\n{RIGHT}```", "config": {"run_timeout": 20}}
    answer = post(url, "/submit", request).json()
    assert (answer["accepted"], answer["id"], answer["extracted_code"]) == (True, 1, RIGHT)
    assert [test["passed"] for test in answer["tests"]] == [True, True]
    assert answer["tests"][0]["exec_info"]["status"] == "Success"
    assert answer["tests"][0]["exec_info"]["run_result"]["return_code"] is None
    wrong = post(url, "/submit", request | {"completion": CHEAT}).json()
    assert (wrong["accepted"], wrong["extra"]["status"]) == (False, "crashed")
    row = {"id": 5, "test": json.dumps(DOUBLE.tests), "labels": json.dumps({"test_setup_code": "y = 1"})}
    own = request | {"dataset": "mine", "config": {"language": "python", "provided_data": row}}
    assert post(url, "/submit", own).json()["accepted"] is True


@pytest.mark.sandbox
@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"dataset": "mbpp"}, 404, "this server has doubles"),
        ({"id": 4}, 404, "no problem of doubles"),
        ({"config": {"language": "cpp"}}, 422, "runs Python alone"),
        ({"config": {"custom_extract_logic": "submit_code_blocks([])"}}, 422, "would run in the server"),
        ({"config": {"provided_data": {"x": 1}}}, 422, "no tests"),
    ],
)
def test_submit_refuses_what_it_cannot_keep(url: str, change: dict[str, Any], status: int, words: str) -> None:
    answer = post(url, "/submit", {"dataset": "doubles", "id": 1, "completion": RIGHT} | change)
    assert (answer.status_code, words in answer.text) == (status, True), answer.text


@pytest.mark.sandbox
@pytest.mark.parametrize(
    ("code", "stdin", "expected"),
    [
        ("print(int(input()) * 2)", "21\n", ("Success", "Finished", 0, "42\n", "")),
        (
            "import sys\nprint('a')\nprint('b', file=sys.stderr)\nsys.exit(3)",
            None,
            ("Failed", "Finished", 3, "a\n", "b\n"),
        ),
        ("import os\nos._exit(0)", "", ("Success", "Finished", 0, "", "")),
        ("while True: pass", "", ("Failed", "TimeLimitExceeded", None, "", "")),
        ("import os\nos.kill(os.getpid(), 9)", "", ("Failed", "Finished", -9, "", "")),
    ],
)
def test_run_code_reports_output_and_exit_code(
    url: str, code: str, stdin: str | None, expected: tuple[object, ...]
) -> None:
    answer = post(url, "/run_code", {"code": code, "language": "python", "stdin": stdin, "run_timeout": 10}).json()
    run = answer["run_result"]
    assert (answer["status"], run["status"], run["return_code"], run["stdout"], run["stderr"]) == expected


@pytest.mark.sandbox
def test_run_code_shows_tracebacks_and_refuses_what_it_cannot_keep(url: str) -> None:
    raised = post(url, "/run_code", {"code": "print(1)\nraise ValueError('no')", "language": "python"}).json()[
        "run_result"
    ]
    assert (raised["return_code"], raised["stdout"], "ValueError: no" in raised["stderr"]) == (1, "1\n", True)
    broken = post(url, "/run_code", {"code": "def f(:", "language": "python"}).json()
    assert (broken["status"], broken["run_result"]["return_code"]) == ("Failed", 1)
    assert "SyntaxError" in broken["run_result"]["stderr"] or "invalid syntax" in broken["run_result"]["stderr"]
    for change in ({"language": "cpp"}, {"files": {"a": "eA=="}}, {"fetch_files": ["a"]}, {"args": ["-v"]}):
        assert post(url, "/run_code", {"code": "1", "language": "python"} | change).status_code == 422


# --- the gate -----------------------------------------------------------------------------------------------------------


@pytest.mark.sandbox
def test_a_wrong_token_another_host_and_a_large_body_are_refused(sandbox: Any, url: str) -> None:
    body = {"samples": [{"task_id": 1, "code": RIGHT}]}
    with serving(sandbox, token=TOKEN, max_bytes=2000) as guarded:
        for given in ({}, {"Authorization": f"Bearer {TOKEN}x"}, {"Authorization": TOKEN}):
            assert post(guarded, "/verify", body, headers=given).status_code == 401
        right = {"Authorization": f"Bearer {TOKEN}"}
        assert post(guarded, "/verify", body, headers=right).json()["labels"][0]["passed"]
        large = {"samples": [{"task_id": 1, "code": "#" * 3000}]}
        assert post(guarded, "/verify", large, headers=right).status_code == 413
        pieces = iter([json.dumps(large).encode()[:1500], json.dumps(large).encode()[1500:]])  # no stated length
        chunked = requests.post(
            guarded + "/verify", data=pieces, headers=right | {"Content-Type": "application/json"}, timeout=9
        )
        assert chunked.status_code == 413
        assert requests.get(guarded + "/openapi.json", timeout=9).json()["paths"].keys() >= {"/verify", "/submit"}
    assert post(url, "/verify", body, headers={"Host": "evil.example:80"}).status_code == 403
    assert post(url, "/verify", body, headers={"Host": "localhost"}).status_code == 200


@pytest.mark.sandbox
def test_more_requests_than_allowed_are_sent_away(sandbox: Any) -> None:
    sleeps = {"samples": [{"task_id": 1, "code": "import time\ndef f(x):\n    time.sleep(0.5)\n    return x * 2\n"}]}
    with serving(sandbox, max_requests=1) as url, ThreadPoolExecutor(4) as pool:
        statuses = list(pool.map(lambda _: post(url, "/verify", sleeps).status_code, range(4)))
    assert set(statuses) == {200, 429}


# --- several servers ----------------------------------------------------------------------------------------------------


class Broken(BaseHTTPRequestHandler):
    """A server that fails every request."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_error(500, "broken")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def broken() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Broken)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def batch(count: int) -> list[Sample]:
    codes = [RIGHT if n % 3 else HALF for n in range(count)]
    return [Sample("1", n, "", f"{code}n = {n}\n", "stop", 0, None, None, "x") for n, code in enumerate(codes)]


@pytest.mark.sandbox
def test_what_a_broken_server_and_one_that_is_not_there_had_goes_to_another(
    sandbox: Any, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoints_module, "PAUSE_S", 0.05)
    samples = batch(200)
    with serving(sandbox, token=TOKEN) as url, Endpoints([broken, url, "http://127.0.0.1:9"], token=TOKEN) as servers:
        labels = list(servers.verify(samples, {"1": DOUBLE}, deadline_s=30))
        assert list(servers.verify([], {"1": DOUBLE}, deadline_s=30)) == []
    assert [(label.sample_id, label.passed) for label in labels] == [(n, n % 3 > 0) for n in range(200)]


@pytest.mark.sandbox
def test_where_no_server_answers_there_is_an_error(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints_module, "PAUSE_S", 0.05)
    with Endpoints([broken, "http://127.0.0.1:9"]) as servers, pytest.raises(SandboxError, match="no server answers"):
        list(servers.verify(batch(5), {"1": DOUBLE}, deadline_s=30))


# --- the command --------------------------------------------------------------------------------------------------------


@pytest.mark.sandbox
def test_the_command_serves_until_it_is_stopped(place: dict[str, Any], tmp_path: Path) -> None:
    port = free_port()
    where = ["--socket", str(place["socket"])] if "socket" in place else ["--image", str(place["image"])]
    command = [sys.executable, "-m", "fractal", "serve", "--http", str(port), "--problems", "starter", *where]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FRACTAL_TOKEN": TOKEN}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert f"http://127.0.0.1:{port}/verify" in process.stdout.readline()
        deadline = time.monotonic() + 20
        while True:
            try:
                health = requests.get(f"http://127.0.0.1:{port}/health", timeout=5).json()
                break
            except requests.ConnectionError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        assert health["problems"] == "starter"
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=30)
    assert (process.returncode, output, errors) == (0, "", "")


@pytest.mark.parametrize("options", [["--problems", "starter"], ["--http", "nonsense"], ["--http", "0.0.0.0:8080"]])
def test_options_that_cannot_be_meant_are_refused_in_a_line(
    options: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FRACTAL_TOKEN", raising=False)
    assert run_command(["serve", *options]) == 2
    errors = capfd.readouterr().err
    assert ("--http" in errors, errors.count("\n")) == (True, 1), errors
