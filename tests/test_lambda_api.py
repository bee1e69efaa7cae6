"""The client of Lambda's API against the fake over real HTTP, and against servers that are worse than it."""

import contextlib
import copy
import json
import logging
import shutil
import socket
import ssl
import subprocess
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fractal.cloud import lambda_api, lambda_errors
from fractal.cloud.lambda_api import Client, RateLimiter
from fractal.cloud.lambda_errors import (
    URL,
    ApiError,
    AuthError,
    CapacityError,
    CloudError,
    ConnectionLostError,
    LaunchUnknownError,
    NotFoundError,
)
from fractal.cloud.lambda_types import Region
from fractal.cloud.ssh_keys import make_host_key
from fractal.errors import InputError, OutsideError
from tests.conftest import until
from tests.fake_lambda.server import FakeLambda, Fault, cut, delay, garbage, hang, lose_answer, ok, status, tear

KEY = "secret_fractal_0123456789abcdef.ZYXWVU"
PUBLIC_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAICN+lJwsONkwrdsSnQsu1ydUkIuIg5oOC+Eslvmtt60T me@here"
LAUNCH = "POST /instance-operations/launch"
TERMINATE = "POST /instance-operations/terminate"
NAME = "fractal-00aa11-22bb33cc"
QUICK = {"patience_s": 5.0, "timeout_s": 5.0, "backoff_s": 0.01}  # long enough for a busy machine


@pytest.fixture
def cloud() -> Iterator[FakeLambda]:
    with FakeLambda(key=KEY, rate=False) as fake:
        fake.add_ssh_key("mine", PUBLIC_KEY)
        yield fake
        assert fake.troubles == []


@pytest.fixture
def client(cloud: FakeLambda) -> Client:
    return connect(cloud.url)


def connect(url: str, **options: Any) -> Client:
    limiter = RateLimiter(Path(), request_s=0, launch_s=0)
    return Client(options.pop("key", KEY), url, **{"rate_limiter": limiter, **QUICK, **options})


def launch(client: Client, **changes: Any) -> str:
    request = {"region": "us-east-1", "type_name": "gpu_1x_a10", "ssh_key": "mine", "name": NAME}
    return client.launch(**(request | changes))


# --- what it does


def test_types_come_with_prices_and_the_regions_that_have_capacity(cloud: FakeLambda, client: Client) -> None:
    cloud.set_price("gpu_1x_a10", 86)
    cloud.set_capacity("gpu_1x_a10", "us-west-1", 0)
    offer = client.instance_types()["gpu_1x_a10"]
    assert offer.price_cents_per_hour == 86
    assert offer.instance_type.gpu_description == "A10 (24 GB PCIe)"
    assert offer.regions == (Region("us-east-1"),)


def test_an_instance_from_launch_to_end(cloud: FakeLambda, client: Client) -> None:
    cloud.boot_s, cloud.terminate_s = 0.2, 0.2
    id = launch(client, image="lambda-stack-24-04")
    assert cloud.requests[-1].body["image"] == {"family": "lambda-stack-24-04"}
    assert (client.instance(id).status, client.instance(id).ip) == ("booting", None)
    until(lambda: client.instance(id).status == "active")
    (seen,) = client.instances()
    assert (seen.id, seen.name, seen.ip, seen.region.name) == (id, NAME, "127.0.0.1", "us-east-1")
    assert (seen.instance_type.name, seen.instance_type.price_cents_per_hour) == ("gpu_1x_a10", 75)
    for _ in range(2):
        client.terminate(id)
        assert client.instance(id).status == "terminating"
    until(lambda: client.instance(id).status == "terminated")
    assert cloud.living() == []


def test_an_image_can_be_named_by_its_id(cloud: FakeLambda, client: Client) -> None:
    image = client.images()[0]
    assert (image.family, image.region.name) == ("lambda-stack-24-04", "us-west-1")
    launch(client, image=image.id)
    assert cloud.requests[-1].body["image"] == {"id": image.id}


