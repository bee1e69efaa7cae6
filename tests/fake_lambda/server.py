"""A strict fake of the Lambda Cloud API over real HTTP, with faults on demand. Written from Lambda's documentation
(its OpenAPI description 1.6, and what is newer: the status preempted), not from our client. It has the requests that
Fractal makes; any other is refused.

    with FakeLambda(rate=False) as cloud:
        cloud.add_ssh_key("mine", PUBLIC_KEY)
        cloud.script("POST /instance-operations/launch", lose_answer(), status(503))
        ...
        assert cloud.living() == [] and cloud.launches == 1 and cloud.troubles == []

Where the documentation is silent the fake takes the strict or the nasty side: unknown fields are refused, an instance
that is still hidden cannot be terminated either, it is billed from the launch on and until it is `terminated`, no connection
is announced to end, only Bearer keys count. The code of a 429 is not documented; ours is made up.
"""

import contextlib
import fnmatch
import hmac
import json
import math
import os
import re
import socket
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal, NamedTuple, Protocol, Self
from urllib.parse import urlsplit

PREFIX = "/api/v1"
BODY_MAX = 2_000_000
USER_DATA_MAX = 1_000_000
OTHER_IPS = "127.0.0.{}"  # where an instance without a machine moves to
HTML = b"<html><head><title>503</title></head><body>Service temporarily unavailable</body></html>"
REGIONS = {
    "us-west-1": "California, USA",
    "us-east-1": "Virginia, USA",
    "us-south-1": "Texas, USA",
    "us-midwest-1": "Illinois, USA",
    "europe-central-1": "Germany",
}
TYPES = {  # name: GPU, price in cents, vcpus, memory_gib, storage_gib, gpus; prices invented
    "gpu_1x_a10": ("A10 (24 GB PCIe)", 75, 30, 200, 1400, 1),
    "gpu_1x_a100_sxm4": ("A100 (40 GB SXM4)", 129, 30, 200, 512, 1),
    "gpu_1x_h100_pcie": ("H100 (80 GB PCIe)", 249, 26, 200, 1024, 1),
    "gpu_8x_a100_80gb_sxm4": ("A100 (80 GB SXM4)", 1432, 240, 1800, 20480, 8),
}
IMAGES = {
    "lambda-stack-24-04": "43336648-096d-4cba-9aa2-f9bb7727639d",
    "ubuntu-24-04": "5d4e5f4a-1b2c-4d3e-8f60-718293a4b5c6",
}
PUBLIC_KEY = re.compile(r"(ssh-ed25519|ssh-rsa|ecdsa-sha2-\S+|sk-\S+) [A-Za-z0-9+/=]+( .*)?")

Status = Literal["booting", "active", "unhealthy", "terminating", "terminated", "preempted"]
Kind = Literal["ok", "status", "lose_answer", "tear", "cut", "delay", "garbage", "hang"]
ENDED = ("terminated", "preempted")


class Running(Protocol):
    """A machine that stands for an instance."""

    @property
    def ip(self) -> str: ...
    def stop(self) -> None: ...
    def restart(self) -> str:
        """Start it anew; its address, which may be another."""


class MachineFactory(Protocol):
    def start(self, instance_id: str, public_key: str, file_systems: Mapping[str, str], user_data: str) -> Running:
        """`file_systems`: their names by where they are mounted. `user_data`: for cloud-init."""


@dataclass(frozen=True, slots=True)
class Fault:
    """How one request goes wrong; made by the functions below."""

    kind: Kind
    code: int = 0
    error: str | None = None  # Lambda's code; None: an HTML page
    message: str = "Something went wrong."
    done: bool = False  # the request takes effect all the same
    seconds: float = 0.0
    body: bytes = HTML
    headers: tuple[tuple[str, str], ...] = ()


def ok() -> Fault:
    """No fault: lets one request through before those that follow."""
    return Fault("ok")


