"""The tasks about images, beside a rented instance or without one: build and push."""

import contextlib

import docker.errors

from fractal.cloud import ssh_config
from fractal.cloud.remote_host import Remote
from fractal.cloud.session import DRIVER_REMEDY, Session
from fractal.images import build as images
from fractal.images import docker_client, driver_compatibility, recipes
from fractal.images import push as image_push


def build(session: Session, image: str, build_options: images.Options, *, as_json: bool, dry: bool) -> None:
    """Build images; before a push, what it sends by default."""
    pushed = session.options_of("push") if session.has_later("build", "push") else None
    keys = image or (pushed["image"] if pushed else "sandbox")
    with contextlib.nullcontext() if dry else session.timed("build"):
        images.build_all(keys, build_options, as_json=as_json, dry=dry)


def push(session: Session, image: str, registry: str, host: str, *, as_json: bool, dry: bool) -> None:
    """Push to the registry, or to the host; the host `lambda` is the rented instance, if there is one."""
    config = None
    if not registry and host == ssh_config.ALIAS and session.ledger.open_entries() and not dry:
        with session.remote() as (remote, _):
            for recipe in recipes.choose(image):
                if recipe.accelerator == "cuda":
                    driver_environment(remote, _base_label(session.image_name(recipe.key)))
        config = ssh_config.config_file(session.ledger.folder)
    with contextlib.nullcontext() if dry else session.timed("push"):
        session.pushed.update(image_push.push_all(image, registry, host, as_json=as_json, dry=dry, ssh_config=config))


def driver_environment(remote: Remote, base: str) -> dict[str, str]:
    """The environment variables that the CUDA image needs for the instance's driver.

    `base`: the image's label that says where its base came from, "" if unknown. Raises DriverError, before anything
    large is sent.
    """
    version, gpus = remote.driver
    return driver_compatibility.environment(version, gpus, base=base, remedy=DRIVER_REMEDY)


def _base_label(name: str) -> str:
    """The label of an image that the local engine has; "" where it has none."""
    client = docker_client.connect()
    try:
        return str(client.images.get(name).labels.get(images.BASE_LABEL, ""))
    except docker.errors.ImageNotFound:
        return ""
    finally:
        client.close()