def test_how_far_lambdas_clock_is_off_is_known(cloud: FakeLambda, client: Client) -> None:
    for offset_s in (0.0, -7200.0, 5 * 365 * 86400.0):
        cloud.clock_offset_s = offset_s
        client.instances()
        assert abs(client.clock_offset_s - offset_s) < 30


def test_keys_and_file_systems_are_listed(cloud: FakeLambda, client: Client) -> None:
    assert client.add_ssh_key("other", PUBLIC_KEY).public_key == PUBLIC_KEY
    assert {key.name for key in client.ssh_keys()} == {"mine", "other"}
    cloud.add_file_system("models", "us-east-1")
    assert [(system.name, system.region.name) for system in client.file_systems()] == [("models", "us-east-1")]
    launch(client, file_systems=["models"])
    assert cloud.requests[-1].body["file_system_names"] == ["models"]


# --- errors of the API, one class each


def over_quota(cloud: FakeLambda, client: Client) -> None:
    cloud.quota = 0
    launch(client)


def inactive(cloud: FakeLambda, client: Client) -> None:
    cloud.account_inactive = True
    client.instances()


def wrong_key(cloud: FakeLambda, client: Client) -> None:
    cloud.key = "another"
    client.instances()


def wrong_region(cloud: FakeLambda, client: Client) -> None:
    cloud.add_file_system("models", "us-west-1")
    launch(client, file_systems=["models"])


def another_key_of_that_name(cloud: FakeLambda, client: Client) -> None:
    client.add_ssh_key("mine", PUBLIC_KEY.replace("ICN", "IDN"))


ERRORS: list[tuple[Callable[[FakeLambda, Client], object], type, str, str]] = [
    (wrong_key, AuthError, "global/invalid-api-key", "make a new key at https://cloud.lambda.ai/api-keys"),
    (inactive, AuthError, "global/account-inactive", "payment method"),
    (over_quota, ApiError, "global/quota-exceeded", "higher quota"),
    (wrong_region, ApiError, "instance-operations/launch/file-system-in-wrong-region", "us-west-1, not in us-east"),
    (
        lambda cloud, client: launch(client, region="us-south-1"),
        CapacityError,
        "instance-operations/launch/insufficient-capacity",
        "another region",
    ),
    (lambda cloud, client: launch(client, region="us-nowhere"), ApiError, "global/invalid-parameters", "nowhere"),
    (lambda cloud, client: launch(client, type_name="gpu_9x"), NotFoundError, "global/object-does-not-exist", "gpu_9x"),
    (lambda cloud, client: launch(client, ssh_key="other"), NotFoundError, "global/object-does-not-exist", "other"),
    (lambda cloud, client: client.instance("0" * 32), NotFoundError, "global/object-does-not-exist", "instance"),
    (lambda cloud, client: client.terminate("0" * 32), NotFoundError, "global/object-does-not-exist", "terminate 0000"),
    (another_key_of_that_name, ApiError, "global/invalid-parameters", "exists already"),
]


def test_an_error_of_the_api_is_a_class_with_code_and_remedy() -> None:
    for act, kind, code, text in ERRORS:
        with FakeLambda(key=KEY, rate=False) as cloud:
            cloud.add_ssh_key("mine", PUBLIC_KEY)
            with pytest.raises(OutsideError) as caught:
                act(cloud, connect(cloud.url))
        error = caught.value
        assert type(error) is kind
        assert isinstance(error, ApiError)
        assert error.code == code
        assert text in str(error)
        assert "\n" not in str(error)
        assert str(error)[-1] == "."
        assert cloud.launches == 0


def test_a_refusal_is_not_repeated(cloud: FakeLambda, client: Client) -> None:
    for act in (wrong_key, inactive):
        with pytest.raises(AuthError):
            act(cloud, client)
    assert len(cloud.requests) == 2


# --- failures on the way

RETRIED = [
    cut(),
    lose_answer(),
    tear(),
    hang(),
    status(503),
    status(500, "global/unknown"),
    status(408),
    status(400, "provider/internal-unavailable"),
    status(429),
    status(429, "x/y", retry_after=0),
    delay(0.1),
]


