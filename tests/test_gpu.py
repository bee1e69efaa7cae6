"""Whether there is a GPU, as NVML says: by stand-ins for the driver's library, one in Python and one in C."""

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fractal.errors import OutsideError
from fractal.generate import models
from fractal.generate.backends import choose_backend
from fractal.install import doctor, gpu, setup
from fractal.install.gpu import Gpu, Reading, visible

GIB = 2**30
H100 = Gpu("NVIDIA H100 80GB HBM3", 80 * GIB, 79 * GIB, (9, 0), "GPU-11111111-aaaa")
A10 = Gpu("NVIDIA A10", 24 * GIB, 20 * GIB, (8, 6), "GPU-22222222-bbbb")
NOT_SUPPORTED, MISMATCH = 3, 18  # nvmlReturn_t
ERRORS = {NOT_SUPPORTED: b"Not Supported", MISMATCH: b"Driver/library version mismatch"}


class Nvml:
    """What we call of libnvidia-ml.so.1, with a driver that can fail at any function."""

    def __init__(self, *gpus: Gpu, fails: dict[str, int] | None = None) -> None:
        self.gpus, self.fails, self.users = gpus, fails or {}, 0

        def error(code: int) -> bytes:
            return ERRORS[code]

        self.nvmlErrorString = error

    def __getattr__(self, name: str) -> Any:
        action = getattr(type(self), f"_{name}")
        return lambda *arguments: self.fails.get(name) or action(self, *arguments)

    def _nvmlInit_v2(self) -> None:
        self.users += 1

    def _nvmlShutdown(self) -> None:
        self.users -= 1

    def _nvmlSystemGetDriverVersion(self, text: Any, size: Any) -> None:
        text.value = b"580.95.05"

    def _nvmlSystemGetCudaDriverVersion_v2(self, version: Any) -> None:
        version._obj.value = 13020

    def _nvmlDeviceGetCount_v2(self, count: Any) -> None:
        count._obj.value = len(self.gpus)

    def _nvmlDeviceGetHandleByIndex_v2(self, index: Any, device: Any) -> None:
        device._obj.value = index.value + 1

    def _nvmlDeviceGetName(self, device: Any, text: Any, size: Any) -> None:
        text.value = self.gpus[device.value - 1].name.encode()

    def _nvmlDeviceGetUUID(self, device: Any, text: Any, size: Any) -> None:
        text.value = self.gpus[device.value - 1].uuid.encode()

    def _nvmlDeviceGetMemoryInfo(self, device: Any, memory: Any) -> None:
        memory._obj.total, memory._obj.free = self.gpus[device.value - 1][1:3]

    def _nvmlDeviceGetCudaComputeCapability(self, device: Any, major: Any, minor: Any) -> None:
        major._obj.value, minor._obj.value = self.gpus[device.value - 1].capability


C_SOURCE = """
#include <string.h>
typedef struct { unsigned long long total, free, used; } Memory;
static int users;
static int copy(char *to, unsigned size, const char *text) {
    if (!users) return 1;  /* NVML_ERROR_UNINITIALIZED */
    if (size <= strlen(text)) return 7;  /* NVML_ERROR_INSUFFICIENT_SIZE */
    strcpy(to, text);
    return 0;
}
int nvmlInit_v2(void) { users++; return 0; }
int nvmlShutdown(void) { users--; return 0; }
const char *nvmlErrorString(int code) { return "some error"; }
int nvmlSystemGetDriverVersion(char *to, unsigned size) { return copy(to, size, "580.95.05"); }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = 13000; return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 1; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { *device = (void *)0x7fffdeadbeef0000; return 0; }
int nvmlDeviceGetName(void *device, char *to, unsigned size) { return copy(to, size, "NVIDIA H100 80GB HBM3"); }
int nvmlDeviceGetUUID(void *device, char *to, unsigned size) { return copy(to, size, "GPU-11111111-aaaa"); }
int nvmlDeviceGetMemoryInfo(void *device, Memory *memory) {
    if (device != (void *)0x7fffdeadbeef0000) return 2;  /* NVML_ERROR_INVALID_ARGUMENT */
    memory->total = 80ull << 30; memory->free = 79ull << 30;
    return 0;
}
int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) { *major = 9; *minor = 0; return 0; }
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine with the driver's device and no library yet; libraries are looked for in this folder."""
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(gpu, "DEVICES", (str(tmp_path / "nvidiactl"),))
    monkeypatch.setattr(gpu, "LIBRARIES", (str(tmp_path / "libnvidia-ml.so.1"),))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpu._read.cache_clear()
    yield tmp_path
    gpu._read.cache_clear()


def test_everything_is_read_from_the_driver() -> None:
    library = Nvml(H100, A10)
    assert gpu.query(lambda name: library) == Reading((H100, A10), "580.95.05", (13, 2))
    assert library.users == 0  # shut down again


def test_the_second_library_is_tried() -> None:
    def load(name: str) -> Nvml:
        if not name.startswith("/usr/lib/wsl/"):
            raise OSError(f"{name}: cannot open shared object file")
        return Nvml(H100)

    assert gpu.query(load).gpus == (H100,)


FAILING: list[tuple[Any, str]] = [
    (Nvml(H100, fails={"nvmlInit_v2": MISMATCH}), "does not answer: Driver/library version mismatch (NVML error 18)"),
    (Nvml(H100, fails={"nvmlDeviceGetName": MISMATCH}), "nvmlDeviceGetName: Driver/library version mismatch"),
    (Nvml(), "no GPU, though NVIDIA's driver 580.95.05 answers"),
    (object(), "has no attribute 'nvmlInit_v2'"),
]


