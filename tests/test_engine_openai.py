"""The engine for served models against a real HTTP server of ours: strict about what it is sent, with faults on order."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fractal.__main__ import app
from fractal.errors import InputError, OutsideError
from fractal.generate import prompts
from fractal.generate.engine import Completion, Request, Sampling, Server
from fractal.generate.openai import OpenAiEngine, parse_answer
from fractal.generate.prompts import sample_seed
from fractal.jsonl import read_jsonl
from fractal.records import Sample
from tests.conftest import ROOT

COMMON = {"model": str, "temperature": float, "top_p": float, "max_tokens": int, "seed": int}
FIELDS: dict[str, dict[str, type]] = {
    "/v1/completions": {**COMMON, "prompt": str, "stop": list, "logprobs": int},
    "/v1/chat/completions": {**COMMON, "messages": list, "logprobs": bool},
}


class FakeServer(ThreadingHTTPServer):
    """Knows one model, "m". `script`: what the next requests get, a function each; then good answers."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[Callable[[Handler], None]] = []
        self.lock = threading.Lock()
        self.asked: list[dict[str, Any]] = []  # bodies that were answered well
        self.times: list[float] = []
        self.faults: list[str] = []  # of what was sent
        self.now = self.most = 0
        self.pause_s = 0.0
        self.key: str | None = None
        self.logprobs = True

    def handle_error(self, *_: Any) -> None: ...  # clients that hang up

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeServer

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        if self.allowed():
            self.reply(200, {"object": "list", "data": [{"id": "m", "object": "model", "created": 1, "owned_by": "x"}]})

    def allowed(self) -> bool:
        if self.has_key():
            return True
        self.reply(401, {"error": {"message": "Incorrect API key", "type": "invalid_request_error"}})
        return False

    def has_key(self) -> bool:
        return not self.server.key or self.headers["Authorization"] == f"Bearer {self.server.key}"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.now += 1
            server.most = max(server.most, server.now)
            server.times.append(time.monotonic())
            fault = server.script.pop(0) if server.script else None
        fields = FIELDS.get(self.path)
        if fields is None or body.keys() != fields.keys():
            server.faults.append(f"{self.path}: {sorted(body)}")
        elif wrong := [k for k, t in fields.items() if type(body[k]) is not t]:
            server.faults.append(f"{self.path}: types of {wrong}")
        elif len(body.get("stop", [])) > 4:  # as OpenAI's API, and vLLM's server, have it
            server.faults.append(f"{self.path}: {len(body['stop'])} stops")
        good = fault is None and body["model"] == "m" and self.has_key()
        if good:
            time.sleep(server.pause_s)
        with server.lock:  # before the answer: after it the client may look, or send its next
            server.now -= 1
            if good:
                server.asked.append(body)
        if good:
            self.reply(200, answer(self.path, body, server.logprobs))
        elif self.allowed():
            if fault:
                fault(self)
            else:
                self.reply(404, {"error": {"message": f"The model {body['model']} does not exist"}})

    def reply(self, code: int, body: Any, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)


def answer(path: str, body: dict[str, Any], logprobs: bool) -> dict[str, Any]:
    code, tokens = f"def f():\n    return {body['seed']}", [-0.5, -1.0, -0.25]
    usage = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
    if path.endswith("chat/completions"):
        found = {"content": [{"token": "t", "logprob": v} for v in tokens]} if logprobs else None
        text = f"Sure:\n```python\n{code}\n```\nDone."
        choice = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": text},
            "logprobs": found,
        }
    else:
        found = {"token_logprobs": tokens, "tokens": ["t"] * 3} if logprobs else None
        choice = {"index": 0, "finish_reason": "stop", "text": code, "logprobs": found}
    return {"id": "x", "object": "o", "created": 1, "model": "m", "choices": [choice], "usage": usage}


def drop(handler: Handler) -> None:
    handler.close_connection = True
    handler.connection.close()


def half(handler: Handler) -> None:
    """Promises more than it sends."""
    handler.send_response(200)
    handler.send_header("Content-Length", "500")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.wfile.flush()
    handler.close_connection = True


