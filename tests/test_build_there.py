"""Images built on a simulated instance by its own engine, and where a build takes place."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import docker
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fractal.cloud import options, remote_build
from fractal.cloud.remote_host import Remote
from fractal.errors import InputError
from fractal.images import build as images
from fractal.images import debian, image_config, placement, recipes
from fractal.images.build_errors import BuildError
from fractal.images.image import Image
from fractal.images.placement import Facts
from fractal.images.recipes import Recipe
from fractal.images.rendering import SHELL
from tests.conftest import until
from tests.machine import Condition, Machine

pytestmark = [pytest.mark.docker, pytest.mark.cloud, pytest.mark.usefixtures("openssh")]
BASE = "small-base:1"
# Of the machine's own files: what the shell of each RUN and the stage of local files call.
MAKE_BASE = f"""\
set -e
docker image inspect {BASE} > /dev/null 2>&1 && exit
programs='sh find date touch chmod chown stat mkdir sleep cat cp ls readlink grep'
files=$(echo /etc/passwd /etc/group; for p in $programs; do command -v $p; echo /bin/$p; ldd $(command -v $p) | grep -o '/[^ ]*'; done | sort -u)
mkdir -p /tmp/root/tmp && tar -chf - $files 2> /dev/null | tar -xf - -C /tmp/root
tar -cf - -C /tmp/root . | docker import -c 'ENV PATH=/usr/bin:/bin' - {BASE} > /dev/null
"""


# --- where to build

facts = st.builds(
    Facts,
    host=st.just("lambda"),
    engine_here=st.booleans(),
    built_here=st.booleans(),
    same_processor=st.booleans(),
    push_bytes=st.floats(0, 2e10),
    context_bytes=st.floats(0, 1e8),
    uplink_bits_per_s=st.floats(1e3, 1e11),
    processors_here=st.integers(1, 256),
    processors_there=st.integers(1, 256),
)


@given(facts)
def test_the_image_is_built_where_it_is_ready_sooner_if_it_can_be(one: Facts) -> None:
    choice = placement.choose(one)
    assert "\n" not in choice.reason
    if not one.engine_here or not one.same_processor:
        assert choice.there
    else:
        assert choice.there == (placement.there_s(one) < placement.here_s(one))


@given(facts, st.floats(1, 100))
def test_a_faster_uplink_never_moves_a_build_to_the_instance(one: Facts, factor: float) -> None:
    from dataclasses import replace

    faster = replace(one, uplink_bits_per_s=one.uplink_bits_per_s * factor)
    if one.push_bytes >= one.context_bytes and not placement.choose(one).there:
        assert not placement.choose(faster).there


def test_the_reckoning_at_home_and_at_a_data_centre() -> None:
    home = Facts(host="lambda", engine_here=True, built_here=True, same_processor=True, push_bytes=4803e6,
                 context_bytes=2e6, uplink_bits_per_s=20e6, processors_here=8, processors_there=30)  # fmt: skip
    assert placement.choose(home) == placement.Choice(
        True,
        "built there 2.0 MB to send and 86 s in all, built here 4,803.0 MB to send and 32 min in all, at 20.0 Mbit/s up",
    )
    from dataclasses import replace

    assert not placement.choose(replace(home, uplink_bits_per_s=1e9)).there
    assert not placement.choose(replace(home, push_bytes=0.0)).there
    assert "no Docker here" in placement.choose(replace(home, engine_here=False)).reason
    assert "another kind of processor" in placement.choose(replace(home, same_processor=False)).reason


def test_what_the_instance_lacks_is_reckoned_by_layers() -> None:
    layers = {"a": 300, "b": 100}
    assert placement.missing_bytes("sandbox", {}, {"a"}) == 31e6
    assert placement.missing_bytes("sandbox", layers, {"a", "x"}) == 31e6 / 4
    assert placement.missing_bytes("sandbox", layers, {"a", "b"}) == 0


def test_the_processor_follows_from_the_instances_type() -> None:
    assert (options.processor("gpu_1x_gh200"), options.processor("gpu_1x_a10")) == ("arm64", "amd64")
    options.check_processor(["gpu_1x_gh200"], "there", "")
    options.check_processor(["gpu_1x_gh200"], "here", "arm64")
    with pytest.raises(InputError, match="gpu_1x_a10: its processor is x86-64"):
        options.check_processor(["gpu_1x_gh200", "gpu_1x_a10"], "there", "arm64")


def test_images_of_two_processors_have_two_names(client: docker.DockerClient) -> None:
    (ours,), (other,) = recipes.choose("sandbox", "amd64"), recipes.choose("sandbox", "arm64")
    assert other.name == f"{ours.name}-arm64"
    own = client.version()["Arch"]
    foreign = Recipe("test", Image.debian_slim(), "", False, processor={"amd64": "arm64"}.get(own, "amd64"))
    assert images.foreign_platform(client, Recipe("test", Image.debian_slim(), "", False, processor=own), "") == ""
    with pytest.raises(BuildError, match="lambda has"):
        images.foreign_platform(client, foreign, "lambda")
    if not any(images.BINFMT.glob("*qemu-*")):
        with pytest.raises(BuildError, match="no emulator for that"):
            images.foreign_platform(client, foreign, "")


def test_layers_that_differ_are_named_with_their_commands() -> None:
    commands = ["", f"RUN /bin/sh -c {SHELL} uv pip install", "COPY /local"]
    assert "all 3 layers are those" in remote_build.difference("x:1", ["a", "b", "c"], ["a", "b", "c"], commands)
    said = remote_build.difference("x:1", ["a", "b", "c"], ["a", "z", "c"], commands)
    assert said.endswith("2 (RUN uv pip install)")
    assert remote_build.difference("x:1", ["y", "b", "c"], ["a", "b", "c"], commands).endswith("1 (the base)")
    assert "bases differ" in remote_build.difference("x:1", ["a", "b"], ["a", "b", "c"], commands)


def test_the_history_of_a_layer_is_found() -> None:
    history = [{"Size": 0, "CreatedBy": "ENV A=1"}, {"Size": 0, "CreatedBy": "RUN true"}, {"Size": 5, "CreatedBy": ""}]
    assert [line["CreatedBy"] for line in image_config.layer_history(history, 2)] == ["", "RUN true"]
    assert [line["CreatedBy"] for line in image_config.layer_history(history, 3)] == ["a layer"] * 3


# --- on an instance


@pytest.fixture(scope="module")
def machine(simulated_machine: Machine) -> Machine:
    """The shared machine, with a base image of its own files."""
    simulated_machine.sh(MAKE_BASE)
    return simulated_machine


@pytest.fixture
def no_docker_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PATH without a docker command, and no engine."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for program in ("ssh", "rsync", "sh", "python3", "apt-get", "apt-config", "dpkg"):
        if path := shutil.which(program):
            (folder / program).symlink_to(path)
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")


Make = Callable[..., Recipe]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """An image on the machine's base, with a file that a test may edit."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code/program").write_text("echo 1\n")

    def recipe(*commands: str) -> Recipe:
        image = Image.from_registry(BASE, root=tmp_path).run_commands(*commands).add_local_dir("code", "/code")
        return Recipe("there", image, "", False)

    return recipe


