"""The alias as OpenSSH itself understands it, and the one line in a person's own config, to which nothing else happens."""

import os
import stat
import subprocess
import tempfile
import threading
from pathlib import Path

import pytest

from fractal.cloud import alias
from fractal.errors import InputError, OutsideError

ID = "0123456789abcdef0123456789abcdef"
OTHERS = b"# mine\r\nHost work\n\tHostName 10.9.9.9\n\n\xff\xfeHost *\n  User joe"  # neither UTF-8 nor a last newline

pytestmark = pytest.mark.usefixtures("openssh")


def write(folder: Path, ip: str = "10.1.2.3", instance_id: str = ID, **changes: object) -> Path:
    settings = {"ip": ip, "key_file": folder / "ssh/id_ed25519", "instance_id": instance_id} | changes
    return alias.write(folder, **settings)  # type: ignore[arg-type]


def understood(config: Path, host: str = "lambda") -> dict[str, str]:
    """What ssh would do."""
    done = subprocess.run(["ssh", "-F", config, "-G", host], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def config_of(home: Path, data: bytes | None = None, permissions: int = 0o600) -> Path:
    place = home / ".ssh/config"
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if data is not None:
        place.write_bytes(data)
        place.chmod(permissions)
    return place


@pytest.mark.parametrize("name", ["state", "a state with spaces", "état"])
def test_ssh_understands_the_alias(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    found = understood(write(folder, port=2222))
    assert (found["hostname"], found["port"], found["user"]) == ("10.1.2.3", "2222", "ubuntu")
    assert found["hostkeyalias"] == ID
    assert found["stricthostkeychecking"] == "true"
    assert found["identitiesonly"] == "yes"
    assert found["identityfile"].strip('"') == str(folder / "ssh/id_ed25519")
    assert found["userknownhostsfile"].strip('"') == str(folder / "ssh/known_hosts")
    assert (found["controlmaster"], found["controlpersist"], found["serveraliveinterval"]) == ("auto", "60", "15")


def test_files_are_for_their_owner_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        place = write(tmp_path / "state")
    finally:
        os.umask(before)
    assert (mode(place), mode(place.parent)) == (0o600, 0o700)


def test_an_address_that_moves_keeps_the_pinned_key_and_another_machine_does_not(tmp_path: Path) -> None:
    first, moved = understood(write(tmp_path)), understood(write(tmp_path, "10.1.2.4"))
    assert moved["hostname"] == "10.1.2.4"
    assert moved["hostkeyalias"] == first["hostkeyalias"]
    assert moved["controlpath"] != first["controlpath"]  # a connection to the old address is not shared
    other = understood(write(tmp_path, "10.1.2.4", "f" * 32))
    assert other["hostkeyalias"] == "f" * 32
    assert other["controlpath"] != moved["controlpath"]


def test_a_shared_connections_socket_is_short_and_nobody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("a" * 60) / ("b" * 60)
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        monkeypatch.setattr(alias, "SHORT", Path(short))
        for folder in (Path(short, "state"), deep):
            socket = Path(understood(write(folder))["controlpath"])
            assert len(str(socket)) <= 86
            assert socket.is_relative_to(short)
            assert mode(socket.parent) == 0o700
        socket.parent.chmod(0o777)  # somebody was quicker: nothing is shared there
        found = understood(write(deep))
        assert found["controlmaster"] == "false"
        assert "controlpath" not in found


@pytest.mark.parametrize("name", ['quo"te', "per%cent", "back\\slash", "$HOME", "st*r", "new\nline"])
def test_a_path_that_ssh_would_read_otherwise_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="FRACTAL_STATE"):
        write(tmp_path / name)
    with pytest.raises(InputError, match="FRACTAL_STATE"):
        alias.include(tmp_path, tmp_path / name)
    assert not (tmp_path / ".ssh").exists()


def test_readers_never_see_half_a_config(tmp_path: Path) -> None:
    place, stop, halves = write(tmp_path), threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            text = place.read_text()
            if not (text.startswith("# Written") and text.endswith("ServerAliveCountMax 4\n")):
                halves.append(text)

    reader = threading.Thread(target=read)
    writers = [
        threading.Thread(target=lambda start=start: [write(tmp_path, f"10.0.{start}.{n}") for n in range(50)])
        for start in range(3)
    ]
    reader.start()
    for one in writers:
        one.start()
    for one in writers:
        one.join()
    stop.set()
    reader.join()
    assert not halves
    assert [file.name for file in place.parent.iterdir()] == ["config"]


def test_a_state_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "ssh").write_text("a file")
    with pytest.raises(OutsideError, match="cannot be written"):
        write(tmp_path)


