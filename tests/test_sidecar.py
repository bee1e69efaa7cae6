"""A sandbox beside other containers: several clients on a Unix socket, back-pressure, threads, an async loop."""

import asyncio
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest

from fractal.records import Label, Problem, Sample
from fractal.sandbox.host.client import KEY_BYTES, SAMPLE_HEAD
from fractal.sandbox.host.container import (
    LABEL_VARIABLE,
    SESSION_LABEL,
    Sandbox,
    SandboxError,
    start_sidecar,
    stop_sidecar,
)
from fractal.sandbox.host.limits import Limits
from fractal.sandbox.inside.protocol import PROBLEM, SAMPLE, frame

pytestmark = pytest.mark.docker
NAME = f"fractal-test-sidecar-{os.getpid()}"  # two sessions on one engine
PROBLEMS = {str(i): Problem(str(i), "", f"def f(x):\n    return x * {i}\n", [f"assert f(2) == {2 * i}"], "", "f", "test") for i in range(1, 9)}  # fmt: skip
LIMITS = Limits(cpu_s=1, wall_s=3)


def samples(count: int, tag: str) -> tuple[list[Sample], list[str]]:
    """Right and wrong programs in turn, none like another, and the status of each."""
    found = []
    for i in range(count):
        task = 1 + i % 8
        factor = task if i % 3 else task + 1
        code = f"def f(x):\n    '{tag} {i}'\n    return x * {factor}\n"
        found.append(Sample(str(task), i, "", code, "stop", 0, None, None, "test"))
    return found, ["passed" if i % 3 else "failed" for i in range(count)]


