"""Runs the pipeline's image beside a sandbox sidecar: no Docker socket inside, results on this machine.

    code = run_stages("pipeline-cpu", Path("runs/demo"), ["--stage", "verify"])

Pure functions decide the options of `docker run`; `run` starts both containers, prints their output, and ends them.
"""

import json
import os
import secrets
import shutil
import socket
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import docker
import docker.errors
import docker.types
import platformdirs
import requests

from fractal.console import note
from fractal.errors import InputError
from fractal.images import driver_compatibility, enter_job, hub_token, recipes, sidecar
from fractal.images.build import BASE_LABEL, ensure
from fractal.images.docker_client import Say, connect, first_line
from fractal.images.recipes import CACHE, ROOT, USER, WORK, Recipe
from fractal.images.sidecar import ContainerError
from fractal.install import docker_engine, gpu
from fractal.rundir import commit
from fractal.sandbox.host.container import SOCKET, session_label

CACHE_VOLUME = "fractal-cache"  # models and compiled kernels, kept between runs; see cache_volume
MODELS = "/models"  # models that this machine has prepared, read-only
LABEL = "fractal.pipeline"
SHARED_MEMORY = "2g"  # vLLM's processes exchange tensors there; Docker's default is 64 MiB
# What the tests read beside the package, mounted where the image has the package.
TEST_SOURCES = ("tests", "docker", "docs", "benchmarks", "Dockerfile", ".dockerignore", "Makefile", "README.md",
                "pyproject.toml", "tasks.py")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a pipeline container gets from outside."""

    sidecar: str  # name of the sidecar's volume
    user: str = USER
    gpus: bool = False
    network: bool = True
    binds: tuple[str, ...] = ()  # SOURCE:TARGET:MODE
    cache: tuple[str, ...] = ()  # binds of CACHE and of folders in it, instead of the user's volume
    environment: Mapping[str, str] = field(default_factory=dict)
    entrypoint: tuple[str, ...] = ()
    workdir: str = WORK
    token: str = field(default="", repr=False)  # of the model hub; becomes a file in memory
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)  # variables of the command's environment
    job: str = ""  # its place among the machine's jobs: queue_bind is among `binds`
    after: tuple[str, ...] = ()  # jobs whose end it waits for


def host_options(setup: Setup) -> dict[str, Any]:
    """Options of the Docker SDK's create_host_config. No Docker socket, no capability, no new privilege."""
    cache = setup.cache or (f"{cache_volume(setup.user)}:{CACHE}",)
    return {
        "binds": [*cache, f"{setup.sidecar}:{Path(SOCKET).parent}", *setup.binds],
        "network_mode": "bridge" if setup.network else "none",
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "shm_size": SHARED_MEMORY,
        "init": True,  # reaps what vLLM leaves, and hands signals on
        **({"tmpfs": {enter_job.SECRETS: _secrets_options(setup.user)}} if _has_secrets(setup) else {}),
        **({"device_requests": [docker.types.DeviceRequest(count=-1, capabilities=[["gpu"]])]} if setup.gpus else {}),
    }


def _has_secrets(setup: Setup) -> bool:
    return bool(setup.token or setup.secrets)


def _secrets_options(user: str) -> str:
    uid, _, gid = user.partition(":")
    return f"rw,noexec,nosuid,nodev,size=1m,mode=0700,uid={uid},gid={gid}"


def queue_bind(folder: str) -> str:
    """The folder of the engine's machine that holds its jobs' locks (enter_job.py), as one of `Setup.binds`."""
    return f"{folder}:{enter_job.QUEUE}"


def cache_volume(user: str) -> str:
    """Each user has a volume: what one writes, with whatever modes, another may have to replace."""
    uid = user.partition(":")[0]
    return CACHE_VOLUME if uid == USER.partition(":")[0] else f"{CACHE_VOLUME}-{uid}"


