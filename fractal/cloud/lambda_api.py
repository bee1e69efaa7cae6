"""The Lambda Cloud API, typed: one method for each request, one class for each way it can go wrong.

Knows no ledger and no ssh: https://docs-api.lambda.ai/api/cloud. A request that may safely be made twice is
made again, politely, until patience ends. `launch` costs money each time: it is made once, and again only where it
certainly did not happen; where that cannot be told it raises LaunchUnknown, and the caller looks for the name.

    with lambda_api.from_env(folder) as client:
        for name, kind in client.instance_types().items():
            print(name, kind.price_cents_per_hour, [region.name for region in kind.regions])
"""

import contextlib
import email.utils
import errno
import hashlib
import ipaddress
import itertools
import os
import random
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, cast, get_args
from urllib.parse import quote, urlsplit

import filelock
import msgspec
import requests
import requests.auth
import urllib3.exceptions

from fractal.errors import InputError, OutsideError
from fractal.jsonl import parse

URL = "https://cloud.lambda.ai/api/v1"
KEYS = "https://cloud.lambda.ai/api-keys"
INSTANCES = "https://cloud.lambda.ai/instances"
CONNECT_TIMEOUT_S = 10.0
REQUEST_INTERVAL_S = 1.05  # Lambda counts 1 request/s as they arrive: leave room for the network's jitter
LAUNCH_INTERVAL_S = 12.5  # 1 launch in 12 s
BACKOFF_MAX_S = 20.0
RETRY_AFTER_MAX_S = 60.0  # what we believe of a Retry-After
TOLD_S = 3.0  # a longer wait is told
GARBLED_MAX = 3  # tries where the answer is no JSON: it was cut, or this is no API at all
ANSWER_MAX = 1 << 25  # bytes
NAME_MAX = 64  # characters, of instances and keys
USER_DATA_MAX = 1_000_000  # bytes

Status = Literal["booting", "active", "unhealthy", "terminating", "terminated", "preempted"]
Say = Callable[[str], None]
T = TypeVar("T")


class CloudError(OutsideError):
    """The cloud did not do what was asked: one line with the remedy."""


class ApiError(CloudError):
    """Lambda's answer was an error. `code` is stable, such as global/invalid-parameters; the words are not."""

    def __init__(self, text: str, *, code: str, status: int, message: str, suggestion: str | None = None) -> None:
        super().__init__(text)
        self.code = code
        self.status = status  # HTTP's
        self.message = message
        self.suggestion = suggestion
        self.echo = False  # an earlier try's answer was lost: perhaps that one was done, and this is its echo


class AuthError(ApiError):
    """The key is wrong, or the account may not do this."""


class RequestError(ApiError):
    """The request itself is refused, and will be again."""


class QuotaError(ApiError):
    """The account may have no more of these."""


class NotFound(ApiError):
    """There is no such thing; of an instance, perhaps not yet."""


class CapacityError(ApiError):
    """No machine of this type is free in this region: the one error that should move a search on."""


class BusyError(ApiError):
    """Too many requests, still after patience."""


class ServerError(ApiError):
    """Lambda or its provider is in trouble, still after patience."""


class ConnectionLost(CloudError):
    """No answer, or a broken one, still after patience."""


class LaunchUnknown(CloudError):
    """A launch was asked for, and whether it happened is not known: it may be billed. Look for its name."""


@dataclass(frozen=True, slots=True)
class Region:
    name: str
    description: str


@dataclass(frozen=True, slots=True)
class InstanceType:
    name: str
    description: str
    gpu_description: str
    price_cents_per_hour: int
    vcpus: int
    memory_gib: int
    storage_gib: int
    gpus: int
    regions: tuple[Region, ...]  # where there is capacity now: advice, no promise


@dataclass(frozen=True, slots=True)
class Instance:
    id: str
    name: str  # "" if it has none
    status: Status  # one that we do not know counts as booting: billed, and not usable yet
    ip: str | None  # an address can be there before the instance is active
    region: str
    type_name: str
    price_cents_per_hour: int
    ssh_key_names: tuple[str, ...]
    hostname: str | None


