"""The fake of Lambda's API is strict and tells the truth: asked by plain HTTP, not by our client."""

import http.client
import json
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests

from tests.conftest import until
from tests.fake_lambda.server import FakeLambda, cut, delay, garbage, hang, lose_answer, ok, status, tear

PUBLIC_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAICN+lJwsONkwrdsSnQsu1ydUkIuIg5oOC+Eslvmtt60T me@here"
WISH = {"region_name": "us-east-1", "instance_type_name": "gpu_1x_a10", "ssh_key_names": ["mine"]}
LAUNCH = "/instance-operations/launch"
TERMINATE = "/instance-operations/terminate"


@pytest.fixture
def cloud() -> Iterator[FakeLambda]:
    with FakeLambda(rate=False) as one:
        one.add_ssh_key("mine", PUBLIC_KEY)
        yield one
        assert one.troubles == []


def send(cloud: FakeLambda, method: str, path: str, body: Any = None, **options: Any) -> requests.Response:
    headers = {"Authorization": f"Bearer {options.pop('key', 'secret-key')}"} | options.pop("headers", {})
    options |= {} if body is None else {"json": body}
    return requests.request(method, cloud.url + path, headers=headers, timeout=options.pop("timeout", 5), **options)


def data(reply: requests.Response) -> Any:
    assert reply.status_code == 200, reply.text
    assert reply.headers["Content-Type"] == "application/json"
    assert list(reply.json()) == ["data"]
    return reply.json()["data"]


def refusal(reply: requests.Response) -> tuple[int, str]:
    error = reply.json()["error"]
    assert error["message"]
    return reply.status_code, error["code"]


def launch(cloud: FakeLambda, **changes: Any) -> str:
    (id,) = data(send(cloud, "POST", LAUNCH, WISH | changes))["instance_ids"]
    return str(id)


def get(cloud: FakeLambda, id: str) -> Any:
    return data(send(cloud, "GET", f"/instances/{id}"))


# --- strict

WRONG_LAUNCHES: list[tuple[dict[str, Any], str]] = [
    ({"region_name": None}, "region_name: must be a string"),
    ({"region_name": "us-nowhere"}, "region_name: 'us-nowhere' is not one of us-west-1"),
    ({"instance_type_name": 5}, "instance_type_name: must be a string"),
    ({"ssh_key_names": "mine"}, "ssh_key_names: must be a list of strings"),
    ({"ssh_key_names": []}, "ssh_key_names: must have 1 to 1 elements"),
    ({"ssh_key_names": ["mine", "mine"]}, "ssh_key_names: must have 1 to 1 elements"),
    ({"ssh_key_names": [1]}, "ssh_key_names: must be a list of strings"),
    ({"name": "x" * 65}, "name: must have 0 to 64 characters"),
    ({"name": None}, "name: must be a string"),
    ({"file_system_names": ["a", "b"]}, "file_system_names: must have 0 to 1"),
    ({"image": "lambda-stack-24-04"}, "image: must be an object"),
    ({"image": {}}, "image: give either id or family"),
    ({"image": {"id": "a", "family": "b"}}, "image: give either id or family"),
    ({"image": {"family": 5}}, "image: give either id or family"),
    ({"quantity": 1}, "quantity: unknown field"),
    ({"region": "us-east-1"}, "region: unknown field"),
]
UNKNOWN: list[dict[str, Any]] = [
    {"instance_type_name": "gpu_9x"},
    {"ssh_key_names": ["other"]},
    {"image": {"family": "windows"}},
    {"image": {"id": "lambda-stack-24-04"}},
    {"file_system_names": ["none"]},
]
NO_OBJECTS = [
    b"",
    b"{",
    b"[]",
    b'"x"',
    b"{'a': 1}",
    b'{"name": NaN}',
    b'{"name": "a", "name": "b"}',
    b"\xff",
    b"[" * 100_000,
]
WRONG_HEADERS = [
    None,
    "",
    "Bearer",
    "Bearer ",
    "Bearer wrong",
    "Bearer secret-key2",
    "bearer secret-key",
    "Basic c2VjcmV0LWtleTo=",
    "secret-key",
    "Bearer s\xe9cret",
]


