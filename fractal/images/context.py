"""The build context: which local files get into an image, their paths in the context, what they hold."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pathspec

from fractal.errors import InputError
from fractal.sandbox.host.source import marked

LIMIT_MB = 100  # of local files in one image; ours are under 2 MB, weights and data belong in a volume
OUTSIDE = "outside"  # the folder of the context for what lies outside the image's root

# What never gets into an image, by name (gitignore's patterns).
CACHES = ("__pycache__/", "*.py[cod]", "*.egg-info/", ".venv/", "node_modules/", ".*_cache/", ".hypothesis/", ".cache/")
PRIVATE = (
    ".git", ".git/", "/runs/", ".env", ".env.*", ".envrc", "*.pem", "*.key", "*.p12", "*.pfx", "id_rsa*", "id_dsa*",
    "id_ecdsa*", "id_ed25519*", ".ssh/", ".netrc", ".pypirc", ".npmrc", ".pgpass", ".htpasswd", ".git-credentials",
    ".aws/", ".azure/", ".docker/", ".kube/", ".gnupg/", "credentials.json", "secrets/",
)  # fmt: skip
WEIGHTS = ("*.safetensors", "*.gguf", "*.pt", "*.pth", "*.ckpt", "*.onnx", "pytorch_model*.bin", "adapter_model.bin")
IGNORED = pathspec.GitIgnoreSpec.from_lines([*CACHES, *PRIVATE, *WEIGHTS])
SPECIAL = re.compile(r"""["'\\$*?\[\]]""")  # characters that mean something in a Dockerfile's paths


class ImageError(InputError):
    """An image that cannot be what was written: names the argument, and what to write."""


@dataclass(frozen=True, slots=True)
class LocalPath:
    """A local file or folder that goes into the image."""

    source: Path  # resolved: no link
    context: str  # its path in the build context; "" is all of it
    target: str  # absolute, in the image; "" for what only the build reads
    ignore: tuple[str, ...] = ()  # gitignore's patterns

    def files(self) -> dict[str, Path]:
        """Path in the build context -> file, without what is ignored. Raises ImageError for what cannot be copied.

        Of the patterns in `ignore` the last that matches decides, also below an ignored folder.
        """
        if not self.source.is_dir():
            return {self.context: self.source}
        ignored = pathspec.GitIgnoreSpec.from_lines(self.ignore)
        has_exceptions = any(pattern.startswith("!") for pattern in self.ignore)
        files: dict[str, Path] = {}
        folders = [self.source]
        while folders:
            for path in folders.pop().iterdir():
                relative = path.relative_to(self.source).as_posix()
                name = f"{self.context}/{relative}" if self.context else relative
                is_folder = path.is_dir() and not path.is_symlink()
                slash = "/" * is_folder
                if IGNORED.match_file(name + slash):
                    continue
                left_out = ignored.match_file(relative + slash)
                if is_folder and (has_exceptions or not left_out):
                    folders.append(path)
                if is_folder or left_out:
                    continue
                if not (path.is_file() or path.is_symlink()):
                    raise ImageError(f"{path}: is neither a file nor a folder. Leave it out: ignore=[{relative!r}].")
                if not name.isprintable():
                    raise ImageError(f"{str(path)!r}: a name that not every machine can read. Rename it.")
                files[name] = path
        return dict(sorted(files.items()))


def resolve(call: str, root: Path, path: str | Path) -> Path:
    """A local file or folder, links resolved. Raises ImageError unless it exists."""
    try:
        resolved = (root / Path(path).expanduser()).resolve()
        exists = resolved.exists()
    except (OSError, RuntimeError, ValueError):  # a loop of links, an unknown ~user, a null byte
        exists = False
    if not exists:
        raise ImageError(f"{call}: there is no such file or folder in {root}. Check the path, or give root=.")
    return resolved


def context_path(call: str, root: Path, resolved: Path) -> str:
    """The path in the build context; what lies outside `root` is put into a folder of its own."""
    inside = resolved.is_relative_to(root)
    name = resolved.relative_to(root).as_posix() if inside else f"{OUTSIDE}/{resolved.name}"
    if not name.isprintable() or SPECIAL.search(name):
        raise ImageError(f"{call}: a Dockerfile cannot name {name!r}. Rename it, or add the folder that it lies in.")
    return "" if name == "." else name


def read_text(call: str, file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, ValueError) as error:
        raise ImageError(f"{call}: cannot be read as text: {error}. Name a text file.") from error


def ignore_patterns(call: str, ignore: Iterable[str]) -> tuple[str, ...]:
    """The argument `ignore`: gitignore's patterns, or one of them."""
    patterns = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    try:
        pathspec.GitIgnoreSpec.from_lines(patterns)
    except ValueError as error:
        raise ImageError(f"{call}: ignore={ignore!r}: {error}. Write gitignore's patterns.") from error
    return patterns


def dockerignore(call: str, folder: Path, dockerfile: Path) -> tuple[str, ...]:
    """A Dockerfile's .dockerignore as gitignore's patterns."""
    candidates = [dockerfile.with_name(f"{dockerfile.name}.dockerignore"), folder / ".dockerignore"]
    file = next((file for file in candidates if file.is_file()), None)
    lines = [line.strip() for line in read_text(call, file).splitlines()] if file else []
    patterns = []
    for line in lines:
        if line and not line.startswith("#"):
            inverted = line.startswith("!")
            patterns.append("!" * inverted + "/" + line.removeprefix("!").strip().removeprefix("./").strip("/"))
    return ignore_patterns(call, patterns)


def check_consistent(call: str, paths: Iterable[LocalPath]) -> None:
    """Raise ImageError where local paths would mix: COPY of a folder takes all that the context has below it."""
    listings = [(path, path.files()) for path in paths]
    merged: dict[str, Path] = {}
    for path, files in listings:
        if path.source.is_dir() and path.target and not files:
            raise ImageError(f"{call}: {path.source} holds nothing that may go into an image. Is everything ignored?")
        for name, file in files.items():
            if merged.setdefault(name, file) != file:
                raise ImageError(
                    f"{call}: {file} would be mixed with {merged[name]} in the build context. "
                    "Rename one, or give a root= that holds both."
                )
    for path, files in listings:
        if not path.source.is_dir():
            continue
        prefix = f"{path.context}/" if path.context else ""
        more = sorted(name for name in merged.keys() - files.keys() if name.startswith(prefix))
        if mixed := [merged[name] for name in more if path.target or not merged[name].is_relative_to(path.source)]:
            raise ImageError(
                f"{call}: {mixed[0]} would be mixed with {path.source} in the build context, or is ignored there. "
                "Ignore the same in both calls, rename one, or give a root= that holds both."
            )


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


def hashed_contents(files: Mapping[str, Path]) -> dict[str, bytes]:
    """What a hash takes of files: names with their kind -> contents; of a link, its target."""
    return {
        marked(name, path): str(path.readlink()).encode() if path.is_symlink() else path.read_bytes()
        for name, path in files.items()
    }
