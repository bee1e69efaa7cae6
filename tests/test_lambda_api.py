"""Our client of Lambda's API against the fake over real HTTP, and against servers that are worse than it."""

import contextlib
import copy
import email.utils
import itertools
import json
import logging
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fractal.cloud import lambda_api
from fractal.cloud.lambda_api import (
    AuthError,
    BusyError,
    CapacityError,
    Client,
    CloudError,
    ConnectionLost,
    LaunchUnknown,
    NotFound,
    Pace,
    QuotaError,
    RequestError,
    ServerError,
)
from fractal.errors import InputError, OutsideError
from tests.conftest import ROOT, until
from tests.fake_lambda.server import FakeLambda, Fault, cut, delay, garbage, hang, lose_answer, ok, status, tear

KEY = "secret_fractal_0123456789abcdef.ZYXWVU"
PUBLIC_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAICN+lJwsONkwrdsSnQsu1ydUkIuIg5oOC+Eslvmtt60T me@here"
LAUNCH = "POST /instance-operations/launch"
WISH = {"region": "us-east-1", "type_name": "gpu_1x_a10", "ssh_key": "mine", "name": "fractal-00aa11-22bb33cc"}
QUICK = {"patience_s": 5.0, "timeout_s": 5.0, "backoff_s": 0.01}  # long enough for a busy machine


@pytest.fixture
def cloud() -> Iterator[FakeLambda]:
    with FakeLambda(key=KEY, rate=False) as one:
        one.add_ssh_key("mine", PUBLIC_KEY)
        yield one
        assert one.troubles == []


@pytest.fixture
def client(cloud: FakeLambda) -> Iterator[Client]:
    with connect(cloud.url) as one:
        yield one


def connect(url: str, **settings: Any) -> Client:
    return Client(settings.pop("key", KEY), url, **{"pace": Pace(request_s=0, launch_s=0), **QUICK, **settings})


def launch(client: Client, **changes: Any) -> str:
    return client.launch(**(WISH | changes))


# What it does


def test_types_come_with_prices_and_the_regions_that_have_capacity(cloud: FakeLambda, client: Client) -> None:
    cloud.set_price("gpu_1x_a10", 86)
    cloud.set_capacity("gpu_1x_a10", "us-west-1", 0)
    kind = client.instance_types()["gpu_1x_a10"]
    assert (kind.price_cents_per_hour, kind.vcpus, kind.memory_gib, kind.storage_gib, kind.gpus) == (
        86,
        30,
        200,
        1400,
        1,
    )
    assert kind.gpu_description == "A10 (24 GB PCIe)"
    assert kind.regions == (lambda_api.Region("us-east-1", "Virginia, USA"),)


def test_an_instance_from_launch_to_end(cloud: FakeLambda, client: Client) -> None:
    cloud.boot_s, cloud.terminate_s = 0.2, 0.2
    image, tag = "lambda-stack-24-04", ("project", "fractal")
    id = launch(client, image=image, user_data="#cloud-config\n", tags=[tag])
    assert cloud.requests[-1].body["image"] == {"family": image}
    assert cloud.requests[-1].body["tags"] == [{"key": tag[0], "value": tag[1]}]
    seen = client.instance(id)
    assert (seen.status, seen.ip, seen.hostname is None) == ("booting", None, False)
    time.sleep(0.25)
    (seen,) = client.instances()
    assert seen == lambda_api.Instance(id, WISH["name"], "active", "127.0.0.1", "us-east-1", "gpu_1x_a10", 75, ("mine",), "127-0-0-1.cloud.lambda.ai")  # fmt: skip
    assert [one.status for one in client.restart([id])] == ["booting"]
    assert [one.status for one in client.terminate([id])] == ["terminating"]
    assert [one.status for one in client.terminate([id])] == ["terminating"]
    time.sleep(0.25)
    assert client.instance(id).status == "terminated"
    assert cloud.living() == []


def test_an_image_can_be_named_by_its_id(cloud: FakeLambda, client: Client) -> None:
    (image, *_) = client.images()
    assert (image.family, image.region) == ("lambda-stack-24-04", "us-west-1")
    launch(client, image=image.id)
    assert cloud.requests[-1].body["image"] == {"id": image.id}


