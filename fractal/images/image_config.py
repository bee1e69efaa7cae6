"""Gives a built image the configuration that its content alone decides, without the time of the build."""

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Mapping
from typing import Any

import docker
import docker.errors

from fractal.images.docker_client import has_image, remove_unused

EPOCH = "1970-01-01T00:00:00Z"
KEPT = ("User", "ExposedPorts", "Env", "Entrypoint", "Cmd", "Healthcheck", "Volumes", "WorkingDir", "Labels",
        "OnBuild", "StopSignal", "Shell")  # fmt: skip
# Instructions that make no layer, as BuildKit or an older builder of the base wrote them. RUN, COPY and WORKDIR make
# one, of 0 bytes at times.
WITHOUT_LAYER = re.compile(
    r"(/bin/sh -c #\(nop\)\s+)?(ENV|LABEL|CMD|ENTRYPOINT|USER|ARG|SHELL|EXPOSE|STOPSIGNAL|MAINTAINER|VOLUME"
    r"|HEALTHCHECK|ONBUILD)\b"
)


def pin(client: docker.DockerClient, built: str, name: str) -> None:
    """Replace the configuration of an image (`built`, its id) by the reproducible one, and give it its name.

    A new image is loaded that consists of its configuration alone: the engine has the layers. Where the engine refuses
    that (containerd's store), the image keeps what the builder wrote; BuildKit was given SOURCE_DATE_EPOCH.
    """
    image = client.images.get(built)
    data = json.dumps(
        reproducible_configuration(image.attrs, client.api.history(built)), sort_keys=True, separators=(",", ":")
    ).encode()
    digest = hashlib.sha256(data).hexdigest()
    layers = [f"{layer.removeprefix('sha256:')}/layer.tar" for layer in image.attrs["RootFS"]["Layers"]]
    manifest = json.dumps([{"Config": f"{digest}.json", "RepoTags": [name], "Layers": layers}]).encode()
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for path, content in ((f"{digest}.json", data), ("manifest.json", manifest)):
            member = tarfile.TarInfo(path)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    before = client.images.get(name).id if has_image(client, name) else built
    try:
        client.images.load(archive.getvalue())
        loaded = client.images.get(name).id == f"sha256:{digest}"
    except docker.errors.DockerException:
        loaded = False
    if not loaded:
        repository, tag = name.split(":")
        image.tag(repository, tag)
    for old in {built, before}:
        if has_image(client, old) and not client.images.get(old).tags:
            remove_unused(client, old)


def reproducible_configuration(attrs: Mapping[str, Any], history: list[dict[str, Any]]) -> dict[str, Any]:
    """An image's configuration (OCI image specification, config.md) without times.

    `attrs` as `docker inspect` shows them; `history` as the engine's API returns it, newest line first.
    """
    layers = attrs["RootFS"]["Layers"]
    lines = []
    for line in reversed(history):
        created_by = re.sub(r"\bFRACTAL_FORCE=[\d.]+", "FRACTAL_FORCE=", line["CreatedBy"])
        pinned: dict[str, Any] = {"created": EPOCH, "created_by": created_by, "comment": line.get("Comment", "")}
        pinned = {key: value for key, value in pinned.items() if value}
        if not _makes_layer(line):
            pinned["empty_layer"] = True
        lines.append(pinned)
    if sum("empty_layer" not in line for line in lines) != len(layers):
        lines = [{"created": EPOCH, "created_by": "a layer"} for _ in layers]
    return {
        "architecture": attrs["Architecture"],
        **({"variant": attrs["Variant"]} if attrs.get("Variant") else {}),
        "config": {key: attrs["Config"][key] for key in KEPT if attrs["Config"].get(key)},
        "created": EPOCH,
        "history": lines,
        "os": attrs["Os"],
        "rootfs": {"type": "layers", "diff_ids": layers},
    }


def layer_history(history: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The history's lines of those instructions that made the `count` layers of an image, the lowest first."""
    lines = [line for line in reversed(history) if _makes_layer(line)]
    return lines if len(lines) == count else [{"CreatedBy": "a layer", "Size": 1}] * count


def _makes_layer(line: Mapping[str, Any]) -> bool:
    return line["Size"] != 0 or not WITHOUT_LAYER.match(line["CreatedBy"])
