"""The local files of an image: which of them get in, what they are called in the build context, what they hold."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pathspec

from fractal.errors import InputError
from fractal.sandbox.host.source import marked

LIMIT_MB = 100  # of local files in one image; ours are under 2 MB, weights and data belong in a volume
OUTSIDE = "outside"  # the folder of the build context for what lies outside the image's root

# What never gets into an image, by name (gitignore's patterns).
CACHES = ("__pycache__/", "*.py[cod]", "*.egg-info/", ".venv/", "node_modules/", ".*_cache/", ".hypothesis/", ".cache/")
PRIVATE = (
    ".git", ".git/", "/runs/", ".env", ".env.*", ".envrc", "*.pem", "*.key", "*.p12", "*.pfx", "id_rsa*", "id_dsa*",
    "id_ecdsa*", "id_ed25519*", ".ssh/", ".netrc", ".pypirc", ".npmrc", ".pgpass", ".htpasswd", ".git-credentials",
    ".aws/", ".azure/", ".docker/", ".kube/", ".gnupg/", "credentials.json", "secrets/",
)  # fmt: skip
WEIGHTS = ("*.safetensors", "*.gguf", "*.pt", "*.pth", "*.ckpt", "*.onnx", "pytorch_model*.bin", "adapter_model.bin")
IGNORED = pathspec.GitIgnoreSpec.from_lines([*CACHES, *PRIVATE, *WEIGHTS])


class ImageError(InputError):
    """An image that cannot be what was written: says which argument, and what to write."""


@dataclass(frozen=True, slots=True)
class Local:
    """A local file or folder on its way into the image."""

    source: Path  # no link
    context: str  # its path in the build context; "" is all of it
    target: str  # absolute, in the image; "" for what only the build reads
    ignore: tuple[str, ...] = ()

    def files(self) -> dict[str, Path]:
        """Path in the build context -> file, without what is ignored. Raises ImageError for what cannot be copied.

        Of the patterns in `ignore` the last that matches decides, also below an ignored folder.
        """
        if not self.source.is_dir():
            return {self.context: self.source}
        own = pathspec.GitIgnoreSpec.from_lines(self.ignore)
        excepts = any(pattern.startswith("!") for pattern in self.ignore)
        found: dict[str, Path] = {}
        folders = [self.source]
        while folders:
            for path in folders.pop().iterdir():
                relative = path.relative_to(self.source).as_posix()
                name = self.name(relative)
                is_folder = path.is_dir() and not path.is_symlink()
                slash = "/" * is_folder
                if IGNORED.match_file(name + slash):
                    continue
                left_out = own.match_file(relative + slash)
                if is_folder and (excepts or not left_out):
                    folders.append(path)
                if is_folder or left_out:
                    continue
                if not (path.is_file() or path.is_symlink()):
                    raise ImageError(f"{path}: is neither a file nor a folder. Leave it out: ignore=[{relative!r}].")
                if not name.isprintable():
                    raise ImageError(f"{str(path)!r}: a name that not every machine can read. Rename it.")
                found[name] = path
        return dict(sorted(found.items()))

    def name(self, relative: str) -> str:
        """What one of its files is called in the build context."""
        return f"{self.context}/{relative}" if self.context else relative


def find(call: object, root: Path, path: object) -> Path:
    """A local file or folder, links resolved. Raises ImageError unless it is there."""
    if not isinstance(path, str | Path) or not str(path).strip():
        raise ImageError(f"{call}: {path!r} is no path. Write one, relative to {root}.")
    try:
        found = (root / Path(path).expanduser()).resolve()
        there = found.exists()
    except (OSError, RuntimeError, ValueError):  # a loop of links, an unknown ~user, a null byte
        there = False
    if not there:
        raise ImageError(f"{call}: there is no such file or folder in {root}. Check the path, or give root=.")
    return found


def place(call: object, root: Path, found: Path) -> str:
    """Its path in the build context; what lies outside `root` is put into a folder of its own."""
    inside = found.is_relative_to(root)
    name = found.relative_to(root).as_posix() if inside else f"{OUTSIDE}/{found.name}"
    if not name.isprintable() or re.search(r"""["'\\$*?\[\]]""", name):
        raise ImageError(f"{call}: a Dockerfile cannot name {name!r}. Rename it, or add the folder that it lies in.")
    return "" if name == "." else name


