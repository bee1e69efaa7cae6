"""The images' benchmark: its pure parts, its bad input, and a smoke run that looks at bytes and never at timing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import docker
import docker.errors
import pytest

from benchmarks import images
from benchmarks.images import Facts
from benchmarks.verify import BenchError
from fractal.errors import InputError
from fractal.images import recipes
from tests.conftest import ROOT

SHELL = 'RUN /bin/sh -c begun=@$(($(date +%s) - 600)); sh -ec "$0" && { find / -exec touch -hcd @0 {} + 2> /dev/null || :; } '
APT = "{ dpkg -s a > /dev/null || { apt-get update && apt-get install -y a; }; }"
TITLES = {
    "": "base",
    f"{SHELL}{APT} # buildkit": "Debian packages",
    f"{SHELL}/run/uv venv --no-cache --quiet /opt/venv # buildkit": "empty environment",
    f"{SHELL}. /run/secrets/settings && X=Y /run/uv pip install --find-links /w --no-deps torch==2.1+cpu # buildkit": "Python package torch==2.1+cpu",
    "[stage-5 4/8] RUN --mount=type=tmpfs,target=/run --mount=type=bind,a=b X=Y /run/uv pip install -r /run/cpu.lock": "Python packages of cpu.lock",
    "[uv 2/2] RUN python3 -m venv /uv && /uv/bin/pip install --require-hashes -r /run/uv.lock": "uv itself",
    "COPY /local/ / # buildkit": "local files",
    "[stage-5 5/8] COPY --from=local1 /local/ /": "local files",
    f"{SHELL}. /run/secrets/settings && mkdir -m 1777 -p /cache # buildkit": "mkdir -m 1777 -p /cache",
}


def test_a_layer_has_a_title() -> None:
    assert {command: images.title(command) for command in TITLES} == TITLES


def test_the_last_local_files_are_our_code() -> None:
    history = [
        {"created_by": ""},
        {"created_by": "ENV A=B", "empty_layer": True},
        {"created_by": "COPY /local/ / # buildkit"},
        {"created_by": "COPY /local/ / # buildkit"},
    ]
    assert images.titles(history) == ["base", "local files", "our code"]


def test_seconds_of_the_steps_longest_first_without_the_cached() -> None:
    log = """#5 [stage-5 3/8] RUN --mount=type=tmpfs,target=/run /run/uv venv /opt/venv
#5 sha256:aa
#5 DONE 0.4s

#6 [stage-5 4/8] RUN /run/uv pip install -r /run/cpu.lock
#6 CACHED

#7 [stage-5 8/8] COPY --from=local2 /local/ /
#7 DONE 0.1s
#8 exporting to image
#8 exporting layers 9.3s done
#8 DONE 9.3s
"""
    assert images.steps(log) == [("exporting to image", 9.3), ("empty environment", 0.4), ("our code", 0.1)]


LOCK = """# comment
attrs==26.1.0 \\
    --hash=sha256:aa \\
    --hash=sha256:bb
idna==3.20 ; python_version > '3' \\
    --hash=sha256:cc \\
    --hash=sha256:dd
    # via requests
ijson==3.6.0 \\
    --hash=sha256:ee