@dataclass(frozen=True, slots=True)
class SshKey:
    id: str
    name: str
    public_key: str


@dataclass(frozen=True, slots=True)
class ImageInfo:
    id: str
    name: str
    family: str
    region: str


@dataclass(frozen=True, slots=True)
class FileSystem:
    id: str
    name: str
    region: str
    mount_point: str
    is_in_use: bool


class Pace:
    """Keeps requests apart, in all processes that share a folder; without a folder, in this process.

    The time of the last request is a file's modification time: it has no content that could break, and no clock can
    make anyone wait longer than one interval. Who waits holds the lock, which the kernel takes from the dead.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        request_s: float = REQUEST_INTERVAL_S,
        launch_s: float = LAUNCH_INTERVAL_S,
    ) -> None:
        self._folder = folder
        self._interval_s = {"request": request_s, "launch": launch_s}
        self._last: dict[str, float] = {}  # by this process's clock
        self._locks = {"request": threading.Lock(), "launch": threading.Lock()}

    def wait(self, kind: Literal["request", "launch"], say: Say | None = None) -> None:
        """Return when the next one may be sent."""
        with self._locks[kind]:
            interval = self._interval_s[kind]
            with contextlib.ExitStack() as stack:
                stamp = self._shared(kind, stack)
                now, last = time.monotonic(), self._last.get(kind)
                due = interval - (now - last) if last is not None else 0.0
                if stamp is not None:
                    due = max(due, interval - _age(stamp, interval))
                due = min(due, interval)  # clocks jump
                if due > 0:
                    if say is not None and due > TOLD_S:
                        say(f"Lambda allows one {kind} in {interval:.0f} s: the next goes out in {due:.0f} s.")
                    time.sleep(due)
                self._last[kind] = time.monotonic()
                if stamp is not None:
                    _touch(stamp)

    def _shared(self, kind: str, stack: contextlib.ExitStack) -> Path | None:
        """The stamp, with its lock held; None where files do not work. An instance must be ended on a full disk too."""
        if self._folder is None:
            return None
        lock = filelock.FileLock(
            self._folder / f"pace-{kind}.lock",
            timeout=20 * self._interval_s[kind] + 5,  # a long queue; who is late is told 429 and waits on
            poll_interval=0.02,
            fallback_to_soft=False,  # such a lock would outlive a killed holder
        )
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock)
        except (OSError, NotImplementedError):
            return None
        return self._folder / f"pace-{kind}"


def _age(stamp: Path, interval: float) -> float:
    """Seconds since the last request, by a clock that may have jumped; no file: long enough."""
    try:
        return time.time() - stamp.stat().st_mtime
    except FileNotFoundError:
        return interval
    except OSError:
        return 0.0


def _touch(stamp: Path) -> None:
    now = time.time()
    with contextlib.suppress(OSError):
        try:
            os.utime(stamp, (now, now))
        except FileNotFoundError:
            stamp.touch()


class _Bearer(requests.auth.AuthBase):
    """Sets the key at the last moment. An auth of our own also keeps ~/.netrc from replacing it."""

    __slots__ = ("_key",)

    def __init__(self, key: str) -> None:
        self._key = key

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self._key}"
        return request


@dataclass(frozen=True, slots=True)
class _Reply:
    """What came back."""

    status: int
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)  # may hold a jupyter_token


@dataclass(frozen=True, slots=True)
class _Trouble:
    """Nothing whole came back."""

    reason: str
    remedy: str
    sent: bool  # perhaps; no means that the request certainly did not reach the API
    lasting: bool = False  # the next try would go the same way


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What one try came to: data, or an error and what follows from it."""

    data: Any = None
    error: CloudError | None = None
    why: str = ""  # the error without its remedy
    again: bool = False  # another try may do better
    undone: bool = False  # the request certainly had no effect
    after_s: float | None = None  # Retry-After
    garbled: bool = False