def read_text(call: object, file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, ValueError) as error:
        raise ImageError(f"{call}: cannot be read as text: {error}. Name a text file.") from error


def ignore_patterns(call: object, ignore: object) -> tuple[str, ...]:
    """The argument `ignore`: gitignore's patterns, or one of them."""
    patterns = (ignore,) if isinstance(ignore, str) else tuple(ignore) if isinstance(ignore, Iterable) else (ignore,)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise ImageError(f'{call}: ignore={ignore!r}: write a list of patterns, such as ["*.csv", "data/"].')
    try:
        pathspec.GitIgnoreSpec.from_lines(patterns)
    except ValueError as error:
        raise ImageError(f"{call}: ignore={ignore!r}: {error}. Write gitignore's patterns.") from error
    return patterns


def dockerignore(call: object, folder: Path, dockerfile: Path) -> tuple[str, ...]:
    """Docker's own list of what a Dockerfile's context leaves out, as gitignore's patterns."""
    files = [dockerfile.with_name(f"{dockerfile.name}.dockerignore"), folder / ".dockerignore"]
    file = next((file for file in files if file.is_file()), None)
    lines = [line.strip() for line in read_text(call, file).splitlines()] if file else []
    found = []
    for line in lines:
        if line and not line.startswith("#"):
            inverted = line.startswith("!")
            found.append("!" * inverted + "/" + line.removeprefix("!").strip().removeprefix("./").strip("/"))
    return ignore_patterns(call, found)


def check(call: object, known: Iterable[Local], new: Collection[Local]) -> None:
    """Raise ImageError for new local files that cannot be copied, or that would mix with those that are known."""
    known = list(known)
    for local in new:
        if local.source.is_dir() and local.target and not local.files():
            raise ImageError(f"{call}: {local.source} holds nothing that may go into an image. Is everything ignored?")
        for other in known:
            inner, outer = (local, other) if _below(local, other) else (other, local)
            if not _below(inner, outer):
                continue
            rest = inner.context.removeprefix(outer.context).strip("/")
            if inner.source != outer.source / rest:
                raise ImageError(
                    f"{call}: {inner.source} would be mixed with {outer.source} in the build context. "
                    "Rename one, or give a root= that holds both."
                )
            if not outer.target:
                continue
            within = {name for name in inner.files() if _is_below(name, outer.context)}
            more = within - outer.files().keys()
            if inner.context == outer.context:
                more |= outer.files().keys() - within
            if more:
                raise ImageError(
                    f"{call}: {min(more)} is added here and ignored there; the build sees one folder. "
                    "Ignore the same in both, or move it out."
                )
        known.append(local)


def _below(inner: Local, outer: Local) -> bool:
    return _is_below(inner.context, outer.context)


def _is_below(name: str, folder: str) -> bool:
    return not folder or name == folder or name.startswith(f"{folder}/")


def check_size(files: Mapping[str, Path]) -> None:
    """Raise ImageError if these are too large, naming the largest."""
    sizes = {name: path.lstat().st_size for name, path in files.items()}
    if (total := sum(sizes.values())) <= LIMIT_MB * 1e6:
        return
    folders: dict[str, int] = {}
    for name, size in sizes.items():
        key = "/".join(name.split("/")[:2])
        folders[key] = folders.get(key, 0) + size
    largest = sorted(folders.items(), key=lambda item: -item[1])[:5]
    named = ", ".join(f"{name} ({size / 1e6:,.0f} MB)" for name, size in largest)
    raise ImageError(
        f"The local files of this image are {total / 1e6:,.0f} MB, over {LIMIT_MB} MB. The largest: "
        f"{named}. Leave them out with ignore=[...]; data and weights belong in a volume."
    )


def read(files: Mapping[str, Path]) -> dict[str, bytes]:
    """What a hash takes of files: names with their kind, contents."""
    return {marked(name, path): content(path) for name, path in files.items()}


def content(path: Path) -> bytes:
    """Of a link, where it points to."""
    return str(path.readlink()).encode() if path.is_symlink() else path.read_bytes()
