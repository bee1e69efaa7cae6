"""How many samples fit into memory at once, and what "out of memory" looks like.

Pure but for `free_memory` and `release`.

A sample under way holds keys and values for each of its tokens; these, not the weights, grow with the batch.
"""

import gc
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from fractal.models import weight_files
from fractal.records import OutsideError

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
LOGITS = 8  # float32 copies of one row of logits that sampling holds at its peak: raw, scaled, noise, softmax, sorted
STATES = 16  # hidden-sized rows for each token of a prompt while it is read: attention's and the MLP's intermediates
GROWTH = 1.5  # transformers grows its cache by copying it, a layer at a time
REMEDY = "Give a smaller --batch or --max-tokens, take a smaller model, or free memory."
BLOCK = 128  # tokens that vLLM's cache gives out at once, at most
LACKS = ("out of memory", "allocate memory", "not enough memory", "cache blocks", "kv cache", "available memory on")


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
    return min(most, kv_bytes // shape.kv_bytes(length + BLOCK, BYTES[dtype]))


def cache_bytes(shape: Shape, free_bytes: int, length: int, dtype: str, *, most: int, share: float) -> int:
    """The cache that vLLM gets on a CPU: room for `most` samples, and a quarter more for prompts kept, if free."""
    return min(int(1.25 * most * shape.kv_bytes(length + BLOCK, BYTES[dtype])), int(share * max(0, free_bytes)))


def weight_bytes(path: Path, dtype: str) -> int:
    """A model's weights in memory; files are taken to be of 16 bits."""
    return sum(file.stat().st_size for file in weight_files(path)) * BYTES[dtype] // 2


def free_memory(limits: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of RAM that can be had: what the machine has left, or the container's limit where that is less."""
    free = int(psutil.virtual_memory().available)
    for most, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            free = min(free, int((limits / most).read_text()) - int((limits / used).read_text()))
        except (OSError, ValueError):  # no such version of cgroups; "max": no limit
            continue
    return max(0, free)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an engine failed for want of memory: on a GPU, on a CPU, or while vLLM made its cache."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, not imported here
        return True
    return isinstance(error, RuntimeError | ValueError) and any(word in str(error).lower() for word in LACKS)


def too_big(batch: int, error: BaseException) -> OutsideError:
    """The one line after the automatic step down did not help."""
    reason = (str(error).strip().splitlines() or ["out of memory"])[0][:160]
    return OutsideError(f"out of memory with {batch} samples at once ({reason}). {REMEDY} What was finished is kept.")


def release() -> None:
    """Give back what was let go: the next model needs it."""
    gc.collect()
    if (torch := sys.modules.get("torch")) is not None:
        torch.cuda.empty_cache()  # does nothing where CUDA was not used