def test_keys_and_file_systems_come_and_go(cloud: FakeLambda, client: Client) -> None:
    key = client.add_ssh_key("other", f"{PUBLIC_KEY}\n")
    assert key.public_key == PUBLIC_KEY
    assert {one.name for one in client.ssh_keys()} == {"mine", "other"}
    client.delete_ssh_key(key.id)
    assert {one.name for one in client.ssh_keys()} == {"mine"}
    made = client.create_file_system("models", "us-east-1")
    assert made.mount_point == "/lambda/nfs/models"
    id = launch(client, file_systems=["models"])
    assert [one.is_in_use for one in client.file_systems()] == [True]
    with pytest.raises(RequestError, match="in use"):
        client.delete_file_system(made.id)
    client.terminate([id])
    client.delete_file_system(made.id)
    assert client.file_systems() == []


# Errors of the API, one class each


def quota(cloud: FakeLambda, client: Client) -> None:
    cloud.quota = 0
    launch(client)


def inactive(cloud: FakeLambda, client: Client) -> None:
    cloud.account_inactive = True
    client.instances()


def wrong_key(cloud: FakeLambda, client: Client) -> None:
    cloud.key = "another"
    client.instances()


def elsewhere(cloud: FakeLambda, client: Client) -> None:
    client.create_file_system("models", "us-west-1")
    launch(client, file_systems=["models"])


ERRORS: list[tuple[Callable[[FakeLambda, Client], object], type, str, str]] = [
    (wrong_key, AuthError, "global/invalid-api-key", "make a new key at https://cloud.lambda.ai/api-keys"),
    (inactive, AuthError, "global/account-inactive", "payment method"),
    (quota, QuotaError, "global/quota-exceeded", "higher quota"),
    (elsewhere, RequestError, "instance-operations/launch/file-system-in-wrong-region", "us-west-1, not in us-east-1"),
    (lambda cloud, client: launch(client, region="us-south-1"), CapacityError, "instance-operations/launch/insufficient-capacity", "another region"),
    (lambda cloud, client: launch(client, region="us-nowhere"), RequestError, "global/invalid-parameters", "us-nowhere"),
    (lambda cloud, client: launch(client, type_name="gpu_9x"), NotFound, "global/object-does-not-exist", "gpu_9x"),
    (lambda cloud, client: launch(client, ssh_key="other"), NotFound, "global/object-does-not-exist", "other"),
    (lambda cloud, client: client.instance("0" * 32), NotFound, "global/object-does-not-exist", "instance"),
    (lambda cloud, client: client.terminate(["0" * 32]), NotFound, "global/object-does-not-exist", "terminate 0000"),
    (lambda cloud, client: client.add_ssh_key("mine", PUBLIC_KEY), RequestError, "global/invalid-parameters", "exists already"),
    (lambda cloud, client: client.delete_ssh_key("0" * 32), RequestError, "global/invalid-parameters", "no SSH key"),
]  # fmt: skip


@pytest.mark.parametrize(("do", "kind", "code", "words"), ERRORS)
def test_an_error_of_the_api_is_a_class_with_code_and_remedy(cloud: FakeLambda, client: Client, do: Callable[..., object], kind: type, code: str, words: str) -> None:  # fmt: skip
    with pytest.raises(OutsideError) as caught:
        do(cloud, client)
    error = caught.value
    assert type(error) is kind
    assert isinstance(error, lambda_api.ApiError)
    assert (error.code, error.echo) == (code, False)
    assert words in str(error)
    assert "\n" not in str(error)
    assert str(error)[-1] == "."
    assert cloud.launches == 0


def test_a_refusal_is_asked_for_once(cloud: FakeLambda, client: Client) -> None:
    for do in (wrong_key, inactive):
        with pytest.raises(AuthError):
            do(cloud, client)
    assert len(cloud.requests) == 2


# Trouble on the way


@pytest.mark.parametrize(
    "fault",
    [cut(), lose_answer(), tear(), hang(), garbage(), garbage(b'{"data": ['), status(503), status(500, "global/unknown"), status(408),
     status(400, "provider/internal-unavailable"), status(429), status(429, "x/y", retry_after=0), delay(0.1)],
)  # fmt: skip
def test_what_may_be_asked_twice_is(cloud: FakeLambda, client: Client, fault: Fault) -> None:
    id = launch(client)
    if fault.kind == "hang":
        client._timeout_s = 0.3
    cloud.script("GET /instances", fault, fault)
    cloud.script("POST /instance-operations/terminate", fault, fault)
    assert [one.id for one in client.instances()] == [id]
    assert [one.id for one in client.terminate([id])] == [id]
    assert cloud.living() == []


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        (cut(), ConnectionLost, "broke"),
        (hang(), ConnectionLost, "does not answer in time"),
        (garbage(), ConnectionLost, "no whole JSON"),
        (status(503), ServerError, "HTTP 503"),
        (status(400, "provider/internal-unavailable"), ServerError, "provider/internal-unavailable"),
        (status(429), BusyError, "wait a minute"),
    ],
)
def test_patience_ends(cloud: FakeLambda, fault: Fault, kind: type, words: str) -> None:
    cloud.script("GET /instances", *[fault] * 1000)
    begin = time.monotonic()
    with connect(cloud.url, patience_s=0.3, timeout_s=0.2) as client, pytest.raises(CloudError, match=words) as caught:
        client.instances()
    assert type(caught.value) is kind
    assert time.monotonic() - begin < 3
    assert len(cloud.requests) > 1


