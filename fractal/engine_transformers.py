"""Decoding with transformers' `generate`: the fallback where vLLM is not installed, and its yardstick."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fractal import prompts
from fractal.generate import Completion, Request, Sampling, sample_seed

BATCH = 8  # samples of one problem decoded together


class TransformersEngine:
    """One model in transformers, on the GPU if there is one.

    A batch holds samples of one problem and is seeded by its first sample, so a resumed run draws whole batches again
    and keeps what was missing.
    """

    def __init__(self, path: Path, sampling: Sampling, dtype: str) -> None:
        self._sampling = sampling
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._tokenizer: Any = AutoTokenizer.from_pretrained(path)
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
        self._model = model.to(self._device).eval()

    def generate(self, requests: list[Request]) -> Iterator[list[Completion]]:
        for _, group in groupby(requests, key=lambda r: (r.task_id, r.sample_id // BATCH)):
            wanted = list(group)
            size = min(BATCH, self._sampling.n)
            drawn = self._draw(wanted[0], size)
            yield [drawn(r) for r in wanted]

    @torch.inference_mode()
    def _draw(self, first: Request, size: int) -> Callable[[Request], Completion]:
        """Decode `size` samples of one prompt; returns a function from a request of the batch to its completion."""
        start = first.sample_id - first.sample_id % BATCH
        seed = sample_seed(self._sampling.seed, first.task_id, start)
        torch.manual_seed(seed)
        prompt = torch.tensor([first.prompt], device=self._device)
        warm = self._sampling.temperature > 0
        options = {"temperature": self._sampling.temperature, "top_p": self._sampling.top_p, "top_k": 0} if warm else {}
        ids = self._model.generate(
            prompt.repeat(size, 1),
            attention_mask=torch.ones_like(prompt).repeat(size, 1),
            do_sample=warm,
            max_new_tokens=self._sampling.max_tokens,
            stop_strings=prompts.STOPS,
            tokenizer=self._tokenizer,
            pad_token_id=self._pad(),
            **options,
        )
        new = ids[:, prompt.shape[1] :]  # (size, T)
        lengths = [self._length(row.tolist()) for row in new]
        sums = self._logprobs(ids, prompt.shape[1], lengths)
        texts = [
            str(self._tokenizer.decode(row[:n], skip_special_tokens=True)) for row, n in zip(new, lengths, strict=True)
        ]

        def completion(request: Request) -> Completion:
            place = request.sample_id - start
            text, length = texts[place], lengths[place]
            cut = min((at for stop in prompts.STOPS if (at := text.find(stop)) >= 0), default=-1)
            ended = bool(length) and int(new[place, length - 1]) in self._ends()
            return Completion(
                request=replace(request, seed=seed),
                text=text if cut < 0 else text[:cut],
                stopped=cut >= 0 or ended,
                tokens=length,
                sum_logprob=sums[place],
            )

        return completion

    def _ends(self) -> set[int]:
        ends = self._model.generation_config.eos_token_id
        return set(ends if isinstance(ends, list) else [ends]) - {None}

    def _pad(self) -> int:
        pad = self._tokenizer.pad_token_id  # None for Qwen2's base models
        return int(pad if pad is not None else self._tokenizer.eos_token_id)

    def _length(self, row: list[int]) -> int:
        """Tokens sampled before padding: up to and with an end token, or up to the first pad after a stop text."""
        ends, pad = self._ends(), self._pad()
        for place, token in enumerate(row):
            if token in ends:
                return place + 1
            if token == pad:
                return place
        return len(row)

    def _logprobs(self, ids: torch.Tensor, prompt_length: int, lengths: list[int]) -> list[float]:
        """Sum of log-probabilities of the sampled tokens at temperature 1, by one more forward pass.

        ids (B, P + T); a row at a time keeps the logits (T, V) small.
        """
        sums = []
        for row, length in zip(ids, lengths, strict=True):
            end = prompt_length + length
            logits = self._model(row[None, :end], logits_to_keep=length + 1).logits[0, :-1].float()  # (length, V)
            chosen = row[prompt_length:end]
            picked = logits.gather(1, chosen[:, None])[:, 0] - torch.logsumexp(logits, dim=1)
            sums.append(float(picked.sum()))
        return sums
