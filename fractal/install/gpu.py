"""The one answer to whether there is an NVIDIA GPU, and what it is. Standard library only; loads no torch.

    if gpu.has_gpu(): ...
    for card in gpu.gpus(): print(card.name, card.total_bytes, card.capability)
    gpu.gpus(fresh=True)[0].free_bytes   # as it is now

Device files exclude quickly; then the driver's own library NVML is asked, which creates no CUDA context, so that a
process may fork or choose its device afterwards. CUDA_VISIBLE_DEVICES hides GPUs as CUDA does. Nothing here raises:
what goes wrong is no GPU, with the reason in `trouble()`.

Calls and structures: NVML API Reference Guide, "Initialization and Cleanup", "System Queries", "Device Queries".
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib import util
from pathlib import Path
from typing import Any, NamedTuple

DEVICES = ("/dev/nvidiactl", "/dev/dxg")  # the driver's control device; WSL's way to the GPU of Windows
LIBRARIES = ("libnvidia-ml.so.1", "/usr/lib/wsl/lib/libnvidia-ml.so.1")  # WSL's is not always in the loader's cache
TEXT_BYTES = 96  # NVML_DEVICE_NAME_V2_BUFFER_SIZE, NVML_DEVICE_UUID_V2_BUFFER_SIZE; a driver's version needs 80


class Gpu(NamedTuple):
    """One GPU. Memory is 0 where NVML does not know it: shared with the processor, as in a GB10."""

    name: str  # "NVIDIA H100 80GB HBM3"
    total_bytes: int
    free_bytes: int  # when it was read
    capability: tuple[int, int]  # CUDA's compute capability, (9, 0)
    uuid: str  # "GPU-…"


class Reading(NamedTuple):
    """What NVML says: all GPUs of the machine, in PCI order."""

    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None  # "580.95.05"
    cuda: tuple[int, int] | None = None  # the newest CUDA that the loaded libcuda.so.1 runs, a compat library's too
    trouble: str = ""  # why there are none, in a line


def gpus(*, fresh: bool = False) -> tuple[Gpu, ...]:
    """The GPUs that a CUDA program started here would see. Read once a process; `fresh` reads again."""
    if fresh:
        _read.cache_clear()
    return visible(_read().gpus, os.environ)


def has_gpu() -> bool:
    """Whether this machine or container has an NVIDIA GPU whose driver answers."""
    return bool(gpus())


def usable() -> bool:
    """Whether there is a GPU and the installed torch was built for it."""
    return has_gpu() and torch_cuda() is not None


def driver_version() -> str | None:
    """Of NVIDIA's driver, like "580.95.05"; None where no driver answers."""
    return _read().driver


def trouble() -> str:
    """Why there is no GPU here, in a line; empty where there is one."""
    if has_gpu():
        return ""
    return _read().trouble or f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']} hides every GPU"


def driver_trouble() -> str:
    """Why torch cannot compute on the GPU that is here, with the remedy, in a line; empty where it can, or has none.

    A driver runs every CUDA of its own major version and of older ones (CUDA Compatibility, "Minor Version
    Compatibility").
    """
    found, wanted = _read(), torch_cuda()
    if not has_gpu() or wanted is None or found.cuda is None or found.cuda[0] >= wanted[0]:
        return ""
    return (
        f"NVIDIA's driver {found.driver} runs CUDA {_dotted(found.cuda)}, the installed torch needs {_dotted(wanted)}. "
        "Upgrade the driver, or set up for the CPU: FRACTAL_ACCELERATOR=cpu make setup."
    )


