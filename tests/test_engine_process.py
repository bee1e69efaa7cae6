"""vLLM's engines in processes of their own: what is read of them, and what becomes of them when one is lost."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fractal.errors import InputError, OutsideError
from fractal.generate.engine import Request, Sampling
from fractal.generate.memory import REQUESTS_AHEAD
from fractal.generate.prompts import load_tokenizer
from fractal.generate.vllm_processes import (
    Completions,
    EngineProcesses,
    Failure,
    RequestReader,
    _error,
    read_frames,
    write_frame,
)
from tests.conftest import ROOT, until

EXECUTOR = "benchmarks.instant.Instant"  # answers at once; vLLM's scheduler and process are the real ones
texts = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.lists(st.tuples(st.integers(0, 1 << 40), texts, st.booleans(), st.integers(0, 1 << 20), st.floats(-9, 0))))
def test_what_is_written_is_read_whole_or_not_at_all(rows: list[tuple[Any, ...]]) -> None:
    stream = BytesIO()
    for row in rows:
        write_frame(stream, Completions([row]))
    data = stream.getvalue()
    whole = list(read_frames(BytesIO(data)))
    assert len(whole) == len(rows)
    assert list(read_frames(BytesIO(data[:-1]))) == whole[:-1], "what a killed writer leaves is no frame"


def test_requests_wait_for_the_engine_or_the_engine_for_them() -> None:
    from fractal.generate.vllm_processes import Requests

    stream = BytesIO()
    requests = [Request("", i, [1, 2], i) for i in range(5)]
    for some in (requests[:2], requests[2:]):
        write_frame(stream, Requests([(one.sample_id, one.prompt, one.seed) for one in some]))
    incoming = RequestReader(read_frames(BytesIO(stream.getvalue())))
    taken: list[Request] = []
    while (some := incoming.take(2, True)) is not None:
        assert 1 <= len(some) <= 2
        taken += some
    assert taken == requests
    assert incoming.ended.is_set()


def test_the_end_of_an_engine_is_told_in_one_line() -> None:
    assert isinstance(_error(Failure(2, "bad"), 0), InputError)
    assert str(_error(Failure(3, "no memory"), 0)) == "no memory"
    for code, words in ((-9, "signal 9 (SIGKILL)"), (1, "exit code 1")):
        error = _error(None, code)
        assert isinstance(error, OutsideError)
        assert words in str(error)
        assert "generate.log" in str(error)
        assert "\n" not in str(error)


READ = """
import json, random, sys
from pathlib import Path
from benchmarks.generate import Stock
from fractal.generate.vllm import VllmEngine
from fractal.generate.engine import Request, Sampling
from fractal.generate.prompts import load_tokenizer
path = Path(sys.argv[1])
tokenizer = load_tokenizer(str(path))
dice = random.Random(0)
pieces = ["\\n", "\\n```", "```", "\\nassert x", "\\n\\nassert f(1) == 2", " assert", "\\nprint(", "\\nprint", "\\n# Te", "st",
          "\\nif __name__", "def f(x):", "\\n    return x", "\\u00e9\\u4e2d\\U0001f600\\U0001f468\\u200d\\U0001f469", "\\t", " ", "x = 1"]
answers = []
for _ in range(300):
    ids = []
    for _ in range(dice.randint(1, 12)):
        if dice.random() < 0.15:
            ids.append(dice.randrange(len(tokenizer)))  # any token: bytes of half a character, special ones
        else:
            ids += tokenizer(dice.choice(pieces), add_special_tokens=False)["input_ids"]
    answers.append(ids + ([tokenizer.eos_token_id] if dice.random() < 0.3 else []))
