"""A step of an image as lines of a Dockerfile, for BuildKit and the network at hand. Pure."""

import json
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import PurePosixPath
from typing import Literal

from fractal.images.context import ImageError, LocalPath

VENV = "/opt/venv"
UV_LOCK = "docker/uv.lock"  # uv itself, with hashes
OUR_STAGES = re.compile(r"uv|wheels|(part|local)\d+", re.I)
FORCE = "ARG FRACTAL_FORCE="  # the builder is given another value each time
DIRECTIVE = re.compile(r"#\s*[A-Za-z][A-Za-z0-9]*\s*=")

# Every RUN goes through this shell. It sets back the times of what the RUN wrote, so that the same contents are the
# same layer on any machine. Ten minutes earlier: the builder makes mount points before the RUN starts, and no Debian
# package is that young.
SHELL = (
    "begun=@$(($(date +%s) - 600)); sh -ec \"$0\" && { find / -xdev -newermt \"$begun\" "
    "-exec touch -hcd @0 {} + 2> /dev/null || :; }"
)  # fmt: skip


SHELL_LINES = (
    "# It sets back the times of what a RUN wrote: the same contents are the same layer on any machine.",
    f"SHELL {json.dumps(['/bin/sh', '-c', SHELL])}",
)


@dataclass(frozen=True, slots=True)
class Rendering:
    """What the network asks for. The image is the same for each rendering."""

    settings: bool = False  # secrets for a closed network: settings (shell), ca, apt, sources; see network.py
    wheels: str | None = None  # an image that holds a folder of wheels, instead of PyTorch's own index


COMMITTED = Rendering()


@dataclass(frozen=True, slots=True)
class Step:
    """One layer, or one line of metadata. `kind` says how it is rendered."""

    kind: Literal["apt", "python", "run", "meta", "add", "force"]
    text: tuple[str, ...] = ()  # packages, commands or Dockerfile lines
    comment: str = ""
    options: str = ""  # the extra_options escape
    locals: tuple[LocalPath, ...] = ()
    torch_backend: str = ""


def dockerfile(
    comment: str, base: list[str], steps: tuple[Step, ...], last: tuple[Step, ...], rendering: Rendering
) -> str:
    """The whole Dockerfile: a comment, the lines that make stage `base`, the steps, local files last."""
    directives = list(takewhile(DIRECTIVE.match, base))  # these have to come first
    lines = [*directives, *(f"# {line}".rstrip() for line in comment.splitlines()), *base[len(directives) :]]
    if any(step.kind == "python" for step in steps):
        lines += uv_stage(rendering)
    if rendering.wheels:
        lines += ["", f"FROM {rendering.wheels} AS wheels"]
    stage, body = "base", list[str]()  # of the stage that is being written: what it is FROM, and its lines
    copied = merged(steps)
    first_python = next((i for i, step in enumerate(copied) if step.kind == "python"), None)
    adds = 0
    for i, step in enumerate([*copied, *merged(last)]):
        if step.kind == "add":  # in a stage of their own, which sees the image so far
            adds += 1
            if body:
                lines += ["", f"FROM {stage} AS part{adds}", *body]
                stage, body = f"part{adds}", []
                if any(before.kind == "force" for before in copied[:i]):
                    body += ["", FORCE]  # an argument ends with its stage
            lines += local_stage(step, stage, adds)
        body.append("")
        if i == len(copied):
            body.append("# Local files last: an edit of them builds and pushes this layer alone.")
        body += [f"# {line}".rstrip() for line in step.comment.splitlines()]
        if i == first_python:
            body += venv(rendering)
        body += layer(step, rendering, adds)
    lines += ["", f"FROM {stage}", *body]
    return "\n".join(lines).strip("\n") + "\n"


def layer(step: Step, rendering: Rendering, number: int) -> list[str]:
    """The lines of a step in its stage."""
    match step.kind:
        case "apt":
            return _apt(step.text, step.options, rendering)
        case "python":
            return _python(step, rendering)
        case "run":
            return [line for command in step.text for line in _run([], [command], rendering)]
        case "add":
            return [*step.text, f"COPY --from=local{number} /local/ /"]
        case "force":
            return [FORCE]
    return list(step.text)


def _run(mounts: list[str], commands: list[str], rendering: Rendering, network: bool = True) -> list[str]:
    """A RUN with its mounts, commands joined by &&."""
    if rendering.settings and network:
        # Below a tmpfs no mount point stays behind in the layer.
        secrets = [f"type=secret,id={name},mode=0444" for name in ("settings", "ca", "apt", "sources")]
        mounts = ["type=tmpfs,target=/run", *secrets, *(m for m in mounts if m != "type=tmpfs,target=/run")]
        commands = [". /run/secrets/settings", *commands]
    flags = [f"--mount={mount} \\\n   " for mount in mounts]
    return [" ".join(["RUN", *flags, " \\\n && ".join(commands)])]


def _apt(packages: tuple[str, ...], options: str, rendering: Rendering) -> list[str]:
    caches = [f"type=cache,target={folder},sharing=locked" for folder in ("/var/cache/apt", "/var/lib/apt/lists")]
    install = " ".join(["apt-get install -y --no-install-recommends", *([options] if options else []), *packages])
    get = f"{{ apt-get update && DEBIAN_FRONTEND=noninteractive {install}; }}"
    if not options and not any("=" in package for package in packages):  # what the base has is right: it needs no apt
        get = f"{{ dpkg -s {' '.join(packages)} > /dev/null 2>&1 \\\n   || {get}; }}"
    commands = [
        get,
        "mkdir -p /usr/share/fractal",
        "dpkg-query -W > /usr/share/fractal/debian-packages",
        # Emptied, not removed: what hides a file of the base has a time that nobody can set.
        "find /var/log /var/cache -xdev -type f ! -path '*/debconf/*' -exec truncate -s 0 {} +",
    ]
    return _run(caches, commands, rendering)