def status(code: int, **headers: str) -> Callable[[Handler], None]:
    return lambda handler: handler.reply(code, {"error": {"message": "try later"}}, **headers)


def garbled(data: bytes) -> Callable[[Handler], None]:
    return lambda handler: handler.reply(200, data)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    one = FakeServer()
    thread = threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield one
    one.shutdown()
    one.server_close()
    assert one.faults == []


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def engine(server: FakeServer, *, tokenizer: str | None = "t", concurrency: int = 4, model: str = "m", retries: int = 3) -> OpenAiEngine:  # fmt: skip
    return OpenAiEngine(model, Sampling(n=4), Server(server.url, tokenizer, concurrency), retries)


def requests(count: int) -> list[Request]:
    return [Request("11", i, [1], sample_seed(0, 11, i), "the prompt") for i in range(count)]


def drawn(one: OpenAiEngine, count: int) -> dict[int, Completion]:
    found = {c.request.sample_id: c for done in one.generate(requests(count)) for c in done}
    assert sorted(found) == list(range(count)), "each once"
    return found


def test_every_sample_has_its_own_seed_and_no_more_are_in_flight_than_allowed(server: FakeServer) -> None:
    server.pause_s = 0.02
    found = drawn(engine(server, concurrency=5), 40)
    assert all(c.text == f"def f():\n    return {c.request.seed}" for c in found.values())
    assert {(c.tokens, c.sum_logprob, c.stopped) for c in found.values()} == {(3, -1.75, True)}
    assert {b["seed"] for b in server.asked} == {r.seed for r in requests(40)}
    assert all(b["prompt"] == "the prompt" and b["stop"] == prompts.STOPS[:4] for b in server.asked)
    assert 2 <= server.most <= 5


def test_without_a_tokenizer_the_chat_form_is_used(server: FakeServer) -> None:
    found = drawn(engine(server, tokenizer=None), 3)
    assert all("```python\ndef f" in c.text and c.sum_logprob == -1.75 for c in found.values())
    assert all(b["messages"] == [{"role": "user", "content": "the prompt"}] for b in server.asked)


@pytest.mark.parametrize(
    "fault",
    [status(500), status(503), status(408), drop, half, garbled(b"<html>busy</html>"), garbled(b'{"choices": []}')],
    ids=["500", "503", "408", "dropped", "half", "html", "empty"],
)
def test_a_passing_fault_costs_a_second_try_and_nothing_else(
    server: FakeServer, fault: Callable[[Handler], None]
) -> None:
    server.script = [fault, fault]
    drawn(engine(server), 6)
    assert len(server.asked) == 6
    assert len(server.times) == 8


def test_retry_after_is_heard(server: FakeServer) -> None:
    server.script = [status(429, Retry_After="2")]
    drawn(engine(server, concurrency=1), 1)
    assert server.times[1] - server.times[0] >= 2.0


def test_a_server_that_never_recovers_ends_it_in_one_line(server: FakeServer) -> None:
    server.script = [status(503)] * 50
    with pytest.raises(OutsideError, match=r"keeps refusing \(503: .*try later") as caught:
        drawn(engine(server, retries=1), 4)
    assert "\n" not in str(caught.value)
    server.script = [garbled(b"[]")] * 50
    with pytest.raises(OutsideError, match="answers that are no completions"):
        drawn(engine(server), 4)


def test_what_was_finished_before_the_fault_is_handed_out(server: FakeServer) -> None:
    one, found = engine(server, concurrency=1), []
    server.pause_s = 0.05
    with pytest.raises(InputError, match="refuses the request"):
        for done in one.generate(requests(9)):
            found.extend(done)
            server.script = [status(400)] if len(found) == 3 else []
    assert len(found) in (3, 4)