def test_what_is_safe_to_repeat_is_repeated(cloud: FakeLambda, client: Client) -> None:
    cloud.quota = 100
    for fault in RETRIED:
        client._timeout_s = 0.3 if fault.kind == "hang" else 5.0
        id = launch(client)
        cloud.script("GET /instances", fault, fault)
        cloud.script(TERMINATE, fault, fault)
        assert id in [instance.id for instance in client.instances()], fault
        client.terminate(id)
        assert cloud.living() == [], fault


def test_retries_end(cloud: FakeLambda) -> None:
    for fault, kind, text in (
        (cut(), ConnectionLostError, "broke"),
        (hang(), ConnectionLostError, "does not answer in time"),
        (status(503), ApiError, "HTTP 503"),
        (status(400, "provider/internal-unavailable"), ApiError, "provider/internal-unavailable"),
        (status(429), ApiError, "wait a minute"),
    ):
        cloud.unscript()
        cloud.requests.clear()
        cloud.script("GET /instances", *[fault] * 1000)
        begin = time.monotonic()
        with pytest.raises(CloudError, match=text) as caught:
            connect(cloud.url, patience_s=0.3, timeout_s=0.2).instances()
        assert type(caught.value) is kind
        assert time.monotonic() - begin < 3
        assert len(cloud.requests) > 1


UNKNOWN = [  # fault, and whether the launch happened
    (cut(), 0),
    (lose_answer(), 1),
    (tear(), 1),
    (hang(), 0),
    (hang(done=True), 1),
    (garbage(), 0),
    (garbage(done=True), 1),
    (garbage(b"{}"), 0),
    (garbage(b'{"data": {"instance_ids": []}}'), 0),
    (garbage(b'{"data": {"instance_ids": ["a", "b"]}}'), 0),
    (garbage(b'{"data": {"instance_ids": ["../x"]}}'), 0),
    (status(503), 0),
    (status(504, done=True), 1),
    (status(500, "global/unknown", done=True), 1),
    (status(408), 0),
    (status(404), 0),
    (status(302), 0),
    (status(400, "provider/internal-unavailable", done=True), 1),
    (delay(0.5), 1),
]


def test_a_launch_that_may_have_happened_is_not_repeated() -> None:
    for fault, happened in UNKNOWN:
        with FakeLambda(key=KEY, rate=False) as cloud:
            cloud.add_ssh_key("mine", PUBLIC_KEY)
            cloud.script(LAUNCH, fault)
            client = connect(cloud.url, timeout_s=0.3 if fault.seconds else 5.0)
            with pytest.raises(LaunchUnknownError, match=f"look for {NAME} in the list") as caught:
                launch(client)
            assert "\n" not in str(caught.value)
            assert cloud.count(LAUNCH) == 1, fault
            until(lambda cloud=cloud, happened=happened: cloud.launches == happened)  # type: ignore[misc]
            assert [instance.name for instance in connect(cloud.url).instances()] == [NAME] * happened


def test_a_launch_that_certainly_did_not_happen_is_repeated(cloud: FakeLambda, client: Client) -> None:
    cloud.script(LAUNCH, status(429), status(429, "global/too-many-requests", retry_after=0))
    launch(client)
    assert (cloud.count(LAUNCH), cloud.launches) == (3, 1)
    cloud.script(LAUNCH, *[status(429)] * 1000)
    client._patience_s = 0.2
    with pytest.raises(ApiError):
        launch(client)
    assert cloud.launches == 1


def test_a_launch_waits_for_a_server_that_does_not_listen_yet() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api/v1"
    with pytest.raises(ConnectionLostError, match="connection refused"):
        launch(connect(url, patience_s=0.2))
    started: list[FakeLambda] = []

    def start() -> None:
        late = FakeLambda(key=KEY, rate=False, port=port)
        late.add_ssh_key("mine", PUBLIC_KEY)
        started.append(late.__enter__())

    timer = threading.Timer(0.3, start)
    timer.start()
    try:
        launch(connect(url, backoff_s=0.1))
        assert started[0].launches == 1
    finally:
        timer.join()
        for late in started:
            late.close()


