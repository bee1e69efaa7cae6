"""An image as a value: each method returns a new Image with a layer more. Pure but for reading local files.

    image = (
        Image.debian_slim()
        .apt_install("gcc", "python3")
        .pip_install("rich==15.0.0")
        .add_local_python_source("fractal")
    )
    print(image.dockerfile())

Names and semantics are Modal's where Modal has them (https://modal.com/docs/reference/modal.Image): arguments are
checked when they are written, local files added last are layered last, and a build step after local files that are not
copied is an error. Unlike Modal's, local files are always in the image, as its last layer, and Python packages have to
be pinned. build.py makes an image of it; what its builder can do is an argument of the rendering, no fact about it.
"""

import json
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Self

import pathspec
from packaging.requirements import InvalidRequirement, Requirement

from fractal.records import InputError
from fractal.sandbox.source import content_hash

CONTEXT_LIMIT_MB = 100  # of local files in one image; ours are under 2 MB, weights and data belong in a volume
PYTHON_SOURCES = "/app"  # where add_local_python_source puts modules, and PYTHONPATH
VENV = "/opt/venv"
UV_LOCK = "docker/uv.lock"  # uv itself, with hashes

# What never gets into an image, by name (gitignore's patterns).
CACHES = ("__pycache__/", "*.py[cod]", "*.egg-info/", ".venv/", "node_modules/", ".*_cache/", ".hypothesis/", ".cache/")
PRIVATE = (
    ".git", ".git/", "/runs/", ".env", ".env.*", "*.pem", "*.key", "id_rsa*", "id_ecdsa*", "id_ed25519*", ".ssh/",
    ".netrc", ".pypirc", ".npmrc", ".aws/", ".docker/", ".kube/", ".gnupg/", "credentials.json", "secrets/",
)  # fmt: skip
WEIGHTS = ("*.safetensors", "*.gguf", "*.pt", "*.pth", "pytorch_model*.bin")
IGNORED = pathspec.GitIgnoreSpec.from_lines([*CACHES, *PRIVATE, *WEIGHTS])

# Every RUN goes through this shell. It sets back the times of what the RUN wrote, so that the same contents are the
# same layer on any machine. Ten minutes earlier: the builder makes mount points before the RUN starts, and no Debian
# package is that young.
SHELL = (
    "begun=@$(($(date +%s) - 600)); sh -ec \"$0\" && { find / -xdev -newermt \"$begun\" "
    "-exec touch -hcd @0 {} + 2> /dev/null || :; }"
)  # fmt: skip


class ImageError(InputError):
    """An image that cannot be what was written: says which argument, and what to write."""


@dataclass(frozen=True, slots=True)
class Rendering:
    """What the builder at hand can do and what the network asks for. The image is the same for each."""

    mounts: bool = True  # BuildKit's cache, secret and bind mounts
    settings: bool = False  # secrets for a closed network: settings (shell), ca, apt, sources; see build.py
    wheels: str | None = None  # an image that holds a folder of wheels, instead of PyTorch's own index


COMMITTED = Rendering()


@dataclass(frozen=True, slots=True)
class Local:
    """A local file or folder on its way into the image."""

    source: Path
    context: str  # its path in the build context
    target: str  # absolute, in the image
    ignore: tuple[str, ...] = ()

    def files(self) -> dict[str, Path]:
        """Path in the build context -> file, without what is ignored. Raises ImageError for what cannot be copied."""
        if not self.source.is_dir():
            return {self.context: self.source}
        own = pathspec.GitIgnoreSpec.from_lines(self.ignore)
        found: dict[str, Path] = {}
        folders = [self.source]
        while folders:
            for path in sorted(folders.pop().iterdir()):
                relative = path.relative_to(self.source).as_posix()
                is_folder = path.is_dir() and not path.is_symlink()
                name = relative + "/" * is_folder
                if IGNORED.match_file(f"{self.context}/{name}") or own.match_file(name):
                    continue
                if is_folder:
                    folders.append(path)
                elif path.is_file() or path.is_symlink():
                    found[f"{self.context}/{relative}"] = path
                else:
                    raise ImageError(f"{path}: is neither a file nor a folder. Leave it out: ignore=[{relative!r}].")
        return dict(sorted(found.items()))