@pytest.mark.parametrize(
    ("fault", "happened"),
    [(cut(), 0), (lose_answer(), 1), (tear(), 1), (hang(), 0), (hang(done=True), 1), (garbage(), 0), (garbage(done=True), 1), (garbage(b"{}"), 0),
     (garbage(b'{"data": {"instance_ids": []}}'), 0), (garbage(b'{"data": {"instance_ids": ["a", "b"]}}'), 0), (garbage(b'{"data": {"instance_ids": ["../x"]}}'), 0),
     (status(503), 0), (status(504, done=True), 1), (status(500, "global/unknown", done=True), 1), (status(408), 0), (status(404), 0), (status(302), 0),
     (status(400, "provider/internal-unavailable", done=True), 1), (delay(0.5), 1)],
)  # fmt: skip
def test_a_launch_that_may_have_happened_is_not_repeated(cloud: FakeLambda, client: Client, fault: Fault, happened: int) -> None:  # fmt: skip
    cloud.script(LAUNCH, fault)
    if fault.seconds:
        client._timeout_s = 0.3
    with pytest.raises(LaunchUnknown, match=f"look for {WISH['name']} in the list") as caught:
        launch(client)
    assert cloud.count(LAUNCH) == 1
    client._timeout_s = 5.0
    until(lambda: cloud.launches == happened)
    assert "\n" not in str(caught.value)
    assert [one.name for one in client.instances()] == [WISH["name"]] * happened


def test_a_launch_that_certainly_did_not_happen_is_repeated(cloud: FakeLambda, client: Client) -> None:
    cloud.script(LAUNCH, status(429), status(429, "global/too-many-requests", retry_after=0))
    launch(client)
    assert (cloud.count(LAUNCH), cloud.launches) == (3, 1)
    cloud.script(LAUNCH, *[status(429)] * 1000)
    client._patience_s = 0.2
    with pytest.raises(BusyError):
        launch(client)
    assert cloud.launches == 1


def test_a_launch_waits_for_a_server_that_is_not_there_yet() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ConnectionLost, match="connection refused"):
        launch(connect(f"http://127.0.0.1:{port}/api/v1", patience_s=0.2))
    clouds: list[FakeLambda] = []

    def come() -> None:
        late = FakeLambda(key=KEY, rate=False, port=port)
        late.add_ssh_key("mine", PUBLIC_KEY)
        clouds.append(late.__enter__())

    timer = threading.Timer(0.3, come)
    timer.start()
    try:
        with connect(f"http://127.0.0.1:{port}/api/v1", backoff_s=0.1) as client:
            launch(client)
        assert clouds[0].launches == 1
    finally:
        timer.join()
        for late in clouds:
            late.close()


def test_a_restart_that_may_have_happened_is_not_repeated(cloud: FakeLambda, client: Client) -> None:
    id = launch(client)
    cloud.script("POST /instance-operations/restart", status(429), lose_answer())
    with pytest.raises(ConnectionLost):
        client.restart([id])
    assert cloud.count("POST /instance-operations/restart") == 2


def test_what_was_done_although_the_answer_was_lost_is_no_error(cloud: FakeLambda, client: Client) -> None:
    cloud.script("* *", lose_answer())
    key = client.add_ssh_key("other", PUBLIC_KEY)
    assert key in client.ssh_keys()
    cloud.script("* *", tear())
    client.delete_ssh_key(key.id)
    cloud.script("* *", status(502, done=True))
    made = client.create_file_system("models", "us-east-1")
    assert made in client.file_systems()
    cloud.script("* *", lose_answer())
    client.delete_file_system(made.id)
    assert client.file_systems() == []


