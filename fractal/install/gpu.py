"""The NVIDIA GPUs of this machine, and whether torch can use them. Standard library only; loads no torch.

The driver's own library NVML is asked, which creates no CUDA context, so that a process may fork or choose its device
afterwards. Nothing here raises: an error means no GPU, with the reason in `problem()`. Calls and structures: NVML API
Reference Guide, "Initialization and Cleanup", "System Queries", "Device Queries".
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
    """What NVML reports: all GPUs of the machine, in PCI order."""

    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None  # "580.95.05"
    cuda: tuple[int, int] | None = None  # the newest CUDA that the loaded libcuda.so.1 runs, a compat library's too
    problem: str = ""  # why there are none, in one line


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


def problem() -> str:
    """Why there is no GPU here, in a line; empty where there is one."""
    if has_gpu():
        return ""
    return _read().problem or f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']} hides every GPU"


def driver_problem() -> str:
    """Why torch cannot compute on the GPU that is here, with the remedy, in a line; empty where it can, or has none."""
    # A driver runs every CUDA of its own major version and of older ones (CUDA Compatibility, "Minor Version ...").
    reading, needed = _read(), torch_cuda()
    if not has_gpu() or needed is None or reading.cuda is None or reading.cuda[0] >= needed[0]:
        return ""
    return (
        f"NVIDIA's driver {reading.driver} runs CUDA {'.'.join(map(str, reading.cuda))}, the installed torch needs "
        f"{'.'.join(map(str, needed))}. Upgrade the driver, or set up for the CPU: FRACTAL_ACCELERATOR=cpu make setup."
    )


@lru_cache(maxsize=1)
def torch_cuda() -> tuple[int, int] | None:
    """The CUDA that the installed torch was built for; None for the CPU's. Reads its version.py, loads nothing."""
    try:
        spec = util.find_spec("torch")
        text = Path(spec.origin).with_name("version.py").read_text() if spec and spec.origin else ""
    except (OSError, ImportError, ValueError):
        return None
    match = re.search(r"^cuda\b.*= *'(\d+)\.(\d+)", text, re.MULTILINE)
    return (int(match[1]), int(match[2])) if match else None


def visible(all_gpus: tuple[Gpu, ...], environ: Mapping[str, str]) -> tuple[Gpu, ...]:
    """Those of `all_gpus` that CUDA_VISIBLE_DEVICES leaves, in its order.

    Entries are indices or beginnings of UUIDs; the first that names no GPU, and all after it, count for nothing (CUDA
    Programming Guide, "CUDA Environment Variables"). A MIG device, of which CUDA takes one, stands for the first GPU.
    Indices are taken in PCI order, so where GPUs differ and CUDA_DEVICE_ORDER is unset, CUDA may mean another.
    """
    setting = environ.get("CUDA_VISIBLE_DEVICES")
    if setting is None:
        return all_gpus
    chosen: list[Gpu] = []
    for name in map(str.strip, setting.split(",")):
        if name.startswith("MIG-"):
            named = all_gpus[:1]
        elif name.isdecimal():
            named = all_gpus[int(name) : int(name) + 1]
        else:
            named = tuple(device for device in all_gpus if name and device.uuid.startswith(name))
        if len(named) != 1 or named[0] in chosen:
            break
        chosen += named
    return tuple(chosen)


@lru_cache(maxsize=1)
def _read() -> Reading:
    if not any(Path(device).exists() for device in DEVICES):
        return Reading(problem="no NVIDIA GPU")
    return query(ctypes.CDLL)


def query(load: Callable[[str], Any]) -> Reading:
    """Read everything through NVML; `load` opens a library by its name or raises OSError."""
    for name in LIBRARIES:
        try:
            library = load(name)
            break
        except OSError:
            continue
    else:
        return Reading(
            problem="an NVIDIA device, but no libnvidia-ml.so.1: install the driver, or start the container with --gpus"
        )
    try:
        if code := library.nvmlInit_v2():
            return Reading(problem=f"the NVIDIA driver does not answer: {_error(library, code)}")
        try:
            return _read_all(library)
        finally:
            library.nvmlShutdown()
    except (AttributeError, NvmlError) as error:  # a library of another age has other functions
        return Reading(problem=f"the NVIDIA driver does not answer: {error}")


class NvmlError(Exception):
    """A call of NVML failed; does not leave this module."""


class Memory(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


def _read_all(library: Any) -> Reading:
    def call(name: str, *arguments: Any) -> None:
        if code := getattr(library, name)(*arguments):
            raise NvmlError(f"{name}: {_error(library, code)}")

    def text(name: str, *arguments: Any) -> str:
        buffer = ctypes.create_string_buffer(TEXT_BYTES)
        call(name, *arguments, buffer, ctypes.c_uint(TEXT_BYTES))
        return buffer.value.decode(errors="replace")

    def read_gpu(index: int) -> Gpu:
        device, memory = ctypes.c_void_p(), Memory()
        major, minor = ctypes.c_int(), ctypes.c_int()
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
    devices = tuple(read_gpu(index) for index in range(count.value))
    version = (cuda.value // 1000, cuda.value % 1000 // 10) if cuda.value else None
    return Reading(devices, driver, version, "" if devices else f"no GPU, though NVIDIA's driver {driver} answers")


def _error(library: Any, code: int) -> str:
    library.nvmlErrorString.restype = ctypes.c_char_p
    return f"{library.nvmlErrorString(code).decode(errors='replace')} (NVML error {code})"