@dataclass(frozen=True, slots=True)
class Step:
    """One layer, or one line of metadata. `kind` says how it is rendered."""

    kind: str  # apt, python, run, meta, add, force
    text: tuple[str, ...] = ()  # packages, words, commands or Dockerfile lines
    comment: str = ""
    options: str = ""  # the extra_options escape
    locals: tuple[Local, ...] = ()
    torch_backend: str = ""


@dataclass(frozen=True, slots=True)
class Call:
    """A method call as written, to show a corrected program."""

    method: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __str__(self) -> str:
        words = [*map(repr, self.args), *(f"{key}={value!r}" for key, value in self.kwargs.items())]
        return f"{self.method}({', '.join(words)})"


@dataclass(frozen=True, slots=True)
class Image:
    """See the module. Equal values are equal images; `digest` is their name."""

    base: str  # a tag with or without a digest, or "" below a Dockerfile or root file system of the user's own
    root: Path  # local paths are relative to it
    prologue: tuple[str, ...] = ()  # lines instead of FROM ${BASE}
    steps: tuple[Step, ...] = ()
    last: tuple[Step, ...] = ()  # local files that are not copied: layered last
    context_locals: tuple[Local, ...] = ()  # what the prologue needs
    comment: str = ""  # opens the Dockerfile
    calls: tuple[Call, ...] = field(default=(), compare=False)
    forced: bool = False

    # --- where to begin

    @classmethod
    def from_registry(cls, tag: str, *, root: str | Path = ".", digests: Mapping[str, str] | None = None) -> Self:
        """Begin with a registry's image; `digests` (tag -> sha256:...) pins it."""
        if not re.fullmatch(r"[a-z0-9][\w.\-/:]*(@sha256:[0-9a-f]{64})?", tag):
            raise ImageError(f"from_registry({tag!r}): not an image's name. Write repository:tag.")
        if ":" not in tag.rpartition("/")[2]:
            raise ImageError(f"from_registry({tag!r}): has no tag, and what `latest` means changes. Write {tag}:TAG.")
        digest = (digests or {}).get(tag)
        return cls(f"{tag}@{digest}" if digest else tag, _root(root), calls=(Call("Image.from_registry", (tag,), {}),))

    @classmethod
    def debian_slim(cls, *, root: str | Path = ".", digests: Mapping[str, str] | None = None) -> Self:
        """Begin with Debian 12 and nothing else, not even Python."""
        made = cls.from_registry("debian:bookworm-slim", root=root, digests=digests)
        return replace(made, calls=(Call("Image.debian_slim", (), {}),))

    @classmethod
    def from_dockerfile(cls, path: str | Path, *, context: str | Path | None = None, root: str | Path = ".") -> Self:
        """Begin with what a Dockerfile makes; its context is the folder it lies in, or `context`."""
        base = _root(root)
        file = _local("from_dockerfile", base, path)
        text = file.read_text()
        lines = text.rstrip().splitlines()
        froms = [i for i, line in enumerate(lines) if re.match(r"FROM\s", line, re.IGNORECASE)]
        if not froms:
            raise ImageError(f"from_dockerfile({str(path)!r}): has no FROM line.")
        words = lines[froms[-1]].split()
        if words[-2].lower() == "as":  # the last stage has a name: ours follows it
            lines.append(f"FROM {words[-1]} AS base")
        else:
            lines[froms[-1]] += " AS base"
        folder = _local("from_dockerfile", base, context) if context is not None else file.parent
        copies = any(re.match(r"(COPY|ADD)\s", line, re.IGNORECASE) for line in lines)
        needed = (Local(folder, ".", ""),) if copies else ()
        call = Call("Image.from_dockerfile", (str(path),), {})
        return cls("", base, tuple(lines), context_locals=needed, calls=(call,))

    @classmethod
    def from_rootfs(cls, path: str | Path, *, root: str | Path = ".") -> Self:
        """Begin with a root file system in a tar archive, as mmdebstrap makes it."""
        base = _root(root)
        file = _local("from_rootfs", base, path)
        if not re.search(r"\.tar(\.gz|\.xz|\.bz2)?$", file.name):
            raise ImageError(f"from_rootfs({str(path)!r}): not a tar archive by its name (.tar, .tar.gz, .tar.xz).")
        local = Local(file, _context(base, file), "/")
        lines = ("FROM scratch AS base", f"ADD {_copy_words(local.context, '/')}")
        return cls("", base, lines, context_locals=(local,), calls=(Call("Image.from_rootfs", (str(path),), {}),))

    # --- build steps

    def apt_install(self, *packages: str, extra_options: str = "") -> Self:
        """Debian packages, sorted so that their order never breaks the cache; NAME or NAME=VERSION."""
        call = Call("apt_install", packages, _given(extra_options=extra_options))
        _check_words(call, packages, r"[a-z0-9][a-z0-9+.\-]*(:[a-z0-9]+)?(=[\w.+~:\-]+)?", "a Debian package")
        comment = "Debian packages, as the base's release has them; which ones: /usr/share/fractal/debian-packages."
        return self._with(call, Step("apt", tuple(sorted(set(packages))), comment, _options(call, extra_options)))

    def pip_install(self, *packages: str, extra_options: str = "", torch_backend: str = "") -> Self:
        """Python packages, each pinned: NAME==VERSION, or NAME @ URL with the file's #sha256=.

        What they depend on is resolved when the image is built: prefer `uv_sync`. `torch_backend`: cpu, cu130, ...
        takes PyTorch's packages from PyTorch's own index.
        """
        call = Call("pip_install", packages, _given(extra_options=extra_options, torch_backend=torch_backend))
        _check_words(call, packages, r"[A-Za-z0-9].*", "a Python package")
        for package in packages:
            _check_pinned(call, package)
        if torch_backend and not re.fullmatch(r"cpu|auto|cu\d+|rocm[\d.]+|xpu", torch_backend):
            raise ImageError(f"{call}: torch_backend={torch_backend!r}: write cpu, auto, or cu130 and the like.")
        words = tuple(sorted(set(packages)))
        options = _options(call, extra_options)
        comment = "Python packages, pinned."
        return self._with(call, Step("python", words, comment, options, torch_backend=torch_backend))

    def uv_sync(self, lock: str, *, extra_options: str = "") -> Self:
        """Exactly the Python packages of a lock file: requirements with versions and hashes, nothing resolved anew."""
        call = Call("uv_sync", (lock,), _given(extra_options=extra_options))
        file = _local("uv_sync", self.root, lock)
        _check_lock(call, file)
        local = Local(file, _context(self.root, file), "")
        comment = f"Python packages, exactly those of {local.context}."
        return self._with(call, Step("python", (), comment, _options(call, extra_options), locals=(local,)))

    def run_commands(self, *commands: str | Iterable[str], comment: str = "") -> Self:
        """Shell commands, a layer for each."""
        call = Call("run_commands", commands, _given(comment=comment))
        flat = [one for many in commands for one in ([many] if isinstance(many, str) else many)]
        if not flat:
            raise ImageError(f"{call}: says no command.")
        for command in flat:
            if not isinstance(command, str) or not command.strip():
                raise ImageError(f"{call}: {command!r} is no command.")
            if "\n" in command or command.rstrip().endswith("\\"):
                raise ImageError(f"{call}: a command is one line. Join lines with && or give them one by one.")
            if command.lstrip().startswith("--"):
                raise ImageError(f"{call}: {command!r} begins with an option, which Docker would take for itself.")
        return self._with(call, Step("run", tuple(flat), comment))

    def env(self, variables: Mapping[str, str]) -> Self:
        """Environment variables, as they stand: nothing in them is expanded."""
        call = Call("env", (dict(variables),), {})
        for name, value in variables.items():
            if not re.fullmatch(r"[A-Za-z_]\w*", name):
                raise ImageError(f"{call}: {name!r} is no variable's name.")
            if not isinstance(value, str) or "\n" in value:
                raise ImageError(f"{call}: {name} has to be a text of one line, not {value!r}.")
            if re.search(r"(TOKEN|SECRET|PASSWORD|API_KEY)$", name) and value:
                raise ImageError(f"{call}: {name} would be readable in the image. Give it to `docker run -e {name}`.")
        if not variables:
            raise ImageError(f"{call}: says no variable.")
        pairs = [f"{name}={shlex.quote(value)}" for name, value in sorted(variables.items())]
        return self._with(call, Step("meta", (" \\\n    ".join([f"ENV {pairs[0]}", *pairs[1:]]),)))

    def workdir(self, path: str) -> Self:
        """The folder in which later commands, and the program, run."""
        call = Call("workdir", (path,), {})
        return self._with(call, Step("meta", (f"WORKDIR {_absolute(call, path)}",)))

    def user(self, user: str) -> Self:
        """Who runs later commands, and the program: a name or a number, with or without a group."""
        call = Call("user", (user,), {})
        if not re.fullmatch(r"[a-z_][\w\-]*(:[a-z_][\w\-]*)?|\d+(:\d+)?", user):
            raise ImageError(f"{call}: not a user. Write 1000:1000 or a name.")
        return self._with(call, Step("meta", (f"USER {user}",)))

    def entrypoint(self, words: Iterable[str]) -> Self:
        """The program that the container runs."""
        listed = [words] if isinstance(words, str) else list(words)
        call = Call("entrypoint", (listed,), {})
        if isinstance(words, str) or not all(isinstance(word, str) for word in listed):
            raise ImageError(f"{call}: write the words of the command as a list, such as {shlex.split(str(words))!r}.")
        return self._with(call, Step("meta", (f"ENTRYPOINT {json.dumps(listed)}",)))

    def pipe(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Self:
        """function(self, ...): for steps that several images share."""
        made = function(self, *args, **kwargs)
        if not isinstance(made, type(self)):
            raise ImageError(f"pipe({getattr(function, '__name__', function)!r}): gave no Image back.")
        return made

    def force_build(self) -> Self:
        """Build what follows anew, whatever is cached."""
        return replace(self._with(Call("force_build", (), {}), Step("force")), forced=True)

    def title(self, comment: str) -> Self:
        """What the image is for, as the first lines of its Dockerfile."""
        return replace(self, comment=comment.strip())

    # --- local files

    def add_local_file(self, local: str | Path, remote: str, *, copy: bool = False) -> Self:
        """A file of this machine, layered last; with copy=True in this place, so that later steps see it."""
        call = Call("add_local_file", (str(local), remote), _given(copy=copy))
        file = _local("add_local_file", self.root, local)
        target = _absolute(call, remote)
        if not file.is_file():
            raise ImageError(f"{call}: is no file. A folder: add_local_dir.")
        context = _context(self.root, file)
        if IGNORED.match_file(context):
            raise ImageError(f"{call}: secrets, weights and caches do not go into an image. Mount it when you run it.")
        place = f"{target}/{file.name}" if remote.endswith("/") else target
        return self._add(call, (Local(file, context, place),), copy)

    def add_local_dir(self, local: str | Path, remote: str, *, copy: bool = False, ignore: Iterable[str] = ()) -> Self:
        """A folder of this machine; `ignore`: gitignore's patterns, besides caches, secrets and weights."""
        patterns = (ignore,) if isinstance(ignore, str) else tuple(ignore)
        call = Call("add_local_dir", (str(local), remote), _given(copy=copy, ignore=list(patterns)))
        folder = _local("add_local_dir", self.root, local)
        if not folder.is_dir():
            raise ImageError(f"{call}: is no folder. A file: add_local_file.")
        target = _absolute(call, remote)
        return self._add(call, (Local(folder, _context(self.root, folder), target, patterns),), copy)

    def add_local_python_source(self, *modules: str, copy: bool = False, ignore: Iterable[str] = ()) -> Self:
        """Python modules or packages below `root`, importable in the image; a package's data files come along."""
        patterns = (ignore,) if isinstance(ignore, str) else tuple(ignore)
        call = Call("add_local_python_source", modules, _given(copy=copy, ignore=list(patterns)))
        _check_words(call, modules, r"[A-Za-z_]\w*", "a top-level module's name")
        found = []
        for module in modules:
            places = [self.root / module, self.root / f"{module}.py"]
            path = next((p for p in places if (p / "__init__.py").is_file() or p.is_file()), None)
            if path is None:
                raise ImageError(f"{call}: there is no {module}.py and no package {module} in {self.root}.")
            found.append(Local(path, _context(self.root, path), f"{PYTHON_SOURCES}/{path.name}", patterns))
        return self._add(call, tuple(found), copy, f"ENV PYTHONPATH={PYTHON_SOURCES}")

    def _add(self, call: Call, found: tuple[Local, ...], copy: bool, *lines: str) -> Self:
        step = Step("add", lines, locals=found)
        if copy:
            return self._with(call, step)
        return replace(self, last=(*self.last, step), calls=(*self.calls, call))

    def _with(self, call: Call, step: Step) -> Self:
        if self.last:
            raise ImageError(_too_late(self.calls, call))
        return replace(self, steps=(*self.steps, step), calls=(*self.calls, call))

    # --- what it is

    def dockerfile(self, rendering: Rendering = COMMITTED) -> str:
        """Its Dockerfile: the same value gives the same text, always."""
        stages = [self._base()]
        if any(step.kind == "python" for step in self.steps):
            stages.append(_uv_stage(rendering))
        if rendering.wheels:
            stages.append(["", f"FROM {rendering.wheels} AS wheels"])
        final = ["", "FROM base"]
        python_yet = False
        adds = 0
        steps = _merged(self.steps)
        for i, step in enumerate([*steps, *_merged(self.last)]):
            final.append("")
            if i == len(steps):
                final.append("# Local files last: an edit of them builds and pushes this layer alone.")
            if step.comment:
                final += [f"# {line}" for line in step.comment.splitlines()]
            match step.kind:
                case "apt":
                    final += _apt(step.text, step.options, rendering)
                case "python":
                    if not python_yet:
                        final += _venv(rendering)
                    python_yet = True
                    final += _python(step, rendering)
                case "run":
                    for command in step.text:
                        final += _run([], [command], rendering)
                case "add":
                    adds += 1
                    stages.append(_local_stage(step, adds))
                    final += [*step.text, f"COPY --from=local{adds} /local/ /"]
                case "force":
                    final.append("ARG FRACTAL_FORCE=")
                case _:
                    final += step.text
        title = [f"# {line}".rstrip() for line in self.comment.splitlines()]
        lines = [*title, *(line for stage in stages for line in stage), *final]
        return re.sub(r"\n{3,}", "\n\n", "\n".join(lines).strip() + "\n")

    def _base(self) -> list[str]:
        shell = f"SHELL {json.dumps(['/bin/sh', '-c', SHELL])}"
        why = [
            "# It sets back the times of what a RUN wrote: the same contents are the same layer on any machine.",
            shell,
        ]
        return [*(self.prologue or (f"ARG BASE={self.base}", "FROM ${BASE} AS base")), *why]

    def context(self) -> dict[str, Path]:
        """The build context: path in it -> file here. Raises ImageError if it is too large, naming what is."""
        files: dict[str, Path] = {}
        for local in self._locals():
            for name, path in local.files().items():
                name = name.removeprefix("./")
                if files.setdefault(name, path).resolve() != path.resolve():
                    raise ImageError(
                        f"{path} and {files[name]}: two files outside {self.root} have one name. Rename one."
                    )
        if any(step.kind == "python" for step in self.steps):
            files[UV_LOCK] = _uv_lock(self.root)
        sizes = {name: path.lstat().st_size for name, path in files.items()}
        if (total := sum(sizes.values())) > CONTEXT_LIMIT_MB * 1e6 and not self.prologue:
            largest = sorted(_by_folder(sizes).items(), key=lambda item: -item[1])[:5]
            named = ", ".join(f"{name} ({size / 1e6:,.0f} MB)" for name, size in largest)
            raise ImageError(
                f"The local files of this image are {total / 1e6:,.0f} MB, over {CONTEXT_LIMIT_MB} MB. The largest: "
                f"{named}. Leave them out with ignore=[...]; data and weights belong in a volume."
            )
        return dict(sorted(files.items()))

    def _locals(self) -> list[Local]:
        return [*self.context_locals, *(local for step in (*self.steps, *self.last) for local in step.locals)]

    def parts(self) -> dict[str, str]:
        """What the image is made of, in order: a name for people -> a hash. Where two differ, a rebuild begins."""
        base = "\n".join([*self._base()])
        found = {f"base {self.base or 'of its own'}": content_hash({"": base.encode(), **_read(self.context_locals)})}
        for step in (*self.steps, *self.last):
            names = ", ".join(local.context for local in step.locals)
            what = {"apt": "Debian packages", "python": "Python packages", "run": "command", "meta": "setting"}
            key = f"{what.get(step.kind, 'local files')}: {names or shlex.join(step.text)[:60]}"
            while key in found:
                key += "'"
            places = [(local.context, local.target, local.ignore) for local in step.locals]
            said = repr((step.kind, step.text, step.options, step.torch_backend, places))
            found[key] = content_hash({"": said.encode(), **_read(step.locals)})
        return found

    def digest(self) -> str:
        """sha256 over the Dockerfile and the context: names the image, whatever builder makes it."""
        files = {name: _content(path) for name, path in self.context().items()}
        return content_hash({"Dockerfile": self.dockerfile().encode(), **files})

    def __str__(self) -> str:
        return _program(self.calls)


# --- rendering: one function for each kind of step --------------------------------------------------------------------


def _run(mounts: list[str], commands: list[str], rendering: Rendering, network: bool = True) -> list[str]:
    """A RUN with its mounts, commands joined by &&."""
    if not rendering.mounts:
        mounts = []
    if rendering.settings and network:
        # Below a tmpfs no mount point stays behind in the layer.
        secrets = [f"type=secret,id={name},mode=0444" for name in ("settings", "ca", "apt", "sources")]
        mounts = ["type=tmpfs,target=/run", *secrets, *(m for m in mounts if m != "type=tmpfs,target=/run")]
        commands = [". /run/secrets/settings", *commands]
    flags = [f"--mount={mount} \\\n   " for mount in mounts]
    return [" ".join(["RUN", *flags, " \\\n && ".join(commands)])]


def _apt(packages: tuple[str, ...], options: str, rendering: Rendering) -> list[str]:
    names = [package.split("=")[0] for package in packages]
    caches = [f"type=cache,target={folder},sharing=locked" for folder in ("/var/cache/apt", "/var/lib/apt/lists")]
    install = " ".join(["apt-get install -y --no-install-recommends", *([options] if options else []), *packages])
    commands = [
        f"{{ dpkg -s {' '.join(names)} > /dev/null 2>&1 \\\n"
        f"   || {{ apt-get update && DEBIAN_FRONTEND=noninteractive {install}; }}; }}",
        "mkdir -p /usr/share/fractal",
        "dpkg-query -W > /usr/share/fractal/debian-packages",
        # Emptied, not removed: what hides a file of the base has a time that nobody can set.
        "find /var/log /var/cache -xdev -type f ! -path '*/debconf/*' -exec truncate -s 0 {} +"
        + ("" if rendering.mounts else " && rm -rf /var/lib/apt/lists/* /var/cache/apt/*"),
    ]
    return _run(caches, commands, rendering)


def _uv_stage(rendering: Rendering) -> list[str]:
    lines = ["", "# uv installs the Python packages and stays out of the image.", "FROM base AS uv"]
    lines += _apt(("python3-venv",), "", rendering)
    lock = f"type=bind,source={UV_LOCK},target=/run/uv.lock"
    commands = ["python3 -m venv /uv", "/uv/bin/pip install --no-cache-dir --no-deps --require-hashes -r {lock}"]
    if rendering.mounts:
        commands = [command.format(lock="/run/uv.lock") for command in commands]
        return [*lines, *_run(["type=tmpfs,target=/run", lock], commands, rendering)]
    commands = [command.format(lock="/uv.lock") for command in commands]
    return [*lines, f"COPY {UV_LOCK} /uv.lock", *_run([], commands, rendering)]


UV_MOUNTS = ("type=tmpfs,target=/run", "type=bind,from=uv,source=/uv/bin/uv,target=/run/uv")


def _venv(rendering: Rendering) -> list[str]:
    lines = [] if rendering.mounts else ["COPY --from=uv /uv/bin/uv /usr/local/bin/uv"]
    uv = "/run/uv" if rendering.mounts else "uv"
    run = _run([*UV_MOUNTS], [f"{uv} venv --no-cache --quiet {VENV}"], rendering, network=False)
    return [*lines, *run, f"ENV VIRTUAL_ENV={VENV} \\\n    PATH={VENV}/bin:$PATH"]


def _python(step: Step, rendering: Rendering) -> list[str]:
    """uv pip install, compiled once and for all: a container that may not write would compile at each start."""
    mounts = [*UV_MOUNTS, "type=cache,target=/run/cache"]
    uv = "/run/uv --cache-dir /run/cache" if rendering.mounts else "uv --no-cache"
    words = ["PYC_INVALIDATION_MODE=UNCHECKED_HASH", uv, "pip install --link-mode copy --compile-bytecode"]
    lines = []
    if step.locals:
        (lock,) = step.locals
        name = f"/{'run' if rendering.mounts else 'tmp'}/{PurePosixPath(lock.context).name}"
        mounts.append(f"type=bind,source={lock.context},target={name}")
        words += ["--no-deps --require-hashes", f"-r {name}"]
        if not rendering.mounts:
            lines.append(f"COPY {lock.context} {name}")
    if rendering.wheels:
        mounts.append("type=bind,from=wheels,target=/run/wheels")
        words.append("--find-links /run/wheels")
    elif step.torch_backend:
        words.append(f"--torch-backend {step.torch_backend}")
    words += [step.options, *(shlex.quote(package) for package in step.text)]
    return [*lines, *_run(mounts, [" ".join(filter(None, words))], rendering)]


def _merged(steps: Iterable[Step]) -> list[Step]:
    """Local files that are added one after the other are one layer."""
    merged: list[Step] = []
    for step in steps:
        if merged and step.kind == merged[-1].kind == "add":
            lines = tuple(dict.fromkeys(merged[-1].text + step.text))
            merged[-1] = replace(merged[-1], text=lines, locals=merged[-1].locals + step.locals)
        else:
            merged.append(step)
    return merged


def _local_stage(step: Step, number: int) -> list[str]:
    """Local files get owner, mode and times of their own: the layer depends on their contents alone."""
    lines = ["", f"FROM base AS local{number}"]
    for local in step.locals:
        lines.append(f"COPY {_copy_words(local.context + '/' * local.source.is_dir(), '/local' + local.target)}")
    return [*lines, "RUN chmod -R u=rwX,go=rX /local && find /local -exec touch -hd @0 {} +"]


def _copy_words(source: str, target: str) -> str:
    return json.dumps([source, target]) if re.search(r"[\s\[\]*?$]", source + target) else f"{source} {target}"


# --- checks -----------------------------------------------------------------------------------------------------------


def _check_words(call: Call, words: Iterable[str], pattern: str, what: str) -> None:
    listed = list(words)
    if not listed:
        raise ImageError(f"{call}: names nothing.")
    for word in listed:
        if isinstance(word, str) and word.startswith("-"):
            raise ImageError(f"{call}: {word} is an option. Options go into extra_options={word!r}.")
        if not isinstance(word, str) or not re.fullmatch(pattern, word):
            hint = " Write the names one by one, not as a list." if isinstance(word, list | tuple) else ""
            raise ImageError(f"{call}: {word!r} is not {what}.{hint}")


def _check_pinned(call: Call, package: str) -> None:
    try:
        wanted = Requirement(package)
    except InvalidRequirement as error:
        raise ImageError(f"{call}: {package!r} is not a requirement: {str(error).splitlines()[0]}.") from error
    if wanted.url:
        if not re.search(r"#.*sha256=[0-9a-f]{64}", wanted.url):
            raise ImageError(f"{call}: {package!r} has no hash. Add #sha256=... to the address.")
        return
    pins = [one for one in wanted.specifier if one.operator in ("==", "===") and not one.version.endswith(".*")]
    if len(pins) != 1 or len(wanted.specifier) != 1:
        raise ImageError(f"{call}: {package!r} is not pinned. Write {wanted.name}==VERSION.")


def _check_lock(call: Call, file: Path) -> None:
    """Every requirement of a lock file has a version and at least one hash."""
    text = re.sub(r"\\\n", " ", file.read_text())
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    if not lines:
        raise ImageError(f"{call}: locks nothing.")
    for line in lines:
        name = line.split()[0]
        if name.startswith("-") or "==" not in name:
            raise ImageError(f"{call}: {name!r} is not NAME==VERSION. Lock anew: invoke lock.")
        if not re.search(r"--hash=sha256:[0-9a-f]{64}", line):
            raise ImageError(f"{call}: {name} has no hash. Lock anew: invoke lock.")


def _absolute(call: Call, path: str) -> str:
    pure = PurePosixPath(path)
    if not pure.is_absolute() or ".." in pure.parts or re.search(r"[\n$]", path) or str(pure) == "/":
        raise ImageError(f"{call}: {path!r} is no absolute path below /.")
    return str(pure)


def _options(call: Call, options: str) -> str:
    if "\n" in options:
        raise ImageError(f"{call}: extra_options is one line.")
    return options.strip()


def _given(**kwargs: Any) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if value}