def status(code: int, error: str | None = None, message: str = "Something went wrong.", *, done: bool = False, retry_after: object = None) -> Fault:  # fmt: skip
    """An error; with JSON if it has a code of Lambda's."""
    headers = () if retry_after is None else (("Retry-After", str(retry_after)),)
    return Fault("status", code, error, message, done, headers=headers)


def lose_answer() -> Fault:
    """Do it, then cut the connection."""
    return Fault("lose_answer", done=True)


def tear() -> Fault:
    """Do it, send half of the answer, then cut the connection."""
    return Fault("tear", done=True)


def cut() -> Fault:
    """Cut the connection instead of doing it."""
    return Fault("cut")


def delay(seconds: float) -> Fault:
    """Do it, this much later."""
    return Fault("delay", done=True, seconds=seconds)


def garbage(body: bytes = HTML, *, done: bool = False) -> Fault:
    """200 with something else in it."""
    return Fault("garbage", 200, done=done, body=body)


def hang(seconds: float = 3600.0, *, done: bool = False) -> Fault:
    """No answer, and the connection stays open."""
    return Fault("hang", done=done, seconds=seconds)


class Call(NamedTuple):
    at: float  # time.time()
    method: str
    path: str  # after /api/v1
    body: Any  # decoded, where it is JSON


class Answer(NamedTuple):
    status: int
    content: Any
    headers: tuple[tuple[str, str], ...] = ()


class Refused(Exception):
    """The request ends here, with an error of Lambda's."""

    def __init__(self, status: int, code: str, message: str, suggestion: str | None = None) -> None:
        error = {"code": code, "message": message} | ({"suggestion": suggestion} if suggestion else {})
        self.answer = Answer(status, {"error": error})


def invalid(message: str) -> Refused:
    return Refused(400, "global/invalid-parameters", f"Invalid request data: {message}")


def missing(message: str) -> Refused:
    return Refused(404, "global/object-does-not-exist", message, "Check the name or id.")


@dataclass
class Rented:
    """One instance, as long as the fake lives."""

    id: str
    name: str | None
    type: str
    region: str
    price_cents: int
    ssh_key_names: list[str]
    file_system_names: list[str]
    ip: str | None
    launched: float  # monotonic, as all below
    launched_at: float  # time.time()
    visible: float
    ready: float  # active from then on, if its machine is there
    status: Status = "booting"
    gone: float | None = None  # terminating: terminated from then on
    ended: float | None = None  # no longer billed
    machine: Running | None = None
    thread: threading.Thread | None = None  # starts, stops or restarts the machine
    taken: bool = True  # of the capacity
    forgotten: bool = False  # not listed any more, whatever keep_terminated_s says