def nothing_left(machine: Machine) -> None:
    """No secret, no context and no builder is left there."""
    until(lambda: "build" not in machine.sh("ls /dev/shm; pgrep -af 'docker buil[d]' || :"), 30)
    assert machine.sh("ls -d /tmp/fractal-* 2> /dev/null || :") == ""


def test_an_image_is_built_there_without_docker_here_and_again_after_an_edit(
    remote: Remote, machine: Machine, make: Make, tmp_path: Path, no_docker_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificates = tmp_path / "ca.pem"
    certificates.write_text("-----BEGIN CERTIFICATE-----\nkaleidoscope\n-----END CERTIFICATE-----\n")
    monkeypatch.setenv("FRACTAL_CA", str(certificates))
    monkeypatch.setenv("PIP_INDEX_URL", "https://joe:token-of-pip@index.example/simple")
    # Brackets: the command itself, which the history shows, does not hold the words.
    seen = "grep -q kaleidoscop[e] /run/secrets/ca && grep -q token-of-pi[p] /run/secrets/settings && echo packages > /packages"
    recipe = make(seen)
    built = remote_build.ensure(remote, recipe, images.Options())
    assert (built.name, built.built) == (recipe.name, True)
    assert built.base == f"{BASE} pulled"
    again = remote_build.ensure(remote, recipe, images.Options())
    assert (again.built, again.digest) == (False, built.digest)
    (tmp_path / "code/program").write_text("echo 2\n")
    edited = remote_build.ensure(remote, make(seen), images.Options())
    assert edited.name != built.name
    with remote.engine() as there:
        first, second = (there.images.get(name).attrs for name in (built.name, edited.name))
        assert first["RootFS"]["Layers"][:-1] == second["RootFS"]["Layers"][:-1]
        assert first["Created"].startswith("1970")
        text = str(first) + str(there.api.history(built.name))
        done = there.containers.run(edited.name, ["sh", "/code/program"], remove=True, network_mode="none")
        assert done == b"2\n"
    log = machine.sh(
        "cat /proc/*/cmdline /proc/*/environ 2> /dev/null | tr '\\0' '\\n'; ls -laR /run/secrets 2>&1 || :"
    )
    for secret in ("kaleidoscope", "token-of-pip"):
        assert secret not in text
        assert secret not in log
    assert remote_build.only_there(remote, [make(seen)]) == {"there"}
    assert remote_build.compare(remote, built.name) is None
    nothing_left(machine)


def test_a_step_that_fails_there_is_one_line(remote: Remote, machine: Machine, make: Make) -> None:
    with pytest.raises(BuildError, match=r"on lambda failed: .*something is wrong") as caught:
        remote_build.ensure(remote, make("echo something is wrong >&2; exit 3"), images.Options())
    assert "\n" not in str(caught.value)
    with pytest.raises(BuildError, match="No index has the Python package nothing==1") as caught:
        remote_build.ensure(remote, make("echo 'no version of nothing==1,'; exit 1"), images.Options())
    with pytest.raises(BuildError, match=r"a registry of packages is not to be reached from there .* --on=here"):
        remote_build.ensure(remote, make("echo 'E: Could not resolve deb.debian.org'; exit 100"), images.Options())
    nothing_left(machine)


@pytest.mark.long
def test_a_build_whose_connection_is_cut_is_repeated_and_goes_on(
    remote: Remote, machine: Machine, make: Make, logged: list[str]
) -> None:
    recipe = make(f"echo {time.time_ns()} > /first", "sleep 2")
    cut = threading.Timer(2.5, lambda: remote.link._process.kill())
    cut.start()
    built = remote_build.ensure(remote, recipe, images.Options())
    cut.join()
    assert built.built
    assert any("connected again" in line for line in logged)
    nothing_left(machine)


def test_an_interruption_here_ends_the_build_there(remote: Remote, machine: Machine, make: Make) -> None:
    began = threading.Timer(2.5, lambda: os.kill(os.getpid(), signal.SIGINT))
    began.start()
    with pytest.raises(KeyboardInterrupt):
        remote_build.ensure(remote, make("sleep 60"), images.Options())
    assert machine.sh("docker ps -q; pgrep -af '[s]leep 60' || :") == ""
    nothing_left(machine)


def test_the_docker_command_there_that_can_use_buildkit_is_taken(remote: Remote, machine: Machine) -> None:
    machine.put("/usr/local/bin/docker", b'#!/bin/sh\n[ "$1" = version ] && echo 28.2.2\n', 0o755)
    try:
        assert remote_build.find_docker(remote) == ("", "/usr/bin/docker")
    finally:
        machine.sh("rm /usr/local/bin/docker")


def test_the_uplink_is_measured_by_what_is_sent(remote: Remote) -> None:
    assert remote_build.uplink(remote) > 1e5


# --- long


@pytest.mark.long
def test_a_full_disk_there_is_one_line_with_the_remedy(make: Make, tmp_path: Path) -> None:
    with Machine(condition=Condition(docker_group=True, disk_mib=200)) as small:
        small.sh(MAKE_BASE)
        with Remote(small.ssh_config, lambda: None, print, host=small.alias) as remote:
            with pytest.raises(BuildError, match="disk is full"):
                remote_build.ensure(remote, make("cat /dev/zero > /zeros"), images.Options())
            nothing_left(small)


@pytest.mark.long
def test_the_sandbox_is_built_there_from_debians_packages_without_docker_here(
    client: docker.DockerClient, remote: Remote, machine: Machine, image: str, no_docker_here: None
) -> None:
    (recipe,) = recipes.choose("sandbox")
    built = remote_build.ensure(remote, recipe, images.Options())
    here = client.images.get(image)
    with remote.engine() as there:
        assert there.images.get(image).attrs["RootFS"]["Layers"] == here.attrs["RootFS"]["Layers"]
    assert (built.name, built.digest) == (image, here.id)
    nothing_left(machine)


@pytest.mark.long
def test_an_instance_that_makes_no_base_says_what_to_do(remote: Remote, machine: Machine) -> None:
    machine.sh("mv /usr/bin/mmdebstrap /usr/bin/mmdebstrap.off; docker rmi -f $(docker images -q fractal-base) || :")
    try:
        (recipe,) = recipes.choose("pipeline-cpu")
        with pytest.raises(debian.BootstrapError, match=r"--base=; or build here"):
            remote_build.ensure(remote, recipe, images.Options())
    finally:
        machine.sh("mv /usr/bin/mmdebstrap.off /usr/bin/mmdebstrap")


@pytest.mark.long
def test_a_second_instance_takes_its_layers_from_the_file_system(
    machine: Machine, remote: Remote, make: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The file system stays while the engine forgets everything, as the next instance's would know nothing."""
    folder = "/home/ubuntu/kept/fractal"
    random = "cat /proc/sys/kernel/random/uuid > /packages"  # built anew, it would be another layer
    recipe = make(random)
    first = remote_build.ensure(remote, recipe, images.Options(), folder)
    tags = f"{folder}/layers/docker/registry/v2/repositories/fractal/_manifests/tags"
    until(lambda: f"there-{recipe.processor}" in machine.sh(f"ls {tags} 2> /dev/null || :"))
    until(lambda: "docker" not in machine.sh("pgrep -af 'docker (pus[h]|rm[i])' || :"))
    forget = f"docker rmi -f {first.name}; docker builder prune -af > /dev/null"
    machine.sh(forget)
    again = remote_build.ensure(remote, recipe, images.Options(), folder)
    assert (again.built, again.digest) == (False, first.digest)
    assert "was kept on the file system" in capfd.readouterr().err
    with remote.engine() as there:
        kept = there.images.get(first.name).attrs["RootFS"]["Layers"]
    machine.sh(forget)
    (tmp_path / "code/program").write_text("echo 2\n")
    edited = remote_build.ensure(remote, make(random), images.Options(), folder)
    assert edited.built
    with remote.engine() as there:
        layers = there.images.get(edited.name).attrs["RootFS"]["Layers"]
    assert kept[:-1] == layers[:-1]
    machine.sh("docker rm -f fractal-layers")
