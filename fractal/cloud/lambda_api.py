"""A client of the Lambda Cloud API: one method for each request that Fractal makes.

Reference: https://docs-api.lambda.ai/api/cloud. A request that is safe to repeat is repeated with backoff until
`patience_s` is over. `launch` costs money each time: it is repeated only where it certainly did not happen; where that
is unknown it raises LaunchUnknownError, and the caller looks for the instance's name.
"""

import contextlib
import email.utils
import hashlib
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar
from urllib.parse import quote, urlsplit

import msgspec
import requests
import urllib3.exceptions
from filelock import FileLock

from fractal.cloud.lambda_errors import (
    INSTANCES_PAGE,
    KEYS_PAGE,
    URL,
    ApiError,
    LaunchUnknownError,
    network_error,
    response_data,
)
from fractal.cloud.lambda_types import FileSystem, ImageInfo, Instance, Launched, Offer, SshKey
from fractal.errors import InputError

CONNECT_TIMEOUT_S = 10.0
REQUEST_INTERVAL_S = 1.05  # Lambda allows 1 request/s, counted on arrival: leave room for network jitter
LAUNCH_INTERVAL_S = 12.5  # Lambda allows 1 launch in 12 s
BACKOFF_MAX_S = 20.0
LOG_AFTER_S = 3.0  # a longer wait is logged
RESPONSE_MAX = 1 << 25  # bytes
IMAGE_ID = re.compile(r"[0-9a-f]{8}-?([0-9a-f]{4}-?){3}[0-9a-f]{12}")
# Unencrypted on this machine alone: the key travels with each request.
URL_FORM = re.compile(r"(https://[\w.-]+|http://(localhost|127\.[0-9.]+|\[::1\]))(:[0-9]+)?(/[\w./-]*)?", re.ASCII)

Log = Callable[[str], None]
Kind = Literal["request", "launch"]
T = TypeVar("T")


class RateLimiter:
    """Keeps requests apart, in all threads and processes that share a folder.

    The time of the last request is a file's modification time: the file has no content that could break, and no clock
    change can make anyone wait longer than one interval. The waiting process holds a lock that the kernel releases if
    the process dies.
    """

    def __init__(
        self, folder: Path, *, request_s: float = REQUEST_INTERVAL_S, launch_s: float = LAUNCH_INTERVAL_S
    ) -> None:
        self._folder = folder
        self._interval_s: dict[Kind, float] = {"request": request_s, "launch": launch_s}

    def wait(self, kind: Kind, log: Log | None = None) -> None:
        """Return when the next request of this kind may be sent."""
        interval_s, stamp = self._interval_s[kind], self._folder / f"last-{kind}"
        if interval_s == 0:
            return
        lock = FileLock(
            f"{stamp}.lock",
            timeout=20 * interval_s + 5,  # a long queue; who gives up gets HTTP 429 and retries
            poll_interval=0.02,
            fallback_to_soft=False,  # a soft lock would outlive a killed holder
        )
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with lock:
                last = stamp.stat().st_mtime if stamp.exists() else 0.0
                delay_s = min(interval_s, last + interval_s - time.time())  # clocks jump
                if log is not None and delay_s > LOG_AFTER_S:
                    log(f"Lambda allows one {kind} in {interval_s:.0f} s: the next is sent in {delay_s:.0f} s.")
                time.sleep(max(0.0, delay_s))
                stamp.touch()
                os.utime(stamp, (now := time.time(), now))  # a touch alone is stamped by the kernel's coarse clock
        except (OSError, NotImplementedError):  # an instance must be terminated on a full disk, too
            time.sleep(interval_s)


