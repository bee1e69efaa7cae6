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
from itertools import takewhile
from pathlib import Path
from typing import Any, Self

from packaging.requirements import InvalidRequirement, Requirement

from fractal.images import context as build_context
from fractal.images.context import IGNORED, ImageError, Local
from fractal.images.rendering import (
    COMMITTED,
    DIRECTIVE,
    FORCE,
    SHELL_LINES,
    UV_LOCK,
    Rendering,
    Step,
    copy_words,
    instructions,
    layer,
    local_stage,
    merged,
    uv_stage,
    venv,
    with_base_stage,
)
from fractal.sandbox.host.source import content_hash

PYTHON_SOURCES = "/app"  # where add_local_python_source puts modules, and PYTHONPATH
DIGEST = "sha256:[0-9a-f]{64}"

# A password in an address, tokens by their form: none of them may be in an image, nor in a message.
SECRET = re.compile(
    r"(?<=://)[^/\s:@]*:[^/\s@$]+(?=@)|\bhf_\w{30,}|\bgh[pousr]_\w{30,}|\bgithub_pat_\w{20,}|\bsk-[\w\-]{20,}"
    r"|\bAKIA[0-9A-Z]{16}\b|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
SECRET_NAME = re.compile(
    r"(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|API_?KEY|ACCESS_KEY|ACCESS_KEY_ID|PRIVATE_KEY|CREDENTIALS?)$", re.I
)
CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class Call:
    """A method call as written, to show a corrected program."""

    method: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def __str__(self) -> str:
        words = [*map(repr, self.args), *(f"{key}={value!r}" for key, value in self.kwargs.items())]
        return SECRET.sub("***", f"{self.method}({', '.join(words)})")


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
        digest = (digests or {}).get(tag) if isinstance(tag, str) else None
        name = f"{tag}@{digest}" if digest else tag
        call = Call("Image.from_registry", (name,), _root_given(root))
        pattern = (
            r"([A-Za-z0-9.\-]+(:\d+)?/)?[a-z0-9]+([._\-/]+[a-z0-9]+)*(?P<tag>:\w[\w.\-]{0,127})?(?P<digest>@"
            + DIGEST
            + ")?"
        )
        match = re.fullmatch(pattern, name, re.ASCII) if isinstance(name, str) else None
        if match is None:
            raise ImageError(f"{call}: not an image's name. Write repository:tag, such as debian:bookworm-slim.")
        if match["tag"] in (None, ":latest") and match["digest"] is None:
            what = tag.removesuffix(":latest")
            raise ImageError(f"{call}: names no version, and what `latest` means changes. Write {what}:TAG.")
        return cls(name, _root(call, root), calls=(call,))

    @classmethod
    def debian_slim(cls, *, root: str | Path = ".", digests: Mapping[str, str] | None = None) -> Self:
        """Begin with Debian 12 and nothing else, not even Python."""
        made = cls.from_registry("debian:bookworm-slim", root=root, digests=digests)
        return made if "@" in made.base else replace(made, calls=(Call("Image.debian_slim", (), _root_given(root)),))

    @classmethod
    def from_dockerfile(cls, path: str | Path, *, context: str | Path | None = None, root: str | Path = ".") -> Self:
        """Begin with what a Dockerfile makes; its context is the folder it lies in, or `context`.

        What its .dockerignore names stays out, and what never gets into an image; what later calls add is in there.
        """
        given = {} if context is None else {"context": str(context)}
        call = Call("Image.from_dockerfile", (str(path),), given | _root_given(root))
        base = _root(call, root)
        file = build_context.find(call, base, path)
        text = build_context.read_text(call, file)
        place = file.parent if context is None else build_context.find(call, base, context)
        if not place.is_dir():
            raise ImageError(f"{call}: context={str(context)!r} is no folder. Write the folder that COPY reads from.")
        needed: tuple[Local, ...] = ()
        if any(re.match(r"(COPY|ADD)\s|RUN\s+--mount", words, re.I) for _, words in instructions(text.split("\n"))):
            needed = (Local(place, "", "", build_context.dockerignore(call, place, file)),)
        return cls("", base, with_base_stage(call, text), context_locals=needed, calls=(call,))

    @classmethod
    def from_rootfs(cls, path: str | Path, *, root: str | Path = ".") -> Self:
        """Begin with a root file system in a tar archive, as mmdebstrap makes it."""
        call = Call("Image.from_rootfs", (str(path),), _root_given(root))
        base = _root(call, root)
        file = build_context.find(call, base, path)
        if not re.search(r"\.tar(\.gz|\.xz|\.bz2)?$", file.name) or not file.is_file():
            raise ImageError(f"{call}: not a tar archive. Give a file that ends in .tar, .tar.gz, .tar.xz or .tar.bz2.")
        local = Local(file, build_context.place(call, base, file), "/")
        lines = ("FROM scratch AS base", f"ADD {copy_words(local.context, '/')}")
        return cls("", base, lines, context_locals=(local,), calls=(call,))

    # --- build steps

    def apt_install(self, *packages: str, extra_options: str = "") -> Self:
        """Debian packages, sorted so that their order never breaks the cache; NAME or NAME=VERSION."""
        call = Call("apt_install", packages, _given(extra_options=extra_options))
        pattern = r"[a-z0-9][a-z0-9+.\-]*(?<!-)(:[a-z0-9]+)?(=[\w.+~:\-]+)?"
        _check_words(call, packages, pattern, "a Debian package; write NAME or NAME=VERSION")
        comment = "Debian packages, as the base's release has them; which ones: /usr/share/fractal/debian-packages."
        return self._with(call, Step("apt", tuple(sorted(set(packages))), comment, _options(call, extra_options)))

    def pip_install(self, *packages: str, extra_options: str = "", torch_backend: str = "") -> Self:
        """Python packages, each pinned: NAME==VERSION, or NAME @ URL with the file's #sha256=.

        What they depend on is resolved when the image is built: prefer `uv_sync`. `torch_backend`: cpu, cu130, ...
        takes PyTorch's packages from PyTorch's own index.
        """
        call = Call("pip_install", packages, _given(extra_options=extra_options, torch_backend=torch_backend))
        _check_words(call, packages, r"[A-Za-z0-9].*", "a Python package; write NAME==VERSION")
        for package in packages:
            _check_pinned(call, package)
        if torch_backend != "" and not _matches(r"cpu|auto|cu\d+|rocm[\d.]+|xpu", torch_backend):
            raise ImageError(f"{call}: torch_backend={torch_backend!r}: write cpu, auto, or cu130 and the like.")
        words = tuple(sorted(set(packages)))
        options = _options(call, extra_options)
        comment = "Python packages, pinned."
        return self._with(call, Step("python", words, comment, options, torch_backend=torch_backend))

    def uv_sync(self, lock: str | Path, *, extra_options: str = "") -> Self:
        """Exactly the Python packages of a lock file: requirements with versions and hashes, nothing resolved anew."""
        call = Call("uv_sync", (str(lock),), _given(extra_options=extra_options))
        file = build_context.find(call, self.root, lock)
        _check_lock(call, build_context.read_text(call, file))
        local = Local(file, build_context.place(call, self.root, file), "")
        if not _matches(r"[\w./@+~\-]+", local.context):
            raise ImageError(f"{call}: a mount cannot name {local.context!r}. Rename it, without spaces and commas.")
        comment = f"Python packages, exactly those of {local.context}."
        return self._with(call, Step("python", (), comment, _options(call, extra_options), locals=(local,)))

    def run_commands(self, *commands: str | Iterable[str], comment: str = "") -> Self:
        """Shell commands, a layer for each."""
        call = Call("run_commands", commands, _given(comment=comment))
        flat: list[Any] = []
        for one in commands:
            flat += [one] if isinstance(one, str) or not isinstance(one, Iterable) else one
        if not flat:
            raise ImageError(f'{call}: says no command. Write one, such as run_commands("make install").')
        for command in flat:
            _check_command(call, command)
        if not isinstance(comment, str):
            raise ImageError(f"{call}: comment={comment!r} is no text. Write a string.")
        return self._with(call, Step("run", tuple(flat), comment))

    def env(self, variables: Mapping[str, str]) -> Self:
        """Environment variables, as they stand: nothing in them is expanded."""
        if not isinstance(variables, Mapping) or not variables:
            raise ImageError('env: says no variable. Write a dictionary, such as env({"LANG": "C.UTF-8"}).')
        for name, value in variables.items():
            if not _matches(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ImageError(f"env: {name!r} is no variable's name. Write letters, digits and _.")
            if SECRET_NAME.search(name) and value:  # never shown: it may be a real one
                raise ImageError(f"env: {name} would be readable in the image. Give it to `docker run -e {name}`.")
            if not isinstance(value, str) or CONTROL.search(value):
                raise ImageError(
                    f"env: {name} has to be a text of one line. Write a string, without control characters."
                )
        call = Call("env", (dict(variables),), {})
        pairs = [f"{name}={shlex.quote(value)}" for name, value in sorted(variables.items())]
        return self._with(call, Step("meta", (" \\\n    ".join([f"ENV {pairs[0]}", *pairs[1:]]),)))

    def workdir(self, path: str) -> Self:
        """The folder in which later commands, and the program, run."""
        call = Call("workdir", (path,), {})
        folder = _absolute(call, path)
        # Docker would give a new folder the time of the day, and it makes it as root, whoever the user is.
        make = f"RUN mkdir -p {shlex.quote(folder)}"
        users = [line for step in self.steps if step.kind == "meta" for line in step.text if line.startswith("USER ")]
        made = ("USER 0", make, users[-1]) if users else (f"{make} || :",)
        return self._with(call, Step("meta", (*made, f"WORKDIR {folder}")))

    def user(self, user: str) -> Self:
        """Who runs later commands, and the program: a name or a number, with or without a group."""
        call = Call("user", (user,), {})
        if not _matches(r"[a-z_][a-z0-9_\-]*(:[a-z_][a-z0-9_\-]*)?|[0-9]+(:[0-9]+)?", user):
            raise ImageError(f'{call}: not a user. Write "1000:1000" or a name.')
        return self._with(call, Step("meta", (f"USER {user}",)))

    def entrypoint(self, words: Iterable[str]) -> Self:
        """The program that the container runs; [] for none."""
        listed = words if isinstance(words, str) or not isinstance(words, Iterable) else list(words)
        call = Call("entrypoint", (listed,), {})
        if not isinstance(listed, list) or not all(isinstance(word, str) and "\0" not in word for word in listed):
            raise ImageError(f'{call}: write the words of the command as a list, such as ["python3", "-m", "fractal"].')
        return self._with(call, Step("meta", (f"ENTRYPOINT {json.dumps(listed)}",)))

    def pipe(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Self:
        """function(self, ...): for steps that several images share."""
        what = f"pipe({getattr(function, '__name__', function)!r})"
        if not callable(function):
            raise ImageError(f"{what}: is no function. Write one that takes an Image and returns one.")
        made = function(self, *args, **kwargs)
        if not isinstance(made, type(self)):
            raise ImageError(f"{what}: gave no Image back. Let it return what its last call gives.")
        return made

    def force_build(self) -> Self:
        """Build what follows anew, whatever is cached."""
        return replace(self._with(Call("force_build", (), {}), Step("force")), forced=True)

    def title(self, comment: str) -> Self:
        """What the image is for, as the first lines of its Dockerfile."""
        call = Call("title", (comment,), {})
        if not isinstance(comment, str) or not comment.strip() or DIRECTIVE.match(f"# {comment.strip()}"):
            raise ImageError(
                f"{call}: write a text; its first line is no NAME=VALUE, which would be an order to Docker."
            )
        return replace(self, comment=comment.strip(), calls=(*self.calls, call))

    # --- local files

    def add_local_file(self, local: str | Path, remote: str, *, copy: bool = False) -> Self:
        """A file of this machine, layered last; with copy=True in this place, so that later steps see it."""
        call = Call("add_local_file", (str(local), remote), _given(copy=copy))
        file = build_context.find(call, self.root, local)
        if not file.is_file():
            raise ImageError(f"{call}: is no file. A folder: add_local_dir.")
        into_folder = isinstance(remote, str) and remote.endswith("/")
        target = _absolute(call, f"{remote}{Path(local).name}" if into_folder else remote)
        name = build_context.place(call, self.root, file)
        if IGNORED.match_file(name) or IGNORED.match_file(Path(local).name):
            raise ImageError(f"{call}: secrets, weights and caches do not go into an image. Mount it when you run it.")
        return self._add(call, (Local(file, name, target),), copy)

    def add_local_dir(self, local: str | Path, remote: str, *, copy: bool = False, ignore: Iterable[str] = ()) -> Self:
        """A folder of this machine; `ignore`: gitignore's patterns, besides caches, secrets and weights."""
        call = Call("add_local_dir", (str(local), remote), _given(copy=copy, ignore=ignore))
        patterns = build_context.ignore_patterns(call, ignore)
        call = replace(call, kwargs=_given(copy=copy, ignore=list(patterns)))
        folder = build_context.find(call, self.root, local)
        if not folder.is_dir():
            raise ImageError(f"{call}: is no folder. A file: add_local_file.")
        target = _absolute(call, remote)
        return self._add(call, (Local(folder, build_context.place(call, self.root, folder), target, patterns),), copy)

    def add_local_python_source(self, *modules: str, copy: bool = False, ignore: Iterable[str] = ()) -> Self:
        """Python modules or packages below `root`, importable in the image; a package's data files come along."""
        call = Call("add_local_python_source", modules, _given(copy=copy, ignore=ignore))
        patterns = build_context.ignore_patterns(call, ignore)
        call = replace(call, kwargs=_given(copy=copy, ignore=list(patterns)))
        _check_words(call, modules, r"[A-Za-z_]\w*", "a top-level module's name; write it without dots and .py")
        found = []
        for module in modules:
            package, file = self.root / module, self.root / f"{module}.py"
            if not (package / "__init__.py").is_file() and not file.is_file():
                raise ImageError(
                    f"{call}: there is no {module}.py and no package {module} (with __init__.py) in {self.root}. "
                    "Give the folder that holds it as the image's root=."
                )
            path = package if (package / "__init__.py").is_file() else file
            source = build_context.find(call, self.root, path)
            name = build_context.place(call, self.root, source)
            found.append(Local(source, name, f"{PYTHON_SOURCES}/{path.name}", patterns))
        return self._add(call, tuple(found), copy, f"ENV PYTHONPATH={PYTHON_SOURCES}")

    def _add(self, call: Call, found: tuple[Local, ...], copy: bool, *lines: str) -> Self:
        step = Step("add", lines, locals=found)
        if copy:
            return self._with(call, step)
        build_context.check(call, self.locals(), found)
        return replace(self, last=(*self.last, step), calls=(*self.calls, call))

    def _with(self, call: Call, step: Step) -> Self:
        if SECRET.search("\n".join([*step.text, step.options, step.comment])):
            raise ImageError(
                f"{call}: holds a password or a token, which anyone could read in the image. "
                "Give it to `docker run -e`; one for an index belongs into pip's configuration, which the build hears."
            )
        build_context.check(call, self.locals(), step.locals)
        if self.last:
            raise ImageError(_too_late(self.calls, call))
        return replace(self, steps=(*self.steps, step), calls=(*self.calls, call))

    # --- what it is

    def dockerfile(self, rendering: Rendering = COMMITTED) -> str:
        """Its Dockerfile: the same value gives the same text, always."""
        directives = tuple(takewhile(DIRECTIVE.match, self.prologue))  # these have to come first
        lines = [*directives, *(f"# {line}".rstrip() for line in self.comment.splitlines())]
        lines += self._base()[len(directives) :]
        if self._with_python():
            lines += uv_stage(rendering)
        if rendering.wheels:
            lines += ["", f"FROM {rendering.wheels} AS wheels"]
        stage, body = "base", list[str]()  # of the stage that is being written: what it is FROM, and its lines
        copied = merged(self.steps)
        python = [i for i, step in enumerate(copied) if step.kind == "python"]
        adds = 0
        for i, step in enumerate([*copied, *merged(self.last)]):
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
            if python[:1] == [i]:
                body += venv(rendering)
            body += layer(step, rendering, adds)
            if python[-1:] == [i] and not rendering.mounts:
                body.append("RUN rm /usr/local/bin/uv")
        lines += ["", f"FROM {stage}", *body]
        return "\n".join(lines).strip("\n") + "\n"

    def _base(self) -> list[str]:
        return [*(self.prologue or (f"ARG BASE={self.base}", "FROM ${BASE} AS base")), *SHELL_LINES]

    def context(self) -> dict[str, Path]:
        """The build context: path in it -> file here. Raises ImageError if it is too large, naming what is."""
        files = {name: path for local in self.locals() for name, path in local.files().items()}
        if self._with_python():
            files |= _uv_lock(self.root).files()
        archives = {local.context for local in self.context_locals if local.target == "/"}
        build_context.check_size({name: path for name, path in files.items() if name not in archives})
        return dict(sorted(files.items()))

    def locals(self) -> list[Local]:
        """The local files and folders that it asks for."""
        return [*self.context_locals, *(local for step in (*self.steps, *self.last) for local in step.locals)]

    def parts(self) -> dict[str, str]:
        """What the image is made of, in order: a name for people -> a hash. Where two differ, a rebuild begins."""
        first = {f"base {self.base or 'of its own'}": self._part(self._base(), self.context_locals)}
        found = first | ({"uv": self._part(uv_stage(COMMITTED), [_uv_lock(self.root)])} if self._with_python() else {})
        for step in (*self.steps, *self.last):
            names = ", ".join(local.context or "." for local in step.locals)
            what = {"apt": "Debian packages", "python": "Python packages", "run": "command", "meta": "setting"}
            key = f"{what.get(step.kind, 'local files')}: {names or shlex.join(step.text)[:60]}"
            while key in found:
                key += "'"
            lines = local_stage(step, "", 0) if step.kind == "add" else []
            found[key] = self._part([*lines, *layer(step, COMMITTED, 0)], step.locals)
        comments = [self.comment, f"{len(self.last)} last", *(step.comment for step in (*self.steps, *self.last))]
        return found | {"comments": self._part(comments, ())}

    def _with_python(self) -> bool:
        return any(step.kind == "python" for step in self.steps)

    def _part(self, lines: Iterable[str], found: Iterable[Local]) -> str:
        files = {name: path for local in found for name, path in local.files().items()}
        return content_hash({"": "\n".join(lines).encode(), **build_context.read(files)})

    def digest(self) -> str:
        """sha256 over the Dockerfile and the context: names the image, whatever builder makes it."""
        return content_hash({"Dockerfile": self.dockerfile().encode(), **build_context.read(self.context())})

    def __str__(self) -> str:
        return _program(self.calls)


# --- checks -----------------------------------------------------------------------------------------------------------


def _matches(pattern: str, word: object) -> bool:
    return isinstance(word, str) and re.fullmatch(pattern, word) is not None


def _check_words(call: Call, words: Iterable[object], pattern: str, what: str) -> None:
    listed = list(words)
    if not listed:
        raise ImageError(f"{call}: names nothing. Write at least one.")
    for word in listed:
        if isinstance(word, str) and word.startswith("-"):
            raise ImageError(f"{call}: {word} is an option. Options go into extra_options={word!r}.")
        if not _matches(pattern, word) or CONTROL.search(str(word)):
            several = isinstance(word, Iterable) and (not isinstance(word, str) or " " in word)
            hint = " Write the names one by one, each in quotes." if several else ""
            raise ImageError(f"{call}: {SECRET.sub('***', repr(word))} is not {what}.{hint}")


def _check_pinned(call: Call, package: str) -> None:
    shown = SECRET.sub("***", repr(package))
    try:
        wanted = Requirement(package)
    except InvalidRequirement as error:
        said = SECRET.sub("***", str(error).splitlines()[0]).rstrip(".")
        raise ImageError(f"{call}: {shown} is not a requirement: {said}. Write NAME==VERSION.") from error
    if wanted.url:
        if not re.search(r"#.*sha256=[0-9a-f]{64}", wanted.url):
            raise ImageError(f"{call}: {shown} has no hash. Add #sha256=... to the address.")
        return
    pins = [one for one in wanted.specifier if one.operator in ("==", "===") and not one.version.endswith(".*")]
    if len(pins) != 1 or len(wanted.specifier) != 1:
        raise ImageError(f"{call}: {shown} is not pinned. Write {wanted.name}==VERSION.")


def _check_lock(call: Call, text: str) -> None:
    """Every requirement of a lock file has a version and at least one hash."""
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise ImageError(f"{call}: locks nothing. Lock anew: invoke lock.")
    for line in lines:
        name = line.split()[0]
        requirement = re.split(r"\s--hash=", line)[0]
        if name.startswith("-") or "==" not in name:
            raise ImageError(f"{call}: {SECRET.sub('***', name)!r} is not NAME==VERSION. Lock anew: invoke lock.")
        _check_pinned(call, requirement)
        if not re.search(r"\s--hash=sha256:[0-9a-f]{64}", line):
            raise ImageError(f"{call}: {name} has no hash. Lock anew: invoke lock.")


def _check_command(call: Call, command: object) -> None:
    if not isinstance(command, str) or not command.strip() or command.lstrip().startswith("#"):
        raise ImageError(f"{call}: {command!r} is no command. Write a line for the shell.")
    if CONTROL.search(command) or command.rstrip().endswith("\\"):
        raise ImageError(f"{call}: a command is one line. Join lines with && or give them one by one.")
    if command.lstrip().startswith("--"):
        raise ImageError(f"{call}: begins with an option, which Docker would take for itself. Write the command first.")
    if re.search(r"(^|\s)\d*<<-?[^<\s]", command):
        raise ImageError(f"{call}: Docker would take what follows for a document. Add a file with add_local_file.")
    try:
        words = json.loads(command)
    except ValueError:
        return
    if isinstance(words, list):
        raise ImageError(f"{call}: Docker would run a list without a shell. Write {shlex.join(map(str, words))!r}.")


def _absolute(call: Call, path: object) -> str:
    """A path in the image that means the same in any instruction."""
    right = isinstance(path, str) and re.fullmatch(r"(/+[^/]+)+/*", path) and path.isprintable()
    if not right or not isinstance(path, str) or ".." in path.split("/") or re.search(r"""["'\\$*?\[\]]""", path):
        raise ImageError(f"{call}: {path!r} is no path in the image. Write an absolute one below /, such as /app/NAME.")
    return "/" + "/".join(word for word in path.split("/") if word not in ("", "."))


def _options(call: Call, options: object) -> str:
    if not isinstance(options, str) or CONTROL.search(options):
        raise ImageError(f"{call}: extra_options is one line of text. Write it as one string.")
    try:
        shlex.split(options)
    except ValueError as error:
        raise ImageError(f"{call}: extra_options={options!r}: {error}. Close what is open.") from error
    return options.strip()


# --- programs ---------------------------------------------------------------------------------------------------------


def _given(**kwargs: Any) -> dict[str, Any]:
    return {key: value for key, value in kwargs.items() if value}


def _root_given(root: object) -> dict[str, Any]:
    return {} if root == "." else {"root": str(root)}


def _program(calls: Iterable[Call]) -> str:
    first, *rest = map(str, calls)
    return "\n".join(["(", f"    {first}", *(f"    .{call}" for call in rest), ")"])


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


def _root(call: Call, root: object) -> Path:
    path = Path(root).resolve() if isinstance(root, str | Path) else None
    if path is None or not path.is_dir():
        raise ImageError(f"{call}: root={str(root)!r} is no folder. Write the one that holds your files.")
    return path


def _uv_lock(root: Path) -> Local:
    """uv's own lock: the project's, else ours."""
    own = root / UV_LOCK
    return Local(own if own.is_file() else Path(__file__).resolve().parents[2] / UV_LOCK, UV_LOCK, "")
