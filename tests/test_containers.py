"""The pipeline's container beside a sandbox: what it is given, what it may not do, and that it does the work."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import docker
import pytest

from fractal.images import build, containers, recipes
from fractal.images.containers import Setup, options
from fractal.records import InputError, Label, Sample, read_jsonl, write_jsonl
from fractal.run import RunDir, commit, own_image
from tests.conftest import ROOT
from tests.engines import Engine


def test_no_container_gets_the_docker_socket_or_a_capability() -> None:
    for wanted in (containers.suite_setup("v"), containers.run_setup("v", Path("/"), gpus=True)):
        given = options(wanted)
        assert not [bind for bind in given["binds"] if "docker.sock" in bind]
        assert (given["cap_drop"], given["security_opt"]) == (["ALL"], ["no-new-privileges"])
        assert not wanted.user.startswith("0:")


def test_the_suite_has_no_network_and_may_change_nothing_of_ours() -> None:
    wanted = containers.suite_setup("v")
    assert options(wanted)["network_mode"] == "none"
    assert [bind for bind in wanted.binds if not bind.endswith(":ro")] == []
    assert f"{ROOT}/tests:/app/tests:ro" in wanted.binds


def test_gpus_are_asked_for_as_docker_run_does_it() -> None:
    (request,) = options(Setup(sidecar="v", gpus=True))["device_requests"]
    assert (request.count, request.capabilities) == (-1, [["gpu"]])
    assert "device_requests" not in options(Setup(sidecar="v"))


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


def left_over() -> set[str]:
    """Containers and volumes of runs."""
    client = docker.from_env()
    try:
        found = {str(one.id) for one in client.containers.list(all=True, filters={"label": containers.LABEL})}
        return found | {one.name for one in client.volumes.list() if one.name.startswith("fractal-sandbox-")}
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
@pytest.mark.slow
def test_gpus_all_reaches_nvidias_hook(gpu_engine: docker.DockerClient, image: str, tmp_path: Path) -> None:
    wanted = Setup(sidecar="volume", gpus=True, network=False)
    code = "import os; print(os.environ['NVIDIA_VISIBLE_DEVICES'], os.getuid())"
    created = gpu_engine.api.create_container(
        image,
        ["-c", code],
        entrypoint=["python3"],
        user=wanted.user,
        host_config=gpu_engine.api.create_host_config(**options(wanted)),
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
    client = build.connect()
    (recipe,) = recipes.choose("sandbox")
    try:
        with pytest.raises(containers.ContainerError, match="nvidia-container-toolkit"):
            containers.run(
                client, recipe, ["--help"], lambda volume: Setup(sidecar=volume, gpus=True), lambda text: None
            )
        assert left_over() <= before
    finally:
        client.close()


@pytest.mark.docker
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_labels_of_the_containers_are_those_of_the_host(tmp_path: Path, image: str) -> None:
    """The pipeline's image judges a run's samples over the socket of a sidecar; the host judges the same ones."""
    from fractal.problems import load
    from fractal.sandbox.container import Limits, Sandbox

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
