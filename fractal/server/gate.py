"""What stands before every request: the access token, the size of a body, how many requests run at once."""

import hmac
import ipaddress
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
OPEN_PATHS = ("/health", "/docs", "/openapi.json")  # without the token: they run nothing


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class Gate:
    """ASGI middleware that refuses before a body is read, or as soon as it is too large.

    Without a token only requests to a loopback name are served, so that no web page's script can reach the sandbox by a
    name of its own that leads to 127.0.0.1.
    """

    def __init__(self, app: App, *, token: str | None, max_bytes: int, max_requests: int) -> None:
        self._app = app
        self._token = token
        self._max_bytes = max_bytes
        self._too_large = f"a body has at most {max_bytes} bytes"
        self._max_requests = max_requests
        self._running = 0

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope["path"], headers)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        self._running += 1
        try:
            await self._app(scope, self._limited(receive), send)
        finally:
            self._running -= 1

    def _refusal(self, path: str, headers: dict[str, str]) -> JSONResponse | None:
        if self._token is None:
            host, _, port = headers.get("host", "").rpartition(":")
            if not is_loopback(host if port.isdecimal() else headers.get("host", "")):
                return _error(403, "without an access token only requests to 127.0.0.1 or localhost are served")
        elif path not in OPEN_PATHS:
            given = headers.get("authorization", "")
            if not hmac.compare_digest(given.encode(), f"Bearer {self._token}".encode()):
                return _error(401, "the header `Authorization: Bearer TOKEN` is missing or has another token")
        size = headers.get("content-length", "0")
        if not size.isdecimal() or int(size) > self._max_bytes:
            return _error(413, self._too_large)
        if path not in OPEN_PATHS and self._running >= self._max_requests:
            return _error(429, f"{self._max_requests} requests are running; try again", {"Retry-After": "1"})
        return None

    def _limited(self, receive: Receive) -> Receive:
        """A body without a stated length is counted as it comes."""
        total = 0

        async def counted() -> Message:
            nonlocal total
            message = await receive()
            total += len(message.get("body", b""))
            if total > self._max_bytes:
                raise HTTPException(413, self._too_large)  # FastAPI makes 400 of any other exception
            return message

        return counted


def _error(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"detail": detail}, status, headers)
