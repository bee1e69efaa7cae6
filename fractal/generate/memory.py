"""How many samples and engines fit into memory, and which errors mean that it ran out.

Pure but for `free_memory`, `gpu_budget`, `engines_here` and `release`.

A sample under way holds keys and values for each of its tokens; these, not the weights, grow with the batch.
"""

import gc
import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from fractal.errors import OutsideError
from fractal.generate.models import weight_files
from fractal.install import gpu

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
LOGITS = 8  # float32 copies of one row of logits that sampling holds at its peak: raw, scaled, noise, softmax, sorted
STATES = 16  # hidden-sized rows for each token of a prompt while it is read: attention's and the MLP's intermediates
GROWTH = 1.5  # transformers grows its cache by copying it, a layer at a time
REMEDY = "Give a smaller --batch or --max-tokens, take a smaller model, or free memory."
CPU_BLOCK = 128  # tokens that vLLM's cache on a CPU allocates at once, at most
MESSAGES = (
    *("out of memory", "allocate memory", "not enough memory"),  # of torch
    *("cache blocks", "kv cache", "available memory on", "less than desired", "engine's budget"),  # of vLLM
)
REQUESTS_AHEAD = 2  # requests that an engine of vLLM holds, for each that it decodes at once
SHARE_GPU, SHARE_GPU_RETRY = 0.92, 0.85  # of a GPU's memory: what vLLM may take, and once memory has run out
GPU_BLOCK = 16  # tokens that vLLM's cache on a GPU allocates at once
# Of the tokens that a sample may have, the share that it is counted with on a GPU. Most end early (70 of 320 tokens in
# the first run, of 8,150 samples), and where they do not, vLLM sets some samples back and draws them again later.
EXPECTED = 0.5
LOGITS_GPU = 4  # float32 rows of logits for each sample that vLLM's sampler holds at its peak
# Where several engines pay on one GPU: Python needs about 25 us a token to schedule and read it (18 us of CPU time on
# an EPYC of 2024, docs/log.md 2026-11-29), a GPU of A100's class 2 FLOPs a parameter at half of its 312 TFLOP/s.
HOST_S_PER_TOKEN, GPU_FLOPS = 25e-6, 156e12
FAST_GPU_BYTES = 70 << 30  # a GPU with as much memory is of that class or faster
MAX_ENGINES = 3
ENGINE_SAMPLES = 35_000  # drawn by one engine while the next one loads: 70 tokens at HOST_S_PER_TOKEN each, a minute


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a model's config.json decides over memory."""

    layers: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocab: int

    def kv_bytes(self, tokens: int, width: int) -> int:
        """Keys and values of `tokens` tokens, `width` bytes for each number."""
        return 2 * self.layers * self.kv_heads * self.head_dim * tokens * width


def shape_of(config: Mapping[str, Any]) -> Shape:
    """Raises OutsideError if a field is missing: of a kind of model that we do not know."""
    config = config.get("text_config") or config
    try:
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        return Shape(
            layers=int(config["num_hidden_layers"]),
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or hidden // heads),
            hidden=hidden,
            vocab=int(config["vocab_size"]),
        )
    except KeyError as error:
        raise OutsideError(
            f"config.json has no field {error}, so the memory of a sample is not known. Give --batch."
        ) from error


def read_shape(path: Path) -> Shape:
    """Of a model's folder."""
    return shape_of(json.loads((path / "config.json").read_bytes()))


def transformers_batch(shape: Shape, free_bytes: int, length: int, dtype: str, *, most: int, share: float) -> int:
    """Samples of `length` tokens (prompt and completion) that transformers decodes together; 1..most.

    `free_bytes` is what is free with the weights loaded, `share` the part of it that may be used.
    """
    width = BYTES[dtype]
    sample = GROWTH * shape.kv_bytes(length, width) + 4 * LOGITS * shape.vocab + STATES * shape.hidden * length * width
    return max(1, min(most, int(share * free_bytes / sample)))


