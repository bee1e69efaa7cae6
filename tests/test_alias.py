"""The ssh alias, read back by OpenSSH itself; and the one line in the user's config, which stays theirs."""

import os
import subprocess
from pathlib import Path

import pytest

from fractal.cloud import alias
from fractal.records import OutsideError

pytestmark = pytest.mark.usefixtures("openssh")


def asked(config: Path) -> dict[str, str]:
    """What ssh makes of it."""
    done = subprocess.run(["ssh", "-F", str(config), "-G", "lambda"], capture_output=True, text=True, check=True)
    return dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)


def write(folder: Path, ip: str = "192.0.2.7") -> Path:
    return alias.write(folder, ip=ip, key_file=folder / "a key", instance_id="i-1")


def test_ssh_reads_what_was_meant(tmp_path: Path) -> None:
    folder = tmp_path / "the state"
    config = write(folder)
    found = asked(config)
    assert (found["hostname"], found["user"], found["port"], found["hostkeyalias"]) == (
        "192.0.2.7",
        "ubuntu",
        "22",
        "i-1",
    )
    assert found["identityfile"] == str(folder / "a key")
    assert found["userknownhostsfile"] == str(folder / "ssh/known_hosts")
    assert (found["stricthostkeychecking"], found["identitiesonly"]) == ("true", "yes")
    assert len(found["controlpath"]) < 90
    assert config.stat().st_mode & 0o777 == 0o600
    assert asked(write(folder, "192.0.2.8"))["hostname"] == "192.0.2.8"


def test_the_users_config_gets_one_line_first_and_keeps_the_rest(tmp_path: Path) -> None:
    home, folder = tmp_path / "home", tmp_path / "the state"
    (home / ".ssh").mkdir(parents=True)
    own = b"# mine \xff\nHost *\n  User me\nHost lambda\n  HostName 198.51.100.1\n"
    (home / ".ssh/config").write_bytes(own)
    (home / ".ssh/config").chmod(0o644)
    write(folder)
    assert alias.own_alias(home)
    assert alias.include(home, folder)
    assert not alias.include(home, folder)
    text = (home / ".ssh/config").read_bytes()
    assert text == f'Include "{folder}/ssh/config"\n'.encode() + own
    assert (home / ".ssh/config").stat().st_mode & 0o777 == 0o644
    found = asked(home / ".ssh/config")
    assert (found["hostname"], found["user"]) == ("192.0.2.7", "ubuntu")


def test_a_config_that_is_not_there_is_made_and_a_link_is_followed(tmp_path: Path) -> None:
    write(tmp_path)
    assert alias.include(tmp_path / "new", tmp_path)
    assert (tmp_path / "new/.ssh").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "new/.ssh/config").stat().st_mode & 0o777 == 0o600
    (tmp_path / "home/.ssh").mkdir(parents=True)
    (tmp_path / "dotfiles").write_text("Host x\n")
    (tmp_path / "home/.ssh/config").symlink_to(tmp_path / "dotfiles")
    assert not alias.own_alias(tmp_path / "home")
    assert alias.include(tmp_path / "home", tmp_path)
    assert (tmp_path / "home/.ssh/config").is_symlink()
    assert (tmp_path / "dotfiles").read_text().endswith("Host x\n")


def test_a_place_that_cannot_be_written_gets_one_line_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    with pytest.raises(OutsideError, match="Put this line first by hand: Include") as caught:
        alias.include(tmp_path / "home", tmp_path)
    assert os.linesep not in str(caught.value)