def test_a_wrong_key_stops_at_once(server: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.key = "right"
    with pytest.raises(OutsideError, match=r"refuses the key \(401\). Set OPENAI_API_KEY"):
        engine(server).check()
    with pytest.raises(OutsideError, match="refuses the key"):
        drawn(engine(server, concurrency=1), 9)
    assert len(server.times) <= 2
    monkeypatch.setenv("OPENAI_API_KEY", "right")
    engine(server).check()
    drawn(engine(server), 2)


def test_an_unknown_model_is_named_with_those_there_are(server: FakeServer) -> None:
    with pytest.raises(InputError, match=r"--model other: http.* serves m\."):
        engine(server, model="other").check()
    with pytest.raises(InputError, match=r"--model other: .* does not know it"):
        drawn(engine(server, model="other"), 2)


def test_no_server_is_one_line(server: FakeServer) -> None:
    one = OpenAiEngine("m", Sampling(), Server("http://127.0.0.1:9/v1"), retries=0)
    with pytest.raises(OutsideError, match=r"does not answer.*Is it running") as caught:
        one.check()
    assert "\n" not in str(caught.value)


def test_missing_log_probabilities_are_none(server: FakeServer) -> None:
    server.logprobs = False
    for tokenizer in ("t", None):
        assert {c.sum_logprob for c in drawn(engine(server, tokenizer=tokenizer), 2).values()} == {None}


ODD_CHOICES: list[tuple[dict[str, Any], str, bool]] = [
    ({"text": "x\n```\nmore", "finish_reason": "length"}, "x", True),
    ({"text": "x", "finish_reason": "length"}, "x", False),
    ({"message": {"content": None}, "finish_reason": "stop"}, "", True),
    ({"text": "x", "logprobs": {"token_logprobs": [None, -1.0]}}, "x", False),
]


def test_odd_answers() -> None:
    for choice, text, stopped in ODD_CHOICES:
        data = json.dumps({"choices": [choice], "usage": {"completion_tokens": 2}}).encode()
        found = parse_answer(requests(1)[0], data, cut=True)
        assert (found.text, found.stopped, found.sum_logprob) == (text, stopped, None), choice


def test_tokens_and_log_probability_are_of_the_text_that_is_kept() -> None:
    """A stop that the server does not know cuts text that was drawn; what follows the stop is not counted."""
    tokens = ["def f(): 0", "\n# Ch", "eck the", " program", "\n"]
    logprobs = {"tokens": tokens, "token_logprobs": [-1.0, -0.5, -0.25, -9.0, -9.0]}

    def parsed(logprobs: object, text: str = "".join(tokens), cut: bool = True) -> tuple[object, ...]:
        choice = {"text": text, "finish_reason": "length", "logprobs": logprobs}
        data = json.dumps({"choices": [choice], "usage": {"completion_tokens": 5}}).encode()
        found = parse_answer(requests(1)[0], data, cut=cut)
        return found.text, found.stopped, found.tokens, found.sum_logprob

    assert parsed(logprobs) == ("def f(): 0", True, 3, -1.75)
    assert parsed(logprobs, cut=False) == ("".join(tokens), False, 5, -19.75)
    assert parsed({**logprobs, "tokens": ["?"] * 5}) == ("def f(): 0", True, 5, None)
    assert parsed(None) == ("def f(): 0", True, 5, None)


def test_stopped_it_asks_for_nothing_more_and_hands_out_what_is_there(server: FakeServer) -> None:
    server.pause_s = 0.05
    one = engine(server, concurrency=2)
    found: list[Completion] = []
    for done in one.generate(requests(50), should_stop=lambda: len(found) >= 4):
        found.extend(done)
    assert 4 <= len(found) <= 8
    assert len(server.times) <= len(found) + 2


def generate(run: Path, server: FakeServer, *more: str) -> Result:
    words = ["generate", "--run", str(run), "--problems", "starter", "--limit", "2", "--n", "3", "--backend", "openai"]
    return CliRunner().invoke(app, [*words, "--base-url", server.url, *more])


def test_the_command_draws_and_goes_on(server: FakeServer, tmp_path: Path) -> None:
    server.script = [status(500)]
    done = generate(tmp_path / "r", server, "--model", "m")
    assert done.exit_code == 0, done.output
    samples = read_jsonl(tmp_path / "r/samples.jsonl", Sample)
    assert len(samples) == 18
    for sample in samples:
        assert sample.code == f"def f():\n    return {sample.seed}\n"
        assert (sample.model, sample.temperature, sample.top_p, sample.max_tokens) == ("m", 0.8, 1.0, 320)
        assert sample.prompt_sha256 is not None
        assert sample.seed == sample_seed(0, sample.task_id, sample.sample_id)
    assert len({sample.prompt_sha256 for sample in samples}) == 6
    count = len(server.asked)
    again = generate(tmp_path / "r", server)  # model and form are the run's own
    assert again.exit_code == 0, again.output
    assert len(server.asked) == count


def test_no_torch_is_imported() -> None:
    code = "import sys, fractal.generate.openai; print(sorted({'torch', 'vllm', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout.strip() == "[]"


BAD_INPUT: list[tuple[list[str], type[Exception], str]] = [
    ([], InputError, "give --model"),
    (["--model", "other"], InputError, "serves m."),
    (["--model", "m", "--concurrency", "0"], InputError, "--concurrency 0"),
    (["--model", "m", "--base-url", "localhost"], InputError, "--base-url localhost: expected an address"),
    (["--model", "m", "--base-url", "http://127.0.0.1:9/v1"], OutsideError, "does not answer"),
    (["--model", "m", "--tokenizer", "/nowhere"], InputError, "--tokenizer /nowhere"),
    (["--model", "m", "--backend", "auto", "--tokenizer", "x"], InputError, "--tokenizer goes with --backend openai"),
]


def test_bad_input_is_one_line(server: FakeServer, tmp_path: Path) -> None:
    wrong = []
    for more, kind, words in BAD_INPUT:
        error = generate(tmp_path / "r", server, *more).exception
        if not isinstance(error, kind) or words not in str(error) or "\n" in str(error):
            wrong.append((more, error))
    assert wrong == []


@pytest.fixture(scope="module")
def vllm_server(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """vLLM's own server with the small model as "m"; skipped where it does not start."""
    pytest.importorskip("vllm")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("vllm") / "log"
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(small_model), "--served-model-name", "m"]  # fmt: skip
    words += [
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--dtype",
        "float32",
        "--max-model-len",
        "512",
        "--enforce-eager",
    ]
    words += ["--no-enable-chunked-prefill", "--max-num-batched-tokens", "4096", "--max-num-seqs", "8"]
    environ = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "TORCHDYNAMO_DISABLE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("wb") as out:
        child = subprocess.Popen(words, stdout=out, stderr=out, env=environ, start_new_session=True)
    try:
        deadline = time.monotonic() + 500
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5).close()
                break
            except OSError:
                if child.poll() is not None or time.monotonic() > deadline:
                    pytest.skip(f"vLLM's server does not start here: {log.read_text(errors='replace')[-400:]}")
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(child.pid, signal.SIGKILL)  # its engine is a process of its own
        child.wait()


@pytest.mark.model
@pytest.mark.long
@pytest.mark.timeout(1200)
def test_vllms_own_server_draws_what_it_is_asked(vllm_server: str, small_model: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "fractal", "generate", "--problems", "starter", "--split", "test", "--limit", "2"]
    words += ["--n", "2", "--max-tokens", "40", "--backend", "openai", "--base-url", vllm_server, "--model", "m"]
    for name, more in (
        ("a", ["--tokenizer", str(small_model)]),
        ("b", ["--tokenizer", str(small_model)]),
        ("chat", []),
    ):
        run = ["--run", str(tmp_path / name)]
        done = subprocess.run([*words, *run, *more], cwd=ROOT, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr
    a, b, chat = (read_jsonl(tmp_path / name / "samples.jsonl", Sample) for name in ("a", "b", "chat"))
    assert {(s.task_id, s.sample_id): s.code for s in a} == {(s.task_id, s.sample_id): s.code for s in b}
    for one in [*a, *chat]:
        assert 0 < one.tokens <= 40
        assert one.sum_logprob is not None
        assert one.sum_logprob < 0
    assert all(s.completion.startswith(prompts.OPENING) for s in a)
