"""Packages for the programs: what may be asked for, the image that is made, and what is said where one is missing."""

import base64
import hashlib
import json
import zipfile
from collections import Counter
from pathlib import Path

import docker
import pytest

from fractal.__main__ import run_command
from fractal.errors import InputError
from fractal.images import packages, recipes
from fractal.sandbox.host import lacking

REFUSED = {
    "": "names no package",
    " , ": "names no package",
    "numpy": r"numpy is not pinned. Write numpy==VERSION",
    "numpy>=2": "not pinned",
    "numpy==2.*": "not pinned",
    "numpy===2.0": "not pinned",
    "NumPy==2.0,numpy==2.1": "stands twice",
    "numpy @ https://example.org/numpy-2.0-py3-none-any.whl": "URL",
    "https://me:secret@example.org/x.whl": r"not NAME==VERSION",
    "numpy==2.0; python_version > '3'": "marker",
    "--index-url=https://me:secret@example.org": "is an option",
    "numpy==2.0 --hash=sha256:00": "not NAME==VERSION",
    "two words": "not NAME==VERSION",
}


def test_only_pinned_packages_are_taken() -> None:
    assert packages.parse(" Pandas==2.3.3,numpy == 2.3.5,") == ("numpy==2.3.5", "pandas==2.3.3")
    assert packages.parse("Scikit_Learn==1.7.2") == ("scikit-learn==1.7.2",)
    for text, reason in REFUSED.items():
        with pytest.raises(InputError, match=reason) as caught:
            packages.parse(text)
        assert "secret" not in str(caught.value)


def test_packages_go_neither_with_an_image_nor_with_a_sidecar(capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--problems", "P", "--samples", "S", "--out", "L"]
    for other in ("--image=i", "--socket=s"):
        assert run_command(["verify", *files, "--packages=numpy==2.3.5", other]) == 2
        assert "--packages" in capsys.readouterr().err


def test_a_missing_module_is_the_sandbox_s_lack() -> None:
    said = {
        "ModuleNotFoundError: No module named 'numpy'": "no module named numpy in the sandbox; --packages numpy==VERSION",
        "test 2: ModuleNotFoundError: No module named 'sklearn'": "test 2: no module named sklearn in the sandbox; "
        "--packages scikit-learn==VERSION",
    }
    for detail, text in said.items():
        assert lacking.explain(detail) == text
    assert [lacking.module(text) for text in said.values()] == ["numpy", "sklearn"]
    for detail in (  # a part of what is there, of the standard library, or another error
        "ModuleNotFoundError: No module named 'numpy.nonsense'",
        "ModuleNotFoundError: No module named 'tkinter'",
        "ImportError: cannot import name 'x' from 'math'",
        "test 1: ValueError: No module named 'numpy'",
    ):
        assert lacking.explain(detail) == detail
        assert lacking.module(detail) == ""
    counted = lacking.summary(Counter(numpy=30, sklearn=7))
    assert counted == (
        "verify: 37 programs need packages that the sandbox does not have: numpy (30), sklearn (7). "
        "--packages numpy==VERSION,scikit-learn==VERSION"
    )


def wheel(folder: Path, name: str, source: str) -> None:
    """A wheel of one module, version 1.0."""
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": source,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = []
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
            rows.append(f"{path},sha256={digest},{len(text)}")
        archive.writestr(f"{info}/RECORD", "\n".join([*rows, f"{info}/RECORD,,"]) + "\n")


@pytest.mark.docker
@pytest.mark.long
def test_an_image_with_packages_is_locked_built_named_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], image: str
) -> None:
    """From a folder of wheels, as in a closed network; the program finds the module loaded, its import costs nothing."""
    (tmp_path / "wheels").mkdir()
    source = "import time\nend = time.process_time() + 1\nwhile time.process_time() < end:\n    pass\nvalue = 6\n"
    wheel(tmp_path / "wheels", "slowly", source)
    monkeypatch.setenv("FRACTAL_WHEELS", str(tmp_path / "wheels"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    problem = {
        "task_id": 1, "prompt": "", "reference": "def f(x):\n    return x\n", "setup": "", "entry_point": "f",
        "tests": ["import slowly\nassert f(1) == slowly.value"], "split": "test",
    }  # fmt: skip
    (tmp_path / "problems.jsonl").write_text(json.dumps(problem) + "\n")
    programs = ["import slowly\ndef f(x):\n    return slowly.value\n", "import absent\ndef f(x):\n    return 6\n"]
    rows = [{"task_id": 1, "solution": program} for program in programs]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = ["problems", "samples"]
    words = ["verify", *(f"--{name}={tmp_path / name}.jsonl" for name in names), f"--out={tmp_path / 'labels.jsonl'}"]
    assert run_command([*words, "--packages=slowly==1.0", "--cpu=0.5"]) == 0
    labels = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    assert [(label["status"], label["detail"]) for label in labels] == [
        ("passed", ""),
        ("error", "no module named absent in the sandbox; --packages absent==VERSION"),
    ]
    shown = capsys.readouterr()
    assert "1 program needs packages that the sandbox does not have: absent (1)" in shown.err
    client = docker.from_env()
    try:
        name = packages.image_for("slowly==1.0")
        assert name in shown.out
        assert client.images.get(name).labels["fractal.packages"] == "slowly==1.0"
        (lock,) = (tmp_path / "cache").rglob("packages.lock")
        assert "slowly==1.0" in lock.read_text()
        assert "--hash=sha256:" in lock.read_text()
        client.images.remove(name, force=True)
    finally:
        client.close()


def test_a_layer_over_the_pipeline_holds_what_the_image_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wheels").mkdir()
    wheel(tmp_path / "wheels", "slowly", "")
    monkeypatch.setenv("FRACTAL_WHEELS", str(tmp_path / "wheels"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (plain,) = recipes.choose("pipeline-cpu", "amd64")
    has = packages.versions("cpu", "x86_64")
    assert packages.pipeline_recipe("pipeline-cpu", (f"pyyaml=={has['pyyaml']}",), "amd64") == plain
    with pytest.raises(InputError, match=f"--package=numpy==1.0: the image has {has['numpy']}"):
        packages.pipeline_recipe("pipeline-cpu", ("numpy==1.0",), "amd64")
    assert has["protobuf"] == "7.36.2"  # the lock has another one for another processor
    more = packages.pipeline_recipe("pipeline-cpu", (f"numpy=={has['numpy']}", "slowly==1.0"), "amd64")
    (lock,) = (tmp_path / "cache").rglob("packages.lock")
    assert [line.split()[0] for line in lock.read_text().splitlines() if "==" in line] == ["slowly==1.0"]
    assert more.name.startswith("fractal-pipeline-cpu-packages:")
    before, after = (recipe.image.dockerfile().splitlines() for recipe in (plain, more))
    first = next(number for number, (one, other) in enumerate(zip(before, after, strict=False)) if one != other)
    assert "-r /run/cpu.lock" in "\n".join(before[:first])  # the large layers are shared
    assert "packages.lock" in "\n".join(after[first : first + 4])
    with pytest.raises(
        packages.PackagesError, match=r"--package absent-of-all==1.0: no index has a package absent-of-all"
    ):
        packages.pipeline_recipe("pipeline-cpu", ("absent-of-all==1.0",), "amd64")