def test_a_wrong_launch_is_refused_by_its_field(cloud: FakeLambda) -> None:
    for changes, text in WRONG_LAUNCHES:
        reply = send(cloud, "POST", LAUNCH, WISH | changes)
        assert refusal(reply) == (400, "global/invalid-parameters"), changes
        assert text in reply.json()["error"]["message"]
    for name in WISH:
        reply = send(cloud, "POST", LAUNCH, {key: value for key, value in WISH.items() if key != name})
        assert refusal(reply) == (400, "global/invalid-parameters")
        assert f"{name}: missing" in reply.json()["error"]["message"]
    for changes in UNKNOWN:
        assert refusal(send(cloud, "POST", LAUNCH, WISH | changes)) == (404, "global/object-does-not-exist"), changes
    assert cloud.launches == 0


def test_a_body_that_is_no_json_object_is_refused(cloud: FakeLambda) -> None:
    for body in NO_OBJECTS:
        for path in (LAUNCH, TERMINATE, "/ssh-keys"):
            reply = send(cloud, "POST", path, data=body, headers={"Content-Type": "application/json"})
            assert refusal(reply) == (400, "global/invalid-parameters"), body


def test_the_content_type_counts(cloud: FakeLambda) -> None:
    body = json.dumps(WISH)
    for kind, expected in (("text/plain", 400), ("application/x-www-form-urlencoded", 400), ("application/json; charset=utf-8", 200)):  # fmt: skip
        assert send(cloud, "POST", LAUNCH, data=body, headers={"Content-Type": kind}).status_code == expected
    assert cloud.launches == 1


def test_a_wrong_key_opens_nothing(cloud: FakeLambda) -> None:
    for header in WRONG_HEADERS:
        for method, path in (("GET", "/instances"), ("POST", LAUNCH)):
            connection = http.client.HTTPConnection(urlsplit(cloud.url).netloc, timeout=5)
            connection.request(method, f"/api/v1{path}", headers={} if header is None else {"Authorization": header})
            reply = connection.getresponse()
            assert (reply.status, json.loads(reply.read())["error"]["code"]) == (401, "global/invalid-api-key"), header
            connection.close()


def test_there_is_nothing_else(cloud: FakeLambda) -> None:
    assert send(cloud, "GET", "/instance").status_code == 404
    assert send(cloud, "GET", "/instances/").status_code == 404
    assert send(cloud, "GET", "/../v2/instances").status_code == 404
    assert send(cloud, "POST", "/instances", {}).status_code == 405
    assert send(cloud, "GET", LAUNCH).status_code == 405
    assert send(cloud, "PUT", "/ssh-keys", {}).status_code == 405
    assert refusal(send(cloud, "GET", "/instances?limit=5")) == (400, "global/invalid-parameters")
    assert refusal(send(cloud, "GET", "/instances", {"a": 1})) == (400, "global/invalid-parameters")


def test_an_inactive_account_can_do_nothing(cloud: FakeLambda) -> None:
    cloud.account_inactive = True
    assert refusal(send(cloud, "GET", "/instances")) == (403, "global/account-inactive")


def test_ssh_keys(cloud: FakeLambda) -> None:
    for body in ({}, {"name": ""}, {"name": "x" * 65, "public_key": PUBLIC_KEY}, {"name": "a", "public_key": "nonsense"}, {"name": "mine", "public_key": PUBLIC_KEY}, {"name": "a", "public_key": PUBLIC_KEY, "more": 1}):  # fmt: skip
        assert refusal(send(cloud, "POST", "/ssh-keys", body)) == (400, "global/invalid-parameters")
    made = data(send(cloud, "POST", "/ssh-keys", {"name": "other", "public_key": PUBLIC_KEY}))
    assert set(made) == {"id", "name", "public_key"}
    assert made in data(send(cloud, "GET", "/ssh-keys"))


def test_a_file_system_is_of_its_region(cloud: FakeLambda) -> None:
    cloud.add_file_system("models", "us-west-1")
    wrong = send(cloud, "POST", LAUNCH, WISH | {"file_system_names": ["models"]})
    assert refusal(wrong) == (400, "instance-operations/launch/file-system-in-wrong-region")
    launch(cloud, file_system_names=["models"], region_name="us-west-1")
    (listed,) = data(send(cloud, "GET", "/file-systems"))
    assert (listed["name"], listed["is_in_use"]) == ("models", True)


# An instance's life


def test_an_instance_has_the_documented_fields(cloud: FakeLambda) -> None:
    cloud.boot_s = 1.0
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