options = {"distributed_executor_backend": sys.argv[2], "additional_config": {"answers": answers}}
engine = VllmEngine(path, Sampling(max_tokens=40), "float32", 100, 32, options=options)
requests = [Request(str(i // 4), i % 4, [1, 2 + i // 4, 3], i) for i in range(400)]

def draw(source):
    return {(c.request.task_id, c.request.sample_id): (c.text, c.stopped, c.tokens, c.sum_logprob) for d in source.generate(requests) for c in d}

theirs, ours = draw(Stock(engine)), draw(engine)
different = [key for key in theirs if theirs[key] != ours[key]]
print("RESULT", json.dumps([len(theirs), len({one[0] for one in theirs.values()}), [[theirs[k], ours[k]] for k in different[:5]]]))
"""


@pytest.mark.model
@pytest.mark.long
def test_we_read_what_vllms_own_output_processor_reads(small_model: Path) -> None:
    """Text, stop, tokens and log-probability of streams that end in, between and before stop texts and characters."""
    pytest.importorskip("vllm")
    command = [sys.executable, "-c", READ, str(small_model), EXECUTOR]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert lines, done.stderr[-2000:]
    count, kinds, different = json.loads(lines[0].partition(" ")[2])
    assert count == 400
    assert kinds > 100
    assert different == []


def engines(model: Path, count: int, step_s: float = 0.05) -> EngineProcesses:
    answer = load_tokenizer(str(model))("def f(x):\n    return x\n```", add_special_tokens=False)["input_ids"]
    config = {"answers": [answer], "step_s": step_s}
    options = {"distributed_executor_backend": EXECUTOR, "additional_config": config}
    return EngineProcesses(model, Sampling(max_tokens=40), "float32", 100, 8, engines=count, options=options)


def children() -> list[psutil.Process]:
    return [p for p in psutil.Process().children() if "fractal.generate.vllm_processes" in " ".join(p.cmdline())]


@pytest.mark.model
@pytest.mark.long
def test_a_lost_engine_gives_its_requests_to_the_others(small_model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each sample comes once, whoever dies when; the last engine's end is told; nobody is left."""
    pytest.importorskip("vllm")
    pool = engines(small_model, 2)
    requests = [Request("1", i, [1, 2, 3], i) for i in range(400)]
    while not all(process.batch for process in pool._processes):  # the second one loads while the first draws
        assert len(list(pool.generate(requests[:1]))) == 1
    came: list[int] = []
    killed = 0
    for done in pool.generate(requests):
        came += [c.request.sample_id for c in done]
        assert all(
            (c.text, c.stopped, c.sum_logprob) == ("def f(x):\n    return x", True, -0.25 * c.tokens) for c in done
        )
        if not killed and all(process.under_way for process in pool._processes):
            killed = pool._processes[0]._child.pid
            os.kill(killed, signal.SIGKILL)
    assert killed
    assert sorted(came) == list(range(400))
    assert pool.engines == 1
    warning = " ".join(capfd.readouterr().err.split())
    assert "one of 2 engines ended, the others go on" in warning
    assert "signal 9" in warning
    with pytest.raises(OutsideError, match=r"signal 9 \(SIGKILL\).*run the same command again"):
        for _ in pool.generate(requests):
            for process in pool._processes:
                process._child.kill()
    pool.close()
    assert children() == []


@pytest.mark.model
@pytest.mark.long
def test_stopped_it_hands_out_what_is_finished_and_closes(small_model: Path) -> None:
    pytest.importorskip("vllm")
    pool = engines(small_model, 1)
    made: list[Request] = []

    def requests() -> Iterator[Request]:
        for i in range(10_000):
            made.append(Request("1", i, [1, 2, 3], i))
            yield made[-1]

    came: list[int] = []
    stopped = lambda: len(came) > 20  # noqa: E731
    for done in pool.generate(requests(), stopped):
        came += [c.request.sample_id for c in done]
        assert len(made) - len(came) <= 2 * REQUESTS_AHEAD * pool.batch
    assert 20 < len(came) < 10_000
    assert len(set(came)) == len(came)
    pool.close()
    assert children() == []


def runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


PARENT = """
import sys, time
from pathlib import Path
from fractal.generate.engine import Request
from tests.test_engine_process import children, engines
pool = engines(Path(sys.argv[1]), 1)
for done in pool.generate([Request("1", i, [1, 2, 3], i) for i in range(10_000)]):
    print(*[p.pid for p in children()], flush=True)
"""


@pytest.mark.model
@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_engine_ends_with_its_parent(small_model: Path, number: signal.Signals) -> None:
    """By the kernel: a parent that is killed can tell nobody."""
    pytest.importorskip("vllm")
    command = [sys.executable, "-c", PARENT, str(small_model)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        (pid,) = map(int, parent.stdout.readline().split())
        assert runs(pid)
        parent.send_signal(number)
    until(lambda: not runs(pid), 30.0)


@pytest.mark.model
@pytest.mark.long
def test_an_engine_that_does_not_start_is_told(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    with pytest.raises(OutsideError, match="exit code 1"):
        EngineProcesses(tmp_path / "none", Sampling(), "float32", 100)
    assert children() == []