class Client:
    """Lambda's API for one account; threads may share it.

    Raises CloudError, and InputError where key or address cannot be right. `patience_s` bounds the tries of one call:
    none begins later. `timeout_s` bounds the silence within one try. `backoff_s` is the longest first wait between two
    tries; the longest next one is twice that, and so on. `log` gets a line for each wait that a person notices.
    """

    def __init__(
        self,
        key: str,
        url: str,
        rate_limiter: RateLimiter,
        *,
        patience_s: float = 120.0,
        timeout_s: float = 30.0,
        backoff_s: float = 1.0,
        log: Log | None = None,
    ) -> None:
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise InputError(
                "LAMBDA_API_KEY is not set, or holds a space, a line break or another character that no key has. Make "
                f"a key at {KEYS_PAGE} and set it: export LAMBDA_API_KEY=..."
            )
        if not URL_FORM.fullmatch(url):
            raise InputError(
                f"FRACTAL_LAMBDA_URL is no address of an API. Unset it, or give one such as {URL}: encrypted (https), "
                "except on this machine, and without user, password, query or fragment."
            )
        self.url = url.rstrip("/")
        self.account = hashlib.sha256(key.encode()).hexdigest()[:12]  # identifies the account without the key
        self.log = log
        self.clock_offset_s = 0.0  # Lambda's clock minus this machine's, to a second, as of the last response
        self._key = key
        self._rate_limiter = rate_limiter
        self._patience_s = patience_s
        self._timeout_s = timeout_s
        self._backoff_s = backoff_s
        self._trust_env = self.url.startswith("https:")  # a proxy's loopback is another one

    @property
    def key(self) -> str:
        """For a watchdog alone, which asks the API by itself."""
        return self._key

    def instance_types(self) -> dict[str, Offer]:
        """All types that Lambda offers, by name, with the regions that have capacity now."""
        return self._get("/instance-types", dict[str, Offer])

    def instances(self) -> list[Instance]:
        return self._get("/instances", list[Instance])

    def instance(self, id: str) -> Instance:
        """Raises NotFoundError also for a moment after a launch."""
        return self._get(f"/instances/{quote(id, safe='')}", Instance)

    def ssh_keys(self) -> list[SshKey]:
        return self._get("/ssh-keys", list[SshKey])

    def images(self) -> list[ImageInfo]:
        return self._get("/images", list[ImageInfo])

    def file_systems(self) -> list[FileSystem]:
        return self._get("/file-systems", list[FileSystem])

    def launch(
        self,
        *,
        region: str,
        type_name: str,
        ssh_key: str,
        name: str,
        image: str | None = None,
        file_systems: Iterable[str] = (),
        user_data: str | None = None,
    ) -> str:
        """Rent one instance and return its id. It is billed from now on, until `terminate`.

        `image` is an image's id, or a family such as lambda-stack-24-04. `user_data` is for cloud-init, 1 MB at most;
        what it holds is kept out of errors. Raises LaunchUnknownError where it may have
        happened although no usable response came; after any other error it certainly did not happen.
        """
        body: dict[str, object] = {
            "region_name": region,
            "instance_type_name": type_name,
            "ssh_key_names": [ssh_key],
            "name": name,
        }
        if image is not None:
            body["image"] = {"id" if IMAGE_ID.fullmatch(image) else "family": image}
        if file_systems := list(file_systems):
            body["file_system_names"] = file_systems
        if user_data is not None:
            body["user_data"] = user_data
        request = f"Lambda, launch of {name}"
        try:
            data = self._request("POST", "/instance-operations/launch", body, request, launch=True)
            return _decode(data, Launched, request).instance_ids[0]
        except ApiError as error:
            if error.had_no_effect:
                raise
            reason = error.reason
        raise LaunchUnknownError(
            f"{reason}. It may have been launched all the same, and be billed: look for {name} in the list of "
            f"instances (run the command again, or see {INSTANCES_PAGE})."
        )

    def terminate(self, id: str) -> None:
        """End an instance: the only thing that stops the bill. Its status is `terminating` first.

        Raises NotFoundError if it does not exist; right after a launch that is no proof that nothing is billed.
        """
        self._request("POST", "/instance-operations/terminate", {"instance_ids": [id]}, f"Lambda, terminate {id}")

    def add_ssh_key(self, name: str, public_key: str) -> SshKey:
        """Register a public key. Raises ApiError if there is a key of this name."""
        request = f"Lambda, ssh key {name}"
        data = self._request("POST", "/ssh-keys", {"name": name, "public_key": public_key}, request)
        return _decode(data, SshKey, request)

    def _get(self, path: str, kind: type[T]) -> T:
        request = f"Lambda, GET {path}"
        return _decode(self._request("GET", path, None, request), kind, request)

    def _request(self, method: str, path: str, body: Any, request: str, *, launch: bool = False) -> Any:
        """The response's data. Raises the last try's error. A launch is repeated only if it certainly had no effect."""
        begin, backoff_s = time.monotonic(), self._backoff_s
        while True:
            if launch:
                self._rate_limiter.wait("launch", self.log)
            self._rate_limiter.wait("request", self.log)
            try:
                return self._send(method, path, body, request)
            except ApiError as error:
                failure = error
            delay_s = random.uniform(0.0, backoff_s) + failure.retry_after_s
            repeatable = failure.retryable and (failure.had_no_effect or not launch)
            if not repeatable or time.monotonic() - begin + delay_s > self._patience_s:
                raise failure
            if self.log is not None and delay_s > LOG_AFTER_S:
                self.log(f"{failure.reason}; trying again in {delay_s:.0f} s.")
            time.sleep(delay_s)
            backoff_s = min(BACKOFF_MAX_S, 2 * backoff_s)

    def _send(self, method: str, path: str, body: Any, request: str) -> Any:
        """One try. Exceptions of requests hold the request, and so the key: none leaves this method."""
        deadline = time.monotonic() + CONNECT_TIMEOUT_S + 2 * self._timeout_s
        try:
            # A session and so a connection for each request: a kept connection may be dead by now, and a launch on it
            # looks lost. The header alone does not help: urllib3 keeps the connection unless the server says `close`.
            with requests.Session() as session:
                session.trust_env = self._trust_env
                with session.request(
                    method,
                    self.url + path,
                    json=body,
                    headers={"Accept": "application/json", "User-Agent": "fractal", "Connection": "close"},
                    auth=self._add_key,
                    timeout=(min(CONNECT_TIMEOUT_S, self._timeout_s), self._timeout_s),
                    allow_redirects=False,
                    stream=True,
                ) as response:
                    with contextlib.suppress(OverflowError, TypeError, ValueError):  # no Date, or another form
                        lambda_time = email.utils.parsedate_to_datetime(response.headers.get("Date", ""))
                        self.clock_offset_s = lambda_time.timestamp() - time.time()
                    content = b"".join(_chunks(response, deadline))
                    secrets = (self._key, *_secrets((body or {}).get("user_data", "")))
                    return response_data(response.status_code, response.headers, content, request, secrets)
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            failure = network_error(error, request, urlsplit(self.url).netloc)
        raise failure

    def _add_key(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """As `auth`, which also keeps ~/.netrc from replacing the header."""
        request.headers["Authorization"] = f"Bearer {self._key}"
        return request


def from_env(folder: Path, *, log: Log | None = None) -> Client:
    """The client that LAMBDA_API_KEY and FRACTAL_LAMBDA_URL describe; its rate limit is shared by files in `folder`."""
    key = os.environ.get("LAMBDA_API_KEY", "").strip()
    url = os.environ.get("FRACTAL_LAMBDA_URL", "").strip() or URL
    return Client(key, url, RateLimiter(folder), log=log)


def _secrets(user_data: str) -> list[str]:
    """What an error must not repeat: the lines of keys, whose breaks may be lost on the way."""
    return re.findall(r"[A-Za-z0-9+/=]{16,}", user_data)


def _chunks(response: requests.Response, deadline: float) -> Iterator[bytes]:
    """The body as it arrives, bounded in size and time."""
    size = 0
    while chunk := response.raw.read1(1 << 16, decode_content=True):
        size += len(chunk)
        if size > RESPONSE_MAX or time.monotonic() > deadline:
            raise TimeoutError("the response does not end")
        yield chunk


def _decode(data: object, kind: type[T], request: str) -> T:
    """Raises ApiError that names the missing or wrong field, but not its value."""
    try:
        return msgspec.convert(data, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        text = str(error).replace("`$", "`data")
    reason = f"{request}: the response is not as Lambda documents it: {text}"
    raise ApiError(reason, "Update fractal, or check FRACTAL_LAMBDA_URL.")