def test_an_end_takes_its_time_and_can_be_asked_for_twice(cloud: FakeLambda) -> None:
    cloud.terminate_s, cloud.keep_terminated_s = 1.0, 2.0
    id, other = launch(cloud), launch(cloud)
    for _ in range(2):
        (ended,) = data(send(cloud, "POST", TERMINATE, {"instance_ids": [id]}))["terminated_instances"]
        assert (ended["status"], ended["actions"]["restart"]["available"]) == ("terminating", False)
    assert {one["id"] for one in cloud.living()} == {id, other}  # still billed
    until(lambda: get(cloud, id)["status"] == "terminated")
    assert [one["id"] for one in cloud.living()] == [other]
    assert cloud.billed_seconds(id) == cloud.billed_seconds(id)
    assert 1.0 <= cloud.billed_seconds(id) < 2.0
    assert (
        data(send(cloud, "POST", TERMINATE, {"instance_ids": [id]}))["terminated_instances"][0]["status"]
        == "terminated"
    )
    until(lambda: send(cloud, "GET", f"/instances/{id}").status_code == 404)
    for reply in (send(cloud, "GET", f"/instances/{id}"), send(cloud, "POST", TERMINATE, {"instance_ids": [id]})):
        assert refusal(reply) == (404, "global/object-does-not-exist")


def test_one_unknown_instance_ends_none(cloud: FakeLambda) -> None:
    id = launch(cloud)
    for ids in ([id, "0" * 32], ["0" * 32]):
        assert refusal(send(cloud, "POST", TERMINATE, {"instance_ids": ids})) == (404, "global/object-does-not-exist")
    for body in ({}, {"instance_ids": []}, {"instance_ids": id}, {"instance_ids": [1]}, {"instance_ids": [id], "force": True}):  # fmt: skip
        assert refusal(send(cloud, "POST", TERMINATE, body)) == (400, "global/invalid-parameters")
    assert [one["id"] for one in cloud.living()] == [id]


def test_an_instance_can_be_hidden_at_first(cloud: FakeLambda) -> None:
    cloud.hidden_s = 1.0
    id = launch(cloud)
    assert data(send(cloud, "GET", "/instances")) == []
    for reply in (send(cloud, "GET", f"/instances/{id}"), send(cloud, "POST", TERMINATE, {"instance_ids": [id]})):
        assert refusal(reply) == (404, "global/object-does-not-exist")
    assert [one["id"] for one in cloud.living()] == [id]
    until(lambda: send(cloud, "GET", f"/instances/{id}").status_code == 200)
    assert get(cloud, id)["status"] == "active"


def test_what_the_world_does_to_an_instance(cloud: FakeLambda) -> None:
    ids = [launch(cloud) for _ in range(5)]
    cloud.preempt(ids[0])
    cloud.end_from_outside(ids[1])
    cloud.end_from_outside(ids[2], forget=True)
    cloud.unhealthy(ids[3])
    assert cloud.move(ids[4]) == "127.0.0.2"
    seen = {one["id"]: (one["status"], one.get("ip")) for one in data(send(cloud, "GET", "/instances"))}
    assert seen == {
        ids[0]: ("preempted", "127.0.0.1"),
        ids[1]: ("terminated", "127.0.0.1"),
        ids[3]: ("unhealthy", "127.0.0.1"),
        ids[4]: ("active", "127.0.0.2"),
    }
    assert {one["id"] for one in cloud.living()} == set(ids[3:])
    before = cloud.billed_seconds(ids[0])
    assert cloud.billed_seconds(ids[0]) == before
    assert cloud.billed_seconds(ids[3]) < cloud.billed_seconds(ids[3])


# What there is to rent


def regions(cloud: FakeLambda) -> list[str]:
    found = data(send(cloud, "GET", "/instance-types"))["gpu_1x_a10"]["regions_with_capacity_available"]
    return [region["name"] for region in found]


def test_capacity_appears_vanishes_and_lies(cloud: FakeLambda) -> None:
    full = (400, "instance-operations/launch/insufficient-capacity")
    cloud.no_capacity()
    assert regions(cloud) == []
    assert refusal(send(cloud, "POST", LAUNCH, WISH)) == full
    cloud.set_capacity("gpu_1x_a10", "us-east-1", 1, after_s=1.0)
    assert regions(cloud) == []
    until(lambda: regions(cloud) == ["us-east-1"])
    id = launch(cloud)
    assert regions(cloud) == []
    assert refusal(send(cloud, "POST", LAUNCH, WISH)) == full
    send(cloud, "POST", TERMINATE, {"instance_ids": [id]})
    assert regions(cloud) == ["us-east-1"]  # it can be had again
    cloud.set_capacity("gpu_1x_a10", "us-east-1", 0, advertised=True)
    assert regions(cloud) == ["us-east-1"]
    assert refusal(send(cloud, "POST", LAUNCH, WISH)) == full


