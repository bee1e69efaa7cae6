"""A client of the Lambda Cloud API: one method for each request that Fractal makes.

Reference: https://docs-api.lambda.ai/api/cloud. A request that is safe to repeat is repeated with backoff until
`patience_s` is over. `launch` costs money each time: it is repeated only where it certainly did not happen; where that
is unknown it raises LaunchUnknownError, and the caller looks for the instance's name.

    client = lambda_api.from_env(folder)
    for name, offer in client.instance_types().items():
        print(name, offer.price_cents_per_hour, [region.name for region in offer.regions])
"""

import contextlib
import errno
import hashlib
import ipaddress
import itertools
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgspec
import requests
import requests.auth
import urllib3.exceptions

from fractal.cloud.lambda_errors import (
    INSTANCES_PAGE,
    KEYS_PAGE,
    URL,
    CloudError,
    LaunchUnknownError,
    NetworkFailure,
    Outcome,
    RequestError,
    Response,
    classify,
    network_failure,
)
from fractal.cloud.lambda_types import FileSystem, ImageInfo, Instance, Offer, SshKey
from fractal.cloud.rate_limit import Kind, RateLimiter
from fractal.errors import InputError

CONNECT_TIMEOUT_S = 10.0
BACKOFF_MAX_S = 20.0
RETRY_AFTER_MAX_S = 60.0  # a longer Retry-After is not believed
LOG_AFTER_S = 3.0  # a longer wait is logged
MALFORMED_MAX = 3  # tries where the response is no JSON: it was truncated, or this is no API at all
RESPONSE_MAX = 1 << 25  # bytes
NAME_MAX = 64  # characters, of instances and keys
ID = re.compile(r"[A-Za-z0-9_-]{1,100}")
IMAGE_ID = re.compile(r"[0-9a-f]{8}-?([0-9a-f]{4}-?){3}[0-9a-f]{12}")
PUBLIC_KEY = re.compile(r"(ssh-|ecdsa-|sk-)[a-z0-9@.-]+ [A-Za-z0-9+/=]{20,}( [^\r\n]*)?")

Log = Callable[[str], None]
T = TypeVar("T")


class _BearerAuth(requests.auth.AuthBase):
    """Sets the key at the last moment. An auth object also keeps ~/.netrc from replacing the header."""

    __slots__ = ("_key",)

    def __init__(self, key: str) -> None:
        self._key = key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._key}"
        return request