class FakeLambda:
    """The cloud of one account. Its attributes may be changed at any time; all methods are safe in threads."""

    def __init__(
        self,
        *,
        key: str = "secret-key",
        machines: MachineFactory | None = None,
        rate: bool = True,
        request_interval_s: float = 1.0,
        launch_interval_s: float = 12.0,
        quota: int = 8,
        boot_s: float = 0.0,
        terminate_s: float = 0.0,
        hidden_s: float = 0.0,
        ip_before_active: bool = False,
        keep_terminated_s: float = math.inf,
        latency_s: float = 0.0,
        port: int = 0,
    ) -> None:
        """`rate`: 429 for what comes sooner than the intervals. `boot_s`: from launch to active. `terminate_s`: from
        the request to terminated. `hidden_s`: 404 and not listed, right after the launch. `keep_terminated_s`: how
        long what has ended is still listed."""
        self.key = key
        self.rate = rate
        self.request_interval_s = request_interval_s
        self.launch_interval_s = launch_interval_s
        self.quota = quota
        self.boot_s = boot_s
        self.terminate_s = terminate_s
        self.hidden_s = hidden_s
        self.ip_before_active = ip_before_active
        self.keep_terminated_s = keep_terminated_s
        self.latency_s = latency_s
        self.clock_offset_s = 0.0  # its clock minus the true time
        self.account_inactive = False
        self.requests: list[Call] = []
        self.launched: list[str] = []  # ids, in order
        self.troubles: list[str] = []  # of the fake itself and its machines: tests want none
        self._machines = machines
        self._lock = threading.RLock()
        self._closing = threading.Event()
        self._scripts: list[tuple[str, deque[Fault]]] = []
        self._rented: dict[str, Rented] = {}
        self._keys: dict[str, dict[str, str]] = {}
        self._file_systems: dict[str, dict[str, Any]] = {}
        self._types = {name: _type(name, *about) for name, about in TYPES.items()}
        self._capacity: dict[tuple[str, str], _Capacity] = {}
        for name in self._types:
            for region in ("us-west-1", "us-east-1"):
                self.set_capacity(name, region, None)
        self._last_request = self._last_launch = -math.inf
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.cloud = self
        self.url = f"http://127.0.0.1:{self._server.server_port}{PREFIX}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), name="fake lambda", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop serving, and end the machines; `living()` still says what would be billed."""
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        with self._lock:
            rented = list(self._rented.values())
        for one in rented:
            self._stop(one)
        for one in rented:
            if one.thread is not None:
                one.thread.join(120)

    # What tests do to the cloud

    def script(self, match: str, *faults: Fault) -> None:
        """The next requests that match go so, one each: "GET /instances", "GET /instances/*", "* *"."""
        with self._lock:
            self._scripts.append((match, deque(faults)))

    def unscript(self) -> None:
        with self._lock:
            self._scripts.clear()

    def add_ssh_key(self, name: str, public_key: str) -> str:
        """As if done on the website; its id."""
        with self._lock:
            key = {"id": _id(), "name": name, "public_key": public_key}
            self._keys[key["id"]] = key
            return key["id"]

    def set_capacity(self, type: str, region: str, count: int | None, *, after_s: float = 0.0, advertised: bool | None = None) -> None:  # fmt: skip
        """How many more can be launched (None: any number), from then on; `advertised` where the list says otherwise."""
        with self._lock:
            old = self._capacity.get((type, region))
            now = time.monotonic()
            before = old.now(now) if old is not None and after_s > 0 else 0
            self._capacity[type, region] = _Capacity(count, now + after_s, before, advertised)

    def add_file_system(self, name: str, region: str) -> None:
        """As if done on the website."""
        with self._lock:
            self._file_systems[name] = {
                "id": _id(),
                "name": name,
                "mount_point": f"/lambda/nfs/{name}",
                "created": "2026-01-15T10:00:00+00:00",
                "created_by": {"id": "0" * 32, "email": "me@example.com", "status": "active"},
                "is_in_use": False,
                "region": _region(region),
                "bytes_used": 0,
            }

    def no_capacity(self) -> None:
        """Nowhere, for no type."""
        with self._lock:
            self._capacity.clear()

    def set_price(self, type: str, cents: int) -> None:
        """For what is launched from now on."""
        with self._lock:
            self._types[type]["price_cents_per_hour"] = cents

    def preempt(self, id: str) -> None:
        """The provider takes it back."""
        self._end(id, "preempted")

    def end_from_outside(self, id: str, *, forget: bool = False) -> None:
        """As if ended on the website; `forget`: it is not in the list any more either."""
        self._end(id, "terminated")
        if forget:
            with self._lock:
                self._rented[id].forgotten = True

    def unhealthy(self, id: str, healthy: bool = False) -> None:
        with self._lock:
            self._rented[id].status = "active" if healthy else "unhealthy"

    def move(self, id: str, ip: str | None = None) -> str:
        """It starts anew with another address, which is returned."""
        with self._lock:
            one = self._rented[id]
        if one.machine is not None and ip is None:
            ip = one.machine.restart()
        with self._lock:
            number = int((one.ip or "127.0.0.1").rsplit(".", 1)[1]) + 1
            one.ip = ip or OTHER_IPS.format(number)
            return one.ip

    # What tests ask

    def living(self) -> list[dict[str, Any]]:
        """What is billed now."""
        with self._lock:
            self._refresh()
            return [
                {
                    "id": one.id,
                    "name": one.name,
                    "status": one.status,
                    "ip": one.ip,
                    "region": one.region,
                    "type": one.type,
                    "price_cents_per_hour": one.price_cents,
                    "launched_at": one.launched_at,
                }
                for one in self._rented.values()
                if one.status not in ENDED
            ]

    @property
    def launches(self) -> int:
        """How many happened, whatever the client was told."""
        return len(self.launched)

    def billed_seconds(self, id: str) -> float:
        with self._lock:
            self._refresh()
            one = self._rented[id]
            return (time.monotonic() if one.ended is None else one.ended) - one.launched

    def count(self, match: str) -> int:
        """How many requests came that match, as in `script`."""
        return sum(_matches(match, call.method, call.path) for call in list(self.requests))

    def machine(self, id: str) -> Running | None:
        with self._lock:
            return self._rented[id].machine

    # Requests

    def fault(self, method: str, path: str) -> Fault | None:
        """The one that is due for this request; it is used up."""
        with self._lock:
            for match, faults in self._scripts:
                if faults and _matches(match, method, path):
                    return faults.popleft()
        return None

    def answer(self, method: str, target: str, headers: Any, body: bytes) -> Answer:
        """Do what is asked for."""
        with self._lock:
            self._refresh()
            try:
                return self._answer(method, target, headers, body)
            except Refused as error:
                return error.answer

    def _answer(self, method: str, target: str, headers: Any, body: bytes) -> Answer:
        word, _, key = headers.get("Authorization", "").partition(" ")
        if word != "Bearer" or not hmac.compare_digest(key.encode("latin-1"), self.key.encode()):
            text = "API key was invalid, expired, or deleted."
            raise Refused(
                401, "global/invalid-api-key", text, "Check your API key or create a new one, then try again."
            )
        if self.account_inactive:
            text = "Make sure you have verified your email address and have a valid payment method."
            raise Refused(403, "global/account-inactive", "Your account is inactive.", text)
        parts = urlsplit(target)
        path = parts.path.removeprefix(PREFIX)
        here = [(verb, handler, match) for verb, pattern, handler in ROUTES if (match := re.fullmatch(pattern, path))]
        if not parts.path.startswith(f"{PREFIX}/") or not here:
            return Answer(404, b"<html>404 page not found</html>")
        found = next(((handler, match) for verb, handler, match in here if verb == method), None)
        if found is None:
            return Answer(405, b"<html>405 method not allowed</html>")
        if self.rate:
            self._limit("launch" if path.endswith("/launch") else "request")
        if parts.query:
            raise invalid(f"unknown parameter {parts.query.split('=')[0]!r}")
        handler, match = found
        words = [self, *match.groups()]
        if method == "POST":
            words.append(_decode(headers, body))
        elif body:
            raise invalid(f"a {method} has no body")
        return Answer(200, {"data": handler(*words)})

    def _limit(self, kind: Literal["request", "launch"]) -> None:
        now = time.monotonic()
        wait = self._last_request + self.request_interval_s - now
        if kind == "launch":
            wait = max(wait, self._last_launch + self.launch_interval_s - now)
        if wait > 0:
            error = {"code": "global/too-many-requests", "message": "Too many requests."}
            refused = Refused(429, "", "")
            refused.answer = Answer(429, {"error": error}, (("Retry-After", str(math.ceil(wait))),))
            raise refused
        self._last_request = now
        if kind == "launch":
            self._last_launch = now

    def _instance_types(self) -> object:
        now = time.monotonic()
        listed = {}
        for name, about in self._types.items():
            regions = [r for r in REGIONS if (c := self._capacity.get((name, r))) is not None and c.listed(now)]
            listed[name] = {
                "instance_type": dict(about),
                "regions_with_capacity_available": [_region(r) for r in regions],
            }
        return listed

    def _instances(self) -> object:
        return [self._view(one) for one in self._rented.values() if self._seen(one)]

    def _instance(self, id: str) -> object:
        return self._view(self._find(id))

    def _launch(self, body: Any) -> object:
        fields = {
            "region_name": _text(1, 64),
            "instance_type_name": _text(1, 128),
            "ssh_key_names": _texts(1, 1),
            "name": _text(0, 64),
            "image": _object,
            "file_system_names": _texts(0, 1),
            "user_data": _text(0, USER_DATA_MAX),
        }
        _check(body, fields, required=("region_name", "instance_type_name", "ssh_key_names"))
        region, type = body["region_name"], body["instance_type_name"]
        if region not in REGIONS:
            raise invalid(f"region_name: {region!r} is not one of {', '.join(REGIONS)}")
        if type not in self._types:
            raise missing(f"Instance type {type} does not exist.")
        key = next((key for key in self._keys.values() if key["name"] == body["ssh_key_names"][0]), None)
        if key is None:
            raise missing(f"SSH key {body['ssh_key_names'][0]} does not exist.")
        if "image" in body:
            self._check_image(body["image"])
        for name in body.get("file_system_names", []):
            self._check_file_system(name, region)
        if len([one for one in self._rented.values() if one.status not in ENDED]) >= self.quota:
            raise Refused(400, "global/quota-exceeded", "Quota exceeded.", "Contact Support to increase your quota.")
        now = time.monotonic()
        capacity = self._capacity.get((type, region))
        if capacity is None or capacity.now(now) == 0:
            text = "Not enough capacity to fulfill launch request."
            raise Refused(400, "instance-operations/launch/insufficient-capacity", text)
        capacity.take(now)
        one = Rented(
            id=_id(),
            name=body.get("name"),
            type=type,
            region=region,
            price_cents=self._types[type]["price_cents_per_hour"],
            ssh_key_names=list(body["ssh_key_names"]),
            file_system_names=list(body.get("file_system_names", [])),
            ip=None if self._machines else OTHER_IPS.format(1),
            launched=now,
            launched_at=time.time(),
            visible=now + self.hidden_s,
            ready=now + self.boot_s,
        )
        self._rented[one.id] = one
        self.launched.append(one.id)
        if self._machines is not None:
            self._work(one, self._start_machine, one, key["public_key"], body.get("user_data", ""))
        return {"instance_ids": [one.id]}

    def _check_image(self, image: dict[str, Any]) -> None:
        if set(image) not in ({"id"}, {"family"}) or not all(isinstance(value, str) for value in image.values()):
            raise invalid("image: give either id or family, as a string")
        (kind,) = image
        if image[kind] not in (IMAGES.values() if kind == "id" else IMAGES):
            raise missing(f"Image {image[kind]} does not exist.")

    def _check_file_system(self, name: str, region: str) -> None:
        found = next((fs for fs in self._file_systems.values() if fs["name"] == name), None)
        if found is None:
            raise missing(f"Filesystem {name} does not exist.")
        if found["region"]["name"] != region:
            text = f"Filesystem {name} is in {found['region']['name']}, not in {region}."
            raise Refused(400, "instance-operations/launch/file-system-in-wrong-region", text)

    def _terminate(self, body: Any) -> object:
        chosen = self._chosen(body)
        for one in chosen:
            if one.status not in (*ENDED, "terminating"):
                one.status = "terminating"
                one.gone = time.monotonic() + self.terminate_s
                self._stop(one)
        return {"terminated_instances": [self._view(one) for one in chosen]}

    def _chosen(self, body: Any) -> list[Rented]:
        _check(body, {"instance_ids": _texts(1, 100)}, required=("instance_ids",))
        return [self._find(id) for id in dict.fromkeys(body["instance_ids"])]

    def _ssh_keys(self) -> object:
        return list(self._keys.values())

    def _add_ssh_key(self, body: Any) -> object:
        _check(body, {"name": _text(1, 64), "public_key": _text(1, 4096)}, required=("name",))
        if any(key["name"] == body["name"] for key in self._keys.values()):
            raise invalid(f"name: an SSH key named {body['name']} exists already")
        if "public_key" not in body:
            raise invalid("public_key: this fake makes no key pairs")
        if not PUBLIC_KEY.fullmatch(body["public_key"]):
            raise invalid("public_key: not an OpenSSH public key")
        return self._keys[self.add_ssh_key(body["name"], body["public_key"])]

    def _images(self) -> object:
        made = "2026-01-15T10:00:00+00:00"
        return [
            {
                "id": id,
                "name": family,
                "family": family,
                "description": family,
                "version": "1",
                "architecture": "x86_64",
            }
            | {"created_time": made, "updated_time": made, "region": _region(region)}
            for family, id in IMAGES.items()
            for region in REGIONS
        ]

    def _list_file_systems(self) -> object:
        used = {name for one in self._rented.values() if one.status not in ENDED for name in one.file_system_names}
        return [fs | {"is_in_use": fs["name"] in used} for fs in self._file_systems.values()]

    # Instances

    def _refresh(self) -> None:
        """Let the time that has passed take effect."""
        now = time.monotonic()
        for one in self._rented.values():
            working = one.thread is not None and one.thread.is_alive()
            if one.status == "booting" and now >= one.ready and not working:
                one.status = "active" if self._machines is None or one.machine is not None else "unhealthy"
            elif one.status == "terminating" and one.gone is not None and now >= one.gone and not working:
                one.status = "terminated"
                one.ended = one.gone if self._machines is None else now
                self._give_back(one)

    def _end(self, id: str, status: Literal["terminated", "preempted"]) -> None:
        with self._lock:
            self._refresh()
            one = self._rented[id]
            if one.status not in ENDED:
                one.status = status
                one.ended = time.monotonic()
                self._give_back(one)
                self._stop(one)

    def _give_back(self, one: Rented) -> None:
        capacity = self._capacity.get((one.type, one.region))
        if one.taken and capacity is not None:
            capacity.give()
        one.taken = False

    def _find(self, id: str) -> Rented:
        one = self._rented.get(id)
        if one is None or not self._seen(one):
            raise Refused(404, "global/object-does-not-exist", "Specified instance does not exist.")
        return one

    def _seen(self, one: Rented) -> bool:
        now = time.monotonic()
        past = one.forgotten or (one.ended is not None and now >= one.ended + self.keep_terminated_s)
        return now >= one.visible and not past

    def _view(self, one: Rented) -> dict[str, Any]:
        """As the API shows it: what is not known is not there."""
        about = dict(self._types[one.type]) | {"price_cents_per_hour": one.price_cents}
        over = one.status in (*ENDED, "terminating")
        why = {"available": False, "reason_code": "vm-is-terminating", "reason_description": "It is terminating."}
        actions = ("migrate", "rebuild", "restart", "cold_reboot", "terminate")
        token = f"token{one.id[:24]}"
        view = {
            "id": one.id,
            "name": one.name,
            "ip": one.ip if one.status != "booting" or self.ip_before_active else None,
            "private_ip": "10.0.2.100",
            "status": one.status,
            "ssh_key_names": one.ssh_key_names,
            "file_system_names": one.file_system_names,
            "region": _region(one.region),
            "instance_type": about,
            "hostname": f"{one.ip.replace('.', '-')}.cloud.lambda.ai" if one.ip else None,
            "jupyter_token": token,
            "jupyter_url": f"https://jupyter-{one.id}.lambdaspaces.com/?token={token}",
            "is_reserved": False,
            "tags": [],
            "actions": {action: dict(why) if over else {"available": True} for action in actions},
        }
        return {name: value for name, value in view.items() if value is not None}

    def _work(self, one: Rented, function: Callable[..., None], *words: object) -> None:
        """Do it beside the requests, after what is being done with the same machine."""
        before = one.thread

        def run() -> None:
            if before is not None:
                before.join()
            try:
                function(*words)
            except Exception as error:
                self.troubles.append(f"machine of {one.id}: {type(error).__name__}: {error}")

        one.thread = threading.Thread(target=run, name=f"machine {one.id}", daemon=True)
        one.thread.start()

    def _start_machine(self, one: Rented, public_key: str, user_data: str) -> None:
        assert self._machines is not None
        mounted = {self._file_systems[name]["mount_point"]: name for name in one.file_system_names}
        machine = self._machines.start(one.id, public_key, mounted, user_data)
        with self._lock:
            one.machine, one.ip = machine, machine.ip

    def _stop(self, one: Rented) -> None:
        if self._machines is not None:
            self._work(one, self._stop_machine, one)

    def _stop_machine(self, one: Rented) -> None:
        machine, one.machine = one.machine, None
        if machine is not None:
            machine.stop()


