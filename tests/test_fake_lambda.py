"""The fake of Lambda's API is strict and tells the truth: asked by plain HTTP, not by our client."""

import http.client
import json
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests

from tests.conftest import until
from tests.fake_lambda.server import FakeLambda, cut, delay, garbage, hang, lose_answer, ok, status, tear

PUBLIC_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAICN+lJwsONkwrdsSnQsu1ydUkIuIg5oOC+Eslvmtt60T me@here"
REQUEST = {"region_name": "us-east-1", "instance_type_name": "gpu_1x_a10", "ssh_key_names": ["mine"]}
LAUNCH = "/instance-operations/launch"
TERMINATE = "/instance-operations/terminate"
INVALID = (400, "global/invalid-parameters")
UNKNOWN = (404, "global/object-does-not-exist")


@pytest.fixture
def cloud() -> Iterator[FakeLambda]:
    with FakeLambda(rate=False) as fake:
        fake.add_ssh_key("mine", PUBLIC_KEY)
        yield fake
        assert fake.troubles == []


def send(cloud: FakeLambda, method: str, path: str, body: Any = None, **options: Any) -> requests.Response:
    headers = {"Authorization": f"Bearer {options.pop('key', 'secret-key')}"} | options.pop("headers", {})
    options |= {} if body is None else {"json": body}
    return requests.request(method, cloud.url + path, headers=headers, timeout=options.pop("timeout", 5), **options)


def data(response: requests.Response) -> Any:
    assert response.status_code == 200, response.text
    assert response.headers["Content-Type"] == "application/json"
    assert list(response.json()) == ["data"]
    return response.json()["data"]


def refusal(response: requests.Response) -> tuple[int, str]:
    error = response.json()["error"]
    assert error["message"]
    return response.status_code, error["code"]


def launch(cloud: FakeLambda, **changes: Any) -> str:
    (id,) = data(send(cloud, "POST", LAUNCH, REQUEST | changes))["instance_ids"]
    return str(id)


def get(cloud: FakeLambda, id: str) -> Any:
    return data(send(cloud, "GET", f"/instances/{id}"))


def terminate(cloud: FakeLambda, *ids: str) -> requests.Response:
    return send(cloud, "POST", TERMINATE, {"instance_ids": list(ids)})


# --- strict

WRONG_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"region_name": None}, "region_name: must be a string"),
    ({"region_name": "us-nowhere"}, "region_name: 'us-nowhere' is not one of us-west-1"),
    ({"instance_type_name": 5}, "instance_type_name: must be a string"),
    ({"ssh_key_names": "mine"}, "ssh_key_names: must be a list of strings"),
    ({"ssh_key_names": []}, "ssh_key_names: must have 1 to 1 elements"),
    ({"ssh_key_names": [1]}, "ssh_key_names: must be a list of strings"),
    ({"name": "x" * 65}, "name: must have 0 to 64 characters"),
    ({"name": None}, "name: must be a string"),
    ({"file_system_names": ["a", "b"]}, "file_system_names: must have 0 to 1"),
    ({"image": "lambda-stack-24-04"}, "image: must be an object"),
    ({"image": {"id": "a", "family": "b"}}, "image: give either id or family"),
    ({"image": {"family": 5}}, "image: give either id or family"),
    ({"user_data": {"ssh_keys": {}}}, "user_data: must be a string"),
    ({"user_data": "x" * 1_000_001}, "user_data: must have 0 to 1000000"),
    ({"quantity": 1}, "quantity: unknown field"),
]
UNKNOWN_NAMES: list[dict[str, Any]] = [
    {"instance_type_name": "gpu_9x"},
    {"ssh_key_names": ["other"]},
    {"image": {"family": "windows"}},
    {"image": {"id": "lambda-stack-24-04"}},
    {"file_system_names": ["none"]},
]


def test_a_wrong_launch_is_refused_by_its_field(cloud: FakeLambda) -> None:
    for changes, text in WRONG_FIELDS:
        response = send(cloud, "POST", LAUNCH, REQUEST | changes)
        assert refusal(response) == INVALID, changes
        assert text in response.json()["error"]["message"]
    for name in REQUEST:
        response = send(cloud, "POST", LAUNCH, {key: value for key, value in REQUEST.items() if key != name})
        assert refusal(response) == INVALID
        assert f"{name}: missing" in response.json()["error"]["message"]
    for changes in UNKNOWN_NAMES:
        assert refusal(send(cloud, "POST", LAUNCH, REQUEST | changes)) == UNKNOWN, changes
    cloud.add_file_system("models", "us-west-1")
    wrong = send(cloud, "POST", LAUNCH, REQUEST | {"file_system_names": ["models"]})
    assert refusal(wrong) == (400, "instance-operations/launch/file-system-in-wrong-region")
    assert cloud.launches == 0


