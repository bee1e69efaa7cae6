"""What several test files share: the markers' conditions, one sandbox for the session, the small model."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fractal.install import docker_engine, gpu

ROOT = Path(__file__).parents[1]
SOCKET = os.environ.get("FRACTAL_SOCKET")  # of a sandbox that runs already: inside the pipeline's image
SHARED = ROOT.parent / "shared"  # real data beside the checkout, where there is some
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a script started us with &: our children would ignore it, too
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Marks the sandboxes of this session: what looks for containers that are left over looks at these only, so that two
# clones may test on one engine at a time.
os.environ.setdefault("FRACTAL_LABEL", f"test-{os.getpid()}-{int(time.time())}")
FULL_BYTES = 500 * 2**20  # with less free, tests fail for want of room, one after the other


def until(true: Callable[[], object], seconds: float = 60.0, words: Callable[[], object] = lambda: "") -> None:
    """Wait for it; the limit is for what hangs, and says nothing about speed."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, words() or "it does not come true"
        time.sleep(0.02)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """End at the first failure on a full disk: an hour of further ones would say nothing."""
    if not report.failed or "PYTEST_XDIST_WORKER" in os.environ:  # the process that started the workers is told, too
        return
    for place in (tempfile.gettempdir(), "/var/lib/docker"):
        if os.path.isdir(place) and (free := shutil.disk_usage(place).free) < FULL_BYTES:
            pytest.exit(f"{report.nodeid} failed, and {place} has {free / 2**20:.0f} MB left. Make room.", returncode=3)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--durations-file", help="write each test's seconds, set-up and tear-down included, as JSON")


class Durations:
    """Adds up what each test took; tests/durations.json is the committed result of a whole run on 2 quiet cores."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration

    def pytest_sessionfinish(self) -> None:
        before = json.loads(self.path.read_text()) if self.path.exists() else {}
        seconds = {name: round(value, 1) for name, value in {**before, **self.seconds}.items() if value >= 0.5}
        self.path.write_text(json.dumps(dict(sorted(seconds.items())), indent=0) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    if (path := config.getoption("--durations-file")) and "PYTEST_XDIST_WORKER" not in os.environ:
        config.pluginmanager.register(Durations(Path(path)))


# With several workers (pytest-xdist) a file stays whole, and the files of one group take turns: they look at the engine's
# containers and at ssh's processes for what is left, and fill both cores.
GROUPS = {
    "docker": "attacks bench bench_generate bench_images containers cuda_image extraction image images losses outputs "
    "kinds overlap packages parity pipeline repeat rewards sandbox scan server sidecar verify",
    "ssh": "build_there demo_cloud file_system guard guide instance killed launch machine push readiness remote run_commands session ssh_config ssh_keys "
    "watchdog",
}
GROUP_OF = {f"test_{name}": group for group, names in GROUPS.items() for name in names.split()}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        """Not by xdist's own marks: it writes them into node ids, which pytest 9.2 does not read back."""

        def _split_scope(self, nodeid: str) -> str:
            stem = Path(nodeid.partition("::")[0]).stem
            return GROUP_OF.get(stem, stem)

    return ByGroup(config, log)