"""


def test_one_package_of_a_lock_is_changed_and_no_other() -> None:
    changed = images.repinned(LOCK, "idna", "3.19", ["ff"])
    assert changed == LOCK.replace(
        "3.20 ; python_version > '3' \\\n    --hash=sha256:cc \\\n    --hash=sha256:dd",
        "3.19 ; python_version > '3' \\\n    --hash=sha256:ff",
    )
    assert (images.pinned(LOCK, "idna"), images.pinned(changed, "idna")) == ("3.20", "3.19")
    assert images.pinned(LOCK, "tqdm") is None


def test_a_package_that_is_not_locked_cannot_be_changed() -> None:
    with pytest.raises(BenchError, match="stands 0 times"):
        images.repinned(LOCK, "tqdm", "1", ["ff"])


def test_our_locks_can_be_changed() -> None:
    for accelerator in ("cuda", "cpu"):
        text = (ROOT / recipes.LOCKS[accelerator][-1]).read_text()
        name = next(n for n in images.DEPENDENCIES if images.pinned(text, n))
        changed = images.repinned(text, name, "0.1", ["ff"])
        assert images.pinned(changed, name) == "0.1"
        before = set(text.splitlines())
        new = [line for line in changed.splitlines() if line not in before]
        assert new == [f"{name}==0.1 \\", "    --hash=sha256:ff"]


FILE = Facts("0", 0o644, "0:0", 0.0, 3, "", "aa", "[]")


def test_differences_of_layers() -> None:
    cases: list[tuple[dict[str, Facts], dict[str, list[str]], str]] = [
        ({"a": FILE, "b": FILE}, {}, "same contents"),
        ({"b": FILE, "a": FILE}, {"order": ["the same entries in another order"]}, "same contents"),
        ({"a": FILE, "b": FILE._replace(time=1.0)}, {"time": ["b"]}, "same contents"),
        ({"a": FILE, "b": FILE._replace(content="bb", size=4)}, {"size": ["b"], "content": ["b"]}, "differs"),
        ({"a": FILE, "b": FILE._replace(owner="1:1")}, {"owner": ["b"]}, "differs"),
        ({"a": FILE, "c": FILE}, {"only here": ["b"], "only there": ["c"]}, "differs"),
    ]
    for theirs, expected, verdict in cases:
        assert images.differences({"a": FILE, "b": FILE}, theirs) == expected
        assert images.verdict(expected) == verdict


def test_bytes_by_item_and_by_what_could_go() -> None:
    site = "opt/venv/lib/python3.11/site-packages"
    found = images.weigh(
        {f"{site}/torch/lib/x.so": 100, f"{site}/torch/__pycache__/a.pyc": 10, f"{site}/nvidia/cudnn/a.a": 50,
         f"{site}/pandas/tests/a.py": 20, f"{site}/mypy/a.py": 3, f"{site}/6ec57f__mypyc.x.so": 4, "opt/venv/bin/ruff": 30, "opt/venv/bin/python": 1,
         f"{site}/pytest-9.2.0.dist-info/METADATA": 2, "usr/lib/x/libc.so": 5, "usr/bin/ruff": 1}
    )  # fmt: skip
    assert found["bytes"] == 226
    assert list(found["largest"].items())[:3] == [("torch", 110), ("nvidia/cudnn", 50), ("opt/venv", 31)]
    assert found["less"] == {
        "compiled Python": 10,
        "static archives": 50,
        "tests of packages": 20,
        "tools for tests": 39,
    }


def test_ratios_are_to_all_layers_built_and_all_bytes_pushed() -> None:
    push = {"bytes": 10, "seconds": 1.0}
    found = {
        "push": {"bytes": 1000, "seconds": 20.0},
        "nothing": {"module": {"median_s": 1.0}},
        "line": {"median_s": 5.0, "push": push},
        "dependency": None,
        "second": {"median_s": 50.0},
    }
    images.ratios(found)
    assert (found["nothing"]["module"]["of_whole"], found["line"]["of_whole"]) == (0.02, 0.1)
    assert (push["of_whole_bytes"], push["of_whole_s"]) == (0.01, 0.05)


def test_what_failed_half_way_is_still_shown() -> None:
    found = {
        "bytes": 5,
        "nothing": {"module": {"median_s": 0.5, "min_s": 0.4, "max_s": 0.6, "runs": 2, "steps_run": 0}},
    }
    images.ratios(found)
    images.ratios({})
    assert images.speed_table({"sandbox": found, "pipeline": {}}).row_count == 1
    assert images.same_table({"sandbox": found}).row_count == images.size_table({"sandbox": found}).row_count == 0
    assert list(images.remarks({"sandbox": found})) == ["sandbox: nothing changed, module 0.50 s (under 1.00 s)"]


def test_the_changed_file_is_in_its_image() -> None:
    for key, recipe in recipes.recipes().items():
        assert images.changed_file(key) in recipe.image.context(), key


def test_options_are_checked_before_anything_runs() -> None:
    assert images.plan_of(images.parser().parse_args([])).images == ["sandbox", "pipeline-cpu"]
    assert images.plan_of(images.parser().parse_args(["--image=all"])).images == list(recipes.recipes())
    quick = images.plan_of(images.parser().parse_args(["--quick"]))
    assert (quick.images, quick.repeats, quick.second) == (["sandbox"], 1, False)
    with pytest.raises(InputError, match="no such image"):
        images.plan_of(images.parser().parse_args(["--image=x"]))
    with pytest.raises(InputError, match="positive"):
        images.plan_of(images.parser().parse_args(["--repeats=0"]))


def bench(*options: str, cwd: Path, **environ: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(ROOT / "benchmarks" / "images.py"), *options]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **environ}, capture_output=True, text=True, timeout=500)


def test_no_engine_is_one_line(tmp_path: Path) -> None:
    done = bench(cwd=tmp_path, DOCKER_HOST=f"unix://{tmp_path}/none.sock")
    assert (done.returncode, len(done.stderr.strip().splitlines())) == (3, 1), done.stderr
    assert "No Docker engine answers" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.docker
@pytest.mark.long
def test_a_quick_run_changes_one_layer_and_leaves_no_image(image: str, tmp_path: Path) -> None:
    done = bench("--quick", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    values = json.loads((tmp_path / done.stdout.strip().splitlines()[-1]).read_text())
    found = values["images"]["sandbox"]
    assert found["image"] == image
    assert [one["steps_run"] for one in found["nothing"].values()] == [0] * len(found["nothing"])
    if "registry" not in values["skipped"]:
        push = found["line"]["push"]
        assert 0 < push["layers"] < push["of_layers"]
        assert 0 < push["bytes"] < 1e6 < found["push"]["bytes"]
    assert [f for f in found["scan"]["findings"] if not f["excuse"]] == []
    client = docker.from_env()
    with pytest.raises(docker.errors.ImageNotFound):
        client.images.get(found["line"]["image"])
    client.close()