def test_a_body_that_is_no_json_object_is_refused(cloud: FakeLambda) -> None:
    for body in (
        b"",
        b"{",
        b"[]",
        b"{'a': 1}",
        b'{"name": NaN}',
        b'{"name": "a", "name": "b"}',
        b"\xff",
        b"[" * 100_000,
    ):
        for path in (LAUNCH, TERMINATE, "/ssh-keys"):
            response = send(cloud, "POST", path, data=body, headers={"Content-Type": "application/json"})
            assert refusal(response) == INVALID, body
    assert refusal(send(cloud, "POST", LAUNCH, data="{}", headers={"Content-Type": "text/plain"})) == INVALID


def test_a_wrong_key_opens_nothing(cloud: FakeLambda) -> None:
    for header in (None, "", "Bearer", "Bearer wrong", "Bearer secret-key2", "bearer secret-key", "secret-key"):
        for method, path in (("GET", "/instances"), ("POST", LAUNCH)):
            connection = http.client.HTTPConnection(urlsplit(cloud.url).netloc, timeout=5)
            connection.request(method, f"/api/v1{path}", headers={} if header is None else {"Authorization": header})
            response = connection.getresponse()
            assert (response.status, json.loads(response.read())["error"]["code"]) == (401, "global/invalid-api-key")
            connection.close()
    cloud.account_inactive = True
    assert refusal(send(cloud, "GET", "/instances")) == (403, "global/account-inactive")


def test_there_is_nothing_else(cloud: FakeLambda) -> None:
    for method, path, code in (
        ("GET", "/instance", 404),
        ("GET", "/instances/", 404),
        ("GET", "/../v2/instances", 404),
        ("POST", "/instances", 405),
        ("GET", LAUNCH, 405),
    ):
        assert send(cloud, method, path).status_code == code, path
    assert refusal(send(cloud, "GET", "/instances?limit=5")) == INVALID
    assert refusal(send(cloud, "GET", "/instances", {"a": 1})) == INVALID


def test_ssh_keys(cloud: FakeLambda) -> None:
    for body in (
        {},
        {"name": "", "public_key": PUBLIC_KEY},
        {"name": "a", "public_key": "nonsense"},
        {"name": "mine", "public_key": PUBLIC_KEY},
        {"name": "a", "public_key": PUBLIC_KEY, "more": 1},
    ):
        assert refusal(send(cloud, "POST", "/ssh-keys", body)) == INVALID, body
    made = data(send(cloud, "POST", "/ssh-keys", {"name": "other", "public_key": PUBLIC_KEY}))
    assert made in data(send(cloud, "GET", "/ssh-keys"))


# --- an instance from launch to end


def test_an_instance_has_the_documented_fields(cloud: FakeLambda) -> None:
    cloud.boot_s = 0.5
    id = launch(cloud, name="n", image={"family": "lambda-stack-24-04"})
    seen = get(cloud, id)
    required = {"id", "status", "ssh_key_names", "file_system_names", "region", "instance_type", "actions"}
    assert required <= set(seen)
    assert (seen["status"], seen["name"], "ip" in seen) == ("booting", "n", False)
    cloud.ip_before_active = True
    assert get(cloud, id)["ip"] == "127.0.0.1"
    until(lambda: get(cloud, id)["status"] == "active")
    assert data(send(cloud, "GET", "/instances")) == [get(cloud, id)]
    assert "name" not in get(cloud, launch(cloud))


def test_termination_takes_its_time_and_can_be_requested_twice(cloud: FakeLambda) -> None:
    cloud.terminate_s, cloud.keep_terminated_s = 0.5, 1.0
    id, other = launch(cloud), launch(cloud)
    for _ in range(2):
        assert data(terminate(cloud, id))["terminated_instances"][0]["status"] == "terminating"
    assert {instance["id"] for instance in cloud.living()} == {id, other}  # still billed
    until(lambda: get(cloud, id)["status"] == "terminated")
    assert [instance["id"] for instance in cloud.living()] == [other]
    assert 0.5 <= cloud.billed_seconds(id) == cloud.billed_seconds(id) < 1.5
    until(lambda: send(cloud, "GET", f"/instances/{id}").status_code == 404)
    assert refusal(terminate(cloud, id)) == UNKNOWN
    assert refusal(terminate(cloud, other, "0" * 32)) == UNKNOWN  # one unknown instance ends none
    for body in ({}, {"instance_ids": []}, {"instance_ids": other}, {"instance_ids": [other], "force": True}):
        assert refusal(send(cloud, "POST", TERMINATE, body)) == INVALID
    assert [instance["id"] for instance in cloud.living()] == [other]


