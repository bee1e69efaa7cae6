"""Set-up's decisions. That it works from nothing is what `make test` on a bare machine shows."""

import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fractal.install import apt, docker_engine, setup
from fractal.install.docker_engine import SOCKET


def test_the_error_is_the_line_that_says_why() -> None:
    output = "Collecting torch==9\nERROR: No matching distribution found for torch==9\n\n"
    assert setup.last_error(output) == "No matching distribution found for torch==9"
    assert setup.last_error("pip was killed\n") == "pip was killed"
    assert setup.last_error("") == "no output"
    assert (
        setup.last_step("Collecting a\n  Downloading a-1.whl (3 MB)\n  Successfully uninstalled b")
        == "Downloading a-1.whl (3 MB)"
    )
    assert setup.last_step("") == "starting"


def test_the_accelerator_follows_the_machine_unless_told() -> None:
    assert setup.choose_accelerator({}, lambda: True) == "cuda"
    assert setup.choose_accelerator({}, lambda: False) == "cpu"
    assert setup.choose_accelerator({"FRACTAL_ACCELERATOR": "cpu"}, lambda: True) == "cpu"
    with pytest.raises(setup.UsageError, match="FRACTAL_ACCELERATOR=tpu: expected cpu or cuda"):
        setup.choose_accelerator({"FRACTAL_ACCELERATOR": "tpu"}, lambda: False)


def test_torch_without_cuda_wherever_there_is_a_choice() -> None:
    assert setup.torch_requirement("cpu", "linux") == "torch==2.13.0+cpu"
    assert setup.torch_requirement("cpu", "darwin") == "torch==2.13.0"
    assert setup.torch_requirement("cuda", "linux") == "torch==2.14.0"


def test_torch_is_the_one_in_pyproject() -> None:
    text = (setup.ROOT / "pyproject.toml").read_text()
    assert all(f'"torch=={version}"' in text for version in setup.TORCH.values())


def test_what_fails_is_tried_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup, "LOG", tmp_path / "setup.log")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text("#!/bin/sh\necho ERROR: No space left on device\nexit 1\n")
    (tmp_path / "bin/python").chmod(0o755)
    monkeypatch.setattr(setup, "VENV", tmp_path)
    installer = setup.Installer(setup.Terminal(), os.open(os.devnull, os.O_RDONLY))
    with pytest.raises(setup.SetupError, match=r"packages failed: No space left on device\. Check .*disk.*log: /"):
        installer.pip_step("packages", "-r", "x.lock")
    with pytest.raises(setup.SetupError, match="torch failed"):
        installer.torch_for_cpu()
    os.close(installer.lock_fd)
    calls = [line for line in setup.LOG.read_text().splitlines() if line.startswith("$ ")]
    assert [setup.TORCH_INDEX in call for call in calls] == [False, False, False, True, True]
    assert capsys.readouterr().err.count("Trying once more") == 2


def test_progress_is_the_last_line_and_a_killed_set_up_ends_its_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup, "LOG", tmp_path / "setup.log")
    monkeypatch.setattr(setup, "PLAIN_PROGRESS_S", 0.0)
    installer = setup.Installer(setup.Terminal(), os.open(os.devnull, os.O_RDONLY))
    code = "import os, time; print(os.getpid()); print('Collecting numpy', flush=True); time.sleep(60)"

    def stop(text: str) -> None:
        print(text, file=sys.stderr)
        if "Collecting numpy" in text:
            raise KeyboardInterrupt

    monkeypatch.setattr(installer.terminal, "progress", stop)
    with pytest.raises(KeyboardInterrupt):
        installer.run([sys.executable, "-c", code])
    os.close(installer.lock_fd)
    assert "s, Collecting numpy" in capsys.readouterr().err
    pid = int(setup.LOG.read_text().splitlines()[1])
    assert not Path(f"/proc/{pid}").exists()