class Client:
    """Lambda's API for one account. Raises CloudError, and InputError where an argument cannot be right.

    `patience_s` bounds the tries of one call: none begins later. `timeout_s` bounds the silence within one try.
    `backoff_s` is the longest first wait between two tries; the longest next one is twice that, and so on. `say` is
    told of waits that a person notices.
    """

    def __init__(
        self,
        key: str,
        url: str = URL,
        *,
        pace: Pace | None = None,
        patience_s: float = 120.0,
        timeout_s: float = 30.0,
        backoff_s: float = 1.0,
        say: Say | None = None,
    ) -> None:
        self.url = check_url(url)
        check_key(key)
        self.account = hashlib.sha256(key.encode()).hexdigest()[:12]  # which account, without the key
        self.say = say
        self._key = key
        self._pace = pace or Pace()
        self._patience_s = patience_s
        self._timeout_s = timeout_s
        self._backoff_s = backoff_s
        self._trust_env = not _loopback(self.url)  # a proxy has another loopback

    def __repr__(self) -> str:
        return f"Client({self.url}, account {self.account})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is open between two calls; safe in threads, and to use afterwards."""

    def instance_types(self) -> dict[str, InstanceType]:
        """All types that Lambda offers, by name, with the regions that have capacity now."""
        found = self._get("/instance-types", dict[str, _WireTypeItem])
        return {name: item.plain() for name, item in found.items()}

    def instances(self) -> list[Instance]:
        return [item.plain() for item in self._get("/instances", list[_WireInstance])]

    def instance(self, id: str) -> Instance:
        """Raises NotFound also for a moment after a launch."""
        return self._get(f"/instances/{_segment(id)}", _WireInstance).plain()

    def launch(
        self,
        *,
        region: str,
        type_name: str,
        ssh_key: str,
        name: str,
        image: str | None = None,
        user_data: str | None = None,
        file_systems: Iterable[str] = (),
        tags: Iterable[tuple[str, str]] = (),
    ) -> str:
        """Rent one machine; its id. It is billed from now on, until `terminate`.

        `image` is an image's id, or a family such as lambda-stack-24-04. Raises LaunchUnknown where it may have
        happened although no usable answer came; after any other error, a ConnectionLost too, it did not happen.
        """
        _check_name("an instance", name)
        body: dict[str, object] = {
            "region_name": region,
            "instance_type_name": type_name,
            "ssh_key_names": [ssh_key],
            "name": name,
        }
        if image is not None:
            body["image"] = {"id" if _IMAGE_ID.fullmatch(image) else "family": image}
        if user_data is not None:
            if len(user_data.encode()) > USER_DATA_MAX:
                raise InputError(f"The user data of {name} is longer than {USER_DATA_MAX} bytes. Make it shorter.")
            body["user_data"] = user_data
        if file_systems := list(file_systems):
            body["file_system_names"] = file_systems
        if tags := list(tags):
            body["tags"] = [{"key": key, "value": value} for key, value in tags]
        where = f"Lambda, launch of {name}"
        verdict = self._once("POST", "/instance-operations/launch", body, where, kind="launch")
        if verdict.error is not None and verdict.undone:
            raise verdict.error
        why = verdict.why
        if verdict.error is None:
            found = _launched_ids(verdict.data)
            if len(found) == 1:
                return found[0]
            why = f"{where}: the answer names {len(found)} instances"
        raise LaunchUnknown(
            f"{why}. It may have been launched all the same, and be billed: look for {name} in the list of instances "
            f"(run the command again, or see {INSTANCES})."
        )

    def terminate(self, ids: Iterable[str]) -> list[Instance]:
        """End instances: the only thing that stops the bill. They are `terminating` first.

        Raises NotFound if one of them is not there, of several perhaps before any is ended: give one at a time. Right
        after a launch that is no proof that there is nothing to end.
        """
        return self._operate("terminate", ids, _WireTerminated).plain()

    def restart(self, ids: Iterable[str]) -> list[Instance]:
        """Start instances anew; their address may change. Not repeated where it may have happened."""
        return self._operate("restart", ids, _WireRestarted).plain()

    def ssh_keys(self) -> list[SshKey]:
        return [item.plain() for item in self._get("/ssh-keys", list[_WireSshKey])]

    def add_ssh_key(self, name: str, public_key: str) -> SshKey:
        """Register a public key. The same name twice is a RequestError."""
        _check_name("an ssh key", name)
        public_key = public_key.strip()
        if not _PUBLIC_KEY.fullmatch(public_key):  # and without one, Lambda would make a key pair of its own
            raise InputError(f"What should be registered as {name} is no public ssh key. Give the line of a .pub file.")
        where = f"Lambda, ssh key {name}"
        try:
            data = self._call("POST", "/ssh-keys", {"name": name, "public_key": public_key}, where)
        except ApiError as error:
            if error.echo:
                for known in self.ssh_keys():
                    if known.name == name and known.public_key.split()[:2] == public_key.split()[:2]:
                        return known
            raise
        return _convert(data, _WireSshKey, where).plain()

    def delete_ssh_key(self, id: str) -> None:
        path = f"/ssh-keys/{_segment(id)}"
        try:
            self._call("DELETE", path)
        except ApiError as error:
            if not error.echo or any(key.id == id for key in self.ssh_keys()):
                raise

    def images(self) -> list[ImageInfo]:
        return [item.plain() for item in self._get("/images", list[_WireImage])]

    def file_systems(self) -> list[FileSystem]:
        return [item.plain() for item in self._get("/file-systems", list[_WireFileSystem])]

    def create_file_system(self, name: str, region: str) -> FileSystem:
        where = f"Lambda, file system {name}"
        try:
            data = self._call("POST", "/filesystems", {"name": name, "region": region}, where)
        except ApiError as error:
            if error.echo:
                for known in self.file_systems():
                    if (known.name, known.region) == (name, region):
                        return known
            raise
        return _convert(data, _WireFileSystem, where).plain()

    def delete_file_system(self, id: str) -> None:
        """Its files are gone with it."""
        try:
            self._call("DELETE", f"/filesystems/{_segment(id)}")
        except NotFound as error:
            if not error.echo:
                raise

    def _get(self, path: str, kind: type[T]) -> T:
        return _convert(self._call("GET", path), kind, f"Lambda, GET {path}")

    def _operate(self, what: Literal["terminate", "restart"], ids: Iterable[str], kind: type[T]) -> T:
        ids = [_segment(id) for id in ids]
        if not ids:
            raise InputError(f"No instance to {what}. Name at least one.")
        path = f"/instance-operations/{what}"
        where = f"Lambda, {what} {' '.join(ids)}"
        if what == "terminate":
            return _convert(self._call("POST", path, {"instance_ids": ids}, where), kind, where)
        verdict = self._once("POST", path, {"instance_ids": ids}, where)
        if verdict.error is not None:
            raise verdict.error
        return _convert(verdict.data, kind, where)

    def _call(self, method: str, path: str, body: object = None, where: str | None = None) -> Any:
        """The answer's data, of a request that may be made more than once."""
        verdict = self._repeat(method, path, body, where or f"Lambda, {method} {path}", lambda verdict: True)
        if verdict.error is not None:
            raise verdict.error
        return verdict.data

    def _once(
        self, method: str, path: str, body: object, where: str, kind: Literal["request", "launch"] = "request"
    ) -> _Verdict:
        """The same for a request that must not happen twice; an error is not raised."""
        return self._repeat(method, path, body, where, lambda verdict: verdict.undone, kind)

    def _repeat(
        self,
        method: str,
        path: str,
        body: object,
        where: str,
        may: Callable[[_Verdict], bool],
        kind: Literal["request", "launch"] = "request",
    ) -> _Verdict:
        begin = time.monotonic()
        doubt = False
        garbled = 0
        for attempt in itertools.count():
            if kind == "launch":
                self._pace.wait("launch", self.say)
            self._pace.wait("request", self.say)
            verdict = judge(self._try(method, path, body), where, self._key)
            if isinstance(verdict.error, ApiError):
                verdict.error.echo = doubt
            if verdict.error is None or not verdict.again or not may(verdict):
                return verdict
            doubt = doubt or not verdict.undone
            garbled += verdict.garbled
            delay = random.uniform(0.0, min(BACKOFF_MAX_S, self._backoff_s * 2 ** min(attempt, 10)))
            if verdict.after_s is not None:
                delay += min(verdict.after_s, RETRY_AFTER_MAX_S)
            if time.monotonic() - begin + delay > self._patience_s or garbled >= GARBLED_MAX:
                return verdict
            if self.say is not None and delay > TOLD_S:
                self.say(f"{verdict.why}; trying again in {delay:.0f} s.")
            time.sleep(delay)
        raise AssertionError("unreachable")

    def _try(self, method: str, path: str, body: object) -> _Reply | _Trouble:
        """One request. Exceptions of requests hold the request, and so the key: none gets out of here."""
        deadline = time.monotonic() + CONNECT_TIMEOUT_S + 2 * self._timeout_s
        headers = {"Accept": "application/json", "User-Agent": "fractal", "Connection": "close"}
        data = None
        if body is not None:
            data = msgspec.json.encode(body)
            headers["Content-Type"] = "application/json"
        try:
            # A session for each, for a connection of its own: a kept one may be dead by now, and a launch on it looks
            # lost. The header alone does not help, urllib3 keeps the connection unless the server says `close` as well.
            with requests.Session() as session:
                session.trust_env = self._trust_env
                with session.request(
                    method,
                    self.url + path,
                    data=data,
                    headers=headers,
                    auth=_Bearer(self._key),
                    timeout=(min(CONNECT_TIMEOUT_S, self._timeout_s), self._timeout_s),
                    allow_redirects=False,
                    stream=True,
                ) as reply:
                    content = b"".join(_pieces(reply, deadline))
                    return _Reply(reply.status_code, dict(reply.headers), content)
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            return _explain(error, urlsplit(self.url).netloc)