def test_an_instance_can_be_hidden_at_first(cloud: FakeLambda) -> None:
    cloud.hidden_s = 0.5
    id = launch(cloud)
    assert data(send(cloud, "GET", "/instances")) == []
    for response in (send(cloud, "GET", f"/instances/{id}"), terminate(cloud, id)):
        assert refusal(response) == UNKNOWN
    assert [instance["id"] for instance in cloud.living()] == [id]
    until(lambda: send(cloud, "GET", f"/instances/{id}").status_code == 200)


def test_what_happens_to_instances_from_outside(cloud: FakeLambda) -> None:
    ids = [launch(cloud) for _ in range(5)]
    cloud.preempt(ids[0])
    cloud.end_from_outside(ids[1])
    cloud.end_from_outside(ids[2], forget=True)
    cloud.unhealthy(ids[3])
    assert cloud.move(ids[4]) == "127.0.0.2"
    seen = {found["id"]: (found["status"], found.get("ip")) for found in data(send(cloud, "GET", "/instances"))}
    assert seen == {
        ids[0]: ("preempted", "127.0.0.1"),
        ids[1]: ("terminated", "127.0.0.1"),
        ids[3]: ("unhealthy", "127.0.0.1"),
        ids[4]: ("active", "127.0.0.2"),
    }
    assert {instance["id"] for instance in cloud.living()} == set(ids[3:])


# --- what there is to rent


def regions(cloud: FakeLambda) -> list[str]:
    offer = data(send(cloud, "GET", "/instance-types"))["gpu_1x_a10"]
    return [region["name"] for region in offer["regions_with_capacity_available"]]


def test_capacity_appears_vanishes_and_lies(cloud: FakeLambda) -> None:
    full = (400, "instance-operations/launch/insufficient-capacity")
    cloud.no_capacity()
    assert regions(cloud) == []
    assert refusal(send(cloud, "POST", LAUNCH, REQUEST)) == full
    cloud.set_capacity("gpu_1x_a10", "us-east-1", 1, after_s=0.5)
    assert regions(cloud) == []
    until(lambda: regions(cloud) == ["us-east-1"])
    id = launch(cloud)
    assert regions(cloud) == []
    assert refusal(send(cloud, "POST", LAUNCH, REQUEST)) == full
    terminate(cloud, id)
    assert regions(cloud) == ["us-east-1"]  # it is available again
    cloud.set_capacity("gpu_1x_a10", "us-east-1", 0, advertised=True)
    assert regions(cloud) == ["us-east-1"]
    assert refusal(send(cloud, "POST", LAUNCH, REQUEST)) == full


def test_quota_and_price(cloud: FakeLambda) -> None:
    cloud.quota = 1
    first = launch(cloud)
    assert refusal(send(cloud, "POST", LAUNCH, REQUEST)) == (400, "global/quota-exceeded")
    cloud.quota = 2
    cloud.set_price("gpu_1x_a10", 999)
    second = launch(cloud)
    assert [get(cloud, id)["instance_type"]["price_cents_per_hour"] for id in (first, second)] == [75, 999]


# --- rates and faults


def test_what_comes_too_soon_is_refused_with_how_long_to_wait() -> None:
    with FakeLambda(request_interval_s=1.0, launch_interval_s=3.0) as cloud:
        cloud.add_ssh_key("mine", PUBLIC_KEY)
        launch(cloud)
        soon = send(cloud, "GET", "/instances")
        assert (soon.status_code, soon.headers["Retry-After"]) == (429, "1")
        time.sleep(1.05)
        assert send(cloud, "GET", "/instances").status_code == 200
        time.sleep(1.05)
        again = send(cloud, "POST", LAUNCH, REQUEST)
        assert (again.status_code, again.headers["Retry-After"]) == (429, "1")
        assert cloud.launches == 1


def test_faults_without_a_response(cloud: FakeLambda) -> None:
    expected = 0
    for fault, done in (
        (lose_answer(), 1),
        (tear(), 1),
        (cut(), 0),
        (hang(), 0),
        (hang(done=True), 1),
        (delay(0.6), 1),
    ):
        cloud.script(f"POST {LAUNCH}", fault)
        with pytest.raises(requests.RequestException):
            send(cloud, "POST", LAUNCH, REQUEST, timeout=0.3)
        expected += done
        until(lambda expected=expected: cloud.launches == len(cloud.living()) == expected)  # type: ignore[misc]