def uv_stage(rendering: Rendering) -> list[str]:
    lines = ["", "# uv installs the Python packages and stays out of the image.", "FROM base AS uv"]
    lines += _apt(("python3-venv",), "", rendering)
    lock = f"type=bind,source={UV_LOCK},target=/run/uv.lock"
    install = "/uv/bin/pip install --no-cache-dir --no-deps --require-hashes -r /run/uv.lock"
    return [*lines, *_run(["type=tmpfs,target=/run", lock], ["python3 -m venv /uv", install], rendering)]


UV_MOUNTS = ("type=tmpfs,target=/run", "type=bind,from=uv,source=/uv/bin/uv,target=/run/uv")


def venv(rendering: Rendering) -> list[str]:
    run = _run([*UV_MOUNTS], [f"/run/uv venv --no-cache --quiet {VENV}"], rendering, network=False)
    return [*run, f"ENV VIRTUAL_ENV={VENV} \\\n    PATH={VENV}/bin:$PATH"]


def _python(step: Step, rendering: Rendering) -> list[str]:
    """uv pip install, with byte code: a container that may not write would compile at each start."""
    mounts = [*UV_MOUNTS, "type=cache,target=/run/cache"]
    command = ["PYC_INVALIDATION_MODE=UNCHECKED_HASH /run/uv --cache-dir /run/cache"]
    command.append("pip install --link-mode copy --compile-bytecode")
    if step.locals:
        (lock,) = step.locals
        name = f"/run/{PurePosixPath(lock.context).name}"
        mounts.append(f"type=bind,source={lock.context},target={name}")
        command.append(f"--no-deps --require-hashes -r {name}")
    if rendering.wheels:
        mounts.append("type=bind,from=wheels,target=/run/wheels")
        command.append("--find-links /run/wheels")
    elif step.torch_backend:
        command.append(f"--torch-backend {step.torch_backend}")
    command += [step.options, *(shlex.quote(package) for package in step.text)]
    return _run(mounts, [" ".join(filter(None, command))], rendering)


def merged(steps: Iterable[Step]) -> list[Step]:
    """Local files that are added one after the other are one layer."""
    merged: list[Step] = []
    for step in steps:
        if merged and step.kind == merged[-1].kind == "add":
            lines = tuple(dict.fromkeys(merged[-1].text + step.text))
            merged[-1] = replace(merged[-1], text=lines, locals=merged[-1].locals + step.locals)
        else:
            merged.append(step)
    return merged


# COPY would give folders that exist already, such as /tmp, the modes of ours; here ours get theirs.
COPY_MODES = """cd /local && chmod -R u=rwX,go=rX . && find . -exec touch -hd @0 {} + \\
 && find . -type d -exec sh -ec 'for d; do \\
      if [ -L "/$d" ]; then echo "error: ${d#.} is a link to $(readlink "/$d"): add files there"; exit 1; fi; \\
      if [ -d "/$d" ]; then chmod $(stat -c %a "/$d") "$d"; chown $(stat -c %u:%g "/$d") "$d"; fi; done' sh {} +"""


def local_stage(step: Step, stage: str, number: int) -> list[str]:
    """Local files get owner, mode and times of their own: the layer depends on their contents alone."""
    why = "# Local files: the same owner, modes and times everywhere. Folders that are there already keep their own."
    lines = ["", why, f"FROM {stage} AS local{number}", "USER 0", 'SHELL ["/bin/sh", "-ec"]']
    for local in step.locals:
        source = f"{local.context or '.'}/" if local.source.is_dir() else local.context
        lines.append(f"COPY {copy_arguments(source, '/local' + local.target)}")
    return [*lines, f"RUN {COPY_MODES}"]


def copy_arguments(source: str, target: str) -> str:
    """Arguments of COPY: plain where no character means something to Docker, else as a JSON list."""
    plain = all(re.fullmatch(r"[\w./@+=:,~%][\w./@+=:,~%\-]*", path) for path in (source, target))
    return f"{source} {target}" if plain else json.dumps([source, target], ensure_ascii=False)


# --- a Dockerfile of the user's own -----------------------------------------------------------------------------------


SPACE = r"(?:[ \t]|\\\n)+"  # a line may be continued
FROM = re.compile(rf"^FROM{SPACE}(?:--\S+{SPACE})?[^\s\\]+(?:{SPACE}AS{SPACE}(?P<name>\S+))?[ \t]*$", re.I | re.M)


def with_base_stage(call: str, text: str) -> tuple[str, ...]:
    """The lines of a Dockerfile, with `base` as the name of its last stage."""
    stages = list(FROM.finditer(text := text.rstrip()))
    if not stages:
        raise ImageError(f"{call}: has no FROM line. Write FROM and a base first.")
    *earlier, last = [(stage["name"] or "").lower() for stage in stages]
    taken = [name for name in (*earlier, last) if OUR_STAGES.fullmatch(name)]
    if taken := [*taken, *(name for name in earlier if name == "base")]:
        raise ImageError(f"{call}: its stage {taken[0]!r} has a name that ours has. Rename it.")
    if not last:
        end = stages[-1].end()
        text = f"{text[:end].rstrip()} AS base{text[end:]}"
    elif last != "base":
        text += f"\nFROM {stages[-1]['name']} AS base"
    return tuple(text.split("\n"))
