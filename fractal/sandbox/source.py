"""What the sandbox image is made of, and the name that follows from it. Pure: reads this clone, asks no engine."""

import hashlib
import io
import tarfile
from pathlib import Path

REPOSITORY = "fractal-sandbox"
ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = "docker/sandbox.Dockerfile"
HOST_ONLY = {"client.py", "container.py", "source.py"}  # the host's end: an edit of it must not change the image


def files() -> dict[str, bytes]:
    """The build context: path in the clone -> content, sorted by path."""
    sources = [path for path in (ROOT / "fractal/sandbox").glob("*.py") if path.name not in HOST_ONLY]
    names = [DOCKERFILE, "fractal/__init__.py", *(path.relative_to(ROOT).as_posix() for path in sources)]
    return {name: (ROOT / name).read_bytes() for name in sorted(names)}


def image_name() -> str:
    """fractal-sandbox:<12 hex digits of the context's hash>."""
    digest = hashlib.sha256()
    for name, content in files().items():
        for part in (name.encode(), content):
            digest.update(len(part).to_bytes(8, "big") + part)
    return f"{REPOSITORY}:{digest.hexdigest()[:12]}"


def context() -> bytes:
    """The build context as a tar archive: same sources, same bytes, on any machine and at any time."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in files().items():
            entry = tarfile.TarInfo(name)  # mtime, uid and gid are 0
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()