@dataclass
class _Capacity:
    count: int | None  # None: any number
    since: float  # from then on; until then `before`
    before: int | None
    advertised: bool | None

    def now(self, now: float) -> int | None:
        return self.count if now >= self.since else self.before

    def listed(self, now: float) -> bool:
        return self.now(now) != 0 if self.advertised is None else self.advertised

    def take(self, now: float) -> None:
        if now >= self.since:
            self.count = None if self.count is None else self.count - 1
        else:
            self.before = None if self.before is None else self.before - 1

    def give(self) -> None:
        self.count = None if self.count is None else self.count + 1


def _type(name: str, gpu: str, cents: int, vcpus: int, memory: int, storage: int, gpus: int) -> dict[str, Any]:
    specs = {"vcpus": vcpus, "memory_gib": memory, "storage_gib": storage, "gpus": gpus}
    about = {"name": name, "description": f"{gpus}x {gpu}", "gpu_description": gpu, "price_cents_per_hour": cents}
    return about | {"specs": specs}


def _region(name: str) -> dict[str, str]:
    return {"name": name, "description": REGIONS[name]}


def _id() -> str:
    return os.urandom(16).hex()


def _matches(match: str, method: str, path: str) -> bool:
    wanted, _, pattern = match.partition(" ")
    return wanted in ("*", method) and fnmatch.fnmatchcase(path, pattern)


