"""The ssh key for a launch: found by its key material, registered only with consent, never one with a passphrase."""

import subprocess
from pathlib import Path

import pytest

from fractal.cloud.launch import launch
from fractal.cloud.ssh_keys import find_key
from fractal.errors import InputError
from tests.renting import REQUEST, Renting

pytestmark = pytest.mark.usefixtures("openssh")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FRACTAL_SSH_KEY", raising=False)
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    (tmp_path / ".ssh").mkdir()
    return tmp_path


def make_key(file: Path, passphrase: str = "") -> str:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", passphrase, "-f", str(file)], check=True)
    return Path(f"{file}.pub").read_text().strip()


def test_a_key_is_found_by_its_material_not_by_its_comment(rented: Renting, home: Path) -> None:
    make_key(home / ".ssh/id_aaa")
    public = make_key(home / ".ssh/id_work")
    rented.cloud.add_ssh_key("laptop", " ".join(public.split()[:2]) + " other@comment")
    assert find_key(rented.account()) == ("laptop", home / ".ssh/id_work")
    (home / ".ssh/id_work.pub").unlink()
    assert find_key(rented.account()).name == "laptop"


def test_fractal_ssh_key_comes_first(
    rented: Renting, home: Path, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rented.cloud.add_ssh_key("laptop", make_key(home / ".ssh/id_work"))
    monkeypatch.setenv("FRACTAL_SSH_KEY", str(key_file))
    assert find_key(rented.account()) == ("mine", key_file)
    make_key(home / "other")
    monkeypatch.setenv("FRACTAL_SSH_KEY", str(home / "other"))
    with pytest.raises(InputError, match="--register-key"):
        find_key(rented.account())
    assert find_key(rented.account(), register=True).file == home / "other"
    for wrong, text in (("/no/such", "no private ssh key"), (f"{home}/other.pub", "no private ssh key")):
        monkeypatch.setenv("FRACTAL_SSH_KEY", wrong)
        with pytest.raises(InputError, match=text):
            find_key(rented.account(), register=True)


def test_without_a_registered_key_a_new_one_is_offered(rented: Renting, home: Path, no_guard: None) -> None:
    with pytest.raises(InputError, match=r"--register-key.*FRACTAL_SSH_KEY"):
        find_key(rented.account())
    with pytest.raises(InputError, match="--register-key"):
        find_key(rented.account(), ask=lambda question: False)
    asked: list[str] = []
    key = find_key(rented.account(), ask=lambda question: not asked.append(question))
    assert len(asked) == 1
    assert key.file == rented.ledger.folder / "ssh/id_ed25519"
    assert key.file.stat().st_mode & 0o77 == 0
    assert find_key(rented.account()) == key
    assert launch(rented.account(), REQUEST, key).ssh_key == key.name
    rented.terminate_all()


def test_the_name_of_a_new_key_may_be_taken_by_a_lost_one(rented: Renting, home: Path) -> None:
    name = f"fractal-{rented.ledger.operator()}"
    rented.cloud.add_ssh_key(name, make_key(home / "lost"))
    assert find_key(rented.account(), register=True).name == f"{name}-2"


def test_a_key_with_a_passphrase_needs_the_agent(rented: Renting, home: Path) -> None:
    rented.cloud.add_ssh_key("laptop", make_key(home / ".ssh/id_work", "secret"))
    with pytest.raises(InputError, match="ssh-add"):
        find_key(rented.account())