def test_what_is_no_api_at_all_is_asked_once(cloud: FakeLambda, client: Client) -> None:
    cloud.script("GET /instances", *[garbage()] * 9)
    with pytest.raises(ApiError, match=r"no response of Lambda.s API\. Check FRACTAL_LAMBDA_URL"):
        client.instances()
    assert len(cloud.requests) == 1


def test_threads_share_a_client_and_each_request_has_a_connection_of_its_own(cloud: FakeLambda, client: Client) -> None:
    """The fake keeps connections open, and closes them at any time: a launch on such a connection would be lost."""
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


def test_retry_after_is_obeyed_but_not_blindly(cloud: FakeLambda, client: Client) -> None:
    cloud.script("GET /instances", status(429, retry_after=1))
    begin = time.monotonic()
    client.instances()
    assert 0.9 < time.monotonic() - begin < 2.5
    for text in ("100000", "-1", "soon", "1e9", "Fri, 99 Foo 2026", "\u00b2"):
        cloud.script("GET /instances", status(429, retry_after=text))
        begin = time.monotonic()
        with contextlib.suppress(ApiError):
            client.instances()
        assert time.monotonic() - begin < 1, text


def test_a_long_wait_is_logged(cloud: FakeLambda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lambda_api, "LOG_AFTER_S", 0.0)
    monkeypatch.setattr("fractal.cloud.lambda_api.LOG_AFTER_S", 0.0)
    logged: list[str] = []
    cloud.script("GET /instances", status(503))
    connect(cloud.url, log=logged.append, rate_limiter=RateLimiter(tmp_path, request_s=0.1, launch_s=0)).instances()
    assert logged[0].startswith("Lambda, GET /instances: HTTP 503 without a reason (http/503); trying again in")
    assert logged[1].startswith("Lambda allows one request in 0 s")


# --- secrets

LEAKY = [
    cut(),
    hang(),
    garbage(),
    status(503),
    status(401, "global/invalid-api-key", f"The key {KEY} is not known."),
    status(403),
    status(302),
    status(400, "a/b", KEY),
]