@lru_cache(maxsize=1)
def torch_cuda() -> tuple[int, int] | None:
    """The CUDA that the installed torch was built for; None for the CPU's. Reads its version.py, loads nothing."""
    try:
        found = util.find_spec("torch")
        text = Path(found.origin).with_name("version.py").read_text() if found and found.origin else ""
    except (OSError, ImportError, ValueError):
        return None
    match = re.search(r"^cuda\b.*= *'(\d+)\.(\d+)", text, re.MULTILINE)
    return (int(match[1]), int(match[2])) if match else None


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def visible(found: tuple[Gpu, ...], environ: Mapping[str, str]) -> tuple[Gpu, ...]:
    """Those of `found` that CUDA_VISIBLE_DEVICES leaves, in its order.

    Entries are indices or beginnings of UUIDs; the first that names no GPU, and all after it, count for nothing (CUDA
    Programming Guide, "CUDA Environment Variables"). A MIG device, of which CUDA takes one, stands for the first GPU.
    Indices are taken in PCI order, so where GPUs differ and CUDA_DEVICE_ORDER is unset, CUDA may mean another.
    """
    wanted = environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return found
    chosen: list[Gpu] = []
    for word in wanted.split(","):
        word = word.strip()
        if word.startswith("MIG-"):
            named = found[:1]
        elif word.isdecimal():
            named = found[int(word) : int(word) + 1]
        else:
            named = tuple(one for one in found if word and one.uuid.startswith(word))
        if len(named) != 1 or named[0] in chosen:
            break
        chosen += named
    return tuple(chosen)


@lru_cache(maxsize=1)
def _read() -> Reading:
    if not any(Path(device).exists() for device in DEVICES):
        return Reading(trouble="no NVIDIA GPU")
    return ask(ctypes.CDLL)


def ask(load: Callable[[str], Any]) -> Reading:
    """Read everything through NVML; `load` opens a library by its name or raises OSError."""
    for name in LIBRARIES:
        try:
            library = load(name)
            break
        except OSError:
            continue
    else:
        return Reading(
            trouble="an NVIDIA device, but no libnvidia-ml.so.1: install the driver, or start the container with --gpus"
        )
    try:
        if code := library.nvmlInit_v2():
            return Reading(trouble=f"the NVIDIA driver does not answer: {_error(library, code)}")
        try:
            return _machine(library)
        finally:
            library.nvmlShutdown()
    except (AttributeError, NvmlError) as error:  # a library of another age has other functions
        return Reading(trouble=f"the NVIDIA driver does not answer: {error}")


class NvmlError(Exception):
    """A call of NVML failed; does not leave this module."""


class Memory(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


def _machine(library: Any) -> Reading:
    def call(name: str, *arguments: Any) -> None:
        if code := getattr(library, name)(*arguments):
            raise NvmlError(f"{name}: {_error(library, code)}")

    def text(name: str, *arguments: Any) -> str:
        buffer = ctypes.create_string_buffer(TEXT_BYTES)
        call(name, *arguments, buffer, ctypes.c_uint(TEXT_BYTES))
        return buffer.value.decode(errors="replace")

    def card(index: int) -> Gpu:
        device, memory, major, minor = ctypes.c_void_p(), Memory(), ctypes.c_int(), ctypes.c_int()
        call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(device))
        call("nvmlDeviceGetCudaComputeCapability", device, ctypes.byref(major), ctypes.byref(minor))
        try:
            call("nvmlDeviceGetMemoryInfo", device, ctypes.byref(memory))
        except NvmlError:  # "not supported" where the memory is the processor's
            memory = Memory()
        name, uuid = text("nvmlDeviceGetName", device), text("nvmlDeviceGetUUID", device)
        return Gpu(name, memory.total, memory.free, (major.value, minor.value), uuid)

    driver, count, cuda = text("nvmlSystemGetDriverVersion"), ctypes.c_uint(), ctypes.c_int()
    try:
        call("nvmlSystemGetCudaDriverVersion_v2", ctypes.byref(cuda))  # 13020: CUDA 13.2
    except NvmlError:  # there is no libcuda.so.1
        cuda.value = 0
    call("nvmlDeviceGetCount_v2", ctypes.byref(count))
    found = tuple(card(index) for index in range(count.value))
    version = (cuda.value // 1000, cuda.value % 1000 // 10) if cuda.value else None
    return Reading(found, driver, version, "" if found else f"no GPU, though NVIDIA's driver {driver} answers")


def _error(library: Any, code: int) -> str:
    library.nvmlErrorString.restype = ctypes.c_char_p
    return f"{library.nvmlErrorString(code).decode(errors='replace')} (NVML error {code})"
