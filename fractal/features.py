"""Last-token states of the critic's questions: computed once by transformers, kept on disk by content.

The samples of a problem share the tokens of the problem: those are run once, and their keys and values serve all of its
programs. Nothing is trained here.
"""

import copy
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from transformers import AutoModel

from fractal import console
from fractal.batch import is_out_of_memory, read_shape
from fractal.critic import PROMPT_VERSION, Asker, Half, question
from fractal.models import preferred_dtype
from fractal.records import OutsideError, Problem, Sample

SHARD = 64  # sequences, at least, whose features are written together
BATCH_TOKENS = 4096 if torch.cuda.is_available() else 1024  # padded tokens in one forward pass; halved once if too many
LAYERS = 12  # layers kept, evenly spaced from a third of the depth to the last

Pairs = list[tuple[Problem, Sample]]


@dataclass(frozen=True, slots=True)
class Asked:
    """One text to be read, as tokens."""

    key: str
    task_id: int
    ids: list[int]


class Features:
    """States of texts, kept on disk by content: a second look costs seconds, and a kill loses one shard at most."""

    def __init__(
        self,
        model: Path,
        digest: str,
        cache: Path,
        *,
        layers: list[int] | None = None,
        load: Callable[[], Any] | None = None,
        dtype: str | None = None,
    ) -> None:
        """`digest` names the weights; `load` makes the model where they are not those of the folder `model`."""
        dtype = dtype or preferred_dtype()
        depth = read_shape(model).layers
        self._model, self._load = model, load or (lambda: load_model(model, dtype))
        self.layers = layers or sorted({round(x) for x in np.linspace(depth / 3, depth, LAYERS)})
        self._cache = cache
        self._salt = f"{digest}/{PROMPT_VERSION}/{self.layers}/{dtype}/normalised"
        self._known: dict[str, Half] = {}
        for shard in sorted(cache.glob("*.npz")):
            try:
                with np.load(shard) as data:
                    self._known |= dict(zip(data["keys"].tolist(), data["states"], strict=True))
            except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
                console.warn(f"{shard}: left out, its features are computed again: {error}")

    def _key(self, text: str) -> str:
        return hashlib.sha256(f"{self._salt}/{text}".encode("utf-8", "surrogatepass")).hexdigest()

    def of(self, pairs: Pairs) -> Half:
        """States (N, layers, width) at the last token of each pair's question, after the model's last norm."""
        texts = [question(problem, sample.code) for problem, sample in pairs]
        keys = [self._key(text) for text in texts]
        missing = {
            key: (problem.task_id, text)
            for key, text, (problem, _) in zip(keys, texts, pairs, strict=True)
            if key not in self._known
        }
        if missing:
            self._compute(missing)
        return np.stack([self._known[key] for key in keys])

    def _compute(self, texts: dict[str, tuple[int, str]]) -> None:
        with console.quiet("loading the critic's model"):
            asker, model = Asker(self._model), self._load()
        asked = [Asked(key, task, asker.ids(text)) for key, (task, text) in texts.items()]
        kept: dict[str, Half] = {}
        try:
            with console.bar("features", len(asked)) as bar:
                for batch, states in read(model, asked, self.layers, asker.pad):
                    half = states.cpu().numpy().astype(np.float16)
                    kept |= {one.key: row for one, row in zip(batch, half, strict=True)}
                    bar.advance(len(batch))
                    if len(kept) >= SHARD:
                        self._keep(kept)
                        kept = {}
        finally:  # Ctrl-C, too
            if kept:
                self._keep(kept)

    def _keep(self, states: dict[str, Half]) -> None:
        self._cache.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256("".join(states).encode()).hexdigest()[:16]
        draft = self._cache / f".{name}"
        with draft.open("wb") as out:
            np.savez(out, keys=np.array(list(states)), states=np.stack(list(states.values())))
        draft.replace(self._cache / f"{name}.npz")
        self._known |= states


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def load_model(path: Path, dtype: str | None = None) -> Any:
    """The model without its output layer, for reading; bfloat16 where the hardware computes in it."""
    return AutoModel.from_pretrained(path, dtype=getattr(torch, dtype or preferred_dtype())).to(device()).eval()


@torch.inference_mode()
def read(
    model: Any, asked: list[Asked], layers: list[int], pad: int, batch_tokens: int = BATCH_TOKENS
) -> Iterator[tuple[list[Asked], torch.Tensor]]:
    """Batches of texts with their last-token states (B, layers, D), float32 and after the model's last norm.

    Texts of one problem go together: what their tokens have in common is run once. Out of memory, batches are halved
    once; then OutsideError.
    """
    whole = batch_tokens
    for _, group in groupby(sorted(asked, key=lambda one: (one.task_id, len(one.ids))), key=lambda one: one.task_id):
        texts = list(group)
        while texts:
            try:
                for batch, states in _problem(model, texts, layers, pad, batch_tokens):
                    texts = texts[len(batch) :]
                    yield batch, states
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if batch_tokens < whole:
                    raise OutsideError(
                        f"out of memory while reading a program of {len(texts[0].ids)} tokens, also with batches of "
                        f"{batch_tokens} tokens. Take a smaller --base, or a machine with more memory."
                    ) from error
                batch_tokens = whole // 2
                console.warn(f"out of memory: going on with batches of {batch_tokens} tokens")


def _problem(
    model: Any, texts: list[Asked], layers: list[int], pad: int, batch_tokens: int
) -> Iterator[tuple[list[Asked], torch.Tensor]]:
    shared = _common(texts) if len(texts) > 1 else 0
    prefix = model(torch.tensor([texts[0].ids[:shared]], device=model.device), use_cache=True) if shared else None
    for batch in batches(texts, batch_tokens, shared):
        rows = [torch.tensor(one.ids[shared:]) for one in batch]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)  # (B, T), right-padded
        last = torch.tensor([len(row) - 1 for row in rows])
        mask = torch.arange(padded.shape[1])[None] <= last[:, None]
        options: dict[str, Any] = {}
        if prefix is not None:
            cache = copy.deepcopy(prefix.past_key_values)  # the model appends to it
            cache.batch_repeat_interleave(len(batch))
            mask = torch.cat([torch.ones(len(batch), shared, dtype=torch.bool), mask], dim=1)
            options = {"past_key_values": cache, "use_cache": True}
        else:
            options = {"use_cache": False}
        hidden = model(
            padded.to(model.device), attention_mask=mask.long().to(model.device), output_hidden_states=True, **options
        ).hidden_states
        place = torch.arange(len(batch))
        found = [hidden[layer][place, last] for layer in layers]  # (B, D) each; the last layer's is normalised already
        top = len(hidden) - 1
        states = [state if layer == top else model.norm(state) for layer, state in zip(layers, found, strict=True)]
        yield batch, torch.stack(states, dim=1).float()


def _common(texts: list[Asked]) -> int:
    """How many tokens all texts begin with; at least one token of each is left over."""
    shortest = min(len(one.ids) for one in texts) - 1
    first = texts[0].ids
    return next((i for i in range(shortest) if any(one.ids[i] != first[i] for one in texts)), shortest)


def batches(texts: list[Asked], batch_tokens: int, shared: int = 0) -> list[list[Asked]]:
    """Neighbours (sorted by length) together, at most `batch_tokens` padded tokens a batch, at least one text."""
    found: list[list[Asked]] = [[]]
    for one in texts:
        if found[-1] and (len(one.ids) - shared) * (len(found[-1]) + 1) > batch_tokens:
            found.append([])
        found[-1].append(one)
    return found
