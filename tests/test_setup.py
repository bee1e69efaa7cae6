"""Set-up's decisions. That it works from nothing is what `make test` on a bare machine shows."""

import dataclasses
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fractal.install import apt, docker_engine, setup
from fractal.install.docker_engine import SOCKET, Machine, State

USER = Machine(platform="linux", user="ada", root=False, in_group=False)
ROOT = dataclasses.replace(USER, user="root", root=True)


def test_the_error_is_the_line_that_says_why() -> None:
    output = "Collecting torch==9\nERROR: No matching distribution found for torch==9\n\n"
    assert setup.last_error(output) == "No matching distribution found for torch==9"
    output = "error: Request failed\n  cause: error sending request\n  cause: dns error\n"  # uv 0.13.9
    assert setup.last_error(output) == "Request failed; cause: error sending request; cause: dns error"
    assert setup.last_error("uv was killed\n") == "uv was killed"
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


@pytest.mark.parametrize(
    ("error", "full"),
    [
        ("Could not install packages due to an OSError: [Errno 28] No space left on device", True),  # pip
        ("Failed to extract archive; cause: No space left on device (os error 28)", True),  # uv
        ("No matching distribution found for torch==9", False),
    ],
)
def test_a_full_disk_is_said_at_once_all_else_is_tried_twice(
    error: str, full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lib/python3.11/site-packages").mkdir(parents=True)
    monkeypatch.setattr(setup, "VENV", tmp_path)
    monkeypatch.setattr(setup, "LOG", tmp_path / "setup.log")
    installer = setup.Installer(setup.Terminal(), os.open(os.devnull, os.O_RDONLY))
    calls = []

    def fail() -> None:
        calls.append(error)
        installer.run([sys.executable, "-c", f"print('ERROR: ' + {error!r}); exit(1)"])

    with pytest.raises(setup.SetupError, match="disk is full" if full else "Check the network"):
        installer.twice("packages", fail)
    os.close(installer.lock_fd)
    assert (len(calls), "once more" in capsys.readouterr().err) == ((1, False) if full else (2, True))


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


def test_gpu_packages_are_found() -> None:
    names = ["nvidia_cublas_cu12", "numpy", "cuda-bindings", "triton", "cudagraph_docs", "torch"]
    assert setup.gpu_packages(names) == ["cuda-bindings", "nvidia_cublas_cu12", "triton"]


def test_the_stamp_changes_with_every_part() -> None:
    keys = [
        setup.stamp_key([b"lock", b"pyproject"], "cpu", "3.11.2"),
        setup.stamp_key([b"lock!", b"pyproject"], "cpu", "3.11.2"),
        setup.stamp_key([b"lock", b"pyproject!"], "cpu", "3.11.2"),
        setup.stamp_key([b"lock", b"pyproject"], "cuda", "3.11.2"),
        setup.stamp_key([b"lock", b"pyproject"], "cpu", "3.12.0"),
        setup.stamp_key([b"lockp", b"yproject"], "cpu", "3.11.2"),
    ]
    assert len(set(keys)) == len(keys)
    assert keys[0] == setup.stamp_key([b"lock", b"pyproject"], "cpu", "3.11.2")


def test_python_versions() -> None:
    assert [setup.is_supported((3, minor)) for minor in (10, 11, 14, 15)] == [False, True, True, False]
    assert not setup.is_supported((2, 13))


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
    joined = "sudo apt-get install docker.io, then: sudo usermod -aG docker ada; then log in again"
    other = "unix:///r/docker.sock"
    cases: list[tuple[State, str, Machine, str]] = [
        ("absent", SOCKET, USER, joined),
        ("absent", SOCKET, ROOT, "run: apt-get install docker.io."),
        ("absent", SOCKET, dataclasses.replace(USER, platform="darwin"), "Start Docker Desktop or colima"),
        ("stopped", SOCKET, USER, "installed, but no engine is running. Run: sudo systemctl start docker"),
        ("denied", SOCKET, USER, "sudo usermod -aG docker ada; then log in again"),
        ("denied", SOCKET, dataclasses.replace(USER, in_group=True), "this login is older than that. Log in again"),
        ("stopped", "tcp://10.0.0.9:2375", ROOT, "unset DOCKER_HOST"),
        ("absent", SOCKET, dataclasses.replace(USER, other=other), f"DOCKER_HOST={other}"),
    ]
    lines = [(docker_engine.remedy(state, host, machine), remedy) for state, host, machine, remedy in cases]
    assert [(line, remedy) for line, remedy in lines if remedy not in line or "\n" in line] == []


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


def test_the_last_line_of_the_daemon_s_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert docker_engine.last_log_line(log) == "it left no log."
    log.write_text("time=... level=info\nfailed to start daemon: no space\n\n")
    assert docker_engine.last_log_line(log) == "failed to start daemon: no space"


def test_apts_reason() -> None:
    output = "Reading package lists...\nE: Unable to locate package docker.io\n"
    assert apt.reason(output) == "E: Unable to locate package docker.io"
    assert apt.reason("") == "no output"