def paged_batch(shape: Shape, kv_bytes: int, length: int, dtype: str, *, most: int) -> int:
    """Samples of `length` tokens whose keys and values vLLM's cache of `kv_bytes` holds; 0 if not even one, ..most."""
    return min(most, kv_bytes // shape.kv_bytes(length + CPU_BLOCK, BYTES[dtype]))


def gpu_batch(shape: Shape, free_bytes: int, length: int, new: int, dtype: str, *, most: int) -> tuple[int, int]:
    """Samples that vLLM decodes together on a GPU, and the bytes of its cache; 0 samples if not even a whole one fits.

    A sample has up to `length` tokens, `new` of them drawn; `free_bytes` is what is left beside weights and workspace.
    """
    width = BYTES[dtype]
    logits = 4 * LOGITS_GPU * shape.vocab
    sample = shape.kv_bytes(length - round((1 - EXPECTED) * new) + GPU_BLOCK, width) + logits
    if free_bytes < shape.kv_bytes(length + GPU_BLOCK, width) + logits:
        return 0, 0
    samples = max(1, min(most, free_bytes // sample))
    return samples, free_bytes - samples * logits


def engine_count(weights_bytes: int, gpu_bytes: int, processors: int, samples: int) -> int:
    """How many engines should share a GPU: as many as keep it busy and fit into its memory and the processors.

    `weights_bytes`: of the model in 16 bits; `gpu_bytes`: of the GPU's memory in all; `samples`: to be drawn.
    """
    if gpu_bytes < FAST_GPU_BYTES:
        return 1
    useful = math.ceil(HOST_S_PER_TOKEN * GPU_FLOPS / weights_bytes)  # 2 FLOPs for each parameter, which has 2 bytes
    fitting = gpu_bytes // 4 // weights_bytes  # a quarter of it for weights, the rest for their caches
    return max(1, min(useful, fitting, MAX_ENGINES, processors - 2, samples // ENGINE_SAMPLES))


def cache_bytes(shape: Shape, free_bytes: int, length: int, dtype: str, *, most: int, share: float) -> int:
    """Bytes of vLLM's cache on a CPU: for `most` samples, and a quarter more for prompts kept, if so much is free."""
    return min(int(1.25 * most * shape.kv_bytes(length + CPU_BLOCK, BYTES[dtype])), int(share * max(0, free_bytes)))


def engines_here(path: Path, dtype: str, samples: int) -> int:
    """`engine_count` for a model's folder on this machine; 1 without a GPU."""
    if not gpu.usable():
        return 1
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return engine_count(weight_bytes(path, dtype), gpu.gpus()[0].total_bytes, processors, samples)


def gpu_budget() -> int | None:
    """Bytes of the first GPU's memory that engines which share it may take now; None without a GPU."""
    if not gpu.usable():
        return None
    first = gpu.gpus(fresh=True)[0]
    return int(min(SHARE_GPU * first.total_bytes, 0.98 * first.free_bytes))


def weight_bytes(path: Path, dtype: str) -> int:
    """A model's weights in memory; files are taken to be of 16 bits."""
    return sum(file.stat().st_size for file in weight_files(path)) * BYTES[dtype] // 2


def free_memory(cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of RAM available: what the machine has left, or the container's limit where that is less."""
    free = int(psutil.virtual_memory().available)
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            free = min(free, int((cgroups / limit).read_text()) - int((cgroups / used).read_text()))
        except (OSError, ValueError):  # no such version of cgroups; "max": no limit
            continue
    return max(0, free)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an engine ran out of memory: on a GPU, on a CPU, or while vLLM made its cache."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, not imported here
        return True
    return isinstance(error, RuntimeError | ValueError) and any(part in str(error).lower() for part in MESSAGES)


def too_big(batch: int, error: BaseException) -> OutsideError:
    """The error once half the batch did not fit either."""
    reason = (str(error).strip().splitlines() or ["out of memory"])[0][:160]
    return OutsideError(f"out of memory with {batch} samples at once ({reason}). {REMEDY} Finished samples are kept.")


def release() -> None:
    """Free the memory of objects that are no longer used: the next model needs it."""
    gc.collect()
    if (torch := sys.modules.get("torch")) is not None:
        torch.cuda.empty_cache()  # does nothing where CUDA was not used
