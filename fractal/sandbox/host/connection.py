"""The two ways to a sandbox: the attached streams of a container of one's own, and the Unix socket of a sidecar."""

import socket
import struct
from collections import deque
from collections.abc import Callable
from pathlib import Path

SILENCE_S = 60.0  # the sandbox sends something every 5 s


class AttachedConnection:
    """The attached streams of one container. Undoes Docker's multiplexing (8-byte header: stream, 0, 0, 0, length)."""

    def __init__(self, container: str, sock: socket.socket, remove: Callable[[str], None]) -> None:
        self.container = container  # its id
        self.known_problems: set[bytes] = set()
        self._remove = remove
        self._sock = sock
        self._sock.settimeout(SILENCE_S)
        self._raw = bytearray()
        self._errors: deque[bytes] = deque(maxlen=50)

    def send(self, data: bytes) -> None:
        self._sock.sendall(data)

    def receive(self) -> bytes:
        while True:
            data = self._sock.recv(1 << 20)
            if not data:
                return b""
            self._raw += data
            parts: list[bytes] = []
            at = 0
            while len(self._raw) - at >= 8:
                stream, size = struct.unpack_from(">BxxxI", self._raw, at)
                if len(self._raw) - at < 8 + size:
                    break
                part = bytes(self._raw[at + 8 : at + 8 + size])
                at += 8 + size
                (self._errors if stream == 2 else parts).append(part)
            del self._raw[:at]
            if parts:
                return b"".join(parts)

    def close(self) -> None:
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._sock.close()
        self._remove(self.container)

    def last_output(self) -> str:
        text = b"".join(self._errors).decode("utf-8", "replace").strip()
        return text.splitlines()[-1][:300] if text else "it said nothing"


class SocketConnection:
    """A sidecar's socket."""

    def __init__(self, path: Path) -> None:
        self.known_problems: set[bytes] = set()
        self._path = path
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.settimeout(SILENCE_S)
        try:
            self._sock.connect(str(path))
        except OSError:
            self._sock.close()
            raise

    def send(self, data: bytes) -> None:
        self._sock.sendall(data)

    def receive(self) -> bytes:
        return self._sock.recv(1 << 20)

    def close(self) -> None:
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._sock.close()

    def last_output(self) -> str:
        return f"the sidecar at {self._path} hung up"