def test_include_makes_what_is_missing_with_the_right_modes(tmp_path: Path) -> None:
    folder = tmp_path / "a state"
    write(folder)
    assert alias.include(tmp_path, folder)
    place = config_of(tmp_path)
    assert (mode(place.parent), mode(place)) == (0o700, 0o600)
    assert understood(place)["hostname"] == "10.1.2.3"
    assert understood(place, "other")["hostname"] == "other"


def test_include_stands_first_once_and_keeps_the_rest_byte_for_byte(tmp_path: Path) -> None:
    write(tmp_path / "state")
    place = config_of(tmp_path, OTHERS, 0o640)
    assert alias.include(tmp_path, tmp_path / "state")
    line = f'Include "{tmp_path}/state/ssh/config"\n'.encode()
    assert place.read_bytes() == line + OTHERS
    assert mode(place) == 0o640
    assert not alias.include(tmp_path, tmp_path / "state")
    assert place.read_bytes() == line + OTHERS
    place.write_bytes(b"# a comment of mine\n\n" + line + OTHERS)  # still first
    assert not alias.include(tmp_path, tmp_path / "state")


def test_an_include_that_slid_into_a_host_is_put_first_again(tmp_path: Path) -> None:
    write(tmp_path / "state")
    line = f'Include "{tmp_path}/state/ssh/config"\n'.encode()
    place = config_of(tmp_path, b"Host work\n  User joe\n  " + line)
    assert understood(place)["hostname"] == "lambda"
    assert alias.include(tmp_path, tmp_path / "state")
    assert place.read_bytes() == line + b"Host work\n  User joe\n"
    assert understood(place)["hostname"] == "10.1.2.3"


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    target = tmp_path / "dotfiles/ssh_config"
    target.parent.mkdir()
    target.write_bytes(OTHERS)
    place = config_of(tmp_path)
    place.symlink_to("../dotfiles/ssh_config")
    assert alias.include(tmp_path, tmp_path / "state")
    assert place.is_symlink()
    assert target.read_bytes().endswith(OTHERS)
    assert target.read_bytes().startswith(b"Include ")


def test_a_read_only_config_stays_and_the_line_is_given(tmp_path: Path) -> None:
    place = config_of(tmp_path, OTHERS, 0o400)
    with pytest.raises(OutsideError, match=f'read-only.*by hand: Include "{tmp_path}/state/ssh/config"$'):
        alias.include(tmp_path, tmp_path / "state")
    assert place.read_bytes() == OTHERS


def test_a_full_disk_leaves_the_config_as_it_was(tiny_disk: Path) -> None:
    place = config_of(tiny_disk, b"# " + b"x" * 30_000 + b"\n")
    before = place.read_bytes()
    (tiny_disk / "filler").write_bytes(b"y" * 24_000)
    with pytest.raises(OutsideError, match=r"No space left.*by hand: Include"):
        alias.include(tiny_disk, tiny_disk / "state")
    assert place.read_bytes() == before
    assert [file.name for file in place.parent.iterdir()] == ["config"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Host lambda\n", True),
        ("host=lambda", True),
        ("\tHost work lambda other\n", True),
        ('Host "lambda"\n', True),
        ("Host lam*\n", True),
        ("Host *\n  User joe\n", False),
        ("Host lambda2 my-lambda\n", False),
        ("Host * !lambda\n", False),
        ("# Host lambda\n", False),
        ("Host work # lambda\n", False),
        ("HostName lambda\n", False),
        ("", False),
    ],
)
def test_a_host_of_the_users_own_is_noticed(tmp_path: Path, text: str, expected: bool) -> None:
    config_of(tmp_path, text.encode())
    assert alias.own_alias(tmp_path) is expected


def test_no_config_has_no_host(tmp_path: Path) -> None:
    assert not alias.own_alias(tmp_path)


def test_a_home_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    with pytest.raises(OutsideError, match="by hand: Include") as caught:
        alias.include(tmp_path / "home", tmp_path)
    assert "\n" not in str(caught.value)
