"""The layers of an image as the engine saves it, read one piece at a time: no layer is whole in memory."""

import gzip
import hashlib
import io
import tarfile
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any, cast

import docker
import docker.errors

from fractal import console
from fractal.errors import OutsideError
from fractal.images.docker_client import first_line

PIECE = 1 << 20  # bytes read at once
TAR_BUFFER = 1 << 17  # tarfile copies its buffer at each header: larger is slower


class ScanError(OutsideError):
    """An image cannot be read whole: one line."""


class _PieceReader(io.RawIOBase):
    """Pieces of bytes as a file that can only be read on; `advance` is told the bytes of each piece."""

    def __init__(self, pieces: Iterable[bytes], advance: Callable[[int], None]) -> None:
        self._pieces, self._advance, self._rest = iter(pieces), advance, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._advance(len(piece))
            self._rest = piece
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


class Layer:
    """One layer of a saved image. `members` are read one after the other, each content before the next member."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash = file, hashlib.sha256()
        self.members = self._read_members()

    def read(self, size: int) -> bytes:
        """The archive's next bytes; they go into the hash. For tarfile."""
        data = self._file.read(size)
        self._hash.update(data)
        return data

    def _read_members(self) -> Iterator[tuple[tarfile.TarInfo, IO[bytes] | None]]:
        with tarfile.open(fileobj=cast(IO[bytes], self), mode="r|", bufsize=TAR_BUFFER) as archive:
            for member in archive:
                archive.members = []  # type: ignore[attr-defined]  # else tarfile keeps every member
                yield member, archive.extractfile(member) if member.isreg() else None

    def diff_id(self) -> str:
        """sha256 of the layer's archive; reads what is left of it."""
        for _ in self.members:
            pass
        while self.read(PIECE):
            pass
        return f"sha256:{self._hash.hexdigest()}"


def read_layers(pieces: Iterable[bytes], advance: Callable[[int], None] = lambda count: None) -> Iterator[Layer]:
    """The layers of `docker save`'s archive, in its order; read each one's members before the next."""
    stream = io.BufferedReader(_PieceReader(pieces, advance), PIECE)
    with tarfile.open(fileobj=stream, mode="r|", bufsize=TAR_BUFFER) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.isreg() else None
            if file is None:
                continue
            data = io.BufferedReader(cast(io.RawIOBase, file), PIECE)
            head = data.peek(512)[:512]
            if head.startswith(b"\x1f\x8b"):  # containerd's store keeps them compressed
                layer = Layer(cast(IO[bytes], gzip.GzipFile(fileobj=data)))
            elif head[257:262] == b"ustar" or (member.name.endswith("layer.tar") and not head.strip(b"\0")):
                layer = Layer(data)
            else:
                continue  # a configuration or a manifest
            yield layer
            layer.diff_id()  # reads what the caller has left


def saved_layers(client: docker.DockerClient, name: str) -> Iterator[Layer]:
    """The layers of an image that the engine has, with a progress bar. Raises ScanError."""
    size = client.images.get(name).attrs["Size"]
    try:
        pieces = client.api.get_image(name)
    except docker.errors.APIError as error:
        raise ScanError(
            f"The engine does not hand out {name}: {first_line(error)}. It needs {size / 1e9:.1f} GB on its disk for "
            "that: `docker system df` shows what takes it."
        ) from error
    with console.bar(f"reading {name}, MB", size // 1_000_000) as bar:
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            bar.advance((done + count) // 1_000_000 - done // 1_000_000)
            done += count

        yield from read_layers(pieces, advance)
