"""A stand-in GPU for the CUDA image on a machine without a GPU: vLLM starts on it, kernels compile, none runs.

Tensors lie in this machine's memory, and what kernels would have written is 0. vLLM sees a CUDA platform of the wanted
compute capability; Triton's own driver code talks to a stand-in for libcuda (libcuda.c). Made for vLLM 0.33.0 and torch
2.14.0: of another version, other functions may be asked for.
"""

import contextlib
import copy
import functools
import os
from types import SimpleNamespace
from typing import Any

import torch


def insert(capability: int) -> None:
    """From here on this process has a GPU of compute capability 80, 86, 89, 90 or 100. Before vLLM is imported."""
    os.environ["FRACTAL_CAPABILITY"] = str(capability)
    import vllm  # noqa: F401  # with torch as it is

    _torch(capability)
    _platform(capability)
    _precompiled()
    _flash_attention_4()
    _inductor()


class Stream:
    """torch.cuda.Stream and Event, on which everything has happened already."""

    cuda_stream = 0
    device = torch.device("cuda", 0)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: True


def _torch(capability: int) -> None:
    properties = SimpleNamespace(
        major=capability // 10,
        minor=capability % 10,
        name="stand-in",
        multi_processor_count=108,
        total_memory=80 << 30,
        warp_size=32,
        max_threads_per_multi_processor=2048,
        regs_per_multiprocessor=65536,
        shared_memory_per_block_optin=166912,
        shared_memory_per_block=49152,
        shared_memory_per_multiprocessor=167936,
        L2_cache_size=40 << 20,
        is_integrated=False,
        gcnArchName="",
    )

    def nothing() -> Any:
        return lambda *_, **__: None  # one for each name: dynamo's tables want different objects

    for name, value in {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": nothing(),
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": nothing(),
        "synchronize": nothing(),
        "empty_cache": nothing(),
        "get_device_capability": lambda *_: (capability // 10, capability % 10),
        "get_device_properties": lambda *_: properties,
        "get_device_name": lambda *_: "stand-in",
        "mem_get_info": lambda *_: (70 << 30, 80 << 30),
        "Stream": Stream,
        "Event": type("Event", (Stream,), {}),
        "current_stream": lambda *_: Stream(),
        "default_stream": lambda *_: Stream(),
        "stream": lambda *_: contextlib.nullcontext(),
        "set_stream": nothing(),
        "is_current_stream_capturing": lambda: False,
        "manual_seed_all": nothing(),
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": nothing(),
        "CUDAGraph": type("CUDAGraph", (Stream,), {}),
        "graph": lambda *_, **__: contextlib.nullcontext(),
        "graph_pool_handle": lambda *_: (0, 0),
        "max_memory_allocated": lambda *_: 0,
        "memory_reserved": lambda *_: 0,
        "reset_peak_memory_stats": nothing(),
        "memory_stats": lambda *_: {},
    }.items():
        setattr(torch.cuda, name, value)
    from torch._dynamo.device_interface import CudaInterface

    for name in ("current_device", "device_count", "get_device_properties", "synchronize"):
        setattr(CudaInterface, name, staticmethod(getattr(torch.cuda, name)))
    CudaInterface.get_raw_stream = staticmethod(lambda *_: 0)
    torch._C._cuda_getCurrentRawStream = lambda *_: 0
    torch._C._cuda_getDevice = lambda: 0
    torch.empty, torch.empty_like = _zeroed(torch.empty), _zeroed(torch.empty_like)
    for name, value in {
        "synchronize": nothing(),
        "empty_cache": nothing(),
        "device_count": lambda: 1,
        "current_device_index": lambda: 0,
        "set_device_index": nothing(),
        "current_stream": lambda *_: Stream(),
        "max_memory_allocated": lambda *_: 0,
        "memory_reserved": lambda *_: 0,
        "memory_stats": lambda *_: {},
        "reset_peak_memory_stats": nothing(),
        "get_memory_info": lambda *_: (70 << 30, 80 << 30),
    }.items():
        setattr(torch.accelerator, name, value)


def _zeroed(make: Any) -> Any:
    """What no kernel has written is 0, a valid index."""

    def zeroed(*args: Any, **options: Any) -> Any:
        made = make(*args, **options)
        return made.zero_() if type(made) is torch.Tensor and not torch.compiler.is_compiling() else made

    return zeroed


def _platform(capability: int) -> None:
    import vllm.platforms
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    class StandIn(NonNvmlCudaPlatform):
        dist_backend = "gloo"
        device_type = "cpu"
        dispatch_key = "CPU"

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
            return DeviceCapability(capability // 10, capability % 10)

        @classmethod
        def is_pin_memory_available(cls) -> bool:
            return False

        @classmethod
        def import_kernels(cls) -> None:
            pass

    vllm.platforms._current_platform = StandIn()


PRECOMPILED = ("_C::", "_C_cache_ops::", "_vllm_fa2_C::", "_vllm_fa3_C::")
asked: set[str] = set()  # of the kernels in vLLM's libraries, those that were called


def _precompiled() -> None:
    """vLLM's compiled kernels take tensors of this machine and leave them as they are."""
    import vllm._C_stable_libtorch
    import vllm.vllm_flash_attn.flash_attn_interface  # noqa: F401

    for name in torch._C._dispatch_get_all_op_names():
        base = name.partition(".")[0]
        if base.startswith(PRECOMPILED) and not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"):
            torch.library.impl(name, "CPU")(_taker(base, torch._C._get_schema(*_split(name)).returns))


def _split(name: str) -> tuple[str, str]:
    base, _, overload = name.partition(".")
    return base, overload


def _taker(name: str, returns: Any) -> Any:
    def take(*args: Any, **_: Any) -> Any:
        asked.add(name)
        first = next((one for one in args if isinstance(one, torch.Tensor)), None)
        values = [
            [first] * (4 if "fa3" in name else 2) if "List" in str(one.type) else 0 if str(one.type) == "int" else first
            for one in returns
        ]
        return None if not values else values[0] if len(values) == 1 else tuple(values)

    return take


def _flash_attention_4() -> None:
    """FlashAttention 4, which is Python that CuTe DSL compiles: compiled as for a GPU, and not launched."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from vllm.vllm_flash_attn.cute import interface

    forward = interface._flash_attn_fwd

    @functools.wraps(forward)
    def compile_only(*args: Any, **options: Any) -> Any:
        def fake(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")

        asked.add("FlashAttention 4")
        with FakeTensorMode():
            forward(*map(fake, args), **{name: fake(value) for name, value in options.items()})
        return options["out"], args[0], None, None

    interface._flash_attn_fwd = compile_only


def _inductor() -> None:
    """The graphs of torch.compile: compiled as for a GPU, and run on this machine as they are."""
    import torch._inductor
    from torch._inductor.codegen.wrapper import PythonWrapperCodegen
    from torch._inductor.fx_passes import joint_graph
    from torch._inductor.utils import IndentedBuffer

    joint_graph.lazy_init = lambda *_: None  # patterns of attention and padding, made from tensors on the GPU
    block = PythonWrapperCodegen.generate_and_run_autotune_block

    def without_runs(wrapper: Any) -> None:
        wrapper.kernel_autotune_calls = IndentedBuffer()  # compiled they are, but timed they can only be on a GPU
        block(wrapper)

    PythonWrapperCodegen.generate_and_run_autotune_block = without_runs
    compile_graph = torch._inductor.standalone_compile

    def compile_only(graph: Any, inputs: list[Any], **options: Any) -> Any:
        for_card = copy.deepcopy(graph)
        for node in for_card.graph.nodes:
            for name in ("example_value", "val"):
                if name in node.meta:
                    node.meta[name] = torch.utils._pytree.tree_map(_on_card, node.meta[name])
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
        compile_graph(for_card, [_on_card(value) for value in inputs], **options)
        return graph

    torch._inductor.standalone_compile = compile_only


def _on_card(value: Any) -> Any:
    from torch._subclasses.fake_tensor import FakeTensor

    if not isinstance(value, torch.Tensor):
        return value
    assert isinstance(value, FakeTensor), value
    with value.fake_mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
