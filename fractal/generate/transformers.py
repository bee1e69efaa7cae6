"""Decoding with transformers' `generate`: the fallback where vLLM is not installed, and its yardstick.

Sampling is the Gumbel-max trick (Gumbel 1954; Maddison et al. 2014, arXiv:1411.0030): the largest of logit / T + noise
is a draw from softmax(logit / T). The noise comes from a generator of the sample's own, seeded by its seed, so a sample
does not depend on the batch that it is decoded in, but for the rounding of sums of another shape.
"""

from collections.abc import Callable, Iterator
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
from fractal.generate.stage import Completion, Request, Sampling, never
from fractal.install import gpu

MOST_GPU, MOST_CPU = 256, 32  # more does not decode faster
SHARE_GPU, SHARE_CPU = 0.8, 0.5  # of free memory; on a CPU others live there, too


class TransformersEngine:
    """One model in transformers, on the GPU if there is one. `size`: samples decoded together, None to find it."""

    def __init__(self, path: Path, sampling: Sampling, dtype: str, length: int, size: int | None = None) -> None:
        self._sampling = sampling
        self._device = "cuda" if gpu.usable() else "cpu"
        self._tokenizer: Any = AutoTokenizer.from_pretrained(path)
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
        self._model = model.to(self._device).eval()
        ends = self._model.generation_config.eos_token_id
        self._ends = sorted(set(ends if isinstance(ends, list) else [ends]) - {None})
        self._stepped = False
        self.batch = size or self._fitting(path, length, dtype)

    def _fitting(self, path: Path, length: int, dtype: str) -> int:
        on_gpu = self._device == "cuda"
        free = torch.cuda.mem_get_info()[0] if on_gpu else memory.free_memory()
        most, share = (MOST_GPU, SHARE_GPU) if on_gpu else (MOST_CPU, SHARE_CPU)
        return memory.transformers_batch(memory.read_shape(path), free, length, dtype, most=most, share=share)

    def close(self) -> None:
        """Give the memory back: the critic needs it, in the same process."""
        self._model = None
        memory.release()

    def generate(self, requests: list[Request], stopped: Callable[[], bool] = never) -> Iterator[list[Completion]]:
        at = 0
        while at < len(requests) and not stopped():
            part = requests[at : at + self.batch]
            done, trouble = self._try(part, stopped)
            if trouble is None:
                yield done
                at += len(part)
                continue
            if self._stepped or self.batch == 1:
                raise memory.too_big(self.batch, trouble)
            self._stepped, self.batch = True, max(1, self.batch // 2)
            del trouble  # its traceback holds the tensors
            memory.release()
            console.warn(f"generate: out of memory; goes on with {self.batch} samples at once")

    def _try(self, part: list[Request], stopped: Callable[[], bool]) -> tuple[list[Completion], BaseException | None]:
        try:
            return self._decode(part, stopped), None
        except Exception as error:
            if not memory.is_out_of_memory(error):
                raise
            return [], error

    @torch.inference_mode()
    def _decode(self, part: list[Request], stopped: Callable[[], bool]) -> list[Completion]:
        """Decode some requests together; those that are finished, all of them unless it was `stopped`."""
        longest, pad = max(len(r.prompt) for r in part), self._pad()
        rows = [[pad] * (longest - len(r.prompt)) + r.prompt for r in part]
        mask = [[0] * (longest - len(r.prompt)) + [1] * len(r.prompt) for r in part]
        watch = _Watch(longest, len(part), StopStringCriteria(self._tokenizer, prompts.STOPS), self._ends, stopped)
        draws = _Draws([r.seed for r in part], self._sampling, self._device, watch)
        ids = self._model.generate(
            torch.tensor(rows, device=self._device),
            attention_mask=torch.tensor(mask, device=self._device),
            do_sample=False,  # the largest is taken, of what _Draws returns
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=1.0,  # Qwen's generation_config.json has 1.1; vLLM is told none either
            max_new_tokens=self._sampling.max_tokens,
            pad_token_id=pad,
            logits_processor=LogitsProcessorList([draws]),
            stopping_criteria=StoppingCriteriaList([watch]),
        )
        new = ids[:, longest:].tolist()  # (B, T)
        sums = torch.stack(draws.logprobs, dim=1).cpu()  # (B, T)
        found = []
        for row, request in enumerate(part):
            length = watch.lengths[row] or len(new[row])
            if not watch.lengths[row] and length < self._sampling.max_tokens:
                continue  # it was stopped while this one was under way
            text = str(self._tokenizer.decode(new[row][:length], skip_special_tokens=True))
            cut = min((at for stop in prompts.STOPS if (at := text.find(stop)) >= 0), default=-1)
            found.append(
                Completion(
                    request=request,
                    text=text if cut < 0 else text[:cut],
                    stopped=cut >= 0 or new[row][length - 1] in self._ends,
                    tokens=length,
                    sum_logprob=float(sums[row, :length].sum()),
                )
            )
        return found

    def _pad(self) -> int:
        pad = self._tokenizer.pad_token_id  # None for Qwen2's base models
        return int(pad if pad is not None else self._tokenizer.eos_token_id)


class _Watch(StoppingCriteria):
    """When each row ended: at a stop text or an end token. Padding that follows may look like an end token."""

    def __init__(
        self, prompt: int, rows: int, strings: StopStringCriteria, ends: list[int], stopped: Callable[[], bool]
    ) -> None:
        self.lengths = [0] * rows  # sampled tokens, the last one included; 0: not ended
        self._prompt, self._strings, self._ends, self._stopped = prompt, strings, ends, stopped

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        """input_ids (B, L) -> (B,) bool."""
        last = torch.isin(input_ids[:, -1], torch.tensor(self._ends, device=input_ids.device))
        ended = (self._strings(input_ids, scores).to(last.device) | last).tolist()
        length = input_ids.shape[1] - self._prompt
        self.lengths = [n or (length if e else 0) for n, e in zip(self.lengths, ended, strict=True)]
        done = [bool(n) for n in self.lengths]
        return torch.tensor([True] * len(done) if self._stopped() else done, device=input_ids.device)


class _Draws(LogitsProcessor):
    """Scores whose largest is the token to take; notes its log-probability at temperature 1."""

    def __init__(self, seeds: list[int], sampling: Sampling, device: str, watch: _Watch) -> None:
        self.logprobs: list[torch.Tensor] = []  # for each step (B,)
        self._sampling, self._watch = sampling, watch
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """input_ids (B, L), scores (B, V) -> (B, V)."""
        raw = scores.float()
        picked = raw
        if self._sampling.temperature > 0:
            picked = nucleus(raw / self._sampling.temperature, self._sampling.top_p)
            noise = torch.ones_like(picked)  # log 1 = 0: none for rows that have ended
            for row, generator in enumerate(self._generators):
                if not self._watch.lengths[row]:
                    noise[row].exponential_(generator=generator)
            picked = (
                picked - noise.clamp_min_(torch.finfo(noise.dtype).tiny).log_()
            )  # -log of an exponential is a Gumbel variable
        tokens = picked.argmax(dim=1, keepdim=True)
        self.logprobs.append(raw.gather(1, tokens)[:, 0] - raw.logsumexp(dim=1))
        return picked


def nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Logits (B, V) with -inf outside the smallest set of tokens that has probability `top_p` (Holtzman et al. 2020,
    arXiv:1904.09751)."""
    if top_p >= 1:
        return logits
    ordered, places = logits.sort(dim=1, descending=True)
    shares = ordered.softmax(dim=1)
    outside = shares.cumsum(dim=1) - shares >= top_p  # the first one never is
    return logits.masked_fill(outside.scatter(1, places, outside), -torch.inf)