def test_anothers_key_of_the_same_name_is_not_taken_for_ours(cloud: FakeLambda, client: Client) -> None:
    cloud.script("POST /ssh-keys", cut())
    with pytest.raises(RequestError, match="exists already") as caught:
        client.add_ssh_key("mine", PUBLIC_KEY.replace("ICN", "IDN"))
    assert caught.value.echo


def test_an_instance_that_was_ended_by_a_lost_request_is_told_as_an_echo(cloud: FakeLambda, client: Client) -> None:
    cloud.keep_terminated_s = 0
    id = launch(client)
    cloud.script("POST /instance-operations/terminate", lose_answer())
    with pytest.raises(NotFound) as caught:
        client.terminate([id])
    assert caught.value.echo
    assert cloud.living() == []


def test_what_is_no_api_at_all_is_asked_three_times(cloud: FakeLambda, client: Client) -> None:
    cloud.script("GET /instances", *[garbage()] * 1000)
    with pytest.raises(ConnectionLost, match="Check FRACTAL_LAMBDA_URL"):
        client.instances()
    assert len(cloud.requests) == 3


def test_threads_share_a_client(cloud: FakeLambda, client: Client) -> None:
    cloud.quota = 1000
    errors: list[Exception] = []

    def work() -> None:
        try:
            for _ in range(10):
                client.instance(launch(client))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert cloud.launches == 60


def test_each_request_has_a_connection_of_its_own(cloud: FakeLambda, client: Client) -> None:
    """The fake keeps connections open, and closes them when it likes: a launch on such a one would be lost."""
    for number in range(40):
        cloud.quota = number + 1
        client.instance(launch(client))
    assert cloud.launches == 40


def test_retry_after_is_heard(cloud: FakeLambda) -> None:
    cloud.script("GET /instances", status(429, retry_after=1))
    begin = time.monotonic()
    with connect(cloud.url, patience_s=5) as client:
        client.instances()
    assert 0.9 < time.monotonic() - begin < 2.5


def test_retry_after_can_be_a_date() -> None:
    when = email.utils.formatdate(1_800_000_030, usegmt=True)
    assert lambda_api._retry_after({"retry-after": when}, 1_800_000_000) == 30
    assert lambda_api._retry_after({"Retry-After": when}, 1_900_000_000) == 0


@pytest.mark.parametrize("when", ["100000", "-1", "soon", "1e9", "Fri, 99 Foo 2026", "\u00b2"])
def test_retry_after_is_not_believed_blindly(cloud: FakeLambda, client: Client, when: str) -> None:
    cloud.script("GET /instances", status(429, retry_after=when))
    begin = time.monotonic()
    with contextlib.suppress(BusyError):
        client.instances()
    assert time.monotonic() - begin < 1


def test_a_wait_is_told(cloud: FakeLambda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lambda_api, "TOLD_S", 0.0)
    told: list[str] = []
    cloud.script("GET /instances", status(503))
    with connect(cloud.url, say=told.append, pace=Pace(request_s=0.1, launch_s=0)) as client:
        client.instances()
    assert told[0].startswith("Lambda, GET /instances: HTTP 503 without a reason (http/503); trying again in")
    assert told[1].startswith("Lambda allows one request in 0 s")


# Secrets


FAULTS = [cut(), hang(), garbage(), status(503), status(401, "global/invalid-api-key", f"The key {KEY} is not known."), status(403), status(302), status(400, "a/b", KEY)]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_the_key_is_in_no_error_and_no_log(cloud: FakeLambda, caplog: pytest.LogCaptureFixture, fault: Fault) -> None:
    caplog.set_level(logging.DEBUG)
    with connect(cloud.url, patience_s=0.05, timeout_s=0.1) as client:
        for do in (client.instances, lambda: launch(client)):
            cloud.unscript()
            cloud.script("* *", *[fault] * 1000)
            with pytest.raises(CloudError) as caught:
                do()
            assert no_secret("".join(traceback.format_exception(caught.value)))
            assert no_secret(repr(vars(caught.value)) + repr(caught.value.args))
            assert caught.value.__cause__ is None  # an error of requests has the request, and that has the header
            assert caught.value.__context__ is None
        assert no_secret(f"{client!r} {client}")
        assert no_secret(caplog.text)


def no_secret(text: str) -> bool:
    return KEY not in text and "token" not in text


def test_a_jupyter_token_stays_outside(cloud: FakeLambda, client: Client) -> None:
    id = launch(client)
    assert no_secret(repr([client.instances(), client.instance(id), client.terminate([id])]))


