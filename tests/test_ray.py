"""Engines that Ray runs: the samples of one engine, whoever is killed, stopped or fails; no process is left.

Ray is the real one, on this machine. Without the extra `fleet` these tests are skipped.
"""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from fractal.errors import InputError, OutsideError
from fractal.generate import stage
from fractal.generate.engine import Completion, RayCluster, Request
from fractal.jsonl import read_jsonl
from fractal.records import Sample
from tests.conftest import ROOT, until
from tests.stand_in_engine import StandIn

COUNT = 400
EXTRACT = stage.CodeExtractor({str(i): ("f", "") for i in range(COUNT // 8)})


def requests() -> Iterator[Request]:
    return (Request(str(i // 8), i % 8, [1, 2, 3], 7 * i, "text") for i in range(COUNT))


def drawn(completions: list[Completion]) -> list[tuple[Any, ...]]:
    return sorted(
        (c.request.task_id, c.request.sample_id, c.request.seed, c.text, c.stopped, c.tokens, c.sum_logprob)
        for c in completions
    )


def of_one_engine() -> list[tuple[Any, ...]]:
    return drawn([c for done in StandIn().generate(requests()) for c in done])


AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")  # end a minute after a driver that was killed


def of_ray(*, agents: bool = True) -> set[int]:
    """Processes of Ray that live on this machine."""
    found = set()
    for process in psutil.process_iter():
        try:
            words = process.cmdline() or [process.name()]
            if words[0].startswith(AGENTS) and not agents:
                continue
            if process.status() != psutil.STATUS_ZOMBIE and ("ray::" in words[0] or "/ray/" in " ".join(words[:3])):
                found.add(process.pid)
        except psutil.Error:
            continue
    return found


@pytest.fixture
def others() -> Iterator[None]:
    """Nothing of Ray is left that was not there."""
    pytest.importorskip("ray")
    before = of_ray()
    yield
    until(lambda: of_ray() <= before, 120.0)


@pytest.mark.parametrize(
    ("ray", "gpus", "cluster"),
    [
        (None, None, None),
        ("local:2", None, RayCluster("local", 2)),
        ("auto", None, RayCluster("auto")),
        ("auto", "3", RayCluster("auto", 3, gpus=True)),
        (None, "all", RayCluster("local", None, gpus=True)),
        (None, "8", RayCluster("local", 8, gpus=True)),
    ],
)
def test_options_of_the_command_line(ray: str | None, gpus: str | None, cluster: RayCluster | None) -> None:
    assert RayCluster.parse(ray, gpus) == cluster


@pytest.mark.parametrize(
    ("ray", "gpus", "message"),
    [
        ("local", None, "--ray local: expected a number from 1"),
        ("local:", None, "--ray local:: expected a number from 1"),
        ("local:all", None, "expected a number from 1"),
        ("local:0", None, "expected a number from 1"),
        ("local:2", "2", "with --gpus, auto alone"),
        ("10.0.0.1:6379", None, "expected local:N"),
        (None, "many", "--gpus many: expected all, or a number from 1"),
        ("auto", "-1", "--gpus -1: expected all"),
        (None, "²", "--gpus ²: expected all"),
    ],
)
def test_wrong_options_are_one_line(ray: str | None, gpus: str | None, message: str) -> None:
    with pytest.raises(InputError) as error:
        RayCluster.parse(ray, gpus)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_does_not_go_with_ray_is_said_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="a server spreads its requests itself"):
        stage.check_ray("openai", None)
    with pytest.raises(InputError, match="--engines 2: does not go with"):
        stage.check_ray("vllm", 2)
    monkeypatch.setattr(stage.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OutsideError, match=r"pip install 'fractal\[fleet\]'"):
        stage.check_ray("vllm", None)


def test_there_must_be_a_gpu_for_each_engine() -> None:
    pytest.importorskip("ray")
    from fractal.generate.ray import check_engines

    assert check_engines(RayCluster("local", 2), 0) == 2
    assert check_engines(RayCluster("auto"), 16, 2) == 16
    assert check_engines(RayCluster("auto"), 0, 2) == 2
    assert check_engines(RayCluster("local", gpus=True), 8) == 8
    for cluster, gpus in ((RayCluster("local", 9, gpus=True), 8), (RayCluster("local", gpus=True), 0)):
        with pytest.raises(OutsideError, match=f"there are {gpus} GPUs"):
            check_engines(cluster, gpus)
    with pytest.raises(OutsideError, match="each engine takes one"):
        check_engines(RayCluster("local", 3), 2)


# --- with Ray ---------------------------------------------------------------------------------------------------------


# SIGKILL of an engine's process, SIGSTOP of another's, an exception in a third.
@pytest.mark.long
@pytest.mark.parametrize("faults", [[], ["kill", "stop", "fail"]], ids=["none", "three of four"])
def test_the_samples_are_those_of_one_engine(
    faults: list[str], tmp_path: Path, others: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from fractal.generate import ray as module

    monkeypatch.setattr(module, "HANG_S", 4.0)
    count = 4 if len(faults) > 1 else 2
    engine = module.RayEngines(RayCluster("local", count), partial(StandIn, tmp_path, 0.05), EXTRACT)
    try:
        while not all(actor.batch for actor in engine._actors.values()):  # the others load while the first draws
            assert len(list(engine.generate([next(requests())]))) == 1
        came: list[Completion] = []
        made = 0

        def counted() -> Iterator[Request]:
            nonlocal made
            for request in requests():
                made += 1
                yield request

        for done in engine.generate(counted()):
            came += done
            assert made - len(came) <= count * 2 * engine.batch
            if not list(tmp_path.iterdir()):
                for name in faults:
                    (tmp_path / name).touch()
        assert drawn(came) == of_one_engine()
        assert all(c.code == EXTRACT(c) and "return" in c.code for c in came)
        assert engine.lost == len(faults) == count - engine.engines
        assert (engine.handed_on > 0) == bool(faults)
        assert engine.ray["engines_lost"] == len(faults)
        warnings = " ".join(capfd.readouterr().err.split())
        assert warnings.count("engines ended, the others go on") == len(faults)
        assert ("it has not answered for 4 s" in warnings) == ("stop" in faults)
        assert ("out of luck" in warnings) == ("fail" in faults)
    finally:
        engine.close()


@pytest.mark.long
def test_the_last_engines_end_is_one_line_and_what_it_finished_is_there(tmp_path: Path, others: None) -> None:
    from fractal.generate.ray import RayEngines

    before = signal.getsignal(signal.SIGTERM)
    engine = RayEngines(RayCluster("local", 1), partial(StandIn, tmp_path, 0.05), EXTRACT)
    came: list[Completion] = []
    try:
        with pytest.raises(OutsideError, match="run the same command again") as error:
            for done in engine.generate(requests()):
                came += done
                (tmp_path / "kill").touch()
        assert "\n" not in str(error.value)
        assert 0 < len(came) < COUNT
    finally:
        engine.close()
    assert signal.getsignal(signal.SIGTERM) is before, "Ray's own would end the process without a word"


@pytest.mark.long
def test_an_engine_that_cannot_load_is_one_line(tmp_path: Path, others: None) -> None:
    from fractal.generate.ray import RayEngines

    with pytest.raises(OutsideError, match="No such file or directory"):
        RayEngines(RayCluster("local", 2), partial(Path.read_bytes, tmp_path / "none"), EXTRACT)  # type: ignore[arg-type]


@pytest.mark.long
def test_there_is_no_cluster_to_join(others: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from fractal.generate.ray import RayEngines

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(
        OutsideError, match=r"--ray auto: no cluster can be joined from here.*ray start --head"
    ) as error:
        RayEngines(RayCluster("auto"), StandIn, EXTRACT)
    assert "\n" not in str(error.value)


COMMAND = """
import sys
from functools import partial
from pathlib import Path
from fractal.__main__ import main
from fractal.generate import stage
from tests.stand_in_engine import StandIn
stage.choose_backend = lambda *_: "transformers"
folder, pause = Path(sys.argv.pop(1)), float(sys.argv.pop(1))
stage.load_here = lambda *_: None
make = stage.partial
stage.partial = lambda *_: partial(StandIn, folder, pause)
main()
"""


def command(folder: Path, pause_s: float, *ray: str) -> list[str]:
    given = ["generate", "--run", str(folder / "run"), "--problems", "starter", "--n", "8", "--max-tokens", "16", *ray]
    return [sys.executable, "-c", COMMAND, str(folder), str(pause_s), *given]


@pytest.mark.long
@pytest.mark.model
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_driver_is_ended_and_the_same_command_goes_on(tmp_path: Path, others: None, number: signal.Signals) -> None:
    """By SIGKILL it can say nothing and end nothing: Ray's processes end with it."""
    before = of_ray()
    samples = tmp_path / "run/samples.jsonl"
    with subprocess.Popen(command(tmp_path, 0.3, "--ray", "local:2"), cwd=ROOT) as driver:
        until(lambda: samples.exists() and samples.stat().st_size > 0, 120.0)
        driver.send_signal(number)
    assert driver.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 130}[number]
    until(lambda: of_ray(agents=False) <= before, 30.0)
    some = read_jsonl(samples, Sample)
    assert some
    if number == signal.SIGTERM:
        return
    done = subprocess.run(command(tmp_path, 0.0, "--ray", "local:2"), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ray" not in done.stderr.lower()
    drawn = read_jsonl(samples, Sample)
    assert drawn[: len(some)] == some
    keys = {(s.task_id, s.sample_id) for s in drawn}
    problems = (tmp_path / "run/problems.jsonl").read_bytes().count(b"\n")
    assert len(keys) == len(drawn) == 8 * problems
    assert len(some) < len(drawn)
    manifest = json.loads((tmp_path / "run/manifest.json").read_bytes())
    assert manifest["stages"]["generate"]["ray"]["engines_lost"] == 0
    assert manifest["stages"]["generate"]["ray"]["nodes"]
