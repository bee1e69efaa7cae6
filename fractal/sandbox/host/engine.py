"""Requests to the Docker engine over its own socket: what a sandbox's container needs. Standard library alone.

Everything else in this project talks to the engine by its SDK, whose import takes a quarter of a second of CPU time:
too long for `fractal verify`, which asks for its container before it imports anything else (launch.py).
API: https://docs.docker.com/reference/api/engine/
"""

import json
import os
import socket
from typing import Any
from urllib.parse import quote, urlsplit

from fractal.install import docker_engine

TIMEOUT_S = 120.0
MAX_HEAD = 1 << 16  # bytes of an answer's status line and headers


class RequestError(Exception):
    """The engine refuses a request; its reason."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def dial() -> socket.socket:
    """A connection to the engine that DOCKER_HOST names. Raises OSError."""
    url = urlsplit(docker_engine.address())
    if url.scheme == "unix":
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        link.settimeout(TIMEOUT_S)
        try:
            link.connect(url.path)
        except BaseException:
            link.close()
            raise
        return link
    if url.scheme not in ("tcp", "http", "https"):
        raise OSError(f"DOCKER_HOST={docker_engine.address()}: expected unix:// or tcp://")
    encrypted = url.scheme == "https" or bool(os.environ.get("DOCKER_TLS_VERIFY"))
    link = socket.create_connection((url.hostname or "localhost", url.port or (2376 if encrypted else 2375)), TIMEOUT_S)
    return _encrypted(link, url.hostname or "localhost") if encrypted else link


def _encrypted(link: socket.socket, host: str) -> socket.socket:
    """TLS with the certificates of DOCKER_CERT_PATH, as the docker command has them."""
    import ssl

    folder = os.environ.get("DOCKER_CERT_PATH") or os.path.expanduser("~/.docker")
    try:
        context = ssl.create_default_context(cafile=f"{folder}/ca.pem")
        context.load_cert_chain(f"{folder}/cert.pem", f"{folder}/key.pem")
        return context.wrap_socket(link, server_hostname=host)
    except BaseException:
        link.close()
        raise


def request(method: str, path: str, body: object = None) -> Any:
    """The engine's answer, decoded. Raises RequestError, OSError.

    HTTP/1.0: the answer ends where the connection does, and is never chunked.
    """
    with dial() as link:
        link.sendall(_head(method, path, body))
        answer = bytearray()
        while data := link.recv(1 << 16):
            answer += data
    head, _, content = bytes(answer).partition(b"\r\n\r\n")
    _check(head, content)
    return json.loads(content) if content.strip() else None


def attach(container: str) -> socket.socket:
    """A connection to a container's standard streams. Raises RequestError, OSError."""
    link = dial()
    try:
        path = f"/containers/{container}/attach?stream=1&stdin=1&stdout=1&stderr=1"
        link.sendall(_head("POST", path, None, version="1.1", more="Connection: Upgrade\r\nUpgrade: tcp\r\n"))
        head = b""
        while not head.endswith(b"\r\n\r\n") and len(head) < MAX_HEAD:  # not a byte more: what follows is the stream
            data = link.recv(1)
            if not data:
                break
            head += data
        _check(head, b"")
    except BaseException:
        link.close()
        raise
    return link


def image(name: str) -> tuple[str, dict[str, str]]:
    """An image's id and labels. Raises RequestError (404 where the engine does not have it), OSError."""
    found = request("GET", f"/images/{quote(name)}/json")
    return str(found["Id"]), found["Config"].get("Labels") or {}


def remove(container: str) -> None:
    """End and remove a container; nothing where it is gone already, or the engine."""
    try:
        request("DELETE", f"/containers/{container}?force=1&v=1")
    except (RequestError, OSError, ValueError):
        pass


def _head(method: str, path: str, body: object, version: str = "1.0", more: str = "") -> bytes:
    content = b"" if body is None else json.dumps(body).encode()
    lines = f"{method} {path} HTTP/{version}\r\nHost: docker\r\nContent-Type: application/json\r\n{more}"
    return f"{lines}Content-Length: {len(content)}\r\n\r\n".encode() + content


def _check(head: bytes, content: bytes) -> None:
    """Raises RequestError for a status that means failure."""
    words = head.split(b"\r\n")[0].split(b" ", 2)
    if len(words) < 2 or not words[1].isdigit():
        raise OSError("the engine ended the connection")
    if int(words[1]) < 400:
        return
    try:
        reason = json.loads(content)["message"]
    except (ValueError, KeyError, TypeError):
        reason = words[-1].decode("utf-8", "replace")
    raise RequestError(int(words[1]), str(reason))