def test_the_key_is_in_no_error_and_no_log(cloud: FakeLambda, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    client = connect(cloud.url, patience_s=0.05, timeout_s=0.1)
    for fault in LEAKY:
        for act in (client.instances, lambda: launch(client)):
            cloud.unscript()
            cloud.script("* *", *[fault] * 1000)
            with pytest.raises(CloudError) as caught:
                act()
            assert no_secret("".join(traceback.format_exception(caught.value)))
            assert no_secret(repr(vars(caught.value)) + repr(caught.value.args))
            assert caught.value.__cause__ is None  # an error of requests holds the request, and that holds the header
            assert caught.value.__context__ is None
    assert no_secret(repr(client))
    assert no_secret(caplog.text)


def test_a_host_key_that_the_api_repeats_is_in_no_error(cloud: FakeLambda, client: Client) -> None:
    user_data = make_host_key().user_data
    private = [line.strip() for line in user_data.splitlines() if line.startswith("    ") and "-----" not in line]
    assert len(private) == 5
    for repeated in (user_data, " ".join(user_data.split()), json.dumps(user_data)):
        cloud.script(LAUNCH, status(400, "global/invalid-parameters", f"user_data: {repeated[:290]}"))
        with pytest.raises(ApiError, match="user_data") as caught:
            launch(client, user_data=user_data)
        assert not [line for line in private if line in str(caught.value)]
        assert "***" in str(caught.value)


def no_secret(text: str) -> bool:
    return KEY not in text and "token" not in text


def test_a_jupyter_token_is_not_decoded(cloud: FakeLambda, client: Client) -> None:
    assert no_secret(repr([client.instance(launch(client)), client.instances()]))


def test_the_account_is_identified_without_the_key() -> None:
    account, other = connect(URL).account, connect(URL, key=f"{KEY}x").account
    assert len(account) == 12
    assert account == connect(URL).account != other


def test_netrc_does_not_replace_the_key(client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password wrong\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    client._trust_env = True  # as for an address that is no loopback
    assert client.instances() == []


def test_a_redirect_is_not_followed(cloud: FakeLambda) -> None:
    answer = f"HTTP/1.1 307 Temporary Redirect\r\nLocation: {cloud.url}/instances\r\nContent-Length: 0\r\n\r\n"
    with RawServer(answer.encode()) as server:
        with pytest.raises(CloudError, match=r"HTTP 307.*is a redirect"):
            connect(server.url).instances()
        with pytest.raises(LaunchUnknownError):
            launch(connect(server.url))
    assert cloud.requests == []


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl")
def test_an_untrusted_certificate_is_no_reason_to_retry(tmp_path: Path) -> None:
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=127.0.0.1 -days 2"
    subprocess.run([*command.split(), "-keyout", "key", "-out", "cert"], cwd=tmp_path, check=True, capture_output=True)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    with RawServer(b"HTTP/1.1 200 OK\r\n\r\n", tls=tls) as server:
        client = connect(server.url)
        for act in (client.instances, lambda: launch(client)):
            with pytest.raises(ConnectionLostError, match="a certificate that is not trusted"):
                act()
    assert server.received == b""


def test_a_proxys_password_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    with RawServer(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n") as server:
        monkeypatch.setenv("HTTPS_PROXY", f"http://me:hunter2@127.0.0.1:{server.port}")
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        client = connect("https://lambda.invalid/api/v1", patience_s=0.1)
        with pytest.raises(ConnectionLostError, match=r"the proxy lets nothing through to lambda\.invalid") as caught:
            launch(client)  # it certainly did not happen
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))
    assert KEY.encode() not in server.received


def test_a_fake_on_this_machine_is_not_asked_through_a_proxy(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert client.instances() == []


# --- input


def test_a_key_that_cannot_be_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remedy = r"LAMBDA_API_KEY .*https://cloud.lambda.ai/api-keys.*export LAMBDA_API_KEY="
    for key in ("", " ", "\n", "two words", "a\nb", "sécret", "a\x00b"):
        if "\x00" not in key:
            monkeypatch.setenv("LAMBDA_API_KEY", key)
            with pytest.raises(InputError, match=remedy):
                lambda_api.from_env(tmp_path)
        with pytest.raises(InputError) as caught:
            connect(URL, key=key)
        assert not key.strip() or key not in str(caught.value)


def test_the_environment_names_the_cloud(cloud: FakeLambda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMBDA_API_KEY", f"{KEY}\n")
    monkeypatch.delenv("FRACTAL_LAMBDA_URL", raising=False)
    assert lambda_api.from_env(tmp_path).url == "https://cloud.lambda.ai/api/v1"
    monkeypatch.setenv("FRACTAL_LAMBDA_URL", f"{cloud.url}/")
    assert lambda_api.from_env(tmp_path).url == cloud.url
    assert lambda_api.from_env(tmp_path).instances() == []
    assert (tmp_path / "last-request").exists()
    monkeypatch.delenv("LAMBDA_API_KEY")
    with pytest.raises(InputError, match="is not set"):
        lambda_api.from_env(tmp_path)


def test_an_address_that_cannot_be_right() -> None:
    for url in (
        "cloud.lambda.ai",
        "ftp://x.example",
        "http://",
        "https://x.example:port",
        "https://[::1",
        "https://x.example/a b",
        "https://me:hunter2@x.example",
        "https://x.example/?a=hunter2",
        "http://x.example/api/v1",
        "http://127.0.0.1.x.example",
    ):
        with pytest.raises(InputError, match=r"FRACTAL_LAMBDA_URL.*encrypted.*without user") as caught:
            connect(url)
        assert "hunter2" not in str(caught.value)
    for url in ("https://x.example:8443/api/v1/", "http://localhost:1", "http://[::1]:1/api"):
        assert connect(url).url == url.rstrip("/")


# --- responses

CALLS: dict[str, tuple[Any, ...]] = {
    "instance_types": (),
    "instances": (),
    "instance": ("1",),
    "ssh_keys": (),
    "images": (),
    "file_systems": (),
    "terminate": ("1",),
    "add_ssh_key": ("other", PUBLIC_KEY),
    "launch": (),
}


def call(client: Client, name: str) -> object:
    return launch(client) if name == "launch" else getattr(client, name)(*CALLS[name])


def good_data(cloud: FakeLambda, client: Client, name: str) -> Any:
    """What the fake answers to this call, decoded."""
    cloud.ip_before_active = True
    id = launch(client)
    cloud.add_file_system("models", "us-east-1")
    view = cloud._view(cloud._rented[id])
    return copy.deepcopy(
        {
            "instance_types": cloud._instance_types(),
            "instances": [view],
            "instance": view,
            "ssh_keys": cloud._ssh_keys(),
            "images": cloud._images(),
            "file_systems": cloud._list_file_systems(),
            "terminate": {"terminated_instances": [view]},
            "add_ssh_key": cloud._ssh_keys()[0],  # type: ignore[index]
            "launch": {"instance_ids": [id]},
        }[name]
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(name=st.sampled_from(sorted(CALLS)), data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_json_gives_anything_but_a_value_or_a_cloud_error(
    cloud: FakeLambda, client: Client, name: str, data: st.DataObject
) -> None:
    cloud.quota = 10**9
    cloud._file_systems.clear()
    cloud.unscript()
    answer = good_data(cloud, client, name)
    spoil(answer, data)
    wrapped = data.draw(st.sampled_from([{"data": answer}, answer, {"data": answer, "more": 1}, [answer]]))
    error_body = json.dumps({"error": answer}).encode()
    client._patience_s = 0
    for fault in (
        garbage(json.dumps(wrapped).encode()),
        Fault("status", data.draw(st.sampled_from([400, 404, 200, 500])), body=error_body),
    ):
        cloud.script("* *", fault)
        with contextlib.suppress(CloudError):
            call(client, name)


def spoil(value: Any, data: st.DataObject) -> None:
    """Change one element: leave it out, or replace it."""

    def keys(container: Any) -> list[Any]:
        return sorted(container) if isinstance(container, dict) else list(range(len(container)))

    container, key = value, data.draw(st.sampled_from(keys(value)))
    while isinstance(container[key], (dict, list)) and container[key] and data.draw(st.booleans()):
        container = container[key]
        key = data.draw(st.sampled_from(keys(container)))
    if data.draw(st.booleans()):
        del container[key]
    else:
        container[key] = data.draw(JSON)


def answering(cloud: FakeLambda, client: Client, name: str, change: Callable[[Any], object]) -> object:
    answer = good_data(cloud, client, name)
    change(answer)
    cloud.script("* *", garbage(json.dumps({"data": answer}).encode()))
    return call(client, name)


WRONG_FIELDS: list[tuple[str, Callable[[Any], object], str]] = [
    ("instances", lambda a: a[0].pop("status"), "missing required field `status` - at `data[0]`"),
    ("instance", lambda a: a.pop("id"), "missing required field `id`"),
    ("instance", lambda a: a["region"].pop("name"), "missing required field `name` - at `data.region`"),
    (
        "instance",
        lambda a: a["instance_type"].update(price_cents_per_hour="75"),
        "Expected `int`, got `str` - at `data.instance_type.price_cents_per_hour`",
    ),
    ("instance", lambda a: a["instance_type"].update(price_cents_per_hour=-1), "Expected `int` >= 0"),
    ("instance", lambda a: a.update(ip="1.2.3.4\nProxyCommand rm -rf /"), "matching regex"),
    ("instance", lambda a: a.update(ip="fe80::1%a\nProxyCommand x"), "matching regex"),
    ("file_systems", lambda a: a[0].pop("region"), "missing required field `region`"),
    ("images", lambda a: a[0].pop("family"), "missing required field `family`"),
    ("ssh_keys", lambda a: a[0].pop("public_key"), "missing required field `public_key`"),
]


def test_a_field_that_is_missing_or_wrong_is_named(cloud: FakeLambda, client: Client) -> None:
    cloud.quota = 100
    for name, change, text in WRONG_FIELDS:
        with pytest.raises(CloudError) as caught:
            answering(cloud, client, name, change)
        assert text in str(caught.value)
        assert "\n" not in str(caught.value)
        assert type(caught.value) is ApiError


def test_other_fields_and_statuses_are_accepted(cloud: FakeLambda, client: Client) -> None:
    """A listing that fails would keep us from ending what costs money."""
    price = {"name": "t", "price_cents_per_hour": 1}

    def change(answer: Any) -> None:
        answer[0] |= {"status": "hibernating", "ip": "", "colour": {"a": 1}}
        answer.append({"id": "1", "status": "active", "region": {"name": "r"}, "instance_type": price})
        answer.append({**answer[1], "name": None})

    first, second, third = answering(cloud, client, "instances", change)  # type: ignore[misc]
    assert (first.status, first.ip) == ("hibernating", "")
    assert (second.status, second.ip, second.name, third.name) == ("active", None, None, None)


ERROR = st.fixed_dictionaries(
    {"code": st.sampled_from(["a/b", "global/quota-exceeded", "provider/x", ""]) | JSON},
    optional={"message": JSON, "suggestion": JSON},
)


@given(
    code=st.integers(100, 999),
    body=st.binary(max_size=60) | (ERROR | JSON).map(lambda error: json.dumps({"error": error}).encode()),
)
@settings(max_examples=300, deadline=None)
def test_any_response_is_classified(code: int, body: bytes) -> None:
    try:
        lambda_errors.response_data(code, {}, body, "GET /x", KEY)
    except ApiError as error:
        assert "\n" not in str(error)
        assert error.reason
        assert not error.had_no_effect or 400 <= code < 500  # a launch would be repeated, or given up


class RawServer:
    """A server that answers each connection with these bytes, then closes it; `drip_s` sends them one by one."""

    def __init__(self, answer: bytes, drip_s: float = 0.0, tls: ssl.SSLContext | None = None) -> None:
        self.answer, self.drip_s, self.tls, self.received = answer, drip_s, tls, b""

    def __enter__(self) -> "RawServer":
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
            self.received += connection.recv(65536)
            chunks = [self.answer[i : i + 1] for i in range(len(self.answer))] if self.drip_s else [self.answer]
            for chunk in chunks:
                connection.sendall(chunk)
                time.sleep(self.drip_s)


@given(answer=st.binary(max_size=80) | st.binary(max_size=80).map(lambda tail: b"HTTP/1.1 200 OK\r\n" + tail))
@settings(max_examples=60, deadline=None)
def test_no_bytes_give_anything_but_a_cloud_error(answer: bytes) -> None:
    with RawServer(answer) as server, pytest.raises(CloudError):
        connect(server.url, patience_s=0).instances()


def test_a_broken_http_response_is_a_cloud_error() -> None:
    for head in (
        b"Content-Encoding: gzip\r\nContent-Length: 5",
        b"Transfer-Encoding: chunked",
        b"Content-Length: -5",
        b"Content-Length: 900",
        b"Location: http://[::1",
    ):
        with RawServer(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\nhello") as server:
            client = connect(server.url, patience_s=0)
            with pytest.raises(ApiError):
                client.instances()
            with pytest.raises(LaunchUnknownError):
                launch(client)


def test_a_response_that_does_not_end_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lambda_api, "CONNECT_TIMEOUT_S", 0.1)
    answer = b"HTTP/1.1 200 OK\r\n\r\n" + b" " * 10_000
    begin = time.monotonic()
    with RawServer(answer, drip_s=0.01) as server, pytest.raises(ConnectionLostError, match="in time"):
        connect(server.url, patience_s=0, timeout_s=0.3).instances()
    assert time.monotonic() - begin < 3
    monkeypatch.setattr(lambda_api, "RESPONSE_MAX", 5000)
    with RawServer(answer) as server, pytest.raises(ConnectionLostError):
        connect(server.url, patience_s=0).instances()


def test_a_fault_can_wait_for_its_turn(cloud: FakeLambda, client: Client) -> None:
    cloud.script("GET /instances", ok(), status(401, "global/invalid-api-key"))
    assert client.instances() == []
    with pytest.raises(AuthError):
        client.instances()
