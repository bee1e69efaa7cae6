"""What an instance has to reach and to have room for: what is asked, what is said, and what stops a push or a build."""

import http.server
import math
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import given

from fractal.cloud import prerequisites
from fractal.cloud.prerequisites import Address, Found, check_disk, needed_bytes, parse, warnings
from fractal.cloud.remote_host import RemoteError, script

HUB = Address("the model hub", "https://hub", "take a folder")
INDEX = Address("the package index", "https://index", "build here")


def test_what_the_probe_prints_is_read() -> None:
    text = "welcome\nclock 1764504000\ndisk 2048\nimage fractal-sandbox\naddress https://hub ok\n"
    found = parse(text + "address https://index curl: (6) Could not resolve host: index.\n")
    assert (found.clock, found.free_bytes, found.repositories) == (1764504000, 2 * 2**20, {"fractal-sandbox"})
    assert found.unreachable == {"https://index": "Could not resolve host: index"}


@given(st.text(max_size=60) | st.from_regex("(clock|disk|image|address) .{0,20}", fullmatch=True))
def test_no_output_of_the_probe_is_an_error(text: str) -> None:
    found = parse(text)
    check_disk(Found(found.clock, math.nan), {"pipeline": 1e12})  # unknown: nothing is refused
    assert all("\n" not in line for line in warnings(found, [HUB], here=0.0, lambda_offset_s=0.0))


def said(found: Found, lambda_offset_s: float = 0.0) -> list[str]:
    return warnings(found, [HUB, INDEX], here=1000.0, lambda_offset_s=lambda_offset_s)


def test_what_is_not_reached_is_one_line_with_the_remedies() -> None:
    assert said(Found(1000.0)) == []
    (line,) = said(Found(1000.0, unreachable={"https://hub": "no answer within 2 s", "https://index": "refused"}))
    assert "the model hub (https://hub: no answer within 2 s), the package index (https://index: refused)" in line
    assert line.endswith("Without it: take a folder; build here.")


@pytest.mark.parametrize(
    ("there", "lambda_offset_s", "texts"),
    [
        (1059.0, 0.0, []),
        (1000.0 + 5 * 365 * 86400, 0.0, ["the instance's clock is 1825 days ahead of Lambda's"]),
        (1000.0 - 7200, 0.0, ["the instance's clock is 2 h behind Lambda's"]),
        (1000.0 - 120, -120.0, ["this machine's clock is 2 min ahead of Lambda's"]),
        (1000.0, 300.0, ["the instance's clock is 5 min behind Lambda's", "this machine's clock is 5 min behind"]),
        (math.nan, 0.0, []),
    ],
)
def test_the_clock_that_is_wrong_is_named(there: float, lambda_offset_s: float, texts: list[str]) -> None:
    lines = said(Found(there), lambda_offset_s)
    assert len(lines) == len(texts)
    for text, line in zip(texts, lines, strict=True):
        assert text in line


def test_needed_disk_says_where_each_figure_comes_from(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(bytes(1000))
    found = Found(free_bytes=3e9, repositories=frozenset({"fractal-sandbox"}))
    needed = needed_bytes(["pipeline", "sandbox"], found, {"pipeline": 11e9}, str(tmp_path))
    assert list(needed.values()) == [11e9, prerequisites.UPDATE_BYTES, 1000.0]
    assert [what.partition(" (")[2] for what in needed] == [
        "its size here)", "only what changed, an estimate)", "its size here)",
    ]  # fmt: skip
    assert list(needed_bytes(["pipeline"], found, {}).values()) == [25e9]
    with pytest.raises(RemoteError, match=r"has 3\.0 GB of free disk, 12\.0 GB are needed: pipeline .*11\.0 GB, sandb"):
        check_disk(found, needed)
    check_disk(Found(free_bytes=12.1e9), needed)


@pytest.mark.parametrize(
    ("model", "gigabytes"),
    [
        ("Qwen/Qwen2.5-Coder-1.5B-Instruct", 3.0),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 0.27),
        ("openai/gpt-oss-20b", 40.0),
        ("someone/model-v2", 0.0),
        ("", 0.0),
    ],
)
def test_a_models_size_by_its_name(model: str, gigabytes: float) -> None:
    assert sum(needed_bytes([], Found(), {}, model).values()) == pytest.approx(gigabytes * 1e9)


def test_addresses_are_those_of_this_machines_settings_without_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"index-url": "https://me:secret@mirror.example/simple"}
    monkeypatch.setattr(prerequisites, "pip_settings", lambda: settings)
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example")
    urls = [address.url for address in prerequisites.addresses()]
    assert urls == ["https://hub.example", "https://mirror.example/simple", prerequisites.DOCKER_HUB]
    monkeypatch.setenv("HF_ENDPOINT", "https://me:secret@hub.example")
    settings.update({"no-index": "true"})
    assert [address.url for address in prerequisites.addresses()] == [prerequisites.HUB, prerequisites.DOCKER_HUB]


@pytest.fixture
def server() -> Iterator[str]:
    """An address that answers with 501."""
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as answering:
        threading.Thread(target=answering.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{answering.server_port}/"
        answering.shutdown()


@pytest.mark.parametrize("program", ["curl", "bash"])
def test_addresses_are_asked_all_at_once(server: str, tmp_path: Path, program: str) -> None:
    for name in ("bash", "awk", "cat", "date", "df", "head", "sh", "timeout", program):
        if (found := shutil.which(name)) is None:
            pytest.skip(f"no {name}")
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).symlink_to(found)
    silent = [f"http://192.0.2.{number}/" for number in (1, 2, 3)]  # RFC 5737: nobody has these addresses
    closed = "http://127.0.0.1:1/simple"
    urls = [server, closed, *silent]
    done = subprocess.run(
        ["sh", "-c", script("probe_prerequisites"), "sh", "2", *urls],
        env={**{k: v for k, v in os.environ.items() if "proxy" not in k.lower()}, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=20,
    )
    found = parse(done.stdout)
    assert found.free_bytes > 0
    assert set(found.unreachable) == {closed, *silent}, done
    assert "refused" in found.unreachable[closed] or "connect" in found.unreachable[closed]
