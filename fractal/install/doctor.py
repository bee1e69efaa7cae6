"""What this machine can do: one line a check, with its remedy. The stages' own checks are beside them (checks.py)."""

import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

import psutil
from rich.table import Table

from fractal import console
from fractal.install import docker_engine, gpu

State = Literal["ok", "missing", "optional"]
MARKS = {"ok": "[green]ok[/]", "missing": "[red]missing[/]", "optional": "[yellow]absent[/]"}


class Finding(NamedTuple):
    """The result of one check. "missing" stops the main job; "optional" does not."""

    name: str
    state: State
    found: str
    remedy: str = ""


def report(findings: Iterable[Finding]) -> int:
    """Print all findings; 0 if the main job can run here, else 3."""
    table = Table("check", "", "found", "remedy", title="what this machine can do", title_justify="left", box=None)
    missing = []
    for finding in findings:
        table.add_row(finding.name, MARKS[finding.state], finding.found, finding.remedy)
        if finding.state == "missing":
            missing.append(finding.name)
    console.say(table)
    console.say(f"doctor: {', '.join(missing)} missing" if missing else "doctor: the main job can run here")
    return 3 if missing else 0


def machine_checks() -> Iterator[Finding]:
    yield Finding("Python", "ok", ".".join(map(str, sys.version_info[:3])))
    yield _resources()
    for library in ("torch", "transformers"):
        try:
            yield Finding(library, "ok", metadata.version(library))
        except metadata.PackageNotFoundError:
            yield Finding(library, "missing", "not installed", "make setup, or pip install 'fractal[cpu]'")
    yield check_gpu()


def _resources() -> Finding:
    free_gib = shutil.disk_usage(Path.cwd()).free / 2**30
    memory_gib = psutil.virtual_memory().available / 2**30
    text = f"{free_gib:.0f} GiB disk free, {memory_gib:.0f} GiB memory free, {os.cpu_count()} processors"
    if free_gib < 1 or memory_gib < 2:
        return Finding("disk and memory", "missing", text, "make room: at least 1 GiB of disk and 2 GiB of memory")
    return Finding("disk and memory", "ok", text)


def check_gpu() -> Finding:
    if not gpu.has_gpu():
        return Finding("GPU", "optional", gpu.problem(), "the CPU decodes; a GPU does it a hundred times faster")
    names = "; ".join(f"{device.name}, {device.total_bytes / 2**30:.0f} GiB" for device in gpu.gpus())
    text = f"{names}, driver {gpu.driver_version()}"
    if gpu.torch_cuda() is None:
        return Finding("GPU", "optional", text, "the installed torch is for the CPU: run make setup")
    if problem := gpu.driver_problem():
        return Finding("GPU", "missing", text, problem)
    return Finding("GPU", "ok", text)


def check_docker() -> Finding:
    if problem := docker_engine.problem():
        return Finding("Docker", "missing", "no usable engine", problem)
    return Finding("Docker", "ok", docker_engine.address())