def _program(calls: Iterable[Call]) -> str:
    first, *rest = map(str, calls)
    return "\n".join([f"    {first}", *(f"        .{call}" for call in rest)])


def _too_late(calls: tuple[Call, ...], late: Call) -> str:
    copied = [
        replace(call, kwargs={"copy": True, **call.kwargs}) if call.method.startswith("add_local_") else call
        for call in calls
    ]
    adds = [call for call in calls if call.method.startswith("add_local_") and not call.kwargs.get("copy")]
    last = [*(call for call in calls if call not in adds), late, *adds]
    return (
        f"{late.method}: a build step after local files. Local files are layered last, so that an edit of them builds "
        f"nothing else. Add them last:\n\n{_program(last)}\n\nor, if the step needs them, copy them in their place:\n\n"
        f"{_program([*copied, late])}"
    )


# --- files ------------------------------------------------------------------------------------------------------------


def _root(root: str | Path) -> Path:
    path = Path(root).resolve()
    if not path.is_dir():
        raise ImageError(f"root={str(root)!r}: is no folder.")
    return path


def _local(method: str, root: Path, path: str | Path) -> Path:
    found = root / Path(path).expanduser()
    if not found.exists():
        raise ImageError(f"{method}({str(path)!r}): there is no such file or folder in {root}.")
    return found


def _context(root: Path, path: Path) -> str:
    """Its path in the build context; what lies outside `root` is put into a folder of its own."""
    try:
        return path.resolve().relative_to(root).as_posix()
    except ValueError:
        return f"outside/{path.name}"


def _uv_lock(root: Path) -> Path:
    """uv's own lock: the project's, else ours."""
    own = root / UV_LOCK
    return own if own.is_file() else Path(__file__).resolve().parents[2] / UV_LOCK


def _read(found: Iterable[Local]) -> dict[str, bytes]:
    return {name: _content(path) for local in found for name, path in local.files().items()}


def _content(path: Path) -> bytes:
    return b"-> " + str(path.readlink()).encode() if path.is_symlink() else path.read_bytes()


def _by_folder(sizes: Mapping[str, int]) -> dict[str, int]:
    """Sizes by the first two parts of the path."""
    totals: dict[str, int] = {}
    for name, size in sizes.items():
        key = "/".join(name.split("/")[:2])
        totals[key] = totals.get(key, 0) + size
    return totals
