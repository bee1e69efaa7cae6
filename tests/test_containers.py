"""The pipeline's container beside a sandbox: what it is given, what it may not do, and that it does the work."""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest

from fractal.errors import InputError
from fractal.generate import models
from fractal.images import containers, enter_job, hub_token, recipes
from fractal.images.containers import Setup, host_options
from fractal.images.docker_client import connect
from fractal.images.sidecar import ContainerError
from fractal.jsonl import read_jsonl, write_jsonl
from fractal.records import Label, Sample
from fractal.rundir import RunDir, commit, own_image
from fractal.sandbox.host.container import LABEL_VARIABLE, SESSION_LABEL
from tests.conftest import ROOT
from tests.engines import Engine


def test_no_container_gets_the_docker_socket_or_a_capability() -> None:
    for wanted in (containers.suite_setup("v"), containers.run_setup("v", Path("/"), gpus=True)):
        given = host_options(wanted)
        assert not [bind for bind in given["binds"] if "docker.sock" in bind]
        assert (given["cap_drop"], given["security_opt"]) == (["ALL"], ["no-new-privileges"])
        assert not wanted.user.startswith("0:")


def test_the_suite_has_no_network_and_may_change_nothing_of_ours() -> None:
    wanted = containers.suite_setup("v")
    assert host_options(wanted)["network_mode"] == "none"
    assert [bind for bind in wanted.binds if not bind.endswith(":ro")] == []
    assert f"{ROOT}/tests:/app/tests:ro" in wanted.binds


def test_gpus_are_asked_for_as_docker_run_does_it() -> None:
    (request,) = host_options(Setup(sidecar="v", gpus=True))["device_requests"]
    assert (request.count, request.capabilities) == (-1, [["gpu"]])
    assert "device_requests" not in host_options(Setup(sidecar="v"))


