"""What the sandbox image is made of, and the name that follows from it. Pure: reads this clone, asks no engine.

images/recipes.py describes the image; its rendering is the Dockerfile read here, and a test compares the names.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

REPOSITORY = "fractal-sandbox"
ROOT = Path(__file__).resolve().parents[3]
DOCKERFILE = "docker/sandbox.Dockerfile"


def files() -> dict[str, bytes]:
    """The sources in the image: path in the clone -> content, sorted by path."""
    inside = [path.relative_to(ROOT).as_posix() for path in (ROOT / "fractal/sandbox/inside").glob("*.py")]
    names = ["fractal/__init__.py", "fractal/sandbox/__init__.py", *inside]
    return {name: (ROOT / name).read_bytes() for name in sorted(names)}


def content_hash(parts: Mapping[str, bytes]) -> str:
    """sha256, in hexadecimal, over names and contents; their order does not matter."""
    digest = hashlib.sha256()
    for name, content in sorted(parts.items()):
        for part in (name.encode(), content):
            digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def marked(name: str, path: Path) -> str:
    """The name under which a file enters a hash: links and programs are marked, other modes do not count."""
    if path.is_symlink():
        return f"{name}\0link"
    return f"{name}\0program" if path.stat().st_mode & 0o100 else name


def image_name() -> str:
    """fractal-sandbox:<12 hex digits of the hash of Dockerfile and sources>."""
    sources = {marked(name, ROOT / name): content for name, content in files().items()}
    digest = content_hash({"Dockerfile": (ROOT / DOCKERFILE).read_bytes(), **sources})
    return f"{REPOSITORY}:{digest[:12]}"