def test_faults_with_a_response_come_in_their_order_to_what_they_match(cloud: FakeLambda) -> None:
    faults = [
        ok(),
        status(503),
        status(500, "global/unknown", "Oops.", done=True),
        garbage(),
        status(429, retry_after=7),
    ]
    cloud.script(f"POST {LAUNCH}", *faults)
    cloud.script("GET /instances/*", status(502))
    responses = [send(cloud, "POST", LAUNCH, REQUEST) for _ in range(6)]
    assert [response.status_code for response in responses] == [200, 503, 500, 200, 429, 200]
    assert responses[1].headers["Content-Type"] == responses[3].headers["Content-Type"] == "text/html"
    assert responses[2].json() == {"error": {"code": "global/unknown", "message": "Oops."}}
    assert responses[4].headers["Retry-After"] == "7"
    assert cloud.launches == 3
    assert [send(cloud, "GET", path).status_code for path in ("/images", "/instances/1", "/instances/1")] == [
        200,
        502,
        404,
    ]
    assert [call[1:] for call in cloud.requests][-2:] == [("GET", "/instances/1", None)] * 2
    assert (cloud.count("GET *"), cloud.count(f"POST {LAUNCH}")) == (3, 6)
    assert "secret-key" not in repr(cloud.requests)


def test_concurrent_launches_are_counted_rightly(cloud: FakeLambda) -> None:
    cloud.quota, cloud.latency_s = 10, 0.02
    codes: list[int] = []

    def work() -> None:
        codes.append(send(cloud, "POST", LAUNCH, REQUEST).status_code)

    threads = [threading.Thread(target=work) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(codes) == [200] * 10 + [400] * 14
    assert cloud.launches == len(cloud.living()) == 10


# --- machines


class Box:
    """A machine that is nothing but an address."""

    def __init__(self, number: int) -> None:
        self.ip, self.stopped = f"127.0.1.{number}", 0

    def stop(self) -> None:
        self.stopped += 1

    def restart(self) -> str:
        self.ip = self.ip.replace("127.0.1.", "127.0.2.")
        return self.ip


class Boxes:
    def __init__(self, broken: bool = False) -> None:
        self.broken, self.made = broken, list[Box]()

    def start(self, instance_id: str, public_key: str, file_systems: Mapping[str, str], user_data: str) -> Box:
        assert (public_key, file_systems, user_data) == (PUBLIC_KEY, {}, "")
        time.sleep(0.2)
        if self.broken:
            raise RuntimeError("no engine")
        self.made.append(Box(len(self.made) + 1))
        return self.made[-1]


def test_an_instance_is_active_when_its_machine_is_there_and_each_end_stops_it_once() -> None:
    boxes = Boxes()
    with FakeLambda(rate=False, machines=boxes) as cloud:
        cloud.add_ssh_key("mine", PUBLIC_KEY)
        ids = [launch(cloud) for _ in range(4)]
        assert (get(cloud, ids[0])["status"], get(cloud, ids[0]).get("ip")) == ("booting", None)
        terminate(cloud, ids[0])  # before its machine is there
        until(lambda: all(get(cloud, id)["status"] != "booting" for id in ids))
        assert get(cloud, ids[3])["ip"].startswith("127.0.1.")
        assert cloud.move(ids[3]) == get(cloud, ids[3])["ip"]
        cloud.preempt(ids[1])
        cloud.end_from_outside(ids[2])
        until(lambda: len(cloud.living()) == 1)
    assert [box.stopped for box in boxes.made] == [1, 1, 1, 1]  # the last one when the cloud closed
    assert [instance["id"] for instance in cloud.living()] == [ids[3]]  # and yet nobody has terminated it
    assert cloud.troubles == []


def test_a_machine_that_does_not_start_is_an_unhealthy_instance() -> None:
    with FakeLambda(rate=False, machines=Boxes(broken=True)) as cloud:
        cloud.add_ssh_key("mine", PUBLIC_KEY)
        id = launch(cloud)
        until(lambda: get(cloud, id)["status"] == "unhealthy")
        assert cloud.living() != []
        terminate(cloud, id)
        until(lambda: cloud.living() == [])
    assert cloud.troubles == [f"machine of {id}: RuntimeError: no engine"]
