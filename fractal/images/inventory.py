"""What is here of our images, and what a rebuild would do and why: `invoke images`. Builds nothing."""

import json
from dataclasses import asdict, dataclass
from typing import Any

import docker
import docker.errors
import requests
from rich.table import Table

from fractal import console
from fractal.images import recipes
from fractal.images.build import BASE_LABEL, PARTS_LABEL, connect, first_line
from fractal.images.builder import BuildError
from fractal.images.recipes import Recipe
from fractal.install import docker_engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
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


def inventory(client: docker.DockerClient) -> list[Entry]:
    """All recipes, looked up. Raises BuildError if the engine fails."""
    try:
        return [look_up(client, recipe) for recipe in recipes.recipes().values()]
    except (docker.errors.DockerException, requests.RequestException) as error:
        raise BuildError(
            f"The Docker engine at {docker_engine.address()} fails: {first_line(error)}. {docker_engine.problem()}"
        ) from error


def look_up(client: docker.DockerClient, recipe: Recipe) -> Entry:
    name = recipe.name
    known = client.images.list(name=f"fractal-{recipe.key}")
    found = next((image for image in known if name in image.tags), None)
    others = sorted((image for image in known if name not in image.tags), key=_tagged)
    tag, _, digest = recipe.image.base.partition("@")
    return Entry(
        image=recipe.key,
        name=name,
        here=found is not None,
        digest=found.id if found else None,
        bytes=found.attrs["Size"] if found else None,
        base=tag,
        base_digest=digest or None,
        built_on=found.labels.get(BASE_LABEL) if found else None,
        rebuild="nothing" if found else why(recipe.image.parts(), _parts(others[-1]) if others else None),
        older=len(others),
    )


def why(wanted: dict[str, str], built: dict[str, str] | None) -> str:
    """What a build would do, given what the newest earlier image was made of."""
    if built is None:
        return "everything: none of its images is here"
    for at, (part, digest) in enumerate(wanted.items()):
        if built.get(part) != digest:
            reason = "changed" if part in built else "is new"
            kept = f"{at} of {len(wanted)} parts are kept"
            return f"from [{part}] on, which {reason}; {kept}"
    gone = [part for part in built if part not in wanted]
    return f"its last steps: [{gone[0]}] is gone" if gone else "its configuration"


def prune(client: docker.DockerClient) -> list[str]:
    """Remove our images of earlier sources, except those that a container uses; returns their names."""
    gone = []
    for recipe in recipes.recipes().values():
        current = recipe.name
        for image in client.images.list(name=f"fractal-{recipe.key}"):
            for name in image.tags:
                if name == current:
                    continue
                try:
                    client.images.remove(name)
                    gone.append(name)
                except docker.errors.APIError:  # a container uses it
                    pass
    return gone


def _tagged(image: Any) -> str:
    return str(image.attrs.get("Metadata", {}).get("LastTagTime", ""))


def _parts(image: Any) -> dict[str, str] | None:
    try:
        parts = json.loads(image.labels.get(PARTS_LABEL, ""))
    except ValueError:
        return None
    return parts if isinstance(parts, dict) else None


def show(*, as_json: bool = False, older: bool = True) -> None:
    """Print it, as a table or as JSON lines. Without `older`, images of earlier sources are removed first."""
    client = connect()
    try:
        for name in [] if older else prune(client):
            console.note(f"{name} is removed")
        entries = inventory(client)
    finally:
        client.close()
    if as_json:
        for entry in entries:
            print(json.dumps(asdict(entry)))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("image", "tag", "here", "size", "digest"):
        table.add_column(column, no_wrap=True)
    for entry in entries:
        size = f"{entry.bytes / 1e6:,.0f} MB" if entry.bytes is not None else ""
        here = "yes" if entry.here else f"no, {entry.older} older" if entry.older else "no"
        digest = entry.digest.removeprefix("sha256:")[:12] if entry.digest else ""
        table.add_row(entry.name.partition(":")[0], entry.name.partition(":")[2], here, size, digest)
    console.say(table)
    for entry in entries:
        pinned = entry.base_digest or "its digest is not known here: `invoke lock` where a registry answers"
        built_on = f"; what is here stands on {entry.built_on}" if entry.built_on else ""
        console.say(f"{entry.image}: base {entry.base}, {pinned}{built_on}. A build would do: {entry.rebuild}.")