# What a body may hold


def _decode(headers: Any, body: bytes) -> Any:
    if headers.get("Content-Type", "").split(";")[0].strip().lower() != "application/json":
        raise invalid("Content-Type must be application/json")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key stands twice")
        return dict(pairs)

    try:
        content = json.loads(body.decode(), object_pairs_hook=once, parse_constant=lambda word: 1 / 0)
    except (ValueError, ArithmeticError, RecursionError):
        raise invalid("the body is not JSON") from None
    if not isinstance(content, dict):
        raise invalid("the body is not an object")
    return content


Checker = Callable[[Any], str | None]  # what is wrong


def _check(body: dict[str, Any], fields: dict[str, Checker], *, required: tuple[str, ...]) -> None:
    for name in required:
        if name not in body:
            raise invalid(f"{name}: missing")
    for name, value in body.items():
        if name not in fields:
            raise invalid(f"{name}: unknown field")
        if wrong := fields[name](value):
            raise invalid(f"{name}: {wrong}")


def _text(least: int, most: int) -> Checker:
    def check(value: Any) -> str | None:
        if not isinstance(value, str):
            return "must be a string"
        return None if least <= len(value) <= most else f"must have {least} to {most} characters"

    return check


def _texts(least: int, most: int) -> Checker:
    def check(value: Any) -> str | None:
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            return "must be a list of strings"
        return None if least <= len(value) <= most else f"must have {least} to {most} elements"

    return check