def from_env(folder: Path, *, say: Say | None = None) -> Client:
    """The client that LAMBDA_API_KEY and FRACTAL_LAMBDA_URL describe, with its pace in `folder`. Raises InputError."""
    key = os.environ.get("LAMBDA_API_KEY", "").strip()
    url = os.environ.get("FRACTAL_LAMBDA_URL", "").strip() or URL
    return Client(key, url, pace=Pace(folder), say=say)


def check_key(key: str) -> None:
    """Raises InputError, without the key."""
    how = f"Make one at {KEYS} and set it: export LAMBDA_API_KEY=..."
    if not key:
        raise InputError(f"LAMBDA_API_KEY is not set: there is no key for Lambda's API. {how}")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(f"LAMBDA_API_KEY holds a space, a line break or another character that no key has. {how}")


def check_url(url: str) -> str:
    """The API's base without a slash at its end. Raises InputError."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    whole = url.isascii() and url.isprintable() and " " not in url
    if not host or not whole or parts.scheme not in ("http", "https"):
        raise InputError(f"FRACTAL_LAMBDA_URL is no address of an API. Unset it, or give one such as {URL}.")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise InputError(
            "FRACTAL_LAMBDA_URL holds a user, a password, a query or a fragment. Give the address alone; the key goes "
            "into LAMBDA_API_KEY."
        )
    if parts.scheme == "http" and not _loopback(url):
        raise InputError(f"FRACTAL_LAMBDA_URL: the key would travel to {host} unencrypted. Give an https address.")
    return url.rstrip("/")


def _loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _pieces(reply: requests.Response, deadline: float) -> Iterator[bytes]:
    """The body as it comes; a server that drips cannot hold us."""
    size = 0
    while piece := reply.raw.read1(1 << 16, decode_content=True):
        size += len(piece)
        if size > ANSWER_MAX:
            raise ValueError("the answer has no end")
        if time.monotonic() > deadline:
            raise TimeoutError(errno.ETIMEDOUT, "the answer has no end")
        yield piece


def _explain(error: BaseException, host: str) -> _Trouble:
    """What went wrong on the way, in our own words: those of the libraries may hold a proxy's password."""
    chain = list(_causes(error))
    network = "Check the network, and HTTPS_PROXY if there is one."

    def has(*kinds: type[BaseException]) -> bool:
        return any(isinstance(one, kinds) for one in chain)

    if has(ssl.SSLCertVerificationError):
        return _Trouble(
            f"{host} shows a certificate that is not trusted here",
            "Something on the way reads along, or this machine's clock or certificates are out of date.",
            sent=False,
            lasting=True,
        )
    if has(requests.exceptions.ProxyError, urllib3.exceptions.ProxyError):
        return _Trouble(f"the proxy lets nothing through to {host}", "Correct or unset HTTPS_PROXY.", sent=False)
    if has(urllib3.exceptions.NameResolutionError):
        return _Trouble(f"the name {host} is not found", network, sent=False)
    if has(urllib3.exceptions.NewConnectionError):
        number = next((one.errno for one in chain if isinstance(one, OSError) and isinstance(one.errno, int)), None)
        words = os.strerror(number).lower() if number else "no connection"
        return _Trouble(f"{host} cannot be reached: {words}", network, sent=False)
    if has(requests.ConnectTimeout, urllib3.exceptions.ConnectTimeoutError):
        return _Trouble(f"{host} cannot be reached in time", network, sent=False)
    if has(
        requests.exceptions.InvalidProxyURL, requests.exceptions.InvalidSchema, urllib3.exceptions.LocationParseError
    ):
        return _Trouble("the proxy's address is not usable", "Correct HTTPS_PROXY.", sent=False, lasting=True)
    if has(requests.Timeout, urllib3.exceptions.TimeoutError, TimeoutError):
        return _Trouble(f"{host} does not answer in time", network, sent=True)
    return _Trouble(f"the connection to {host} broke", network, sent=True)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was made of, and what it was made from."""
    todo: list[object] = [error]
    seen: set[int] = set()
    while todo:
        one = todo.pop(0)
        if not isinstance(one, BaseException) or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        todo += [*one.args, getattr(one, "reason", None), getattr(one, "original_error", None)]
        todo.append(one.__cause__)  # not the context: that may be an error of our caller


def judge(answer: _Reply | _Trouble, where: str, key: str) -> _Verdict:
    """What one try came to. Pure, and blind to what the request was."""
    if isinstance(answer, _Trouble):
        why = f"{where}: {answer.reason}"
        error: CloudError = ConnectionLost(f"{why}. {answer.remedy}")
        return _Verdict(error=error, why=why, again=not answer.lasting, undone=not answer.sent)
    status = answer.status
    try:
        content = parse(answer.body, Any)
        broken = False
    except (msgspec.DecodeError, ValueError, RecursionError):
        content, broken = None, True
    if 200 <= status < 300:
        if broken:
            why = f"{where}: the answer is no whole JSON"
            return _Verdict(error=ConnectionLost(f"{why}. {_elsewhere(status)}"), why=why, again=True, garbled=True)
        if not isinstance(content, dict) or "data" not in content:
            why = f"{where}: the answer has no field `data`"
            return _Verdict(error=CloudError(f"{why}. {_elsewhere(status)}"), why=why)
        return _Verdict(data=content["data"])
    said = content.get("error") if isinstance(content, dict) else None
    said = said if isinstance(said, dict) and isinstance(said.get("code"), str) else None
    code = _line(said["code"], key, 100) if said else f"http/{status}"
    message = _words(said, "message", key) or f"HTTP {status} without a reason"
    suggestion = _words(said, "suggestion", key) or None
    kind, remedy = _classify(status, code, said is not None)
    if kind is CloudError:
        why = f"{where}: HTTP {status}, which is no answer of Lambda's API"
        return _Verdict(error=CloudError(f"{why}. {remedy}"), why=why)
    why = f"{where}: {message.rstrip('. ')} ({code})"
    text = f"{why}. {remedy or suggestion or 'Correct the request.'}"
    error = cast(type[ApiError], kind)(text, code=code, status=status, message=message, suggestion=suggestion)
    return _Verdict(
        error=error,
        why=why,
        again=kind in (BusyError, ServerError),
        undone=kind is not ServerError,
        after_s=_retry_after(answer.headers, time.time()),
    )


def _classify(status: int, code: str, explained: bool) -> tuple[type[CloudError], str]:
    """The error's class, and our remedy where we know better than Lambda's suggestion."""
    if status == 429:
        return BusyError, "Something else uses this account's API as well: wait a minute, then run the command again."
    if status >= 500 or status == 408 or code.startswith("provider/"):
        return ServerError, "That is Lambda's side: try again in some minutes."
    if status == 401:
        return AuthError, f"Check LAMBDA_API_KEY, or make a new key at {KEYS}."
    if status == 403:
        return AuthError, "" if explained else f"Check LAMBDA_API_KEY, or make a new key at {KEYS}."
    if not explained or status < 400:
        return CloudError, _elsewhere(status)
    if code.endswith("/insufficient-capacity"):
        return CapacityError, "Try another region or type, or wait for capacity."
    if code.endswith("/quota-exceeded"):
        return QuotaError, f"End what is not needed ({INSTANCES}), or ask Lambda's support for a higher quota."
    if status == 404 or code == "global/object-does-not-exist":
        return NotFound, ""
    return RequestError, ""


def _elsewhere(status: int) -> str:
    moved = "It points elsewhere, where the key must not go. " if 300 <= status < 400 else ""
    return f"{moved}Check FRACTAL_LAMBDA_URL (unset, it is {URL}), and what stands between here and there."


def _words(said: dict[str, Any] | None, name: str, key: str) -> str:
    found = said.get(name) if said else None
    return _line(found, key, 300) if isinstance(found, str) else ""


def _line(text: str, key: str, length: int) -> str:
    """Words of a server as one line to print: no key, no control characters, no end of the screen."""
    if len(key) >= 8:  # what is shorter is no secret, and stands in ordinary words
        text = text.replace(key, "***")
    text = _printable(" ".join(text.split()))
    return text if len(text) <= length else text[:length] + "..."


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text)


def _retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds, from seconds or from an HTTP date."""
    text = next((value for name, value in headers.items() if name.lower() == "retry-after"), "").strip()
    if re.fullmatch(r"[0-9]{1,9}", text):
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - now)
    except (ValueError, TypeError, OverflowError):
        return None


