"""What is here of our images, and what a rebuild would do and why: `invoke images`. Builds nothing."""

import json
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import docker
import docker.errors
import requests
from rich.table import Table

from fractal import console
from fractal.images import recipes
from fractal.images.build import BASE_LABEL, PARTS_LABEL
from fractal.images.build_errors import BuildError
from fractal.images.docker_client import connect, first_line
from fractal.images.recipes import Recipe
from fractal.install import docker_engine


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageState:
    """One of our images, as the engine has it."""

    image: str  # key
    name: str  # repository:tag of the present sources
    here: bool
    digest: str | None  # the image's id
    bytes: int | None
    base: str  # of the recipe
    base_digest: str | None  # None: docker/images.lock has the tag alone
    built_on: str | None  # where the base of the image that is here came from
    rebuild: str  # what `invoke build` would do, and why
    older: int  # images of earlier sources that are here


def inventory(client: docker.DockerClient) -> list[ImageState]:
    """All recipes, looked up. Raises BuildError if the engine fails."""
    try:
        return [look_up(client, recipe) for recipe in recipes.recipes().values()]
    except (docker.errors.DockerException, requests.RequestException) as error:
        raise BuildError(
            f"The Docker engine at {docker_engine.address()} fails: {first_line(error)}. {docker_engine.problem()}"
        ) from error


def look_up(client: docker.DockerClient, recipe: Recipe) -> ImageState:
    """The state of one recipe's image."""
    name = recipe.name
    known = client.images.list(name=f"fractal-{recipe.key}")
    current = next((image for image in known if name in image.tags), None)
    present = {replace(recipe, processor=processor).name for processor in recipes.PROCESSORS}
    older = sorted((image for image in known if not present & {*image.tags}), key=_last_tagged)
    built = json.loads(older[-1].labels.get(PARTS_LABEL, "{}")) if older else None
    tag, _, digest = recipe.image.base.partition("@")
    return ImageState(
        image=recipe.key,
        name=name,
        here=current is not None,
        digest=current.id if current else None,
        bytes=current.attrs["Size"] if current else None,
        base=tag,
        base_digest=digest or None,
        built_on=current.labels.get(BASE_LABEL) if current else None,
        rebuild="nothing" if current else why(recipe.image.parts(), built),
        older=len(older),
    )


def why(wanted: dict[str, str], built: dict[str, str] | None) -> str:
    """What a build would do, given what the newest earlier image was made of."""
    if built is None:
        return "everything: none of its images is here"
    changed = [part for part in {**wanted, **built} if built.get(part) != wanted.get(part)]
    return f"what has changed, and what follows: {', '.join(changed)}"


def prune(client: docker.DockerClient) -> list[str]:
    """Remove our images of earlier sources, except those that a container uses; returns their names."""
    removed = []
    for recipe in recipes.recipes().values():
        images = client.images.list(name=f"fractal-{recipe.key}")
        present = {replace(recipe, processor=processor).name for processor in recipes.PROCESSORS}
        for name in {tag for image in images for tag in image.tags} - present:
            with suppress(docker.errors.APIError):  # a container uses it
                client.images.remove(name)
                removed.append(name)
    return sorted(removed)


def _last_tagged(image: Any) -> str:
    return str(image.attrs.get("Metadata", {}).get("LastTagTime", ""))


def show(*, as_json: bool = False, older: bool = True) -> None:
    """Print it, as a table or as JSON lines. Without `older`, images of earlier sources are removed first."""
    with closing(connect()) as client:
        for name in [] if older else prune(client):
            console.note(f"{name} is removed")
        images = inventory(client)
    if as_json:
        for image in images:
            print(json.dumps(asdict(image)))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("image", "tag", "here", "size", "digest"):
        table.add_column(column, no_wrap=True)
    for image in images:
        size = f"{image.bytes / 1e6:,.0f} MB" if image.bytes is not None else ""
        here = "yes" if image.here else f"no, {image.older} older" if image.older else "no"
        digest = image.digest.removeprefix("sha256:")[:12] if image.digest else ""
        table.add_row(image.name.partition(":")[0], image.name.partition(":")[2], here, size, digest)
    console.say(table)
    for image in images:
        pinned = image.base_digest or "its digest is not known here: `invoke lock` where a registry answers"
        built_on = f"; what is here stands on {image.built_on}" if image.built_on else ""
        console.say(f"{image.image}: base {image.base}, {pinned}{built_on}. A build would do: {image.rebuild}.")