def test_a_driver_that_fails_is_no_gpu_with_a_reason() -> None:
    for library, problem in FAILING:
        reading = gpu.query(lambda name, library=library: library)
        assert reading.gpus == (), problem
        assert problem in reading.problem
        assert getattr(library, "users", 0) == 0, problem


def test_memory_shared_with_the_processor_is_unknown_and_no_failure() -> None:
    (found,) = gpu.query(lambda name: Nvml(H100, fails={"nvmlDeviceGetMemoryInfo": NOT_SUPPORTED})).gpus
    assert found == H100._replace(total_bytes=0, free_bytes=0)


HIDDEN: dict[str | None, tuple[Gpu, ...]] = {
    None: (H100, A10),
    "0": (H100,),
    "1, 0": (A10, H100),
    "GPU-2222": (A10,),
    "MIG-3333/1/0": (H100,),
    "": (),
    "-1": (),
    "NoDevFiles": (),
    "0,2,1": (H100,),  # what comes after the first that names no GPU counts for nothing
    "GPU-": (),  # names both
}


def test_hidden_gpus_are_not_there() -> None:
    environs = {value: {} if value is None else {"CUDA_VISIBLE_DEVICES": value} for value in HIDDEN}
    assert {value: visible((H100, A10), environ) for value, environ in environs.items()} == HIDDEN


def test_without_a_device_file_no_library_is_loaded(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine / "nvidiactl").unlink()
    monkeypatch.setattr(gpu, "query", lambda load: pytest.fail("the driver was asked"))
    assert (gpu.has_gpu(), gpu.driver_version(), gpu.problem()) == (False, None, "no NVIDIA GPU")


def test_a_device_without_the_drivers_library_is_said(machine: Path) -> None:
    assert not gpu.has_gpu()
    assert "no libnvidia-ml.so.1" in gpu.problem()
    (machine / "libnvidia-ml.so.1").write_bytes(b"no library")
    gpu._read.cache_clear()
    assert not gpu.has_gpu()


def compiled(folder: Path) -> None:
    """The stand-in in C as libnvidia-ml.so.1 in the folder."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    (folder / "nvml.c").write_text(C_SOURCE)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", folder / "libnvidia-ml.so.1", folder / "nvml.c"], check=True)


def test_a_real_library_is_called_as_c_wants_it(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Widths of arguments and the layout of structures, which the stand-in in Python cannot get wrong."""
    compiled(machine)
    assert gpu.gpus() == (H100,)
    assert (gpu.driver_version(), gpu.problem()) == ("580.95.05", "")
    assert setup.choose_accelerator({}, gpu.has_gpu) == "cuda"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not gpu.has_gpu()
    assert gpu.problem() == "CUDA_VISIBLE_DEVICES= hides every GPU"


def test_free_memory_is_read_again_on_demand(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Nvml(H100)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert gpu.gpus() == (H100,)
    library.gpus = (H100._replace(free_bytes=GIB),)
    assert gpu.gpus() == (H100,)
    assert gpu.gpus(fresh=True)[0].free_bytes == GIB


def test_a_gpu_with_a_torch_for_the_cpu_is_not_used(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Nvml(A10))
    monkeypatch.setattr(gpu, "torch_cuda", lambda: None)
    assert (gpu.has_gpu(), gpu.usable()) == (True, False)
    finding = doctor.check_gpu()
    assert (finding.state, finding.found) == ("optional", "NVIDIA A10, 24 GiB, driver 580.95.05")
    monkeypatch.setattr(gpu, "torch_cuda", lambda: (13, 0))
    assert (gpu.usable(), models.preferred_dtype(), doctor.check_gpu().state) == (True, "bfloat16", "ok")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Nvml(A10._replace(capability=(7, 5))))
    gpu.gpus(fresh=True)
    assert models.preferred_dtype() == "float32"


DRIVERS: list[tuple[int, tuple[int, int] | None, bool]] = [  # the driver's CUDA, torch's, too old
    (13020, (13, 0), False),
    (13000, (13, 2), False),  # within a major version, a newer torch runs
    (12080, (13, 0), True),
    (14010, (13, 0), False),
    (12080, None, False),
]


def test_a_driver_too_old_for_torch_is_reported_before_anything_is_loaded(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cuda, torch, old in DRIVERS:

        def answer(self: Nvml, version: Any, cuda: int = cuda) -> None:
            version._obj.value = cuda

        monkeypatch.setattr(Nvml, "_nvmlSystemGetCudaDriverVersion_v2", answer)
        monkeypatch.setattr(ctypes, "CDLL", lambda name: Nvml(H100))
        monkeypatch.setattr(gpu, "torch_cuda", lambda torch=torch: torch)
        gpu.gpus(fresh=True)
        problem = gpu.driver_problem()
        assert bool(problem) == old, (cuda, torch)
        assert (doctor.check_gpu().state == "missing") == old
        if old:
            assert "driver 580.95.05 runs CUDA 12.8, the installed torch needs 13.0" in problem
            with pytest.raises(OutsideError, match="Upgrade the driver"):
                choose_backend("auto", None)
            assert choose_backend("openai", None) == "openai"


def test_without_libcuda_nothing_is_said_of_cuda() -> None:
    assert gpu.query(lambda name: Nvml(H100, fails={"nvmlSystemGetCudaDriverVersion_v2": NOT_SUPPORTED})).cuda is None


def test_the_installed_torch_is_read_as_it_was_built() -> None:
    torch = pytest.importorskip("torch")
    gpu.torch_cuda.cache_clear()
    built = torch.version.cuda
    assert gpu.torch_cuda() == (tuple(int(part) for part in built.split(".")[:2]) if built else None)


def test_no_part_of_torch_is_loaded() -> None:
    code = "import sys; from fractal.install import gpu; gpu.has_gpu(), gpu.usable(), gpu.problem(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
