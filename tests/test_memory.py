"""Memory to batch: arithmetic, what is refused, and what "out of memory" looks like."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fractal.errors import OutsideError
from fractal.generate import memory
from fractal.generate.memory import Shape, shape_of

QWEN = {"num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "hidden_size": 896, "vocab_size": 151936}  # 0.5B  # fmt: skip
SHAPE = shape_of(QWEN)


def test_keys_and_values_of_a_known_model() -> None:
    """24 layers x (keys, values) x 2 heads x 64 numbers x 4 bytes."""
    assert Shape(24, 2, 64, 896, 151936) == SHAPE
    assert SHAPE.kv_bytes(1, 4) == 24_576
    assert shape_of({"text_config": QWEN}) == SHAPE
    assert shape_of({**QWEN, "head_dim": 128}).kv_bytes(1, 2) == 24_576


def test_an_unknown_kind_of_model_is_refused_with_the_way_out() -> None:
    with pytest.raises(OutsideError, match=r"no field 'hidden_size'.*--batch"):
        shape_of({"num_attention_heads": 4})


sizes = st.integers(0, 1 << 40)


@given(sizes, sizes, st.integers(1, 4096), st.sampled_from(sorted(memory.BYTES)), st.integers(1, 1024))
def test_batches_grow_with_memory_and_stay_within_it(a: int, b: int, length: int, dtype: str, most: int) -> None:
    less, more = sorted((a, b))
    found = [memory.transformers_batch(SHAPE, free, length, dtype, most=most, share=0.5) for free in (less, more)]
    assert 1 <= found[0] <= found[1] <= most
    if found[1] > 1:
        assert found[1] * SHAPE.kv_bytes(length, memory.BYTES[dtype]) <= more / 2
    cache = memory.cache_bytes(SHAPE, more, length, dtype, most=most, share=0.5)
    assert cache <= more / 2
    held = memory.paged_batch(SHAPE, cache, length, dtype, most=most)
    assert held * SHAPE.kv_bytes(length, memory.BYTES[dtype]) <= cache
    if cache < more // 2 - 1:  # memory did not bound it
        assert held == most


@given(sizes, sizes, st.integers(1, 4096), st.integers(1, 4096), st.integers(1, 1024))
def test_a_gpus_batch_and_cache_stay_within_its_memory(a: int, b: int, prompt: int, new: int, most: int) -> None:
    less, more = sorted((a, b))
    found = [memory.gpu_batch(SHAPE, free, prompt + new, new, "bfloat16", most=most) for free in (less, more)]
    assert 0 <= found[0][0] <= found[1][0] <= most
    for free, (samples, cache) in zip((less, more), found, strict=True):
        assert cache + samples * 4 * memory.LOGITS_GPU * SHAPE.vocab <= free
        if samples:
            assert cache >= SHAPE.kv_bytes(prompt + new, 2), "one sample of full length always fits"


def test_a_large_model_is_not_starved() -> None:
    """Qwen2.5-Coder 7B on an A10 and an A100 of 40 GB, 1.5B on an A10: prompts of 200 tokens, up to 320 new ones."""
    large = {"hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4}
    small = {"hidden_size": 1536, "num_attention_heads": 12, "num_key_value_heads": 2}
    for model, weights, gigabytes, least in (
        (large, 15.23e9, 24, 200),
        (large, 15.23e9, 40, 800),
        (small, 3.09e9, 24, 1000),
    ):
        shape = shape_of({**model, "num_hidden_layers": 28, "vocab_size": 152064})
        free = 0.92 * 0.985 * gigabytes * (1 << 30) - weights - (2.5 * (1 << 30))
        samples, cache = memory.gpu_batch(shape, int(free), 520, 320, "bfloat16", most=1024)
        assert samples >= least, (model, gigabytes)
        assert cache >= samples * shape.kv_bytes(360, 2)


ENGINES = {  # weights in GB, GPU memory in GB, processors, samples: engines
    (1.0, 80, 26, 1_000_000): 3,  # 0.5B on an A100: Python is the limit
    (3.1, 80, 26, 1_000_000): 2,  # 1.5B
    (3.1, 141, 26, 1_000_000): 2,  # on an H200
    (15.2, 80, 26, 1_000_000): 1,  # 7B: the GPU is
    (3.1, 24, 26, 1_000_000): 1,  # a smaller GPU is slower, too
    (1.0, 80, 4, 1_000_000): 2,  # each engine keeps a processor busy
    (1.0, 80, 2, 1_000_000): 1,
    (3.1, 80, 26, 8_150): 1,  # drawn before a second engine has loaded
    (1.0, 80, 26, 80_000): 2,
}


def test_engines_are_as_many_as_keep_the_gpu_busy() -> None:
    found = {key: memory.engine_count(int(key[0] * 1e9), int(0.99 * key[1] * (1 << 30)), *key[2:]) for key in ENGINES}
    assert found == ENGINES


def test_free_memory_hears_a_containers_limit(tmp_path: Path) -> None:
    machine = memory.free_memory(tmp_path)
    assert machine > 1 << 20
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert memory.free_memory(tmp_path) > 1 << 20
    (tmp_path / "memory.max").write_text("3000000\n")
    assert memory.free_memory(tmp_path) == 2_000_000
    (tmp_path / "memory.max").write_text("500\n")
    assert memory.free_memory(tmp_path) == 0


class OutOfMemoryError(RuntimeError):
    """torch.cuda's own is of this name."""


OUT_OF_MEMORY = [
    MemoryError(),
    OutOfMemoryError("CUDA: 2 GiB"),
    RuntimeError("CUDA out of memory. Tried to allocate 20 MiB"),
    ValueError("No available memory for the cache blocks."),
    ValueError("Available memory on node 0 (1.2/23 GiB) on kv cache allocation is less"),
    # vllm 0.33.0, v1/worker/utils.py and v1/core/kv_cache_utils.py
    ValueError(
        "Free memory on device cuda:0 (3.1/23.7 GiB) on startup is less than desired GPU memory utilization (0.92)"
    ),
    ValueError(
        "Free memory on device cuda:0 (3.1/23.7 GiB) on startup is less than the engine's budget after excluding"
    ),
    ValueError(
        "To serve at least one request with the model's max seq len (520), (0.03 GiB KV cache is needed, which is"
    ),
]


def test_out_of_memory_is_told_from_other_errors() -> None:
    others = [RuntimeError("shapes do not match"), KeyError("out of memory"), KeyboardInterrupt()]
    assert [error for error in OUT_OF_MEMORY if not memory.is_out_of_memory(error)] == []
    assert [error for error in others if memory.is_out_of_memory(error)] == []


def test_torch_on_a_cpu_is_understood() -> None:
    import torch

    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    error = caught.value
    assert memory.is_out_of_memory(error)
    line = str(memory.too_big(4, error))
    assert "out of memory with 4 samples at once" in line
    assert "--batch" in line
    assert "\n" not in line