def chown_cache(client: docker.DockerClient, image: str, user: str) -> None:
    """Give the user's cache volume to the user, whoever made it and filled it. Raises ContainerError.

    An engine gives a new volume the modes of the image's folder, but one that something else made belongs to root.
    """
    volume, (uid, _, _) = cache_volume(user), user.partition(":")
    try:
        client.containers.run(
            image,
            ["-c", f"find {CACHE} ! -user {uid} -exec chown -h {user} {{}} +"],
            entrypoint=["sh"],
            user="0:0",
            volumes=[f"{volume}:{CACHE}"],
            network_mode="none",
            cap_drop=["ALL"],
            cap_add=["CHOWN", "DAC_OVERRIDE"],  # of Docker's own set: a machine in a container may have no other
            security_opt=["no-new-privileges"],
            labels={LABEL: "1", **session_label()},
            remove=True,
        )
    except docker.errors.ContainerError as error:
        reason = bytes(error.stderr or b"no reason given").decode(errors="replace").strip().splitlines()[0][:200]
        raise ContainerError(
            f"The volume {volume} cannot be given to user {user}: {reason}. Remove it: docker volume rm {volume}"
        ) from error


def suite_setup(sidecar: str, root: Path = ROOT) -> Setup:
    """The test suite inside the image: without network, the sources of the tests mounted read-only."""
    binds = [f"{root / name}:/app/{name}:ro" for name in TEST_SOURCES if (root / name).exists()]
    shared = root.parent / "shared"  # real data beside the checkout, where there is some
    binds += [f"{shared}:/shared:ro"] if shared.is_dir() else []
    return Setup(
        sidecar=sidecar,
        network=False,
        binds=(*binds, *model_binds()),
        environment={"HYPOTHESIS_STORAGE_DIRECTORY": "/tmp/hypothesis", "FRACTAL_MODELS": MODELS},
        entrypoint=("python", "-m", "pytest", "-o", "cache_dir=/tmp/pytest"),
        workdir="/app",
    )


def run_setup(sidecar: str, folder: Path, *, gpus: bool, network: bool = True) -> Setup:
    """A run: its folder is this machine's, the only one that the container sees, and what is in it has its owner."""
    owner = folder.stat()
    return Setup(
        sidecar=sidecar,
        user=f"{owner.st_uid}:{owner.st_gid}" if owner.st_uid else USER,
        gpus=gpus,
        network=network,
        binds=(f"{folder}:{WORK}/runs/{folder.name}", *model_binds()),
        environment={"FRACTAL_MODELS": MODELS},
    )


def model_binds() -> tuple[str, ...]:
    """Models that were prepared on this machine, made readable for the pipeline's user."""
    folder = Path(os.environ.get("FRACTAL_CACHE") or platformdirs.user_cache_dir("fractal")) / "models"
    for file in folder.glob("*/*"):
        if file.stat().st_uid == os.geteuid() and file.is_file():
            file.chmod(file.stat().st_mode | 0o444)
    return (f"{folder.resolve()}:{MODELS}:ro",) if folder.is_dir() else ()


def provenance(client: docker.DockerClient, pipeline_name: str, sandbox_name: str, recipe: Recipe) -> dict[str, str]:
    """What the manifest of a run has to know and cannot see from inside."""
    pipeline, sandbox = client.images.get(pipeline_name), client.images.get(sandbox_name)
    code = commit()
    tag, _, digest = recipe.image.base.partition("@")
    pinned = digest or "no digest known"
    return {
        "FRACTAL_IMAGE": f"{pipeline_name}@{pipeline.id}",
        "FRACTAL_IMAGE_BASE": f"{tag} ({pinned}); built on {pipeline.labels.get(BASE_LABEL, 'unknown')}",
        "FRACTAL_SANDBOX_IMAGE": f"{sandbox_name}@{sandbox.id}",
        "FRACTAL_GIT_COMMIT": code["git_commit"] or "",
        "FRACTAL_GIT_DIRTY": "1" if code["git_dirty"] else "",
    }