def needs(item: pytest.Item) -> set[str]:
    """The groups that a test's marks and fixtures ask for."""
    marks, fixtures = {mark.name for mark in item.iter_markers()}, getattr(item, "fixturenames", ())
    found = {"ssh"} if "cloud" in marks or "openssh" in fixtures else set()
    return found | ({"docker"} if marks & {"docker", "sandbox"} or "image" in fixtures else set())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this machine lacks."""
    for item in items:
        if (wanted := needs(item)) and (group := GROUP_OF.get(item.path.stem)) not in {*wanted, "ssh"}:
            raise pytest.UsageError(
                f"{item.nodeid}: its file is of group {group}. tests/conftest.py: add it to {' or '.join(sorted(wanted))}."
            )
    no_docker = docker_engine.problem()
    no_sandbox = None if SOCKET else no_docker
    no_gpu = None if gpu.usable() else gpu.problem() or "the installed torch is built for the CPU"
    for item in items:
        found = getattr(item, "_fixtureinfo", None)
        defined = found.name2fixturedefs.get("image", ()) if found else ()
        wants_image = any(one.func.__module__ == __name__ for one in defined[-1:])  # not a fixture of the test's own
        if (item.get_closest_marker("docker") or wants_image) and no_docker:
            item.add_marker(pytest.mark.skip(reason=no_docker))
        if item.get_closest_marker("sandbox") and no_sandbox:
            item.add_marker(pytest.mark.skip(reason=no_sandbox))
        if item.get_closest_marker("gpu") and no_gpu:
            item.add_marker(pytest.mark.skip(reason=no_gpu))


@pytest.fixture(scope="session")
def place(request: pytest.FixtureRequest) -> dict[str, object]:
    """Where tests' sandboxes run: a container of their own, or the sidecar that FRACTAL_SOCKET names."""
    return {"socket": Path(SOCKET)} if SOCKET else {"image": request.getfixturevalue("image")}


@pytest.fixture(scope="session")
def image() -> str:
    """The sandbox image of this code, built if it is not there."""
    import docker

    from fractal.images.build import ensure_sandbox_image

    client = docker.from_env()
    try:
        return ensure_sandbox_image(client, print).name
    finally:
        client.close()


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    """A Docker client."""
    from fractal.images.docker_client import connect

    client = connect()
    yield client
    client.close()


@pytest.fixture(scope="session")
def sandbox(place: dict[str, Any]) -> Iterator["object"]:
    from fractal.sandbox.host.container import Sandbox
    from fractal.sandbox.host.limits import Limits

    with Sandbox(limits=Limits(cpu_s=1.0, wall_s=3.0), **place) as one:
        yield one


@pytest.fixture(scope="session")
def small_model() -> Path:
    """The embedded model's folder."""
    from fractal.generate import models

    return models.resolve(models.EMBEDDED).path


@pytest.fixture(scope="session")
def openssh(tmp_path_factory: pytest.TempPathFactory) -> None:
    """OpenSSH's programs and rsync, installed if root may; a bare machine has neither."""
    from tests.machine import Unavailable, need

    try:
        for program, package in (("ssh-keygen", "openssh-client"), ("rsync", "rsync")):
            need(program, package, log=tmp_path_factory.mktemp("apt") / "log")
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def key_file(openssh: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A private ssh key."""
    from tests.renting import key_pair

    return key_pair(tmp_path_factory.mktemp("ssh"))


@pytest.fixture
def rented(tmp_path: Path, key_file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An account at the fake cloud, with a state folder (tests/renting.py); what must hold is checked at the end."""
    from tests.renting import renting

    monkeypatch.setenv("LAMBDA_API_KEY", "secret-key")
    with renting(tmp_path / "state", key_file) as account:
        yield account
        account.check()


@pytest.fixture(scope="session")
def simulated_machine(openssh: None) -> Iterator[Any]:
    """A simulated instance with Docker and a GPU, whose user is in the group docker (tests/machine.py)."""
    from tests.machine import Condition, Machine, Unavailable

    try:
        with Machine(condition=Condition(docker_group=True)) as machine:
            yield machine
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def logged() -> list[str]:
    return []


@pytest.fixture
def remote(machine: Any, logged: list[str]) -> Iterator[Any]:
    """A connection to the module's `machine`; what it says is in `logged`."""
    from fractal.cloud.remote_host import Remote

    with Remote(machine.ssh_config, lambda: None, logged.append, host=machine.alias, patience_s=30) as connected:
        yield connected


@pytest.fixture
def no_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of other things: a guard's process costs a third of a second."""
    from fractal.cloud import guard

    monkeypatch.setattr(guard, "start", lambda account, name: None)
    monkeypatch.setattr(guard, "alive", lambda ledger, name: True)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no program mount")
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)
