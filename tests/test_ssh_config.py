"""The alias as OpenSSH itself understands it, and the one line in a user's own config, which is changed in no other way."""

import os
import stat
import subprocess
import threading
from pathlib import Path

import pytest

from fractal.cloud import ssh_config
from fractal.errors import InputError, OutsideError
from tests.test_ledger import entry

ID = "0123456789abcdef0123456789abcdef"
OTHERS = b"# mine\r\nHost work\n\tHostName 10.9.9.9\n\n\xff\xfeHost *\n  User joe"  # neither UTF-8 nor a last newline

pytestmark = pytest.mark.usefixtures("openssh")


def write(folder: Path, ip: str = "10.1.2.3", instance_id: str = ID) -> Path:
    return ssh_config.write(folder, entry(ip=ip, id=instance_id, key_file=str(folder / "ssh/id_ed25519")))


def understood(config: Path, host: str = "lambda") -> dict[str, str]:
    """What ssh would do."""
    done = subprocess.run(["ssh", "-F", config, "-G", host], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def users_config(home: Path, data: bytes, permissions: int = 0o600) -> Path:
    path = home / ".ssh/config"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(permissions)
    return path


@pytest.mark.parametrize("name", ["state", "a state with spaces", "état"])
def test_ssh_understands_the_alias(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    before = os.umask(0)
    try:
        path = write(folder)
    finally:
        os.umask(before)
    assert (mode(path), mode(path.parent)) == (0o600, 0o700)  # for its owner alone, whatever the umask
    found = understood(path)
    assert (found["hostname"], found["port"], found["user"]) == ("10.1.2.3", "22", "ubuntu")
    assert found["hostkeyalias"] == ID
    assert found["stricthostkeychecking"] == "true"
    assert found["identitiesonly"] == "yes"
    assert found["identityfile"].strip('"') == str(folder / "ssh/id_ed25519")
    assert found["userknownhostsfile"].strip('"') == str(folder / "ssh/known_hosts")
    moved = understood(write(folder, "10.1.2.4"))  # another address of the same instance keeps the pinned key
    assert (moved["hostname"], moved["hostkeyalias"]) == ("10.1.2.4", ID)
    assert understood(write(folder, "10.1.2.4", "f" * 32))["hostkeyalias"] == "f" * 32


def test_a_path_that_ssh_would_read_otherwise_is_refused(tmp_path: Path) -> None:
    for name in ('quo"te', "per%cent", "back\\slash", "$HOME", "st*r", "new\nline"):
        with pytest.raises(InputError, match="FRACTAL_STATE"):
            write(tmp_path / name)
        with pytest.raises(InputError, match="FRACTAL_STATE"):
            ssh_config.include(tmp_path, tmp_path / name)
    assert not (tmp_path / ".ssh").exists()


def test_an_instance_without_an_address_is_waited_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no address yet.*invoke wait"):
        write(tmp_path, ip="")


def test_readers_never_see_half_a_config(tmp_path: Path) -> None:
    path, stop, halves = write(tmp_path), threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            text = path.read_text()
            if not (text.startswith("# Written") and text.endswith("ServerAliveCountMax 4\n")):
                halves.append(text)

    def rewrite(start: int) -> None:
        for number in range(50):
            write(tmp_path, f"10.0.{start}.{number}")

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=rewrite, args=(start,)) for start in range(3)]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    reader.join()
    assert not halves
    assert [file.name for file in path.parent.iterdir()] == ["config"]


def test_include_creates_what_is_missing_with_the_right_modes(tmp_path: Path) -> None:
    folder = tmp_path / "a state"
    write(folder)
    assert ssh_config.include(tmp_path, folder)
    path = tmp_path / ".ssh/config"
    assert (mode(path.parent), mode(path)) == (0o700, 0o600)
    assert understood(path)["hostname"] == "10.1.2.3"
    assert understood(path, "other")["hostname"] == "other"


def test_include_is_first_once_and_keeps_the_rest_byte_for_byte(tmp_path: Path) -> None:
    write(tmp_path / "state")
    path = users_config(tmp_path, OTHERS, 0o640)
    assert ssh_config.include(tmp_path, tmp_path / "state")
    line = f'Include "{tmp_path}/state/ssh/config"\n'.encode()
    assert path.read_bytes() == line + OTHERS
    assert mode(path) == 0o640
    assert not ssh_config.include(tmp_path, tmp_path / "state")
    assert path.read_bytes() == line + OTHERS
    path.write_bytes(b"# a comment of mine\n\n" + line + OTHERS)  # still first
    assert not ssh_config.include(tmp_path, tmp_path / "state")
    path.write_bytes(b"Host work\n  User joe\n  " + line)  # it has come to belong to a host
    assert understood(path)["hostname"] == "lambda"
    assert ssh_config.include(tmp_path, tmp_path / "state")
    assert path.read_bytes() == line + b"Host work\n  User joe\n"
    assert understood(path)["hostname"] == "10.1.2.3"


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    target = tmp_path / "dotfiles/ssh_config"
    target.parent.mkdir()
    target.write_bytes(OTHERS)
    path = tmp_path / ".ssh/config"
    path.parent.mkdir()
    path.symlink_to("../dotfiles/ssh_config")
    assert ssh_config.include(tmp_path, tmp_path / "state")
    assert path.is_symlink()
    assert target.read_bytes().endswith(OTHERS)
    assert target.read_bytes().startswith(b"Include ")


def test_what_cannot_be_written_is_one_line_and_the_include_line_is_given(tmp_path: Path, tiny_disk: Path) -> None:
    path = users_config(tmp_path, OTHERS, 0o400)
    with pytest.raises(OutsideError, match=f'read-only.*by hand: Include "{tmp_path}/state/ssh/config"$'):
        ssh_config.include(tmp_path, tmp_path / "state")
    assert path.read_bytes() == OTHERS

    path = users_config(tiny_disk, b"# " + b"x" * 30_000 + b"\n")
    before = path.read_bytes()
    (tiny_disk / "filler").write_bytes(b"y" * 24_000)
    with pytest.raises(OutsideError, match="no space left"):
        ssh_config.include(tiny_disk, tiny_disk / "state")
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["config"]

    for name in ("home", "ssh"):
        (tmp_path / name).write_text("a file")
    with pytest.raises(OutsideError, match="by hand: Include") as caught:
        ssh_config.include(tmp_path / "home", tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(OutsideError, match="cannot be written"):
        write(tmp_path)
