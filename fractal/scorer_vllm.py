"""Scoring with vLLM's pooling runner: a sequence classification model in, one logit a text out."""

from collections.abc import Iterator
from pathlib import Path

from fractal import batch
from fractal.engine_vllm import ON_GPU, memory  # first: it sets vLLM's environment

from vllm import LLM, PoolingParams, TokensPrompt  # isort: skip

CHUNK = 256  # texts handed over at once


class VllmScorer:
    """One sequence classification model with one label. Texts with the same beginning share it in the prefix cache."""

    def __init__(self, path: Path, dtype: str, longest: int) -> None:
        """`longest`: tokens of the longest text. Raises OutsideError where the memory holds not even that."""
        size, options = memory(path, dtype, longest + 1, None)
        self._llm = LLM(
            str(path),
            runner="pooling",
            dtype=dtype,  # type: ignore[arg-type]
            max_model_len=longest + 1,
            enable_prefix_caching=True,
            enforce_eager=not ON_GPU,
            max_num_batched_tokens=None if ON_GPU else max(4096, longest + 1),
            max_num_seqs=size,
            disable_log_stats=True,
            **options,
        )

    def logits(self, texts: list[list[int]]) -> Iterator[tuple[int, float]]:
        """Place and logit of each text, as they come."""
        raw = PoolingParams(use_activation=False)
        for start in range(0, len(texts), CHUNK):
            prompts = [TokensPrompt(prompt_token_ids=ids) for ids in texts[start : start + CHUNK]]
            for place, output in enumerate(self._llm.classify(prompts, pooling_params=raw, use_tqdm=False), start):
                yield place, float(output.outputs.probs[0])

    def close(self) -> None:
        """Give the memory back: the next model needs it."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        batch.release()