def test_the_account_is_told_apart_without_the_key() -> None:
    one, two = Client(KEY), Client(f"{KEY}x")
    assert len(one.account) == 12
    assert one.account == Client(KEY).account != two.account


def test_netrc_does_not_replace_the_key(cloud: FakeLambda, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password wrong\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    client._trust_env = True  # as for an address that is no loopback
    assert client.instances() == []


def test_a_redirect_is_not_followed(cloud: FakeLambda) -> None:
    answer = f"HTTP/1.1 307 Temporary Redirect\r\nLocation: {cloud.url}/instances\r\nContent-Length: 0\r\n\r\n"
    with Raw(answer.encode()) as raw, connect(raw.url) as client:
        with pytest.raises(CloudError, match=r"HTTP 307.*points elsewhere"):
            client.instances()
        with pytest.raises(LaunchUnknown):
            launch(client)
    assert cloud.requests == []


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl")
def test_a_certificate_that_nobody_vouches_for_ends_it_at_once(tmp_path: Path) -> None:
    words = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=127.0.0.1 -days 2"
    subprocess.run([*words.split(), "-keyout", "key", "-out", "cert"], cwd=tmp_path, check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    with Raw(b"HTTP/1.1 200 OK\r\n\r\n", tls=tls) as raw, connect(raw.url) as client:
        for do in (client.instances, lambda: launch(client)):
            with pytest.raises(ConnectionLost, match="a certificate that is not trusted"):
                do()
    assert raw.heard == b""


def test_a_proxys_password_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    with Raw(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n") as raw:
        monkeypatch.setenv("HTTPS_PROXY", f"http://me:hunter2@127.0.0.1:{raw.port}")
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        client = connect("https://lambda.invalid/api/v1", patience_s=0.1)
        with pytest.raises(ConnectionLost, match=r"the proxy lets nothing through to lambda\.invalid") as caught:
            launch(client)  # it certainly did not happen
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))
    assert KEY.encode() not in raw.heard


def test_a_fake_on_this_machine_is_not_asked_through_a_proxy(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert client.instances() == []


# Input


@pytest.mark.parametrize("key", ["", " ", "\n", "two words", "a\nb", "sécret", "a\x00b"])
def test_a_key_that_cannot_be_right(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "\x00" not in key:
        monkeypatch.setenv("LAMBDA_API_KEY", key)
        with pytest.raises(
            InputError, match=r"LAMBDA_API_KEY .*https://cloud.lambda.ai/api-keys.*export LAMBDA_API_KEY="
        ):
            lambda_api.from_env(tmp_path)
    with pytest.raises(InputError) as caught:
        Client(key)
    assert not key.strip() or key not in str(caught.value)


def test_the_environment_names_the_cloud(cloud: FakeLambda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMBDA_API_KEY", f"{KEY}\n")
    monkeypatch.delenv("FRACTAL_LAMBDA_URL", raising=False)
    assert lambda_api.from_env(tmp_path).url == "https://cloud.lambda.ai/api/v1"
    monkeypatch.setenv("FRACTAL_LAMBDA_URL", f"{cloud.url}/")
    assert lambda_api.from_env(tmp_path).url == cloud.url
    assert lambda_api.from_env(tmp_path).instances() == []
    assert (tmp_path / "pace-request").exists()
    monkeypatch.delenv("LAMBDA_API_KEY")
    with pytest.raises(InputError, match="is not set"):
        lambda_api.from_env(tmp_path)


@pytest.mark.parametrize(
    ("url", "words"),
    [("cloud.lambda.ai", "no address"), ("ftp://x.example", "no address"), ("http://", "no address"), ("https://x.example:port", "no address"), ("https://[::1", "no address"),
     ("https://x.example/a b", "no address"), ("https://me:hunter2@x.example", "a user, a password"), ("https://x.example/?a=hunter2", "a query"), ("http://x.example/api/v1", "unencrypted")],
)  # fmt: skip
def test_an_address_that_cannot_be_right(url: str, words: str) -> None:
    with pytest.raises(InputError, match=f"FRACTAL_LAMBDA_URL.*{words}") as caught:
        Client(KEY, url)
    assert "hunter2" not in str(caught.value)


def test_input_that_cannot_be_right_is_not_sent(cloud: FakeLambda, client: Client) -> None:
    for id in ("", "..", "a/b", "a?b", "a b", "ü"):
        for do in (
            client.instance,
            client.delete_ssh_key,
            client.delete_file_system,
            lambda id: client.terminate([id]),
        ):
            with pytest.raises(InputError, match="no id"):
                do(id)
    with pytest.raises(InputError, match="No instance to terminate"):
        client.terminate([])
    for name in ("", "x" * 65, "a\nb"):
        with pytest.raises(InputError, match="1 to 64"):
            launch(client, name=name)
    for line in ("", "-----BEGIN OPENSSH PRIVATE KEY-----", "ssh-ed25519", f"{PUBLIC_KEY}\n{PUBLIC_KEY}"):
        with pytest.raises(InputError, match="no public ssh key"):
            client.add_ssh_key("other", line)
    with pytest.raises(InputError, match="user data"):
        launch(client, user_data="x" * 1_000_001)
    assert cloud.requests == []


# Answers


def good(cloud: FakeLambda, client: Client) -> dict[str, Any]:
    """What the fake answers to each question, decoded."""
    cloud.ip_before_active = True
    id = launch(client)
    client.create_file_system("models", "us-east-1")
    view = cloud._view(cloud._rented[id])
    return {
        "instance_types": cloud._instance_types(),
        "instances": [view],
        "instance": view,
        "ssh_keys": cloud._ssh_keys(),
        "images": cloud._images(),
        "file_systems": cloud._list_file_systems(),
        "terminate": {"terminated_instances": [view]},
        "restart": {"restarted_instances": [view]},
        "add_ssh_key": cloud._ssh_keys()[0],  # type: ignore[index]
        "create_file_system": cloud._list_file_systems()[0],  # type: ignore[index]
        "launch": {"instance_ids": [id]},
    }


def ask(client: Client, question: str) -> object:
    words: dict[str, tuple[Any, ...]] = {
        "instance": ("1",),
        "terminate": (["1"],),
        "restart": (["1"],),
        "add_ssh_key": ("other", PUBLIC_KEY),
        "create_file_system": ("models", "us-east-1"),
    }
    return launch(client) if question == "launch" else getattr(client, question)(*words.get(question, ()))


QUESTIONS = ["instance_types", "instances", "instance", "ssh_keys", "images", "file_systems", "terminate", "restart", "add_ssh_key", "create_file_system", "launch"]  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
SAME_CLOUD = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("question", QUESTIONS)
@given(data=st.data())
@SAME_CLOUD
def test_no_json_gives_anything_but_a_value_or_a_cloud_error(cloud: FakeLambda, client: Client, question: str, data: st.DataObject) -> None:  # fmt: skip
    cloud.quota = 10**9
    cloud._file_systems.clear()
    cloud.unscript()
    answer = copy.deepcopy(good(cloud, client)[question])
    spoil(answer, data)
    wrapped = data.draw(st.sampled_from([{"data": answer}, answer, {"data": answer, "more": 1}, [answer]]))
    client._patience_s = 0
    for fault in (garbage(json.dumps(wrapped).encode()), Fault("status", data.draw(st.sampled_from([400, 404, 200, 500])), body=json.dumps({"error": answer}).encode())):  # fmt: skip
        cloud.script("* *", fault)
        with contextlib.suppress(CloudError):
            ask(client, question)


def spoil(value: Any, data: st.DataObject) -> None:
    """Change one place: left out, or something else."""
    place, key = value, data.draw(st.sampled_from(keys(value)))
    while isinstance(place[key], (dict, list)) and place[key] and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(st.sampled_from(keys(place)))
    if data.draw(st.booleans()):
        del place[key]
    else:
        place[key] = data.draw(JSON)


def keys(value: Any) -> list[Any]:
    return sorted(value) if isinstance(value, dict) else list(range(len(value)))


def answering(cloud: FakeLambda, client: Client, question: str, change: Callable[[Any], object]) -> object:
    answer = copy.deepcopy(good(cloud, client)[question])
    change(answer)
    cloud.script("* *", garbage(json.dumps({"data": answer}).encode()))
    return ask(client, question)


@pytest.mark.parametrize(
    ("question", "change", "words"),
    [
        ("instances", lambda a: a[0].pop("status"), "missing required field `status` - at `data[0]`"),
        ("instance", lambda a: a.pop("id"), "missing required field `id`"),
        ("instance", lambda a: a["region"].pop("name"), "missing required field `name` - at `data.region`"),
        ("instance", lambda a: a["instance_type"].update(price_cents_per_hour="75"), "Expected `int`, got `str` - at `data.instance_type.price_cents_per_hour`"),
        ("instance", lambda a: a["instance_type"].update(price_cents_per_hour=-1), "`price_cents_per_hour` of 0 or more"),
        ("instance", lambda a: a.update(ip="1.2.3.4\nProxyCommand rm -rf /"), "Expected an address in `ip`"),
        ("instance", lambda a: a.update(ip="fe80::1%a\nProxyCommand x"), "Expected an address in `ip`"),
        ("instance_types", lambda a: a["gpu_1x_a10"]["instance_type"]["specs"].pop("gpus"), "missing required field `gpus`"),
        ("terminate", lambda a: a.clear(), "missing required field `terminated_instances`"),
        ("file_systems", lambda a: a[0].pop("region"), "missing required field `region`"),
        ("images", lambda a: a[0].pop("family"), "missing required field `family`"),
        ("ssh_keys", lambda a: a[0].pop("public_key"), "missing required field `public_key`"),
    ],
)  # fmt: skip
def test_a_field_that_is_missing_or_wrong_is_named(cloud: FakeLambda, client: Client, question: str, change: Any, words: str) -> None:  # fmt: skip
    with pytest.raises(CloudError) as caught:
        answering(cloud, client, question, change)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert type(caught.value) is CloudError


def test_other_fields_and_states_are_welcome(cloud: FakeLambda, client: Client) -> None:
    """A listing that fails would keep us from ending what costs money."""

    def change(answer: Any) -> None:
        answer[0] |= {"status": "hibernating", "ip": "", "hostname": None, "name": "\x1b[2Jx", "colour": {"a": 1}}
        answer.append({"id": "1", "status": "active", "region": {"name": "r"}, "instance_type": {"name": "t", "price_cents_per_hour": 1}, "ssh_key_names": []})  # fmt: skip

    one, two = answering(cloud, client, "instances", change)  # type: ignore[misc]
    assert (one.status, one.ip, one.hostname, one.name) == ("booting", None, None, "?[2Jx")
    assert (two.status, two.ip, two.hostname, two.name) == ("active", None, None, "")


SAID = st.fixed_dictionaries({"code": st.sampled_from(["a/b", "global/quota-exceeded", "provider/x", ""]) | JSON}, optional={"message": JSON, "suggestion": JSON})  # fmt: skip


@given(code=st.integers(100, 999), body=st.binary(max_size=60) | (SAID | JSON).map(lambda said: json.dumps({"error": said}).encode()))  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_any_answer_is_judged(code: int, body: bytes) -> None:
    verdict = lambda_api.judge(lambda_api._Reply(code, {}, body), "GET /x", KEY)
    if verdict.error is not None:
        assert "\n" not in str(verdict.error)
        assert verdict.why
    if verdict.undone:  # a launch would be repeated, or given up
        assert verdict.error is not None
        assert 400 <= code < 500


class Raw:
    """A server that answers each connection with these bytes, then closes it; `drip` sends them one by one."""

    def __init__(self, answer: bytes, drip: float = 0.0, tls: ssl.SSLContext | None = None) -> None:
        self.answer, self.drip, self.tls, self.heard = answer, drip, tls, b""

    def __enter__(self) -> "Raw":
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"http{'s' if self.tls else ''}://127.0.0.1:{self.port}/api/v1"
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self._answer(self._listener.accept()[0])

    def _answer(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            if self.tls is not None:
                connection = self.tls.wrap_socket(connection, server_side=True)
            self.heard += connection.recv(65536)
            for piece in [self.answer[i : i + 1] for i in range(len(self.answer))] if self.drip else [self.answer]:
                connection.sendall(piece)
                time.sleep(self.drip)


@given(answer=st.binary(max_size=80) | st.binary(max_size=80).map(lambda tail: b"HTTP/1.1 200 OK\r\n" + tail))
@settings(max_examples=100, deadline=None)
def test_no_bytes_give_anything_but_a_cloud_error(answer: bytes) -> None:
    with Raw(answer) as raw, connect(raw.url, patience_s=0) as client, pytest.raises(CloudError):
        client.instances()


@pytest.mark.parametrize(
    "head",
    [b"Content-Encoding: gzip\r\nContent-Length: 5", b"Transfer-Encoding: chunked", b"Content-Length: -5", b"Content-Length: 900", b"Location: http://[::1"],
)  # fmt: skip
def test_a_broken_http_answer_is_a_cloud_error(head: bytes) -> None:
    with Raw(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\nhello") as raw, connect(raw.url, patience_s=0) as client:
        with pytest.raises(ConnectionLost):
            client.instances()
        with pytest.raises(LaunchUnknown):
            launch(client)


def test_an_answer_without_an_end_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lambda_api, "CONNECT_TIMEOUT_S", 0.1)
    answer = b"HTTP/1.1 200 OK\r\n\r\n" + b" " * 10_000
    begin = time.monotonic()
    with Raw(answer, drip=0.01) as raw, pytest.raises(ConnectionLost, match="in time"):
        connect(raw.url, patience_s=0, timeout_s=0.3).instances()
    assert time.monotonic() - begin < 3
    monkeypatch.setattr(lambda_api, "ANSWER_MAX", 5000)
    with Raw(answer) as raw, connect(raw.url, patience_s=0) as client, pytest.raises(ConnectionLost):
        client.instances()


# Pace


WAITS = """
import sys, time
from pathlib import Path
from fractal.cloud.lambda_api import Pace
pace = Pace(Path(sys.argv[1]), request_s=float(sys.argv[2]), launch_s=0)
for _ in range(int(sys.argv[3])):
    pace.wait("request")
    print(time.time(), flush=True)
"""


def waiting(folder: Path, interval: float, times: int) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", WAITS, str(folder), str(interval), str(times)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def test_two_processes_share_one_pace(tmp_path: Path) -> None:
    with waiting(tmp_path, 0.15, 5) as one, waiting(tmp_path, 0.15, 5) as two:
        times = sorted(float(line) for each in (one, two) for line in each.communicate()[0].split())
    assert len(times) == 10
    assert min(b - a for a, b in itertools.pairwise(times)) > 0.1


def test_threads_share_one_pace(tmp_path: Path) -> None:
    for pace in (Pace(request_s=0.05), Pace(tmp_path, request_s=0.05)):
        begin = time.monotonic()
        threads = [threading.Thread(target=pace.wait, args=("request",)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert time.monotonic() - begin > 0.24


def test_the_dead_hold_no_lock(tmp_path: Path) -> None:
    with waiting(tmp_path, 30, 2) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        time.sleep(0.3)  # it waits for its second turn, with the lock
        holder.send_signal(signal.SIGKILL)
    os.utime(tmp_path / "pace-request", (0, 0))
    begin = time.monotonic()
    Pace(tmp_path, request_s=30).wait("request")
    assert time.monotonic() - begin < 1


def far_ahead(folder: Path) -> None:
    (folder / "pace-request").touch()
    os.utime(folder / "pace-request", (4e9, 4e9))


def long_ago(folder: Path) -> None:
    (folder / "pace-request").touch()
    os.utime(folder / "pace-request", (0, 0))


def nonsense(folder: Path) -> None:
    (folder / "pace-request").write_bytes(b"\xff\x00 nonsense")


def a_folder(folder: Path) -> None:
    (folder / "pace-request" / "x").mkdir(parents=True)


def lock_is_a_folder(folder: Path) -> None:
    (folder / "pace-request.lock").mkdir()


def is_a_file(folder: Path) -> None:
    folder.rmdir()
    folder.write_bytes(b"")


@pytest.mark.parametrize("harm", [far_ahead, long_ago, nonsense, a_folder, lock_is_a_folder, is_a_file])
def test_no_file_and_no_clock_makes_the_pace_wait_longer_than_once(tmp_path: Path, harm: Callable[[Path], None]) -> None:  # fmt: skip
    folder = tmp_path / "state"
    folder.mkdir()
    harm(folder)
    pace = Pace(folder, request_s=0.5)
    begin = time.monotonic()
    pace.wait("request")
    first = time.monotonic() - begin
    pace.wait("request")
    assert first < 1.0
    assert 0.4 < time.monotonic() - begin - first < 1.0


def test_the_pace_satisfies_the_cloud() -> None:
    with FakeLambda(key=KEY, request_interval_s=0.1, launch_interval_s=0.4) as cloud:
        cloud.add_ssh_key("mine", PUBLIC_KEY)
        with connect(cloud.url, pace=Pace(request_s=0.12, launch_s=0.45)) as client:
            for number in range(3):
                launch(client, name=f"n{number}")
                client.instances()
        assert cloud.launches == 3
        assert len(cloud.requests) == 6  # none was refused and repeated
        with connect(cloud.url, patience_s=10) as client:
            client.instances()
        assert len(cloud.requests) == 8  # without the pace some are, and the client waits


def test_a_fault_can_wait_for_its_turn(cloud: FakeLambda, client: Client) -> None:
    cloud.script("GET /instances", ok(), status(401, "global/invalid-api-key"))
    assert client.instances() == []
    with pytest.raises(AuthError):
        client.instances()
