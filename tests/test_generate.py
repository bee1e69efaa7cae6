"""Drawing samples: seeds, settings, resumption; and the real small model in both engines."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fractal.errors import InputError
from fractal.generate import models, prompts, stage
from fractal.generate.backends import choose_backend
from fractal.generate.engine import Completion, Request, Sampling, never_stop
from fractal.generate.interrupt import DeferredInterrupt
from fractal.generate.prompts import sample_seed
from fractal.jsonl import KeySet, read_jsonl
from fractal.problems.sets import ProblemSet, load
from fractal.records import Sample, task_order
from fractal.rundir import RunDir

ids = st.integers(0, 10**6)


@given(ids, ids, ids)
def test_a_seed_depends_on_run_problem_and_sample_only(run: int, task_id: int, sample_id: int) -> None:
    seed = sample_seed(run, task_id, sample_id)
    assert 0 <= seed < 1 << 31
    assert seed == sample_seed(run, task_id, sample_id)
    assert seed != sample_seed(run, task_id, sample_id + 1)
    assert seed != sample_seed(run + 1, task_id, sample_id)


def test_settings_out_of_range_are_refused() -> None:
    wrong = {"n": [0], "temperature": [-1, 11], "top_p": [0, 1.1], "max_tokens": [0], "seed": [-1, 1 << 31]}
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(InputError, match="--" + name.replace("_", "-")):
                Sampling(**{name: value})  # type: ignore[arg-type]


def test_auto_stays_with_what_the_run_began_with() -> None:
    assert choose_backend("auto", "transformers") == "transformers"
    assert choose_backend("auto", None) in ("vllm", "transformers")
    with pytest.raises(InputError):
        choose_backend("llama", None)


class Counting:
    """An engine that answers at once and notes what it was asked."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.asked: list[Request] = []
        self._stop_after = stop_after

    def close(self) -> None:
        pass

    def generate(self, requests: Iterable[Request], stopped: object = None) -> Iterator[list[Completion]]:
        for number, request in enumerate(requests):
            if number == self._stop_after:
                raise KeyboardInterrupt
            self.asked.append(request)
            yield [Completion(request, f"def f():\n    return {request.seed}\n", True, 5, -1.5)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_held_back_once(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with DeferredInterrupt() as interrupt:
        assert not interrupt.received()
        os.kill(os.getpid(), number)
        assert interrupt.received()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
            signal.pause()  # where the handler did not run yet
    assert signal.getsignal(number) is before


class Signalled(Counting):
    """A SIGTERM arrives after some samples; what is finished then is still handed out, as an engine has to."""

    def generate(
        self, requests: Iterable[Request], should_stop: Callable[[], bool] = never_stop
    ) -> Iterator[list[Completion]]:
        for done in super().generate(requests):
            if len(self.asked) == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            yield done
            if should_stop():
                return


def test_what_is_finished_when_a_signal_comes_is_written(tmp_path: Path, starter: ProblemSet) -> None:
    requests = [Request(starter.problems[0].task_id, i, [1], i, "text") for i in range(20)]
    entry: dict[str, object] = {}
    with pytest.raises(KeyboardInterrupt):
        stage.draw(Signalled(), requests, starter.by_id(), tmp_path / "s", Sampling(), "m", entry)
    assert [s.sample_id for s in read_jsonl(tmp_path / "s", Sample)] == [0, 1, 2, 3, 4]
    assert entry["tokens"] == 25


def test_requests_are_made_as_an_engine_takes_them(tmp_path: Path, starter: ProblemSet) -> None:
    """10^10 samples are asked for: a list of their requests would not fit into memory."""
    path = tmp_path / "samples.jsonl"
    sampling, done = Sampling(n=2 * 10**9), KeySet()
    for sample_id in (0, 1, 5, 3 * 10**9):
        done.add(starter.problems[0].task_id, sample_id)
    requests = prompts.build_requests(starter.problems, None, 10**6, sampling, {}, done)
    assert len(requests) == 10**10 - 3
    with pytest.raises(KeyboardInterrupt):
        stage.draw(Signalled(), requests, starter.by_id(), path, sampling, "m", {})
    assert [s.sample_id for s in read_jsonl(path, Sample)] == [2, 3, 4, 6, 7]


def test_settings_that_do_not_go_together_are_refused(tmp_path: Path, starter: ProblemSet) -> None:
    with RunDir(tmp_path / "r", create=True) as folder:
        with pytest.raises(InputError, match="--batch 0"):
            stage.run(folder, starter, models.EMBEDDED, Sampling(), batch=0)
        for wrong in (0, 17):
            with pytest.raises(InputError, match=f"--engines {wrong}: must be from 1 to 16"):
                stage.run(folder, starter, models.EMBEDDED, Sampling(), engines=wrong)
        with pytest.raises(InputError, match="--engines 2: goes with --backend vllm, and here transformers draws"):
            stage.run(folder, starter, models.EMBEDDED, Sampling(), "transformers", engines=2)
        with pytest.raises(InputError, match="--base-url"):
            stage.run(folder, starter, "m", Sampling(), "openai")
    assert not (tmp_path / "r").exists()


@pytest.fixture
def starter() -> ProblemSet:
    return load("starter", "test", 5)


@pytest.mark.model
def test_an_interrupted_run_goes_on_without_repeating(
    tmp_path: Path, starter: ProblemSet, monkeypatch: pytest.MonkeyPatch, small_model: Path
) -> None:
    first, second = Counting(stop_after=7), Counting()
    engines = iter([first, second])
    monkeypatch.setattr(stage, "load_engine", lambda *_: next(engines))
    for expected in (KeyboardInterrupt, None):
        with RunDir(tmp_path / "run", create=True) as folder:
            if expected:
                with pytest.raises(expected):
                    stage.run(folder, starter, models.EMBEDDED, Sampling(n=3), "transformers")
            else:
                stage.run(folder, starter, models.EMBEDDED, Sampling(n=3), "transformers")
    samples = read_jsonl(tmp_path / "run/samples.jsonl", Sample)
    assert sorted(((s.task_id, s.sample_id) for s in samples), key=lambda key: (task_order(key[0]), key[1])) == [
        (p.task_id, i) for p in starter.problems for i in range(3)
    ]
    assert len(first.asked) + len(second.asked) == 15
    assert all(s.seed == sample_seed(0, s.task_id, s.sample_id) for s in samples)
    assert {(s.temperature, s.top_p, s.max_tokens) for s in samples} == {(0.8, 1.0, 320)}
    from transformers import AutoTokenizer

    template = AutoTokenizer.from_pretrained(small_model).apply_chat_template
    hashes = {p.task_id: hashlib.sha256(prompts.render(p, template).encode()).hexdigest() for p in starter.problems}
    assert all(s.prompt_sha256 == hashes[s.task_id] for s in samples)


@pytest.mark.model
def test_a_prompt_too_long_for_the_context_is_skipped_and_counted(
    tmp_path: Path,
    starter: ProblemSet,
    monkeypatch: pytest.MonkeyPatch,
    small_model: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    engine = Counting()
    monkeypatch.setattr(stage, "load_engine", lambda *_: engine)
    long = list(starter.problems)
    long[2] = replace(long[2], prompt="word " * 9000)
    began = time.time()
    with RunDir(tmp_path / "run", create=True) as folder:
        stage.run(folder, ProblemSet("x", long, "d"), models.EMBEDDED, Sampling(n=2), "transformers")
        start_up = folder.manifest["stages"]["generate"]["start_up"]
        assert began <= start_up["first_sample_at"] <= time.time()
        assert min(start_up["weights_seconds"], start_up["load_seconds"]) >= 0
        assert list(folder.manifest["stages"]["generate"]["skipped"]) == [str(long[2].task_id)]
    assert "1 problems skipped" in capsys.readouterr().err
    assert {r.task_id for r in engine.asked} == {p.task_id for p in long} - {long[2].task_id}
    with RunDir(tmp_path / "run", create=True) as folder:
        stage.run(folder, ProblemSet("x", long, "d"), models.EMBEDDED, Sampling(n=2), "transformers")
    assert len(engine.asked) == 8


def generate(folder: Path, backend: str) -> dict[tuple[int, int], Sample]:
    command = [sys.executable, "-m", "fractal", "generate", "--run", str(folder), "--problems", "starter"]
    command += ["--split", "test", "--limit", "1", "--n", "2", "--max-tokens", "40", "--backend", backend]
    subprocess.run(command, check=True, timeout=500)
    return {(s.task_id, s.sample_id): s for s in read_jsonl(folder / "samples.jsonl", Sample)}


@pytest.mark.model
@pytest.mark.parametrize("backend", ["vllm", "transformers"])
def test_the_real_model_writes_programs(tmp_path: Path, backend: str, small_model: Path) -> None:
    """Both engines, the real weights: code that stops at the fence, log-probabilities below 0."""
    if backend == "vllm":
        pytest.importorskip("vllm")
    samples = generate(tmp_path / "a", backend).values()
    assert len(samples) == 2
    for sample in samples:
        assert sample.completion.startswith(prompts.OPENING)
        assert "```" not in sample.code
        assert 0 < sample.tokens <= 40
        assert sample.sum_logprob is not None
        assert sample.sum_logprob < 0
        is_cut = sample.tokens == 40 and not sample.completion.endswith(prompts.FENCE_END)
        assert (sample.finish_reason == "length") == is_cut
    assert any("def " in sample.code for sample in samples)


@pytest.mark.model
@pytest.mark.long
@pytest.mark.parametrize("backend", ["vllm", "transformers"])
def test_the_real_model_draws_the_same_twice(tmp_path: Path, backend: str, small_model: Path) -> None:
    if backend == "vllm":
        pytest.importorskip("vllm")
    assert generate(tmp_path / "a", backend) == generate(tmp_path / "b", backend)


GREEDY = """
import sys
from pathlib import Path
from fractal.generate import prompts
from fractal.generate.engine import Sampling
from fractal.generate.stage import load_engine
from fractal.problems.sets import load
path = Path(sys.argv[1])
problem = load("starter", "train", 1).problems[0]
sampling = Sampling(n=1, temperature=0, max_tokens=40)
requests = prompts.build_requests([problem], prompts.load_tokenizer(str(path)), 4096, sampling, {})
for backend in ("vllm", "transformers"):
    engine = load_engine(backend, path, sampling, "float32", requests)
    (batch,) = engine.generate(requests)
    engine.close()
    print("RESULT", batch[0].tokens, batch[0].sum_logprob, repr(batch[0].text))
"""


@pytest.mark.model
@pytest.mark.long
def test_both_engines_agree_on_log_probabilities(small_model: Path) -> None:
    """Greedy decoding in float32: the same program and the same sum from vLLM and from transformers."""
    pytest.importorskip("vllm")
    command = [sys.executable, "-c", GREEDY, str(small_model)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    found = [line.split(maxsplit=3)[1:] for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert len(found) == 2, done.stderr[-2000:]
    assert found[0][2] == found[1][2]
    assert float(found[0][1]) == pytest.approx(float(found[1][1]), abs=0.05)
