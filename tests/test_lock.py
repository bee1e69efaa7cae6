"""Locks of Python packages: CUDA's compiler fits its headers."""

import re

from fractal.images import lock
from fractal.install import setup
from tests.conftest import ROOT

# What nvcc compiles with and against: of two releases of CUDA, CUDA's own headers refuse to compile (vllm#44305).
COMPILER = {"nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-cccl"}
HEADERS = {"nvidia-cuda-runtime", "nvidia-cuda-nvrtc"}


def cuda_release(package: str, version: str) -> str:
    """The release of CUDA that one of NVIDIA's packages belongs to, as cuda-toolkit's metadata pairs them: 13.0.

    The first two numbers, but for cccl since 13.3, which has its own behind CUDA's first: 13.3.5.0.6 is CCCL 3.5.0.6 of
    CUDA 13.5.
    """
    parts = version.split(".")
    minor = parts[2] if package == "nvidia-cuda-cccl" and len(parts) > 3 else parts[1]
    return f"{parts[0]}.{minor}"


def test_the_committed_compiler_fits_the_committed_headers() -> None:
    """Where it fails: pin cuda-toolkit[cccl,nvcc] in pyproject.toml to the version that torch asks for."""
    texts = [(ROOT / "docker" / name).read_text() for name in setup.LOCKS["cuda"]]
    pins = [entry.split()[0].split("==") for text in texts for entry in lock.split_requirements(text)]
    releases = {name: cuda_release(name, version) for name, version in pins if name in COMPILER | HEADERS}
    assert releases.keys() == COMPILER | HEADERS
    assert len(set(releases.values())) == 1, releases


def test_releases_are_those_of_cuda_toolkits_metadata() -> None:
    """Pairs of cuda-toolkit 13.0.3.0, 13.2.0, 13.3.0 and 13.5.0."""
    for release, cccl, nvcc in (
        ("13.0", "13.0.85", "13.0.88"),
        ("13.2", "13.2.27", "13.2.51"),
        ("13.3", "13.3.3.3.1", "13.3.33"),
        ("13.5", "13.3.5.0.6", "13.5.37"),
    ):
        assert (cuda_release("nvidia-cuda-cccl", cccl), cuda_release("nvidia-cuda-nvcc", nvcc)) == (release, release)


def test_two_locks_hold_everything_once_pytorchs_family_first() -> None:
    text = "a==1 \\\n    --hash=x\ntorch==2 \\\n    --hash=y\nnvidia-cublas==3\nz==4\n"
    first, second = lock.split(text, ("first", "second")).values()
    assert (first, second) == ("torch==2 \\\n    --hash=y\nnvidia-cublas==3\n", "a==1 \\\n    --hash=x\nz==4\n")
    assert lock.split(text, ("one",)) == {"one": text}


def test_a_machine_without_a_gpu_gets_no_package_for_one() -> None:
    for name in (*setup.LOCKS["cpu"], setup.DEMO_LOCK):
        packages = lock.split_requirements((ROOT / "docker" / name).read_text())
        assert packages
        assert [p for p in packages if re.match(r"(nvidia|cuda|triton)\b", p)] == [], name