def test_the_stamp_changes_with_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [setup.key_for("cpu"), setup.key_for("cuda")]
    assert keys[0] == setup.key_for("cpu")
    shutil.copytree(setup.ROOT / "docker", tmp_path / "docker")
    shutil.copy(setup.ROOT / "pyproject.toml", tmp_path)
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    keys.append(setup.key_for("cpu"))
    for name in ("pyproject.toml", "docker/cpu.lock", "docker/demo.lock"):
        (tmp_path / name).write_text("changed")
        keys.append(setup.key_for("cpu"))
    monkeypatch.setattr(sys, "version_info", (3, 12, 99))
    keys.append(setup.key_for("cpu"))
    assert len(set(keys)) == len(keys)


def test_packages_cut_short_are_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = tmp_path / "lib/python3.11/site-packages"
    for name in ("whole-1.dist-info", "torn-1.dist-info"):
        (packages / name).mkdir(parents=True)
    (packages / "whole-1.dist-info/RECORD").touch()
    monkeypatch.setattr(setup, "VENV", tmp_path)
    setup.drop_broken()
    assert setup.distributions() == ["whole"]


def test_setup_imports_only_the_standard_library() -> None:
    """-S hides site-packages, -I the folder we are in: what is left is Python's own."""
    code = f"import sys; sys.path.append({str(setup.ROOT)!r}); import fractal.install.setup"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_wrong_usage_is_one_line_and_exit_2() -> None:
    environ = {**os.environ, "FRACTAL_ACCELERATOR": "tpu"}
    argv = [sys.executable, "-m", "fractal.install.setup", "--only=python"]
    done = subprocess.run(argv, cwd=setup.ROOT, env=environ, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


# The engine


def test_each_state_of_the_engine_has_its_remedy() -> None:
    joined = "sudo apt-get install docker.io, then: sudo usermod -aG docker $USER; then log in again"
    other = "unix:///r/docker.sock"
    lines = {
        docker_engine.remedy("absent", SOCKET): joined,
        docker_engine.remedy("absent", SOCKET, root=True): "run: apt-get install docker.io.",
        docker_engine.remedy("absent", SOCKET, platform="darwin"): "Start Docker Desktop or colima",
        docker_engine.remedy(
            "stopped", SOCKET
        ): "installed, but no engine is running. Run: sudo systemctl start docker",
        docker_engine.remedy("denied", SOCKET): "sudo usermod -aG docker $USER; then log in again",
        docker_engine.remedy("stopped", "tcp://10.0.0.9:2375", root=True): "unset DOCKER_HOST",
        docker_engine.remedy("absent", SOCKET, other=other): f"DOCKER_HOST={other}",
    }
    assert [(line, remedy) for line, remedy in lines.items() if remedy not in line or "\n" in line] == []
    assert len(lines) == 7


def test_the_state_tells_answering_stopped_and_absent_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "docker.sock"
    monkeypatch.setattr(docker_engine, "daemon_path", lambda: None)
    assert docker_engine.engine_state(f"unix://{path}") == "absent"
    monkeypatch.setattr(docker_engine, "daemon_path", lambda: "/usr/sbin/dockerd")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        assert docker_engine.engine_state(f"unix://{path}") == "stopped"  # a socket left by a dead daemon
        server.listen()
        replies = [b"HTTP/1.0 200 OK\r\n\r\nOK", b"HTTP/1.0 500 Internal Server Error\r\n\r\n"]

        def serve() -> None:
            for reply in replies:
                with server.accept()[0] as link:
                    link.recv(1024)
                    link.sendall(reply)

        threading.Thread(target=serve, daemon=True).start()
        assert docker_engine.engine_state(f"unix://{path}") == "answers"
        assert docker_engine.engine_state(f"unix://{path}") == "stopped"


def test_a_stale_pid_file_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "docker.pid"
    monkeypatch.setattr(docker_engine, "PID_FILE", file)
    assert not docker_engine.is_daemon_alive()
    file.write_text(str(os.getpid()))  # alive, but no dockerd: the number was used again
    assert not docker_engine.is_daemon_alive()
    assert not file.exists()


def test_apts_reason() -> None:
    output = "Reading package lists...\nE: Unable to locate package docker.io\n"
    assert apt.reason(output) == "E: Unable to locate package docker.io"
    assert apt.reason("") == "no output"
