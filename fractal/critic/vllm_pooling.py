"""Scoring with vLLM's pooling runner: a sequence classification model in, its labels' logits for each text out."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fractal.generate import memory
from fractal.generate.vllm import GPU_KERNELS, ON_GPU, batch_and_memory  # first: it sets vLLM's environment

from vllm import LLM, PoolingParams, TokensPrompt  # isort: skip

CHUNK = 4096 if ON_GPU else 256  # texts handed over at once; on a CPU these take a minute
STEP_TOKENS = 16384 if ON_GPU else 4096  # tokens of one engine step


class PoolingEngine:
    """One sequence classification model. Texts with the same beginning share it in the prefix cache.

    To start an engine costs most of a minute on a GPU, so one engine serves several critics (`exchange`).
    """

    def __init__(self, path: Path, dtype: str, longest: int) -> None:
        """`longest`: tokens of the longest text. Raises OutsideError where the memory holds not even that."""
        size, options = batch_and_memory(path, dtype, longest + 1, None)
        self._llm = LLM(
            str(path),
            runner="pooling",
            dtype=dtype,  # type: ignore[arg-type]
            max_model_len=longest + 1,
            enable_prefix_caching=True,
            enforce_eager=True,  # prompts only: CUDA graphs are for decoding, and compiling would outlast the work
            max_num_batched_tokens=max(STEP_TOKENS, longest + 1),
            max_num_seqs=size,
            disable_log_stats=True,
            **(GPU_KERNELS if ON_GPU else {}),
            **options,
        )

    def logits(self, texts: list[list[int]]) -> Iterator[tuple[int, NDArray[np.float64]]]:
        """Yields the index and the logits (labels,) of each text."""
        raw = PoolingParams(use_activation=False)
        for start in range(0, len(texts), CHUNK):
            prompts = [TokensPrompt(prompt_token_ids=ids) for ids in texts[start : start + CHUNK]]
            for index, output in enumerate(self._llm.classify(prompts, pooling_params=raw, use_tqdm=False), start):
                yield index, np.array(output.outputs.probs, dtype=np.float64)

    def exchange(self, weights: Mapping[str, Any]) -> None:
        """Replace the weights by others of the same shape, by name; the heads' are score.weight."""
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights.items())})
        self._llm.reset_prefix_cache()

    def close(self) -> None:
        """Free the memory: the next model needs it."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        memory.release()
