"""Locks of Python packages: CUDA's compiler fits its headers, or nothing is written."""

from pathlib import Path

import pytest

from fractal.images import lock
from fractal.images.lock import LockError, check_cuda, cuda_release
from fractal.install import setup
from tests.conftest import ROOT

HASH = "    --hash=sha256:" + "0" * 64
FITTING = {
    "nvidia-cuda-cccl": "13.0.85",
    "nvidia-cuda-crt": "13.0.88",
    "nvidia-cuda-nvcc": "13.0.88",
    "nvidia-nvvm": "13.0.88",
    "nvidia-cuda-nvrtc": "13.0.88",
    "nvidia-cuda-runtime": "13.0.96",
}


def text(pins: dict[str, str], **markers: str) -> str:
    """A lock's text; `markers` by the package's name with underscores."""
    lines = []
    for name, version in {**pins, "torch": "2.14.0"}.items():
        marker = markers.get(name.replace("-", "_"), "")
        lines.append(f"{name}=={version}{f' ; {marker}' if marker else ''} \\\n{HASH}\n")
    return "".join(lines)


def quiet(_: str) -> None:
    pass


def test_the_committed_compiler_fits_the_committed_headers() -> None:
    texts = [(ROOT / "docker" / name).read_text() for name in setup.LOCKS["cuda"]]
    check_cuda("".join(texts))
    locked = {entry.partition("==")[0] for one in texts for entry in lock.split_requirements(one)}
    assert set(lock.COMPILER + lock.HEADERS) <= locked  # else the check above looked at nothing


def test_any_part_of_another_release_is_refused() -> None:
    check_cuda(text(FITTING))
    for package in lock.COMPILER + lock.HEADERS:
        with pytest.raises(LockError, match=rf"{package} 13\.5\.37.*No lock has changed; name cuda-toolkit") as caught:
            check_cuda(text(FITTING | {package: "13.5.37"}))
        assert "\n" not in str(caught.value)


def test_other_machines_than_those_with_gpus_do_not_count() -> None:
    check_cuda(text(FITTING | {"nvidia-cuda-runtime": "13.5.37"}, nvidia_cuda_runtime="platform_machine == 's390x'"))
    with pytest.raises(LockError, match="on aarch64"):
        check_cuda(
            text(FITTING | {"nvidia-cuda-runtime": "13.5.37"}, nvidia_cuda_runtime="platform_machine == 'aarch64'")
        )


def test_releases_are_those_of_cuda_toolkits_metadata() -> None:
    """Pairs of cuda-toolkit 13.0.3.0, 13.2.0, 13.3.0 and 13.5.0."""
    assert {cuda_release("nvidia-cuda-nvcc", v) for v in ("13.0.88", "13.0.48")} == {"13.0"}
    for release, cccl, nvcc in (
        ("13.0", "13.0.85", "13.0.88"),
        ("13.2", "13.2.27", "13.2.51"),
        ("13.3", "13.3.3.3.1", "13.3.33"),
        ("13.5", "13.3.5.0.6", "13.5.37"),
    ):
        assert (cuda_release("nvidia-cuda-cccl", cccl), cuda_release("nvidia-cuda-nvcc", nvcc)) == (release, release)


def test_a_set_that_does_not_fit_leaves_the_locks_as_they_are(tmp_path: Path) -> None:
    torch, rest = setup.LOCKS["cuda"]
    (tmp_path / torch).write_text("before")
    with pytest.raises(LockError):
        lock.write_python(
            {"cpu.lock": "", torch: text(FITTING | {"nvidia-cuda-nvcc": "13.5.37"}), rest: ""}, quiet, tmp_path
        )
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {torch: "before"}
    lock.write_python({torch: text(FITTING), rest: ""}, quiet, tmp_path)
    assert (tmp_path / torch).read_text() == text(FITTING)
