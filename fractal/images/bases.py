"""The base image of a build: the one given, the recipe's own, pulled, or one made here from Debian's packages."""

import os
from pathlib import Path
from typing import NamedTuple

import docker

from fractal.images import debian, recipes
from fractal.images.build_errors import BuildError
from fractal.images.docker_client import Say, has_image, pull
from fractal.images.recipes import Recipe


class Base(NamedTuple):
    name: str  # "" for an image that brings its own
    origin: str  # as in the image's label fractal.base
    bootstrapped: bool  # made here from Debian's packages


def given_base(recipe: Recipe, option: str | None) -> str | None:
    """The base that --base or the environment names."""
    if not recipe.image.base:
        return None
    variable = "FRACTAL_CUDA_BASE_IMAGE" if recipe.image.base.startswith("nvidia/") else "FRACTAL_BASE_IMAGE"
    return option or os.environ.get(variable)


def choose_base(client: docker.DockerClient, recipe: Recipe, option: str | None, say: Say, log: Path) -> Base:
    """The base to build on, pulled or made if need be; reports which and why. Raises BuildError, BootstrapError."""
    public = recipe.image.base
    if not public:
        return Base("", "of its own", False)
    if given := given_base(recipe, option):
        if not has_image(client, given):
            pull_or_fail(client, given)
        say(f"{recipe.key}: building on {given}, as asked for")
        return Base(given, f"{given} given", False)
    if has_image(client, public):
        say(f"{recipe.key}: building on {public}, which the engine has")
        return Base(public, f"{public} pulled", False)
    if public.partition("@")[0] not in recipes.BASE.values():  # Debian's packages replace none but our own bases
        pull_or_fail(client, public)
        say(f"{recipe.key}: building on {public}, pulled from a registry")
        return Base(public, f"{public} pulled", False)
    kind = debian.KINDS["whole" if recipe.with_apt else "small"]
    if has_image(client, kind.name):
        say(f"{recipe.key}: building on {kind.name}, made here earlier from Debian's packages")
        return Base(kind.name, f"{kind.name} bootstrapped", True)
    failure = pull(client, public)
    if failure is None:
        say(f"{recipe.key}: building on {public}, pulled from a registry")
        return Base(public, f"{public} pulled", False)
    say(f"{recipe.key}: no registry gives us {public} ({failure}): making a base from Debian's packages, half a minute")
    return Base(debian.bootstrap(client, kind, log), f"{kind.name} bootstrapped", True)


def pull_or_fail(client: docker.DockerClient, name: str) -> None:
    """Pull a base. Raises BuildError."""
    if failure := pull(client, name):
        raise BuildError(f"The base {name} cannot be pulled: {failure}. Load it, or name another one with --base.")
