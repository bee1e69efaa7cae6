"""A sandbox beside one pipeline container: started, waited for, and removed with its volume."""

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager

import docker
import docker.errors

from fractal.errors import OutsideError
from fractal.images.docker_client import Say, first_line
from fractal.sandbox.host.container import SOCKET, start_sidecar, stop_sidecar

START_TIMEOUT_S = 30
REMOVE_TIMEOUT_S = 2.0  # the engine lets go of a volume a moment after its container is gone


class ContainerError(OutsideError):
    """A container did not do what it should: one line with the remedy."""


@contextmanager
def running(client: docker.DockerClient, image: str, say: Say) -> Iterator[str]:
    """A sandbox of its own for one pipeline container; yields the name of its volume. Ends it on every way out."""
    name = f"fractal-sandbox-{secrets.token_hex(4)}"
    start(client, name, image)
    try:
        say(f"sandbox: {image} serves {name}")
        yield name
    finally:
        end(client, name)


def start(client: docker.DockerClient, name: str, image: str) -> None:
    """Start a sandbox and wait until it listens; container and volume have this name. Raises ContainerError."""
    start_sidecar(volume=name, name=name, image=image, client=client)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while client.containers.get(name).exec_run(["test", "-S", SOCKET]).exit_code != 0:
            if time.monotonic() > deadline:
                raise ContainerError(
                    f"The sandbox {name} does not listen after {START_TIMEOUT_S} s. See: fractal doctor"
                )
            time.sleep(0.05)
    except docker.errors.DockerException as error:
        end(client, name)
        raise ContainerError(
            f"The sandbox {name} ended at its start: {first_line(error)}. See: fractal doctor"
        ) from error
    except BaseException:
        end(client, name)
        raise


def end(client: docker.DockerClient, name: str) -> None:
    """Remove a sandbox and its volume; what is gone already is fine."""
    stop_sidecar(name, client)
    deadline = time.monotonic() + REMOVE_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            client.volumes.get(name).remove(force=True)
        except docker.errors.NotFound:
            return
        except docker.errors.APIError:
            time.sleep(0.1)