def test_a_quota_counts_what_lives(cloud: FakeLambda) -> None:
    cloud.quota = 1
    id = launch(cloud)
    assert refusal(send(cloud, "POST", LAUNCH, WISH)) == (400, "global/quota-exceeded")
    send(cloud, "POST", TERMINATE, {"instance_ids": [id]})
    launch(cloud)


def test_a_new_price_is_for_new_instances(cloud: FakeLambda) -> None:
    old = launch(cloud)
    cloud.set_price("gpu_1x_a10", 999)
    new = launch(cloud)
    assert data(send(cloud, "GET", "/instance-types"))["gpu_1x_a10"]["instance_type"]["price_cents_per_hour"] == 999
    assert [get(cloud, id)["instance_type"]["price_cents_per_hour"] for id in (old, new)] == [75, 999]
    assert [one["price_cents_per_hour"] for one in cloud.living()] == [75, 999]


def test_images_are_listed_by_region(cloud: FakeLambda) -> None:
    found = data(send(cloud, "GET", "/images"))
    assert {"id", "created_time", "updated_time", "name", "description", "family", "version", "architecture", "region"} == set(found[0])  # fmt: skip
    assert {one["region"]["name"] for one in found} >= {"us-east-1", "us-west-1"}


# Rates and faults


def test_what_comes_too_soon_is_refused_with_how_long_to_wait() -> None:
    with FakeLambda(request_interval_s=1.0, launch_interval_s=3.0) as cloud:
        cloud.add_ssh_key("mine", PUBLIC_KEY)
        launch(cloud)
        soon = send(cloud, "GET", "/instances")
        assert (soon.status_code, soon.headers["Retry-After"]) == (429, "1")
        time.sleep(1.05)
        assert send(cloud, "GET", "/instances").status_code == 200
        time.sleep(1.05)
        again = send(cloud, "POST", LAUNCH, WISH)
        assert (again.status_code, again.headers["Retry-After"]) == (429, "1")
        assert cloud.launches == 1


@pytest.mark.parametrize(("fault", "done"), [(lose_answer(), 1), (tear(), 1), (cut(), 0), (hang(), 0), (hang(done=True), 1), (delay(0.6), 1)])  # fmt: skip
def test_faults_without_an_answer(cloud: FakeLambda, fault: Any, done: int) -> None:
    cloud.script(f"POST {LAUNCH}", fault)
    with pytest.raises(requests.RequestException):
        send(cloud, "POST", LAUNCH, WISH, timeout=0.3)
    if fault.kind == "delay":
        until(cloud.living)
    assert cloud.launches == len(cloud.living()) == done


def test_faults_with_an_answer(cloud: FakeLambda) -> None:
    cloud.script(f"POST {LAUNCH}", ok(), status(503), status(500, "global/unknown", "Oops.", done=True), garbage(), garbage(b"{}", done=True), status(429, retry_after=7))  # fmt: skip
    replies = [send(cloud, "POST", LAUNCH, WISH) for _ in range(7)]
    assert [reply.status_code for reply in replies] == [200, 503, 500, 200, 200, 429, 200]
    assert replies[1].headers["Content-Type"] == replies[3].headers["Content-Type"] == "text/html"
    assert replies[2].json() == {"error": {"code": "global/unknown", "message": "Oops."}}
    assert replies[5].headers["Retry-After"] == "7"
    assert cloud.launches == 4


def test_a_script_is_for_what_it_matches(cloud: FakeLambda) -> None:
    cloud.script("GET /instances/*", status(500))
    cloud.script("* *", ok(), ok(), status(502))
    assert send(cloud, "GET", "/instances/1").status_code == 500
    assert [send(cloud, "GET", "/images").status_code for _ in range(4)] == [200, 200, 502, 200]
    cloud.script("* *", status(500))
    cloud.unscript()
    assert send(cloud, "GET", "/images").status_code == 200


