"""The Docker engine that builds and runs images: a client, and what several modules ask it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import docker
import docker.errors
import requests

from fractal.images.build_errors import BuildError
from fractal.install import docker_engine

ENGINE_TIMEOUT_S = 1800  # without a reply: a layer of several GB is being written
REGISTRY_TIMEOUT_S = 8  # a public registry answers in about one second
Say = Callable[[str], None]  # takes a line for the user


def connect() -> docker.DockerClient:
    """A client of the engine that DOCKER_HOST names; the caller closes it: `with closing(connect()) as client`.

    Raises BuildError with the remedy if no engine answers.
    """
    try:
        return docker.from_env(timeout=ENGINE_TIMEOUT_S, use_ssh_client=True)
    except docker.errors.DockerException as error:
        raise BuildError(
            docker_engine.problem() or f"The Docker engine at {docker_engine.address()} refuses: {error}."
        ) from error


def has_image(client: docker.DockerClient, name: str) -> bool:
    """Whether the engine has an image of this name or id."""
    try:
        client.images.get(name)
    except docker.errors.ImageNotFound:
        return False
    return True


def remove_unused(client: docker.DockerClient, image: str) -> None:
    """Remove an image that only helped to build, unless something uses it; its layers stay in the builder's cache."""
    try:
        client.images.remove(image)
    except docker.errors.DockerException:  # another build uses it
        pass


def pull(client: docker.DockerClient, name: str) -> str | None:
    """None, or why the image could not be pulled. A registry that does not answer costs REGISTRY_TIMEOUT_S."""
    try:
        registry_digest(client, name)
        client.images.pull(name)
    except requests.Timeout:
        return f"no answer in {REGISTRY_TIMEOUT_S} s"
    except docker.errors.APIError as error:
        return ": ".join(first_line(error).split(": ")[-2:])  # Go wraps errors from the outside in
    return None


def registry_digest(client: docker.DockerClient, name: str) -> str:
    """The digest that a registry has for an image's name. Raises DockerException, requests.RequestException."""
    with request_timeout(client, REGISTRY_TIMEOUT_S):
        return str(client.api.inspect_distribution(name)["Descriptor"]["digest"])


@contextmanager
def request_timeout(client: docker.DockerClient, seconds: float) -> Iterator[None]:
    """Another timeout for the client's requests."""
    before, client.api.timeout = client.api.timeout, seconds
    try:
        yield
    finally:
        client.api.timeout = before


def first_line(error: Exception) -> str:
    """An engine's error message without the HTTP around it."""
    text = str(getattr(error, "explanation", None) or error).strip() or type(error).__name__
    return text.splitlines()[0][:200].rstrip(".")
