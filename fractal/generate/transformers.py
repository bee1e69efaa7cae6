"""Decoding with transformers' `generate`: the fallback where vLLM is not installed, and its yardstick.

Sampling is the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014, arXiv:1411.0030): the largest of logit / T + noise
is a draw from softmax(logit / T). The noise comes from a generator of the sample's own, seeded by its seed, so a sample
does not depend on the batch that it is decoded in, but for the rounding of sums of another shape.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from fractal import console
from fractal.generate import memory, prompts
from fractal.generate.engine import Completion, Request, Sampling, never_stop
from fractal.install import gpu

MAX_BATCH_GPU, MAX_BATCH_CPU = 256, 32  # more does not decode faster
SHARE_GPU, SHARE_CPU = 0.8, 0.5  # of free memory; on a CPU other processes need the rest


class TransformersEngine:
    """One model in transformers, on the GPU if there is one. `size`: samples decoded together, None to find it."""

    def __init__(self, path: Path, sampling: Sampling, dtype: str, length: int, size: int | None = None) -> None:
        self._sampling = sampling
        self._device = "cuda" if gpu.usable() else "cpu"
        self._tokenizer: Any = AutoTokenizer.from_pretrained(path)
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
        self._model = model.to(self._device).eval()
        end_tokens = self._model.generation_config.eos_token_id
        self._end_tokens = sorted(set(end_tokens if isinstance(end_tokens, list) else [end_tokens]) - {None})
        self._halved = False
        self.batch = size or self._fitting(path, length, dtype)

    def _fitting(self, path: Path, length: int, dtype: str) -> int:
        on_gpu = self._device == "cuda"
        free = torch.cuda.mem_get_info()[0] if on_gpu else memory.free_memory()
        most, share = (MAX_BATCH_GPU, SHARE_GPU) if on_gpu else (MAX_BATCH_CPU, SHARE_CPU)
        return memory.transformers_batch(memory.read_shape(path), free, length, dtype, most=most, share=share)

    def close(self) -> None:
        """Free the memory: the critic needs it, in the same process."""
        self._model = None
        memory.release()

    def generate(
        self, requests: Iterable[Request], should_stop: Callable[[], bool] = never_stop
    ) -> Iterator[list[Completion]]:
        source = iter(requests)
        waiting: list[Request] = []  # more than a batch after it was halved
        while not should_stop():
            waiting += itertools.islice(source, max(0, self.batch - len(waiting)))
            batch = waiting[: self.batch]
            if not batch:
                return
            try:
                completions = self._decode(batch, should_stop)
            except Exception as error:
                if not memory.is_out_of_memory(error):
                    raise
                if self._halved or self.batch == 1:
                    raise memory.too_big(self.batch, error) from error
                completions = None
            if completions is None:  # outside of `except`: the error's traceback holds the tensors
                self._halved, self.batch = True, max(1, self.batch // 2)
                memory.release()
                console.warn(f"generate: out of memory; goes on with {self.batch} samples at once")
                continue
            yield completions
            del waiting[: len(batch)]

    @torch.inference_mode()
    def _decode(self, batch: list[Request], should_stop: Callable[[], bool]) -> list[Completion]:
        """Decode some requests together. Returns those that are finished: all, unless `should_stop` returned True."""
        longest = max(len(request.prompt) for request in batch)
        pad = self._tokenizer.pad_token_id  # None for Qwen2's base models
        pad = int(pad if pad is not None else self._tokenizer.eos_token_id)
        rows = [[pad] * (longest - len(request.prompt)) + request.prompt for request in batch]
        mask = [[0] * (longest - len(request.prompt)) + [1] * len(request.prompt) for request in batch]
        stop_strings = StopStringCriteria(self._tokenizer, prompts.STOPS)
        endings = _Endings(longest, len(batch), stop_strings, self._end_tokens, should_stop)
        sampler = _GumbelSampler([request.seed for request in batch], self._sampling, self._device, endings)
        token_ids = self._model.generate(
            torch.tensor(rows, device=self._device),
            attention_mask=torch.tensor(mask, device=self._device),
            do_sample=False,  # takes the largest of what _GumbelSampler returns
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=1.0,  # Qwen's generation_config.json has 1.1; vLLM is given none either
            max_new_tokens=self._sampling.max_tokens,
            pad_token_id=pad,
            logits_processor=LogitsProcessorList([sampler]),
            stopping_criteria=StoppingCriteriaList([endings]),
        )
        new = token_ids[:, longest:].tolist()  # (B, T)
        logprobs = torch.stack(sampler.logprobs, dim=1).cpu()  # (B, T)
        completions = []
        for row, request in enumerate(batch):
            length = endings.lengths[row] or len(new[row])
            if not endings.lengths[row] and length < self._sampling.max_tokens:
                continue  # unfinished when `should_stop` returned True
            text = str(self._tokenizer.decode(new[row][:length], skip_special_tokens=True))
            stop = prompts.find_stop(text)
            completions.append(
                Completion(
                    request=request,
                    text=text if stop is None else text[: stop.start],
                    stopped=stop is not None or new[row][length - 1] in self._end_tokens,
                    tokens=length,
                    sum_logprob=float(logprobs[row, :length].sum()),
                )
            )
        return completions


class _Endings(StoppingCriteria):
    """When each row ended: at a stop text or an end token. Padding that follows may look like an end token."""

    def __init__(
        self,
        prompt_length: int,
        rows: int,
        stop_strings: StopStringCriteria,
        end_tokens: list[int],
        should_stop: Callable[[], bool],
    ) -> None:
        self.lengths = [0] * rows  # sampled tokens, the last one included; 0: not ended
        self._prompt_length, self._stop_strings = prompt_length, stop_strings
        self._end_tokens, self._should_stop = end_tokens, should_stop

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        """input_ids (B, L) -> (B,) bool."""
        last = torch.isin(input_ids[:, -1], torch.tensor(self._end_tokens, device=input_ids.device))
        ended = (self._stop_strings(input_ids, scores).to(last.device) | last).tolist()
        length = input_ids.shape[1] - self._prompt_length
        self.lengths = [n or (length if e else 0) for n, e in zip(self.lengths, ended, strict=True)]
        done = [True] * len(ended) if self._should_stop() else [bool(n) for n in self.lengths]
        return torch.tensor(done, device=input_ids.device)


class _GumbelSampler(LogitsProcessor):
    """Returns scores whose largest is the token to take; records its log-probability at temperature 1."""

    def __init__(self, seeds: list[int], sampling: Sampling, device: str, endings: _Endings) -> None:
        self.logprobs: list[torch.Tensor] = []  # for each step (B,)
        self._sampling, self._endings = sampling, endings
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """input_ids (B, L), scores (B, V) -> (B, V)."""
        raw = scores.float()
        noisy = raw
        if self._sampling.temperature > 0:
            noisy = nucleus(raw / self._sampling.temperature, self._sampling.top_p)
            noise = torch.ones_like(noisy)  # log 1 = 0: none for rows that have ended
            for row, generator in enumerate(self._generators):
                if not self._endings.lengths[row]:
                    noise[row].exponential_(generator=generator)
            smallest = torch.finfo(noise.dtype).tiny
            noisy = noisy - noise.clamp_min_(smallest).log_()  # -log of an exponential variable is a Gumbel variable
        tokens = noisy.argmax(dim=1, keepdim=True)
        self.logprobs.append(raw.gather(1, tokens)[:, 0] - raw.logsumexp(dim=1))
        return noisy


def nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Logits (B, V) with -inf outside the smallest set of tokens that has probability `top_p` (Holtzman et al. 2020,
    arXiv:1904.09751)."""
    if top_p >= 1:
        return logits
    ordered, columns = logits.sort(dim=1, descending=True)
    shares = ordered.softmax(dim=1)
    outside = shares.cumsum(dim=1) - shares >= top_p  # the first one never is
    return logits.masked_fill(outside.scatter(1, columns, outside), -torch.inf)