def prepare_run(folder: Path) -> Path:
    """A run's folder, made so that the pipeline's user may write to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made: {error.strerror}. Name another --run.") from error
    uid, gid = map(int, USER.split(":"))
    if hasattr(os, "geteuid") and os.geteuid() == 0 and folder.stat().st_uid == 0:
        # Root's own folder would be closed to the pipeline, which never runs as root.
        is_run = (folder / "manifest.json").exists()  # another folder's files stay as they are
        for path in [folder, *(folder.rglob("*") if is_run else ())]:
            os.chown(path, uid, gid, follow_symlinks=False)
    return folder.resolve()


def run(client: docker.DockerClient, recipe: Recipe, command: Iterable[str], make_setup: Any, say: Say) -> int:
    """Run a command in the recipe's container beside a sandbox; returns its exit code.

    `make_setup`: the sidecar's volume -> Setup. Output goes to this terminal. Ctrl-C ends both containers.
    Raises BuildError, ContainerError, SandboxError.
    """
    (sandbox_recipe,) = recipes.choose("sandbox")
    sandbox_name = ensure(client, sandbox_recipe, say).name
    name = ensure(client, recipe, say).name
    try:
        with sidecar.running(client, sandbox_name, say) as volume:
            manifest_facts = provenance(client, name, sandbox_name, recipe)
            return _follow(client, name, list(command), make_setup(volume), manifest_facts)
    except (docker.errors.DockerException, requests.RequestException) as error:
        raise _start_error(name, error) from error


def _start_error(name: str, error: Exception) -> ContainerError:
    reason = first_line(error)
    remedy = docker_engine.problem() or "Run the command again."
    if "could not select device driver" in reason:
        remedy = "The engine has no NVIDIA container toolkit: install nvidia-container-toolkit, or leave --gpus out."
    return ContainerError(f"{name} does not run: {reason}. {remedy}")


def start(
    client: docker.DockerClient,
    recipe: Recipe,
    pipeline: str,
    sandbox: str,
    command: Iterable[str],
    make_setup: Callable[[str], Setup],
    *,
    job: str,
    labels: Mapping[str, str],
    size: os.terminal_size | None,
) -> None:
    """Start the same two containers on the client's engine and leave them running; `end` removes them.

    `pipeline` and `sandbox` are images there; the containers are called by the job. Output stays with the engine, as a
    terminal of this size would get it, or plain. Raises ContainerError, SandboxError.
    """
    name = f"fractal-sandbox-{job}"
    try:
        sidecar.start(client, name, sandbox)
        manifest_facts = provenance(client, pipeline, sandbox, recipe)
        setup = make_setup(name)
        created = _create(client, pipeline, list(command), setup, manifest_facts, f"fractal-job-{job}", labels, size)
        client.api.start(created)
        deliver_secrets(client, created, setup)
    except (docker.errors.DockerException, requests.RequestException) as error:
        end(client, job)
        raise _start_error(pipeline, error) from error
    except BaseException:
        end(client, job)
        raise


def end(client: docker.DockerClient, job: str) -> None:
    """Remove a job's containers and the sidecar's volume, running or not; what is gone already is fine."""
    with suppress(docker.errors.NotFound):
        client.api.remove_container(f"fractal-job-{job}", force=True, v=True)
    sidecar.end(client, f"fractal-sandbox-{job}")


def _create(
    client: docker.DockerClient,
    image: str,
    command: list[str],
    setup: Setup,
    provenance: Mapping[str, str],
    name: str,
    labels: Mapping[str, str],
    size: os.terminal_size | None,
) -> str:
    environment = {"FRACTAL_SOCKET": SOCKET, **provenance, **setup.environment}
    if setup.token:
        environment["HF_TOKEN_PATH"] = enter_job.TOKEN
    entrypoint = list(setup.entrypoint)
    if setup.job or _has_secrets(setup):
        settings = {"job": setup.job, "after": setup.after if setup.job else None, "secrets": _has_secrets(setup)}
        inner = entrypoint or client.images.get(image).attrs["Config"]["Entrypoint"] or []
        entrypoint = ["python3", "-c", Path(enter_job.__file__).read_text(), json.dumps(settings), *inner]
    if size:
        environment |= {"TERM": os.environ.get("TERM", "xterm"), "COLUMNS": str(size.columns), "LINES": str(size.lines)}
    if not setup.cache:
        chown_cache(client, image, setup.user)
    logs = docker.types.LogConfig(type=docker.types.LogConfig.types.JSON, config={"max-size": "1000g"})  # never cut
    created = client.api.create_container(
        image,
        command,
        name=name,
        user=setup.user,
        tty=size is not None,
        environment=environment,
        working_dir=setup.workdir,
        entrypoint=entrypoint or None,
        labels={LABEL: "1", **session_label(), **labels},
        host_config=client.api.create_host_config(**host_options(setup), log_config=logs),
    )
    identity: str = created["Id"]
    return identity


def deliver_secrets(client: docker.DockerClient, container: str, setup: Setup) -> None:
    """Write the secrets into the memory of a container that has just started, and waits for them (enter_job.py).

    They travel as the standard input of a process there: no image, configuration, log or list of processes has them.
    Raises ContainerError.
    """
    if not _has_secrets(setup):
        return
    data = json.dumps({"token": setup.token, "environment": dict(setup.secrets)}).encode()
    part = f"{enter_job.SECRETS}/part"
    write = f"umask 077; head -c {len(data)} > {part} && mv {part} {enter_job.DELIVERED}"
    process = client.api.exec_create(container, ["sh", "-c", write], stdin=True, user=setup.user)["Id"]
    stream = client.api.exec_start(process, socket=True)
    connection = getattr(stream, "_sock", stream)  # docker-py wraps a Unix socket for reading only
    try:
        connection.sendall(data)
        while connection.recv(4096):
            pass
    finally:
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)  # close() alone leaves it to docker-py's response
        stream.close()
    if code := client.api.exec_inspect(process)["ExitCode"]:
        raise ContainerError(f"The job's secrets cannot be handed over: exit code {code}. Run the command again.")


def terminal() -> os.terminal_size | None:
    """The size of the terminal that a person looks at, if one does."""
    return shutil.get_terminal_size() if sys.stdout.isatty() and sys.stderr.isatty() else None


def _follow(
    client: docker.DockerClient, name: str, command: list[str], setup: Setup, provenance: Mapping[str, str]
) -> int:
    created = _create(
        client, name, command, setup, provenance, f"fractal-pipeline-{secrets.token_hex(4)}", {}, terminal()
    )
    try:
        stream = client.api.attach(created, stdout=True, stderr=True, stream=True, logs=True, demux=True)
        client.api.start(created)
        deliver_secrets(client, created, setup)
        for out, err in stream:
            for data, output in ((out, sys.stdout), (err, sys.stderr)):
                if data:
                    output.buffer.write(data)
                    output.flush()
        return int(client.api.wait(created)["StatusCode"])
    finally:
        client.api.remove_container(created, force=True)


def run_stages(
    key: str,
    run_folder: Path,
    arguments: Iterable[str],
    *,
    gpus: bool = False,
    secrets: Mapping[str, str] | None = None,  # environment variables of the stages
) -> int:
    """`fractal run` in an image; the run's folder is this machine's. Returns the exit code."""
    recipe = pipeline(key)
    folder = prepare_run(run_folder)
    given = [str(argument) for argument in arguments]
    command = ["run", "--run", f"{WORK}/runs/{folder.name}", *given]
    if token := hub_token.find(given, folder):
        note(f"your Hugging Face token goes into the container, as a file; {hub_token.SWITCH}=1 keeps it out")
    on_gpu = gpus or gpu.has_gpu()
    with closing(connect()) as client:
        compatibility = _driver_environment(client, recipe) if on_gpu and recipe.accelerator == "cuda" else {}

        def make_setup(volume: str) -> Setup:
            setup = run_setup(volume, folder, gpus=on_gpu)
            return replace(
                setup, environment={**setup.environment, **compatibility}, token=token, secrets=secrets or {}
            )

        return run(client, recipe, command, make_setup, note)


def _driver_environment(client: docker.DockerClient, recipe: Recipe) -> dict[str, str]:
    """What the CUDA image needs beside this machine's driver. Raises DriverError."""
    version, names = gpu.driver_version() or "", [device.name for device in gpu.gpus()]
    remedy = "Upgrade the driver, or take --image=pipeline-cpu."
    if not driver_compatibility.environment(version, names, base="", remedy=remedy):
        return {}
    return driver_compatibility.environment(version, names, base=ensure(client, recipe, note).base, remedy=remedy)


def run_tests(key: str, arguments: Iterable[str]) -> int:
    """The test suite in an image, without network. Returns pytest's exit code."""
    recipe = pipeline(key)
    with closing(connect()) as client:
        return run(client, recipe, arguments, suite_setup, note)


def pipeline(key: str) -> Recipe:
    """The recipe of an image that holds the pipeline. Raises InputError."""
    chosen = recipes.choose(key)
    if len(chosen) != 1 or not chosen[0].accelerator:
        known = [recipe.key for recipe in recipes.recipes().values() if recipe.accelerator]
        raise InputError(f"--image={key}: holds no pipeline. There are: {', '.join(known)}.")
    return chosen[0]