def test_a_run_belongs_to_who_owns_its_folder(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    os.chown(tmp_path, 1234, 5678)
    assert containers.run_setup("v", tmp_path, gpus=False).user == "1234:5678"
    os.chown(tmp_path, 0, 0)
    assert containers.run_setup("v", containers.prepare_run(tmp_path), gpus=False).user == recipes.USER


def test_only_a_runs_own_folder_changes_hands(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    (tmp_path / "beside").write_text("")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/theirs").write_text("")
    folder = containers.prepare_run(tmp_path / "run")
    assert [path.stat().st_uid for path in (tmp_path, tmp_path / "beside", folder / "theirs")] == [0, 0, 0]
    (folder / "manifest.json").write_text("{}")
    os.chown(folder, 0, 0)
    containers.prepare_run(folder)
    assert {path.stat().st_uid for path in (folder, *folder.iterdir())} == {1000}
    assert containers.run_setup("v", folder, gpus=False).binds[0] == f"{folder}:/work/runs/run"


@pytest.mark.parametrize("key", ["sandbox", "pipelin", "all", "", "pipeline,pipeline-cpu"])
def test_only_a_pipeline_runs_stages(key: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--image="):
        containers.run_stages(key, tmp_path, [])


def test_the_manifest_knows_the_image_and_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FRACTAL_IMAGE", raising=False)
    monkeypatch.delenv("FRACTAL_GIT_COMMIT", raising=False)
    assert own_image() == {}
    assert commit().keys() == {"git_commit", "git_dirty"}
    monkeypatch.setenv("FRACTAL_IMAGE", "fractal-pipeline-cpu:abc@sha256:12")
    monkeypatch.setenv("FRACTAL_IMAGE_BASE", "debian:bookworm-slim (no digest known)")
    monkeypatch.setenv("FRACTAL_GIT_COMMIT", "f00")
    monkeypatch.setenv("FRACTAL_GIT_DIRTY", "1")
    with RunDir(tmp_path / "run", create=True) as run:
        run.save()
    manifest = json.loads((tmp_path / "run/manifest.json").read_bytes())
    assert manifest["images"]["pipeline"] == {
        "name": "fractal-pipeline-cpu:abc",
        "digest": "sha256:12",
        "base": "debian:bookworm-slim (no digest known)",
    }
    assert (manifest["git_commit"], manifest["git_dirty"]) == ("f00", True)


TOKEN = "hf_" + secrets.token_hex(17)  # another test's must not be found for this one's
READS_TOKEN = """
import hashlib, os, time
path = os.environ.get("HF_TOKEN_PATH", "/run/secrets/hf_token")
if os.path.exists(path):
    state = os.stat(path)
    print(hashlib.sha256(open(path, "rb").read()).hexdigest(), oct(state.st_mode), state.st_uid, flush=True)
else:
    print("nothing", flush=True)
time.sleep(60)
"""


def processes() -> bytes:
    """Command lines and environments of all that runs on this machine and in its containers."""
    found = b""
    for name in ("cmdline", "environ"):
        for path in Path("/proc").glob(f"[0-9]*/{name}"):
            with contextlib.suppress(OSError):
                found += path.read_bytes()
    return found


@pytest.mark.docker
@pytest.mark.parametrize("token", [pytest.param(TOKEN, id="token"), pytest.param("", id="none")])
def test_a_token_is_a_file_of_the_job_and_seen_nowhere_else(image: str, token: str) -> None:
    before = left_over()
    client = connect()
    (recipe,) = recipes.choose("sandbox")

    def make_setup(volume: str) -> Setup:
        entrypoint = ("python3", "-c", READS_TOKEN)
        return Setup(sidecar=volume, user="1234:5678", network=False, entrypoint=entrypoint, token=token)

    job = f"token-{os.getpid()}"
    try:
        containers.start(client, recipe, image, image, [], make_setup, job=job, labels={}, size=None)
        container = client.containers.get(f"fractal-job-{job}")
        (line,) = next(container.logs(stream=True)).decode().splitlines()
        expected = f"{hashlib.sha256(TOKEN.encode()).hexdigest()} 0o100400 1234" if token else "nothing"
        assert line == expected
        if os.geteuid() == 0:  # the container's environment is among what we look at
            assert b"FRACTAL_SOCKET" in processes()
        assert TOKEN.encode() not in processes()
        inspected = client.api.inspect_container(container.id)
        for shown in (make_setup("v"), inspected, container.logs()):
            assert TOKEN not in str(shown)
        assert (f"HF_TOKEN_PATH={enter_job.TOKEN}" in inspected["Config"]["Env"]) == bool(token)
        other = container.exec_run(["cat", enter_job.TOKEN], user="1235:5678")
        assert other.exit_code != 0
    finally:
        containers.end(client, job)
        client.close()
    assert left_over() <= before


def test_the_token_is_found_for_models_of_the_hub_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (tmp_path / "folder").mkdir()
    assert hub_token.EMBEDDED_MODEL == models.EMBEDDED
    for arguments in ([], ["--model", models.EMBEDDED], ["--model", str(tmp_path / "folder")], ["--model=./x"]):
        assert hub_token.find(arguments, tmp_path) == ""
    for arguments in (["--n", "2", "--model", "someone/gated"], ["--model=someone/gated"]):
        assert hub_token.find(arguments, tmp_path) == TOKEN
    (tmp_path / "manifest.json").write_text(json.dumps({"config": {"generate": {"model": "someone/gated"}}}))
    assert hub_token.find(["--stage", "score"], tmp_path) == TOKEN  # the run's own model
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    assert hub_token.find([], tmp_path) == ""


def test_the_hubs_client_reads_the_token_where_we_put_it(tmp_path: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    (tmp_path / "token").write_text(TOKEN)
    code = "import huggingface_hub; print(huggingface_hub.get_token())"
    for name, expected in (("token", TOKEN), ("none", "None")):
        environ = {**kept, "HOME": str(tmp_path), "HF_TOKEN_PATH": str(tmp_path / name)}
        done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected


def test_each_user_has_a_cache_of_its_own() -> None:
    volumes = {user: containers.cache_volume(user) for user in (recipes.USER, "1000:50", "1234:5678")}
    assert list(volumes.values()) == ["fractal-cache", "fractal-cache", "fractal-cache-1234"]
    for user, volume in volumes.items():
        assert host_options(Setup(sidecar="v", user=user))["binds"][0] == f"{volume}:/cache"


@pytest.fixture
def cache(image: str) -> Iterator[tuple[docker.DockerClient, str]]:
    """A cache volume as something else may have made it: root's, closed, and with another user's closed folder in it."""
    user = "54321:54321"
    client = docker.from_env()
    volume = client.volumes.create(containers.cache_volume(user))
    shut = "mkdir -p /cache/theirs && touch /cache/theirs/file && ln -s /etc/passwd /cache/link && chown -R 1001 /cache/theirs && chmod 700 /cache/theirs && chmod 755 /cache"
    try:
        client.containers.run(
            image, ["-c", shut], entrypoint=["sh"], user="0", volumes=[f"{volume.name}:/cache"], remove=True
        )
        yield client, user
    finally:
        volume.remove(force=True)
        client.close()


@pytest.mark.docker
def test_a_cache_volume_is_its_users_whoever_made_it(cache: tuple[docker.DockerClient, str], image: str) -> None:
    client, user = cache
    write = [
        "-c",
        "mkdir /cache/mine && echo new > /cache/theirs/file && cat /cache/theirs/file && stat -Lc %u /cache/link",
    ]
    given = host_options(Setup(sidecar="v", user=user, network=False))
    wanted = {**given, "binds": given["binds"][:1]}

    def run() -> str:
        made = client.api.create_container(
            image, write, entrypoint=["sh"], user=user, host_config=client.api.create_host_config(**wanted)
        )["Id"]
        try:
            client.api.start(made)
            code = client.api.wait(made)["StatusCode"]
            return str(code) if code else client.api.logs(made).decode()
        finally:
            client.api.remove_container(made, force=True)

    assert run() != "0"  # as it was found, it is closed
    containers.chown_cache(client, image, user)
    assert run() == "new\n0\n"  # the link's target stays root's


@pytest.mark.docker
def test_a_cache_that_cannot_be_given_away_is_one_line_with_a_remedy(image: str) -> None:
    client = docker.from_env()
    user = "54322:54322"
    volume = client.volumes.create(
        containers.cache_volume(user), driver_opts={"type": "tmpfs", "device": "tmpfs", "o": "ro"}
    )
    try:
        with pytest.raises(ContainerError, match="docker volume rm fractal-cache-54322") as caught:
            containers.chown_cache(client, image, user)
        assert len(str(caught.value).splitlines()) == 1
    finally:
        volume.remove(force=True)
        client.close()


def left_over() -> set[str]:
    """Containers and volumes of runs, of this test session only: others may be at work on the same engine."""
    client = docker.from_env()
    mine = {"label": f"{SESSION_LABEL}={os.environ[LABEL_VARIABLE]}"}
    try:
        pipelines = client.containers.list(all=True, filters={"label": [containers.LABEL, mine["label"]]})
        volumes = client.volumes.list(filters=mine)
        return {str(container.id) for container in pipelines} | {volume.name for volume in volumes}
    finally:
        client.close()


@pytest.fixture
def gpu_engine(image: str, tmp_path: Path) -> Iterator[docker.DockerClient]:
    """An engine that takes `--gpus all`: it looks for NVIDIA's hook on its PATH; this one only says that it was called."""
    if os.geteuid() != 0:
        pytest.skip("an engine of the test's own needs root")
    programs = tmp_path / "programs"
    programs.mkdir()
    hook = programs / "nvidia-container-runtime-hook"
    hook.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\n')
    hook.chmod(0o755)
    folder = Path("/var/tmp") / f"fractal-gpu-{os.getpid()}"
    folder.mkdir()
    host = docker.from_env()
    saved = b"".join(host.images.get(image).save(named=True))
    host.close()
    own = Engine(folder, programs)
    client = docker.DockerClient(base_url=own.host, timeout=120)
    try:
        client.images.load(saved)
        yield client
    finally:
        client.close()
        own.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.docker
@pytest.mark.long
def test_gpus_all_reaches_nvidias_hook(gpu_engine: docker.DockerClient, image: str, tmp_path: Path) -> None:
    wanted = Setup(sidecar="volume", gpus=True, network=False)
    code = "import os; print(os.environ['NVIDIA_VISIBLE_DEVICES'], os.getuid())"
    created = gpu_engine.api.create_container(
        image,
        ["-c", code],
        entrypoint=["python3"],
        user=wanted.user,
        host_config=gpu_engine.api.create_host_config(**host_options(wanted)),
    )["Id"]
    gpu_engine.api.start(created)
    assert gpu_engine.api.wait(created)["StatusCode"] == 0
    assert gpu_engine.api.logs(created).decode().split() == ["all", "1000"]
    assert (tmp_path / "called").read_text() == "prestart\n"


@pytest.mark.docker
def test_an_engine_without_nvidias_toolkit_says_what_is_missing(image: str, capfd: pytest.CaptureFixture[str]) -> None:
    if shutil.which("nvidia-container-runtime-hook"):
        pytest.skip("this engine has NVIDIA's toolkit")
    before = left_over()
    client = connect()
    (recipe,) = recipes.choose("sandbox")
    try:
        with pytest.raises(ContainerError, match="nvidia-container-toolkit"):
            containers.run(
                client, recipe, ["--help"], lambda volume: Setup(sidecar=volume, gpus=True), lambda text: None
            )
        assert left_over() <= before
    finally:
        client.close()


@pytest.mark.docker
@pytest.mark.long
@pytest.mark.timeout(900)
def test_labels_of_the_containers_are_those_of_the_host(tmp_path: Path, image: str) -> None:
    """The pipeline's image judges a run's samples over the socket of a sidecar; the host judges the same ones."""
    from fractal.problems.sets import load
    from fractal.sandbox.host.container import Sandbox
    from fractal.sandbox.host.limits import Limits

    problems = load("starter").problems[:20]
    codes = {
        p.task_id: (p.reference, "def g(): pass", p.reference + "\nraise ValueError", "import os; os._exit(0)")
        for p in problems
    }
    samples = [
        Sample(task, i, "", code, "stop", 1, None, None, "t")
        for task, four in codes.items()
        for i, code in enumerate(four)
    ]
    before = left_over()
    with RunDir(tmp_path / "runs/judged", create=True) as run:
        run.set_problems(problems)
        write_jsonl(run.file("samples.jsonl"), samples)
        run.save()
    assert containers.run_stages("pipeline-cpu", tmp_path / "runs/judged", ["--stage", "verify"]) == 0
    found = read_jsonl(tmp_path / "runs/judged/labels.jsonl", Label)
    with Sandbox(limits=Limits(), image=image) as sandbox:
        expected = list(sandbox.verify(samples, {p.task_id: p for p in problems}))
    assert [(x.task_id, x.sample_id, x.status, x.tests) for x in found] == [
        (x.task_id, x.sample_id, x.status, x.tests) for x in expected
    ]
    manifest = json.loads((tmp_path / "runs/judged/manifest.json").read_bytes())
    assert manifest["images"]["sandbox"]["digest"].startswith("sha256:")
    assert left_over() <= before