def _object(value: Any) -> str | None:
    return None if isinstance(value, dict) else "must be an object"


Route = tuple[str, str, Callable[..., object]]
ROUTES: list[Route] = [
    ("GET", r"/instance-types", FakeLambda._instance_types),
    ("GET", r"/instances", FakeLambda._instances),
    ("GET", r"/instances/([^/]+)", FakeLambda._instance),
    ("POST", r"/instance-operations/launch", FakeLambda._launch),
    ("POST", r"/instance-operations/terminate", FakeLambda._terminate),
    ("GET", r"/ssh-keys", FakeLambda._ssh_keys),
    ("POST", r"/ssh-keys", FakeLambda._add_ssh_key),
    ("GET", r"/images", FakeLambda._images),
    ("GET", r"/file-systems", FakeLambda._list_file_systems),
]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    cloud: FakeLambda

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, (ConnectionError, TimeoutError)):
            self.cloud.troubles.append(f"{type(error).__name__}: {error}")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    timeout = 60

    def do_GET(self) -> None:
        cloud = self.server.cloud
        length = self.headers.get("Content-Length", "0")
        if not length.isdigit() or int(length) > BODY_MAX or "Transfer-Encoding" in self.headers:
            self.close_connection = True
            return self._send(413 if length.isdigit() else 411, HTML)
        body = self.rfile.read(int(length))
        path = urlsplit(self.path).path.removeprefix(PREFIX)
        try:
            content = json.loads(body) if body else None
        except (ValueError, RecursionError):
            content = None
        cloud.requests.append(Call(time.time(), self.command, path, content))
        fault = cloud.fault(self.command, path) or ok()
        if not self._wait(cloud.latency_s + (fault.seconds if fault.kind == "delay" else 0.0)):
            return None
        normal = fault.kind in ("ok", "delay")
        answer = cloud.answer(self.command, self.path, self.headers, body) if normal or fault.done else None
        if answer is not None and (normal or fault.kind == "tear"):
            return self._send(answer.status, _encode(answer.content), answer.headers, tear=not normal)
        if fault.kind == "hang":
            self._wait(fault.seconds)
            return self._cut()
        if fault.kind in ("status", "garbage"):
            error = {"error": {"code": fault.error, "message": fault.message}}
            return self._send(fault.code, _encode(error) if fault.error else fault.body, fault.headers)
        return self._cut()

    do_POST = do_PUT = do_DELETE = do_PATCH = do_GET

    def _wait(self, seconds: float) -> bool:
        """False if the cloud closes meanwhile."""
        if seconds > 0 and self.server.cloud._closing.wait(seconds):
            self._cut()
            return False
        return True

    def _send(self, status: int, body: bytes, headers: tuple[tuple[str, str], ...] = (), *, tear: bool = False) -> None:
        self.send_response(status)
        kind = "application/json" if body[:1] in (b"{", b"[") else "text/html"
        for name, value in (("Content-Type", kind), ("Content-Length", str(len(body))), *headers):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if tear else body)
        self.wfile.flush()
        if tear:
            self._cut()

    def _cut(self) -> None:
        """The connection ends here, without a farewell."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.shutdown(socket.SHUT_RDWR)

    def date_time_string(self, timestamp: float | None = None) -> str:
        """For the header Date."""
        return super().date_time_string(time.time() + self.server.cloud.clock_offset_s)

    def log_message(self, format: str, *args: object) -> None:
        pass


def _encode(content: Any) -> bytes:
    return content if isinstance(content, bytes) else json.dumps(content).encode()
