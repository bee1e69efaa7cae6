"""A folder of wheels as an image that a build mounts: --wheels, for networks without a package index."""

import re
import tarfile
import tempfile
from pathlib import Path

import docker
from packaging.utils import canonicalize_name

from fractal.images.docker_client import has_image
from fractal.images.image import Image
from fractal.images.rendering import Step
from fractal.sandbox.host.source import content_hash


def import_wheels(client: docker.DockerClient, folder: Path, image: Image) -> str | None:
    """Make an image of those wheels in a folder that `image` asks for; returns its name, None if there are none."""
    wanted = {name for step in image.steps if step.kind == "python" for name in package_names(step)}
    files = [file for file in sorted(folder.glob("*.whl")) if canonicalize_name(file.name.split("-")[0]) in wanted]
    if not files:
        return None
    sizes = {file.name: str(file.stat().st_size).encode() for file in files}
    name = f"fractal-wheels:{content_hash(sizes)[:12]}"
    if has_image(client, name):
        return name
    with tempfile.TemporaryDirectory(prefix="fractal-wheels-") as temporary:
        archive = Path(temporary, "wheels.tar")
        with tarfile.open(archive, "w") as tar:
            for file in files:
                member = tarfile.TarInfo(file.name)
                member.size = file.stat().st_size
                with file.open("rb") as content:
                    tar.addfile(member, content)
        repository, tag = name.split(":")
        client.api.import_image(src=str(archive), repository=repository, tag=tag)
    return name


def package_names(step: Step) -> set[str]:
    """Canonical names of the Python packages that a step installs."""
    requirements = "\n".join([*step.text, *(local.source.read_text() for local in step.locals)])
    return {canonicalize_name(name) for name in re.findall(r"^[A-Za-z0-9][\w.\-]*", requirements, re.MULTILINE)}