@pytest.fixture(scope="module")
def sidecar(image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A sidecar's socket. The folder belongs to root, as a Docker volume does: without capabilities, root needs that."""
    folder = tmp_path_factory.mktemp("volume")
    stop_sidecar(NAME)
    start_sidecar(volume=str(folder), name=NAME, limits=LIMITS, slots=2, image=image)
    path = folder / "sandbox.sock"
    for _ in range(200):
        if path.is_socket():
            break
        time.sleep(0.05)
    yield path
    stop_sidecar(NAME)


def statuses(labels: list[Label]) -> list[str]:
    return [label.status for label in labels]


def test_several_clients_at_once_each_get_their_own_labels(sidecar: Path) -> None:
    found: dict[int, list[Label]] = {}

    def one(number: int) -> None:
        with Sandbox(socket=sidecar, limits=LIMITS) as sandbox:
            found[number] = list(sandbox.verify(samples(300, f"client {number}")[0], PROBLEMS))

    threads = [threading.Thread(target=one, args=(n,)) for n in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for number in range(4):
        assert statuses(found[number]) == samples(300, "")[1]
        assert [label.sample_id for label in found[number]] == list(range(300))


def test_the_check_from_inside_holds_in_a_sidecar(sidecar: Path) -> None:
    with Sandbox(socket=sidecar) as sandbox:
        assert [name for name, check in sandbox.checks.items() if not check["ok"]] == []


def test_a_client_that_hangs_up_disturbs_nobody(sidecar: Path) -> None:
    with Sandbox(socket=sidecar, limits=LIMITS) as sandbox:
        labels = sandbox.verify(samples(200, "stays")[0], PROBLEMS)
        first = [next(labels)]
        with Sandbox(socket=sidecar, limits=LIMITS) as other:
            next(other.verify(samples(200, "leaves")[0], PROBLEMS))
        assert statuses(first + list(labels)) == samples(200, "")[1]


def test_a_client_that_talks_nonsense_is_dropped_alone(sidecar: Path) -> None:
    for nonsense in (b"\xff\xff\xff\xff", frame(b"Xhello"), frame(b"S"), frame(b"P"), frame(SAMPLE_HEAD.pack(SAMPLE, 1, b"unknown", 1.0, False))):  # fmt: skip
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(10)
            sock.connect(str(sidecar))
            assert sock.recv(1 << 16)  # the greeting
            sock.sendall(nonsense)
            if nonsense != frame(b"P"):  # a problem without a body, which nobody names
                assert sock.recv(1 << 16) == b""
    with Sandbox(socket=sidecar, limits=LIMITS) as sandbox:
        assert statuses(list(sandbox.verify(samples(9, "after")[0], PROBLEMS))) == samples(9, "")[1]


def test_a_client_that_does_not_read_is_made_to_wait(sidecar: Path) -> None:
    """Samples without end and no verdict read: the sidecar stops taking them, its memory stays bounded, others work."""
    key = b"k" * KEY_BYTES
    problem = b'{"reference":"","setup":"","tests":["assert f(1) == 1"],"entry_point":"f"}'
    limits = b'{"cpu_s":1.0,"wall_s":3.0,"memory_mib":512,"file_mib":16}'
    body = b'["def f(x):\\n    return 1\\n#' + b"x" * 60_000 + b'",' + limits + b",false]"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(sidecar))
        sock.sendall(frame(PROBLEM + key + problem))
        sock.settimeout(1)
        sent = 0
        with pytest.raises(TimeoutError):
            for number in range(100_000):
                sock.sendall(frame(SAMPLE_HEAD.pack(SAMPLE, number, key, 3.0, False) + body))
                sent += len(body)
        with Sandbox(socket=sidecar, limits=LIMITS) as sandbox:
            assert statuses(list(sandbox.verify(samples(30, "beside")[0], PROBLEMS))) == samples(30, "")[1]
    assert sent < 1 << 30


def test_a_sidecar_that_starts_again_is_found_again(sidecar: Path, image: str) -> None:
    work, expected = samples(400, "restart")
    slow = [Sample(s.task_id, s.sample_id, "", "import time\ntime.sleep(0.02)\n" + s.code, "stop", 0, None, None, "t") for s in work]  # fmt: skip
    with Sandbox(socket=sidecar, limits=LIMITS) as sandbox:
        labels = sandbox.verify(slow, PROBLEMS)
        first = [next(labels) for _ in range(20)]
        stop_sidecar(NAME)
        start_sidecar(volume=str(sidecar.parent), name=NAME, limits=LIMITS, slots=2, image=image)
        assert statuses(first + list(labels)) == expected


def test_a_second_sidecar_of_one_name_is_refused(sidecar: Path, image: str) -> None:
    with pytest.raises(SandboxError, match="fractal serve --stop"):
        start_sidecar(volume=str(sidecar.parent), name=NAME, image=image)


def test_no_sidecar_says_how_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(SandboxError, match="fractal serve"), Sandbox(socket=tmp_path / "none"):
        pass


def test_threads_share_a_sandbox(sandbox: Sandbox) -> None:
    found: dict[int, list[str]] = {}

    def one(number: int) -> None:
        found[number] = statuses(list(sandbox.verify(samples(150, f"thread {number}")[0], PROBLEMS)))

    threads = [threading.Thread(target=one, args=(n,)) for n in range(5)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert found == dict.fromkeys(range(5), samples(150, "")[1])


def test_an_event_loop_is_free_while_programs_run(sandbox: Sandbox) -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0.01)

    async def main() -> list[str]:
        ticking = asyncio.create_task(tick())
        work = [Sample("1", i, "", f"import time\ntime.sleep(0.1)\ndef f(x):\n    return x # {i}\n", "stop", 0, None, None, "t") for i in range(8)]  # fmt: skip
        both = await asyncio.gather(*(_collect(sandbox, work[half::2]) for half in range(2)))
        ticking.cancel()
        return statuses(both[0] + both[1])

    assert asyncio.run(main()) == ["passed"] * 8
    assert ticks > 5


async def _collect(sandbox: Sandbox, work: list[Sample]) -> list[Label]:
    return [label async for label in sandbox.verify_async(work, {"1": Problem("1", "", "", ["assert f(2) == 2"], "", "f", "test")})]  # fmt: skip


def test_leaving_in_the_middle_leaves_nothing_under_way(sandbox: Sandbox) -> None:
    labels = sandbox.verify(samples(500, "left")[0], PROBLEMS)
    next(labels)
    labels.close()  # type: ignore[attr-defined]
    assert not sandbox._pending
    assert statuses(list(sandbox.verify(samples(5, "then")[0], PROBLEMS))) == samples(5, "")[1]


def test_a_sidecar_has_no_other_mount(sidecar: Path) -> None:
    client = docker.from_env()
    mounts = client.api.inspect_container(NAME)["Mounts"]
    client.close()
    assert [mount["Destination"] for mount in mounts] == ["/run/fractal"]


def test_another_session_on_the_engine_is_told_apart(image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers and volumes carry FRACTAL_LABEL's value: what one session looks for as left over is its own."""
    monkeypatch.setenv(LABEL_VARIABLE, "another-session")
    name = f"fractal-sandbox-{os.getpid()}-other"
    start_sidecar(volume=name, name=name, image=image, slots=1)
    client = docker.from_env()
    try:
        assert client.containers.get(name).labels[SESSION_LABEL] == "another-session"
        assert client.volumes.get(name).attrs["Labels"] == {SESSION_LABEL: "another-session"}
    finally:
        stop_sidecar(name)
        client.volumes.get(name).remove(force=True)
        client.close()
