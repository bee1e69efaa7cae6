"""A container image as a value: each method returns a new Image with a layer more. Pure but for reading local files.

    image = (
        Image.debian_slim()
        .apt_install("gcc", "python3")
        .pip_install("rich==15.0.0")
        .add_local_python_source("fractal")
    )
    print(image.dockerfile())

Names and semantics are Modal's where Modal has them (https://modal.com/docs/reference/modal.Image). Unlike Modal's,
local files are always in the image, as its last layer, and Python packages have to be pinned. build.py builds it.
"""

import json
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from fractal.images import image_checks as checks
from fractal.images import rendering
from fractal.images.context import (
    IGNORED,
    ImageError,
    LocalPath,
    check_consistent,
    check_size,
    context_path,
    dockerignore,
    hashed_contents,
    ignore_patterns,
    read_text,
    resolve,
)
from fractal.images.image_checks import describe
from fractal.images.rendering import COMMITTED, Rendering, Step
from fractal.images.secret_patterns import SECRET_NAME
from fractal.sandbox.host.source import content_hash

PYTHON_SOURCES = "/app"  # where add_local_python_source puts modules, and PYTHONPATH


@dataclass(frozen=True, slots=True)
class Image:
    """See the module. Equal values are equal images; `digest` names them."""

    base: str  # a tag with or without a digest, or "" below a Dockerfile or root file system of the user's own
    root: Path  # local paths are relative to it
    prologue: tuple[str, ...] = ()  # lines instead of FROM ${BASE}
    steps: tuple[Step, ...] = ()
    last: tuple[Step, ...] = ()  # local files that are not copied: layered last
    prologue_paths: tuple[LocalPath, ...] = ()  # what the prologue needs
    comment: str = ""  # the first lines of the Dockerfile
    forced: bool = False

    # --- where to begin

    @classmethod
    def from_registry(cls, tag: str, *, root: str | Path = ".", digests: Mapping[str, str] | None = None) -> Self:
        """Begin with a registry's image; `digests` (tag -> sha256:...) pins it."""
        digest = (digests or {}).get(tag)
        name = f"{tag}@{digest}" if digest else tag
        call = describe("Image.from_registry", name)
        match = checks.BASE_NAME.fullmatch(name)
        if match is None:
            raise ImageError(f"{call}: not an image's name. Write repository:tag, such as debian:bookworm-slim.")
        if match["tag"] in (None, ":latest") and match["digest"] is None:
            repository = tag.removesuffix(":latest")
            raise ImageError(f"{call}: names no version, and what `latest` means changes. Write {repository}:TAG.")
        return cls(name, _root(call, root))

    @classmethod
    def debian_slim(cls, *, root: str | Path = ".", digests: Mapping[str, str] | None = None) -> Self:
        """Begin with Debian 12 and nothing else, not even Python."""
        return cls.from_registry("debian:bookworm-slim", root=root, digests=digests)

    @classmethod
    def from_dockerfile(cls, path: str | Path, *, context: str | Path | None = None, root: str | Path = ".") -> Self:
        """Begin with what a Dockerfile makes; its context is the folder it lies in, or `context`.

        What its .dockerignore names stays out, and what never gets into an image; what later calls add is in there.
        """
        call = describe("Image.from_dockerfile", str(path), context=context and str(context))
        base = _root(call, root)
        file = resolve(call, base, path)
        text = read_text(call, file)
        folder = file.parent if context is None else resolve(call, base, context)
        if not folder.is_dir():
            raise ImageError(f"{call}: context={str(context)!r} is no folder. Write the folder that COPY reads from.")
        reads = re.search(r"^(COPY|ADD)\s|--mount", text, re.I | re.M)
        needed = (LocalPath(folder, "", "", dockerignore(call, folder, file)),) if reads else ()
        return cls("", base, rendering.with_base_stage(call, text), prologue_paths=needed)

    @classmethod
    def from_rootfs(cls, path: str | Path, *, root: str | Path = ".") -> Self:
        """Begin with a root file system in a tar archive, as mmdebstrap makes it."""
        call = describe("Image.from_rootfs", str(path))
        base = _root(call, root)
        file = resolve(call, base, path)
        if not re.search(r"\.tar(\.gz|\.xz|\.bz2)?$", file.name) or not file.is_file():
            raise ImageError(f"{call}: not a tar archive. Give a file that ends in .tar, .tar.gz, .tar.xz or .tar.bz2.")
        local = LocalPath(file, context_path(call, base, file), "/")
        lines = ("FROM scratch AS base", f"ADD {rendering.copy_arguments(local.context, '/')}")
        return cls("", base, lines, prologue_paths=(local,))

    # --- build steps

    def apt_install(self, *packages: str, extra_options: str = "") -> Self:
        """Debian packages, sorted so that their order never breaks the cache; NAME or NAME=VERSION."""
        call = describe("apt_install", *packages, extra_options=extra_options)
        checks.check_names(call, packages, checks.DEBIAN_PACKAGE, "a Debian package; write NAME or NAME=VERSION")
        comment = "Debian packages, as the base's release has them; which ones: /usr/share/fractal/debian-packages."
        options = checks.one_line_options(call, extra_options)
        return self._with(call, Step("apt", tuple(sorted(set(packages))), comment, options))

    def pip_install(self, *packages: str, extra_options: str = "", torch_backend: str = "") -> Self:
        """Python packages, each pinned: NAME==VERSION, or NAME @ URL with the file's #sha256=.

        What they depend on is resolved when the image is built: prefer `uv_sync`. `torch_backend`: cpu, cu130, ...
        takes PyTorch's packages from PyTorch's own index.
        """
        call = describe("pip_install", *packages, extra_options=extra_options, torch_backend=torch_backend)
        checks.check_names(call, packages, r"[A-Za-z0-9].*", "a Python package; write NAME==VERSION")
        for package in packages:
            checks.check_pinned(call, package)
        if torch_backend and not checks.is_match(r"cpu|auto|cu\d+|rocm[\d.]+|xpu", torch_backend):
            raise ImageError(f"{call}: torch_backend={torch_backend!r}: write cpu, auto, or cu130 and the like.")
        names, options = tuple(sorted(set(packages))), checks.one_line_options(call, extra_options)
        return self._with(call, Step("python", names, "Python packages, pinned.", options, torch_backend=torch_backend))

    def uv_sync(self, lock: str | Path, *, extra_options: str = "") -> Self:
        """Exactly the Python packages of a lock file: requirements with versions and hashes, nothing resolved anew."""
        call = describe("uv_sync", str(lock), extra_options=extra_options)
        file = resolve(call, self.root, lock)
        checks.check_lock(call, read_text(call, file))
        local = LocalPath(file, context_path(call, self.root, file), "")
        if not checks.is_match(r"[\w./@+~\-]+", local.context):
            raise ImageError(f"{call}: a mount cannot name {local.context!r}. Rename it, without spaces and commas.")
        comment = f"Python packages, exactly those of {local.context}."
        options = checks.one_line_options(call, extra_options)
        return self._with(call, Step("python", (), comment, options, locals=(local,)))

    def run_commands(self, *commands: str | Iterable[str], comment: str = "") -> Self:
        """Shell commands, a layer for each."""
        call = describe("run_commands", *commands, comment=comment)
        flat: list[Any] = []
        for command in commands:
            flat += [command] if isinstance(command, str) or not isinstance(command, Iterable) else command
        if not flat:
            raise ImageError(f'{call}: says no command. Write one, such as run_commands("make install").')
        for command in flat:
            checks.check_command(call, command)
        return self._with(call, Step("run", tuple(flat), comment))

    def env(self, variables: Mapping[str, str]) -> Self:
        """Environment variables, as they stand: nothing in them is expanded."""
        if not variables:
            raise ImageError('env: says no variable. Write a dictionary, such as env({"LANG": "C.UTF-8"}).')
        for name, value in variables.items():
            checks.check_variable(name, value)
            if SECRET_NAME.search(name) and value:
                raise ImageError(f"env: {name} would be readable in the image. Give it to `docker run -e {name}`.")
        pairs = [f"{name}={shlex.quote(value)}" for name, value in sorted(variables.items())]
        return self._with("env", Step("meta", (" \\\n    ".join([f"ENV {pairs[0]}", *pairs[1:]]),)))

    def workdir(self, path: str) -> Self:
        """The folder in which later commands, and the program, run."""
        call = describe("workdir", path)
        folder = checks.absolute_path(call, path)
        # Docker would give a new folder the time of the day, and it makes it as root, whoever the user is.
        make = f"RUN mkdir -p {shlex.quote(folder)}"
        users = [line for step in self.steps if step.kind == "meta" for line in step.text if line.startswith("USER ")]
        lines = ("USER 0", make, users[-1]) if users else (f"{make} || :",)
        return self._with(call, Step("meta", (*lines, f"WORKDIR {folder}")))

    def user(self, user: str) -> Self:
        """Who runs later commands, and the program: a name or a number, with or without a group."""
        call = describe("user", user)
        if not checks.is_match(r"[a-z_][a-z0-9_\-]*(:[a-z_][a-z0-9_\-]*)?|[0-9]+(:[0-9]+)?", user):
            raise ImageError(f'{call}: not a user. Write "1000:1000" or a name.')
        return self._with(call, Step("meta", (f"USER {user}",)))

    def entrypoint(self, command: Iterable[str]) -> Self:
        """The program that the container runs, as a list of arguments; [] for none."""
        call = describe("entrypoint", command)
        if isinstance(command, str):
            raise ImageError(f'{call}: write the words of the command as a list, such as ["python3", "-m", "fractal"].')
        return self._with(call, Step("meta", (f"ENTRYPOINT {json.dumps(list(command))}",)))

    def pipe(self, function: Callable[..., Self], *args: Any, **kwargs: Any) -> Self:
        """function(self, ...): for steps that several images share."""
        return function(self, *args, **kwargs)

    def force_build(self) -> Self:
        """Build what follows anew, whatever is cached."""
        return replace(self._with("force_build()", Step("force")), forced=True)

    def title(self, comment: str) -> Self:
        """What the image is for, as the first lines of its Dockerfile."""
        return replace(self, comment=comment.strip())

    # --- local files

    def add_local_file(self, local: str | Path, remote: str, *, copy: bool = False) -> Self:
        """A file of this machine, layered last; with copy=True in this place, so that later steps see it."""
        call = describe("add_local_file", str(local), remote, copy=copy)
        file = resolve(call, self.root, local)
        if not file.is_file():
            raise ImageError(f"{call}: is no file. A folder: add_local_dir.")
        target = checks.absolute_path(call, f"{remote}{Path(local).name}" if remote.endswith("/") else remote)
        name = context_path(call, self.root, file)
        if IGNORED.match_file(name) or IGNORED.match_file(Path(local).name):
            raise ImageError(f"{call}: secrets, weights and caches do not go into an image. Mount it when you run it.")
        return self._add(call, (LocalPath(file, name, target),), copy)

    def add_local_dir(self, local: str | Path, remote: str, *, copy: bool = False, ignore: Iterable[str] = ()) -> Self:
        """A folder of this machine; `ignore`: gitignore's patterns, besides caches, secrets and weights."""
        call = describe("add_local_dir", str(local), remote, copy=copy, ignore=ignore)
        patterns = ignore_patterns(call, ignore)
        folder = resolve(call, self.root, local)
        if not folder.is_dir():
            raise ImageError(f"{call}: is no folder. A file: add_local_file.")
        path = LocalPath(folder, context_path(call, self.root, folder), checks.absolute_path(call, remote), patterns)
        return self._add(call, (path,), copy)

    def add_local_python_source(self, *modules: str, copy: bool = False, ignore: Iterable[str] = ()) -> Self:
        """Python modules or packages below `root`, importable in the image; a package's data files come along."""
        call = describe("add_local_python_source", *modules, copy=copy, ignore=ignore)
        patterns = ignore_patterns(call, ignore)
        checks.check_names(call, modules, r"[A-Za-z_]\w*", "a top-level module's name; write it without dots and .py")
        paths = []
        for module in modules:
            package, file = self.root / module, self.root / f"{module}.py"
            path = package if (package / "__init__.py").is_file() else file
            if not path.exists():
                raise ImageError(
                    f"{call}: there is no {module}.py and no package {module} (with __init__.py) in {self.root}. "
                    "Give the folder that holds it as the image's root=."
                )
            source = resolve(call, self.root, path)
            name = context_path(call, self.root, source)
            paths.append(LocalPath(source, name, f"{PYTHON_SOURCES}/{path.name}", patterns))
        return self._add(call, tuple(paths), copy, f"ENV PYTHONPATH={PYTHON_SOURCES}")

    def _add(self, call: str, paths: tuple[LocalPath, ...], copy: bool, *lines: str) -> Self:
        step = Step("add", lines, locals=paths)
        if copy:
            return self._with(call, step)
        check_consistent(call, (*self.local_paths(), *paths))
        return replace(self, last=(*self.last, step))

    def _with(self, call: str, step: Step) -> Self:
        checks.check_no_secret(call, "\n".join([*step.text, step.options, step.comment]))
        if step.locals:
            check_consistent(call, (*self.local_paths(), *step.locals))
        if self.last:
            raise ImageError(
                f"{call}: a build step after local files, which are layered last, so that an edit of them builds "
                "nothing else. Call the add_local_ methods last; or, if this step needs the files, give these calls "
                "copy=True."
            )
        return replace(self, steps=(*self.steps, step))

    # --- what it is

    def dockerfile(self, settings: Rendering = COMMITTED) -> str:
        """Its Dockerfile: the same value gives the same text, always."""
        return rendering.dockerfile(self.comment, self._base_lines(), self.steps, self.last, settings)

    def _base_lines(self) -> list[str]:
        return [*(self.prologue or (f"ARG BASE={self.base}", "FROM ${BASE} AS base")), *rendering.SHELL_LINES]

    def context(self) -> dict[str, Path]:
        """The build context: path in it -> file here. Raises ImageError if it is too large, naming what is."""
        files = {name: path for local in self._context_paths() for name, path in local.files().items()}
        archives = {local.context for local in self.prologue_paths if local.target == "/"}
        check_size({name: path for name, path in files.items() if name not in archives})
        return dict(sorted(files.items()))

    def local_paths(self) -> list[LocalPath]:
        """The local files and folders that it asks for."""
        return [*self.prologue_paths, *(local for step in (*self.steps, *self.last) for local in step.locals)]

    def _context_paths(self) -> list[LocalPath]:
        has_python = any(step.kind == "python" for step in self.steps)
        return [*self.local_paths(), *([_uv_lock(self.root)] if has_python else [])]

    def parts(self) -> dict[str, str]:
        """What the image is made of, by names for people: its Dockerfile, and local files and folders -> a hash."""
        parts = {"its Dockerfile": content_hash({"": self.dockerfile().encode()})}
        for local in self._context_paths():
            parts[local.context or "."] = content_hash(hashed_contents(local.files()))
        return parts

    def digest(self) -> str:
        """sha256 over the Dockerfile and the context: names the image, whatever builder makes it."""
        return content_hash({"Dockerfile": self.dockerfile().encode(), **hashed_contents(self.context())})


def _root(call: str, root: str | Path) -> Path:
    path = Path(root).resolve()
    if not path.is_dir():
        raise ImageError(f"{call}: root={str(root)!r} is no folder. Write the one that holds your files.")
    return path


def _uv_lock(root: Path) -> LocalPath:
    """uv's own lock: the project's, else ours."""
    own = root / rendering.UV_LOCK
    ours = Path(__file__).resolve().parents[2] / rendering.UV_LOCK
    return LocalPath(own if own.is_file() else ours, rendering.UV_LOCK, "")