class Client:
    """Lambda's API for one account; threads may share it.

    Raises CloudError, and InputError where an argument cannot be right. `patience_s` bounds the tries of one call: none
    begins later. `timeout_s` bounds the silence within one try. `backoff_s` is the longest first wait between two
    tries; the longest next one is twice that, and so on. `log` gets a line for each wait that a person notices.
    """

    def __init__(
        self,
        key: str,
        url: str = URL,
        *,
        rate_limiter: RateLimiter | None = None,
        patience_s: float = 120.0,
        timeout_s: float = 30.0,
        backoff_s: float = 1.0,
        log: Log | None = None,
    ) -> None:
        self.url = check_url(url)
        check_key(key)
        self.account = hashlib.sha256(key.encode()).hexdigest()[:12]  # identifies the account without the key
        self.log = log
        self._key = key
        self._rate_limiter = rate_limiter or RateLimiter()
        self._patience_s = patience_s
        self._timeout_s = timeout_s
        self._backoff_s = backoff_s
        self._trust_env = not _is_loopback(self.url)  # a proxy's loopback is another one

    def __repr__(self) -> str:
        return f"Client({self.url}, account {self.account})"

    def instance_types(self) -> dict[str, Offer]:
        """All types that Lambda offers, by name, with the regions that have capacity now."""
        return self._get("/instance-types", dict[str, Offer])

    def instances(self) -> list[Instance]:
        return self._get("/instances", list[Instance])

    def instance(self, id: str) -> Instance:
        """Raises NotFoundError also for a moment after a launch."""
        return self._get(f"/instances/{_check_id(id)}", Instance)

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
    ) -> str:
        """Rent one instance and return its id. It is billed from now on, until `terminate`.

        `image` is an image's id, or a family such as lambda-stack-24-04. Raises LaunchUnknownError where it may have
        happened although no usable response came; after any other error, a ConnectionLostError too, it did not happen.
        """
        _check_name("an instance", name)
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
        request = f"Lambda, launch of {name}"
        outcome = self._request("POST", "/instance-operations/launch", body, request, kind="launch", idempotent=False)
        if outcome.error is not None and outcome.had_no_effect:
            raise outcome.error
        reason = outcome.reason
        if outcome.error is None:
            ids = _launched_ids(outcome.data)
            if len(ids) == 1:
                return ids[0]
            reason = f"{request}: the response names {len(ids)} instances"
        raise LaunchUnknownError(
            f"{reason}. It may have been launched all the same, and be billed: look for {name} in the list of "
            f"instances (run the command again, or see {INSTANCES_PAGE})."
        )

    def terminate(self, id: str) -> None:
        """End an instance: the only thing that stops the bill. Its status is `terminating` first.

        Raises NotFoundError if it does not exist; right after a launch that is no proof that nothing is billed.
        """
        body = {"instance_ids": [_check_id(id)]}
        self._data(self._request("POST", "/instance-operations/terminate", body, f"Lambda, terminate {id}"))

    def add_ssh_key(self, name: str, public_key: str) -> SshKey:
        """Register a public key. Raises RequestError if another key has this name."""
        _check_name("an ssh key", name)
        public_key = public_key.strip()
        if not PUBLIC_KEY.fullmatch(public_key):  # without one, Lambda would make a key pair of its own
            raise InputError(f"What should be registered as {name} is no public ssh key. Give the line of a .pub file.")
        request = f"Lambda, ssh key {name}"
        try:
            data = self._data(self._request("POST", "/ssh-keys", {"name": name, "public_key": public_key}, request))
        except RequestError:  # perhaps it is registered by an earlier try whose response was lost
            for known in self.ssh_keys():
                if known.name == name and known.public_key.split()[:2] == public_key.split()[:2]:
                    return known
            raise
        return _decode(data, SshKey, request)

    def _get(self, path: str, kind: type[T]) -> T:
        request = f"Lambda, GET {path}"
        return _decode(self._data(self._request("GET", path, None, request)), kind, request)

    def _data(self, outcome: Outcome) -> Any:
        if outcome.error is not None:
            raise outcome.error
        return outcome.data

    def _request(
        self,
        method: str,
        path: str,
        body: object,
        request: str,
        *,
        kind: Kind = "request",
        idempotent: bool = True,
    ) -> Outcome:
        """The outcome of the last try. A request that is not idempotent is repeated only if it had no effect."""
        begin = time.monotonic()
        malformed = 0
        for attempt in itertools.count():
            if kind == "launch":
                self._rate_limiter.wait("launch", self.log)
            self._rate_limiter.wait("request", self.log)
            outcome = classify(self._send(method, path, body), request, self._key)
            if outcome.error is None or not outcome.retryable or not (idempotent or outcome.had_no_effect):
                return outcome
            malformed += outcome.malformed
            delay_s = random.uniform(0.0, min(BACKOFF_MAX_S, self._backoff_s * 2 ** min(attempt, 10)))
            if outcome.retry_after_s is not None:
                delay_s += min(outcome.retry_after_s, RETRY_AFTER_MAX_S)
            if time.monotonic() - begin + delay_s > self._patience_s or malformed >= MALFORMED_MAX:
                return outcome
            if self.log is not None and delay_s > LOG_AFTER_S:
                self.log(f"{outcome.reason}; trying again in {delay_s:.0f} s.")
            time.sleep(delay_s)
        raise AssertionError("unreachable")

    def _send(self, method: str, path: str, body: object) -> Response | NetworkFailure:
        """One try. Exceptions of requests hold the request, and so the key: none leaves this method."""
        deadline = time.monotonic() + CONNECT_TIMEOUT_S + 2 * self._timeout_s
        headers = {"Accept": "application/json", "User-Agent": "fractal", "Connection": "close"}
        data = None
        if body is not None:
            data = msgspec.json.encode(body)
            headers["Content-Type"] = "application/json"
        try:
            # A session and so a connection for each request: a kept connection may be dead by now, and a launch on it
            # looks lost. The header alone does not help: urllib3 keeps the connection unless the server says `close`.
            with requests.Session() as session:
                session.trust_env = self._trust_env
                with session.request(
                    method,
                    self.url + path,
                    data=data,
                    headers=headers,
                    auth=_BearerAuth(self._key),
                    timeout=(min(CONNECT_TIMEOUT_S, self._timeout_s), self._timeout_s),
                    allow_redirects=False,
                    stream=True,
                ) as response:
                    content = b"".join(_chunks(response, deadline))
                    return Response(response.status_code, dict(response.headers), content)
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            return network_failure(error, urlsplit(self.url).netloc)


