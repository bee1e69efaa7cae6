"""Start a job on the instance: its inputs are sent, its images checked, its containers started."""

import contextlib
import os
from collections.abc import Iterable

import docker
import docker.errors

from fractal.cloud import jobs, transfer
from fractal.cloud.ledger import Entry
from fractal.cloud.options import RunRequest, local_path
from fractal.cloud.remote_host import ROOT, Remote
from fractal.cloud.session import Session, log
from fractal.cloud.ssh_config import ALIAS
from fractal.cloud.transfer import RemoteUser
from fractal.errors import OutsideError
from fractal.images import build as images
from fractal.images import containers, hub_token, recipes
from fractal.images.docker_client import first_line

INPUTS = "/inputs"  # files and models from this machine, in the container


def start_job(session: Session, remote: Remote, entry: Entry, request: RunRequest, user: RemoteUser) -> str:
    """Start the job and return its id. Raises OutsideError."""
    arguments, name = list(request.arguments), request.folder.name
    gpus = bool(remote.driver.gpus)
    (recipe,) = recipes.choose(request.image)
    uses_cuda = recipe.accelerator == "cuda" and gpus
    if uses_cuda:
        remote.driver.environment()  # checked before the inputs are sent, which may be large
    for option in ("--problems", "--model"):
        if path := local_path(arguments, option):
            arguments[arguments.index(option) + 1] = f"{INPUTS}/{transfer.send_input(remote, path, log)}"
    model = hub_token.model_of(arguments, request.folder)
    if "--model" not in arguments and model in (None, hub_token.EMBEDDED_MODEL):
        transfer.send_model(remote, session.pipeline.embedded_model(), log)  # images hold no weights
    pipeline, sandbox = session.image_name(request.image), session.image_name("sandbox")
    pushed = session.options_of("push") or session.options_of("up")
    registry = (pushed["to"] if pushed else "") or os.environ.get("FRACTAL_REGISTRY", "")
    job = jobs.new_id(arguments[1])
    environment = {
        "FRACTAL_MODELS": containers.MODELS,
        "FRACTAL_PRICE_USD_PER_HOUR": f"{entry.usd_per_hour:.4f}",
    }
    if token := hub_token.find(request.arguments, request.folder):
        log(f"your Hugging Face token goes into the job's container, as a file; {hub_token.SWITCH}=1 keeps it here")

    def setup(volume: str) -> containers.Setup:
        return containers.Setup(
            sidecar=volume,
            user=user.user if not user.user.startswith("0:") else recipes.USER,
            gpus=gpus,
            binds=(
                f"{user.home}/{ROOT}/runs/{name}:{recipes.WORK}/runs/{name}",
                f"{user.home}/{ROOT}/inputs:{INPUTS}:ro",
                f"{user.home}/{ROOT}/models:{containers.MODELS}:ro",
            ),
            environment=environment,
            token=token,
        )

    with remote.engine() as engine:
        need_images(engine, (pipeline, sandbox), request.image, registry)
        if uses_cuda:
            base = engine.images.get(pipeline).labels.get(images.BASE_LABEL, "")
            if compatibility := remote.driver.environment(base):
                environment |= compatibility
                log("the driver is older than the image's CUDA: CUDA's compatibility libraries are used")
        containers.start(
            engine,
            recipe,
            pipeline,
            sandbox,
            ["run", "--run", f"{recipes.WORK}/runs/{name}", *arguments],
            setup,
            job=job,
            labels=jobs.labels(job, name, request.arguments),
            size=containers.terminal(),
        )
    return job


def need_images(engine: docker.DockerClient, names: Iterable[str], key: str, registry: str) -> None:
    """Check that the instance has the images; what a registry has is pulled. Raises OutsideError."""
    for name in names:
        with contextlib.suppress(docker.errors.ImageNotFound):
            engine.images.get(name)
            continue
        if not registry:
            raise OutsideError(f"{name} is not on the instance. Run: invoke push --image={key},sandbox")
        log(f"the instance pulls {registry}/{name}")
        try:
            repository, _, tag = name.partition(":")
            engine.images.pull(f"{registry}/{repository}", tag=tag).tag(repository, tag)
        except docker.errors.APIError as error:
            raise OutsideError(
                f"The instance cannot pull {registry}/{name}: {first_line(error)}. Log in here (docker login), "
                f"or send it over ssh: invoke push --host={ALIAS}"
            ) from error