_ID = re.compile(r"[A-Za-z0-9_-]{1,100}")
_IMAGE_ID = re.compile(r"[0-9a-f]{8}-?([0-9a-f]{4}-?){3}[0-9a-f]{12}")
_PUBLIC_KEY = re.compile(r"(ssh-|ecdsa-|sk-)[a-z0-9@.-]+ [A-Za-z0-9+/=]{20,}( [^\r\n]*)?")


def _segment(id: str) -> str:
    """An id as part of a path: `..` or nothing would ask for something else."""
    if not _ID.fullmatch(id):
        raise InputError(f"{id!r} is no id of Lambda's. Take it from the list.")
    return quote(id, safe="")


def _check_name(what: str, name: str) -> None:
    if not name or len(name) > NAME_MAX or not name.isprintable():
        raise InputError(f"{name!r} is no name for {what}: Lambda takes 1 to {NAME_MAX} characters.")


def _convert(data: object, kind: type[T], where: str) -> T:
    """Raises CloudError with the field that is missing or wrong, not with what stands in it."""
    try:
        return msgspec.convert(data, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        text = str(error)
    raise CloudError(
        f"{where}: the answer is not as Lambda documents it: {text.replace('$', 'data', 1) if '`$' in text else text}. "
        "Update fractal, or check FRACTAL_LAMBDA_URL."
    )


# As on the wire: what we need, and what may be missing. Other fields are welcome and dropped.


class _WireRegion(msgspec.Struct):
    name: str
    description: str = ""

    def plain(self) -> Region:
        return Region(self.name, self.description)


class _WireSpecs(msgspec.Struct):
    vcpus: int
    memory_gib: int
    storage_gib: int
    gpus: int


class _WireType(msgspec.Struct):
    name: str
    price_cents_per_hour: int
    description: str = ""
    gpu_description: str = ""

    def __post_init__(self) -> None:
        if self.price_cents_per_hour < 0:
            raise ValueError("Expected a `price_cents_per_hour` of 0 or more")


class _WireFullType(_WireType, kw_only=True):
    specs: _WireSpecs


class _WireTypeItem(msgspec.Struct):
    instance_type: _WireFullType
    regions_with_capacity_available: list[_WireRegion]

    def plain(self) -> InstanceType:
        kind = self.instance_type
        return InstanceType(
            name=kind.name,
            description=kind.description,
            gpu_description=kind.gpu_description,
            price_cents_per_hour=kind.price_cents_per_hour,
            vcpus=kind.specs.vcpus,
            memory_gib=kind.specs.memory_gib,
            storage_gib=kind.specs.storage_gib,
            gpus=kind.specs.gpus,
            regions=tuple(region.plain() for region in self.regions_with_capacity_available),
        )


class _WireInstance(msgspec.Struct):
    id: str
    status: str
    region: _WireRegion
    instance_type: _WireType
    ssh_key_names: list[str]
    name: str | None = None
    ip: str | None = None
    hostname: str | None = None

    def __post_init__(self) -> None:
        if self.ip:  # it goes into a file that ssh obeys
            try:
                ipaddress.ip_address(self.ip if "%" not in self.ip else "")  # what follows a % is not looked at
            except ValueError:
                raise ValueError("Expected an address in `ip`") from None

    def plain(self) -> Instance:
        return Instance(
            id=self.id,
            name=_printable(self.name or ""),  # anyone may name an instance anything; ours are plain
            status=cast(Status, self.status) if self.status in get_args(Status) else "booting",
            ip=self.ip or None,
            region=self.region.name,
            type_name=self.instance_type.name,
            price_cents_per_hour=self.instance_type.price_cents_per_hour,
            ssh_key_names=tuple(self.ssh_key_names),
            hostname=_printable(self.hostname) if self.hostname else None,
        )


class _WireLaunched(msgspec.Struct):
    instance_ids: list[str]


def _launched_ids(data: object) -> list[str]:
    with contextlib.suppress(msgspec.ValidationError, RecursionError):
        return [id for id in msgspec.convert(data, _WireLaunched).instance_ids if _ID.fullmatch(id)]
    return []


class _WireTerminated(msgspec.Struct):
    terminated_instances: list[_WireInstance]

    def plain(self) -> list[Instance]:
        return [item.plain() for item in self.terminated_instances]


class _WireRestarted(msgspec.Struct):
    restarted_instances: list[_WireInstance]

    def plain(self) -> list[Instance]:
        return [item.plain() for item in self.restarted_instances]


class _WireSshKey(msgspec.Struct):
    id: str
    name: str
    public_key: str

    def plain(self) -> SshKey:
        return SshKey(self.id, self.name, self.public_key)


class _WireImage(msgspec.Struct):
    id: str
    name: str
    family: str
    region: _WireRegion

    def plain(self) -> ImageInfo:
        return ImageInfo(self.id, self.name, self.family, self.region.name)


class _WireFileSystem(msgspec.Struct):
    id: str
    name: str
    region: _WireRegion
    mount_point: str = ""
    is_in_use: bool = False

    def plain(self) -> FileSystem:
        return FileSystem(self.id, self.name, self.region.name, self.mount_point, self.is_in_use)