def from_env(folder: Path, *, log: Log | None = None) -> Client:
    """The client that LAMBDA_API_KEY and FRACTAL_LAMBDA_URL describe; it shares its rate limit by files in `folder`.

    Raises InputError.
    """
    key = os.environ.get("LAMBDA_API_KEY", "").strip()
    url = os.environ.get("FRACTAL_LAMBDA_URL", "").strip() or URL
    return Client(key, url, rate_limiter=RateLimiter(folder), log=log)


def check_key(key: str) -> None:
    """Raises InputError; the message does not hold the key."""
    remedy = f"Make one at {KEYS_PAGE} and set it: export LAMBDA_API_KEY=..."
    if not key:
        raise InputError(f"LAMBDA_API_KEY is not set: there is no key for Lambda's API. {remedy}")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(f"LAMBDA_API_KEY holds a space, a line break or another character that no key has. {remedy}")


def check_url(url: str) -> str:
    """The API's base address without a slash at its end. Raises InputError."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    valid = url.isascii() and url.isprintable() and " " not in url
    if not host or not valid or parts.scheme not in ("http", "https"):
        raise InputError(f"FRACTAL_LAMBDA_URL is no address of an API. Unset it, or give one such as {URL}.")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise InputError(
            "FRACTAL_LAMBDA_URL holds a user, a password, a query or a fragment. Give the address alone; the key goes "
            "into LAMBDA_API_KEY."
        )
    if parts.scheme == "http" and not _is_loopback(url):
        raise InputError(f"FRACTAL_LAMBDA_URL: the key would travel to {host} unencrypted. Give an https address.")
    return url.rstrip("/")


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _chunks(response: requests.Response, deadline: float) -> Iterator[bytes]:
    """The body as it arrives, bounded in size and time."""
    size = 0
    while chunk := response.raw.read1(1 << 16, decode_content=True):
        size += len(chunk)
        if size > RESPONSE_MAX:
            raise ValueError("the response does not end")
        if time.monotonic() > deadline:
            raise TimeoutError(errno.ETIMEDOUT, "the response does not end")
        yield chunk


def _check_id(id: str) -> str:
    """An id that is part of a path: `..` or nothing would ask for something else. Raises InputError."""
    if not ID.fullmatch(id):
        raise InputError(f"{id!r} is no id of Lambda's. Take it from the list.")
    return id


def _check_name(what: str, name: str) -> None:
    if not name or len(name) > NAME_MAX or not name.isprintable():
        raise InputError(f"{name!r} is no name for {what}: Lambda takes 1 to {NAME_MAX} characters.")


def _decode(data: object, kind: type[T], request: str) -> T:
    """Raises CloudError that names the missing or wrong field, but not its value."""
    try:
        return msgspec.convert(data, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        text = str(error)
    raise CloudError(
        f"{request}: the response is not as Lambda documents it: "
        f"{text.replace('$', 'data', 1) if '`$' in text else text}. Update fractal, or check FRACTAL_LAMBDA_URL."
    )


def _launched_ids(data: object) -> list[str]:
    with contextlib.suppress(msgspec.ValidationError, RecursionError):
        ids = msgspec.convert(data, dict[str, Any]).get("instance_ids")
        return [id for id in msgspec.convert(ids, list[str]) if ID.fullmatch(id)]
    return []