def test_all_requests_are_kept(cloud: FakeLambda) -> None:
    id = launch(cloud)
    send(cloud, "GET", f"/instances/{id}", key="wrong")
    cloud.script("* *", cut())
    with pytest.raises(requests.ConnectionError):
        send(cloud, "GET", "/images")
    assert [call[1:] for call in cloud.requests] == [("POST", LAUNCH, WISH), ("GET", f"/instances/{id}", None), ("GET", "/images", None)]  # fmt: skip
    assert (cloud.count("GET *"), cloud.count(f"POST {LAUNCH}"), cloud.count("PUT *")) == (2, 1, 0)
    assert "secret-key" not in repr(cloud.requests)


def test_many_at_once_are_counted_rightly(cloud: FakeLambda) -> None:
    cloud.quota = 10
    cloud.latency_s = 0.02
    codes: list[int] = []
    threads = [
        threading.Thread(target=lambda: codes.append(send(cloud, "POST", LAUNCH, WISH).status_code)) for _ in range(24)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(codes) == [200] * 10 + [400] * 14
    assert cloud.launches == len(cloud.living()) == 10


# Machines


class Box:
    def __init__(self, number: int) -> None:
        self.ip, self.stopped = f"127.0.1.{number}", 0

    def stop(self) -> None:
        self.stopped += 1

    def restart(self) -> str:
        self.ip = self.ip.replace("127.0.1.", "127.0.2.")
        return self.ip


class Boxes:
    """Machines that are nothing but an address; `wait_s` to start."""

    def __init__(self, wait_s: float = 0.0, broken: bool = False) -> None:
        self.wait_s, self.broken = wait_s, broken
        self.made: list[Box] = []
        self.asked: list[tuple[str, str]] = []

    def start(self, instance_id: str, public_key: str) -> Box:
        self.asked.append((instance_id, public_key))
        time.sleep(self.wait_s)
        if self.broken:
            raise RuntimeError("no engine")
        self.made.append(Box(len(self.made) + 1))
        return self.made[-1]


def test_an_instance_is_active_when_its_machine_is_there() -> None:
    boxes = Boxes(wait_s=0.3)
    with FakeLambda(rate=False, machines=boxes) as cloud:
        cloud.add_ssh_key("mine", PUBLIC_KEY)
        id = launch(cloud)
        assert (get(cloud, id)["status"], get(cloud, id).get("ip")) == ("booting", None)
        until(lambda: get(cloud, id)["status"] == "active")
        assert get(cloud, id)["ip"] == "127.0.1.1"
        assert boxes.asked == [(id, PUBLIC_KEY)]
        assert cloud.move(id) == get(cloud, id)["ip"] == "127.0.2.1"
        send(cloud, "POST", TERMINATE, {"instance_ids": [id]})
        until(lambda: get(cloud, id)["status"] == "terminated")
        assert boxes.made[0].stopped == 1
    assert boxes.made[0].stopped == 1


def test_each_way_to_end_stops_the_machine_once() -> None:
    boxes = Boxes(wait_s=0.1)
    with FakeLambda(rate=False, machines=boxes) as cloud:
        cloud.add_ssh_key("mine", PUBLIC_KEY)
        ids = [launch(cloud) for _ in range(4)]
        send(cloud, "POST", TERMINATE, {"instance_ids": [ids[0]]})  # before it is there
        until(lambda: all(get(cloud, id)["status"] != "booting" for id in ids))
        cloud.preempt(ids[1])
        cloud.end_from_outside(ids[2])
        until(lambda: len(cloud.living()) == 1)
    assert [box.stopped for box in boxes.made] == [1, 1, 1, 1]  # the last one when the cloud closed
    assert [one["id"] for one in cloud.living()] == [ids[3]]  # and yet nobody has ended it
    assert cloud.troubles == []


def test_a_machine_that_does_not_start_is_an_unhealthy_instance() -> None:
    with FakeLambda(rate=False, machines=Boxes(broken=True)) as cloud:
        cloud.add_ssh_key("mine", PUBLIC_KEY)
        id = launch(cloud)
        until(lambda: get(cloud, id)["status"] == "unhealthy")
        assert cloud.living() != []
        send(cloud, "POST", TERMINATE, {"instance_ids": [id]})
        until(lambda: cloud.living() == [])
    assert cloud.troubles == [f"machine of {id}: RuntimeError: no engine"]
