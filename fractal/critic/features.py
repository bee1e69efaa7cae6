"""Last-token states of the critic's questions: computed once by transformers, kept on disk by content.

The samples of a problem share the tokens of the problem: those are run once, and their keys and values serve all of its
programs. On a GPU, which a single problem leaves idle, many problems go through the model together. Nothing is trained
here.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModel, DynamicCache

from fractal import console
from fractal.critic.critic import PROMPT_VERSION, Asker, Half, question
from fractal.errors import OutsideError
from fractal.generate.memory import is_out_of_memory, read_shape
from fractal.generate.models import preferred_dtype
from fractal.install import gpu
from fractal.records import Problem, Sample

SHARD = 64  # sequences, at least, whose features are written together
BATCH_TOKENS = {"cpu": 1024, "cuda": 32768}  # padded tokens in one forward pass; out of memory, halved
HALVINGS = 4
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
        self._shards: dict[str, Path] = {}  # by key: states are read when asked for, so those of other models never
        for shard in sorted(cache.glob("*.npz")):
            if (keys := _read_shard(shard, "keys")) is not None:
                self._shards |= dict.fromkeys(keys.tolist(), shard)

    def _key(self, text: str) -> str:
        return hashlib.sha256(f"{self._salt}/{text}".encode("utf-8", "surrogatepass")).hexdigest()

    def of(self, pairs: Pairs) -> Half:
        """States (N, layers, width) at the last token of each pair's question, after the model's last norm."""
        texts = [question(problem, sample.code) for problem, sample in pairs]
        keys = [self._key(text) for text in texts]
        for shard in {self._shards[key]: None for key in keys if key in self._shards and key not in self._known}:
            names, states = _read_shard(shard, "keys"), _read_shard(shard, "states")
            if names is not None and states is not None:
                self._known |= dict(zip(names.tolist(), states, strict=True))
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


def _read_shard(shard: Path, name: str) -> NDArray[Any] | None:
    """One array of a shard; None, with a warning, if it cannot be read."""
    try:
        with np.load(shard) as data:
            return np.asarray(data[name])
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        console.warn(f"{shard}: left out, its features are computed again: {error}")
        return None


def device() -> str:
    return "cuda" if gpu.usable() else "cpu"


def load_model(path: Path, dtype: str | None = None) -> Any:
    """The model without its output layer, for reading; bfloat16 where the hardware computes in it."""
    return AutoModel.from_pretrained(path, dtype=getattr(torch, dtype or preferred_dtype())).to(device()).eval()


@torch.inference_mode()
def read(
    model: Any,
    asked: list[Asked],
    layers: list[int],
    pad: int,
    batch_tokens: int | None = None,
    across: bool | None = None,
) -> Iterator[tuple[list[Asked], torch.Tensor]]:
    """Batches of texts with their last-token states (B, layers, D), float32 and after the model's last norm.

    What the texts of one problem have in common is run once. `across`: problems share forward passes of `batch_tokens`
    padded tokens; by default on a GPU only, since a CPU would pay for the padding. Keys of `asked` differ. Out of
    memory, batches are halved, HALVINGS times; then OutsideError.
    """
    kind = torch.device(model.device).type
    tokens = whole = batch_tokens or BATCH_TOKENS[kind]
    left = {one.key: one for one in asked}
    while left:
        try:
            for batch, states in _passes(
                model, list(left.values()), layers, pad, tokens, kind != "cpu" if across is None else across
            ):
                for one in batch:
                    del left[one.key]
                yield batch, states
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if tokens <= whole >> HALVINGS:
                raise OutsideError(
                    f"out of memory while reading programs of up to {max(len(one.ids) for one in left.values())} "
                    f"tokens, also with batches of {tokens} tokens. Take a smaller --base, or a machine with more "
                    "memory."
                ) from error
            tokens //= 2
            console.warn(f"out of memory: going on with batches of {tokens} tokens")


Prefixed = tuple[int, list[Asked]]  # a problem's texts, and how many tokens all of them begin with


def _passes(
    model: Any, asked: list[Asked], layers: list[int], pad: int, batch_tokens: int, across: bool
) -> Iterator[tuple[list[Asked], torch.Tensor]]:
    problems: list[Prefixed] = []
    for _, group in groupby(sorted(asked, key=lambda one: (one.task_id, len(one.ids))), key=lambda one: one.task_id):
        texts = list(group)
        problems.append((_common(texts) if len(texts) > 1 else 0, texts))
    for block in blocks(problems, batch_tokens) if across else [[problem] for problem in problems]:
        yield from _block(model, block, layers, pad, batch_tokens)


def blocks(problems: list[Prefixed], batch_tokens: int) -> list[list[Prefixed]]:
    """Problems whose prefixes are run together: like lengths, `batch_tokens` padded tokens; those without one apart."""
    found: list[list[Prefixed]] = []
    for shared, texts in sorted(problems, key=lambda problem: problem[0]):
        new = not found or (shared > 0 and (found[-1][0][0] == 0 or shared * (len(found[-1]) + 1) > batch_tokens))
        if new:
            found.append([])
        found[-1].append((shared, texts))
    return found


def _block(
    model: Any, block: list[Prefixed], layers: list[int], pad: int, batch_tokens: int
) -> Iterator[tuple[list[Asked], torch.Tensor]]:
    """First all prefixes, padded on the right; then the rest of the texts, each with its problem's keys and values."""
    longest = max(shared for shared, _ in block)
    prefixes = DynamicCache()
    if longest:
        heads = _padded([texts[0].ids[:shared] for shared, texts in block], pad).to(model.device)
        model(heads, past_key_values=prefixes, use_cache=True)  # no mask: nothing looks at what is behind it
    rows = [(one, place, shared) for place, (shared, texts) in enumerate(block) for one in texts]
    rows.sort(key=lambda row: len(row[0].ids) - row[2])
    for part in batches([len(one.ids) - shared for one, _, shared in rows], batch_tokens):
        batch = [one for one, _, _ in rows[part]]
        tails = _padded([one.ids[shared:] for one, _, shared in rows[part]], pad)  # (B, T)
        last = torch.tensor([len(one.ids) - shared - 1 for one, _, shared in rows[part]])
        options: dict[str, Any] = {"past_key_values": DynamicCache(), "use_cache": False}
        if longest:
            begins = torch.tensor([shared for _, _, shared in rows[part]])[:, None]
            mask = [torch.arange(longest)[None] < begins, torch.arange(tails.shape[1])[None] <= last[:, None]]
            options = {
                "past_key_values": _chosen(prefixes, torch.tensor([place for _, place, _ in rows[part]])),
                "use_cache": True,
                "attention_mask": torch.cat(mask, dim=1).long().to(model.device),
                "position_ids": (begins + torch.arange(tails.shape[1])[None]).to(model.device),
            }
        hidden = model(tails.to(model.device), output_hidden_states=True, **options).hidden_states
        place = torch.arange(len(batch))
        found = [hidden[layer][place, last] for layer in layers]  # (B, D) each; the last layer's is normalised already
        top = len(hidden) - 1
        states = [state if layer == top else model.norm(state) for layer, state in zip(layers, found, strict=True)]
        yield batch, torch.stack(states, dim=1).float()


def _padded(rows: list[list[int]], pad: int) -> torch.Tensor:
    """(B, T), padded on the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad)


def _chosen(cache: DynamicCache, places: torch.Tensor) -> DynamicCache:
    """Keys and values of some rows, in a cache of their own: the model appends to it."""
    found = DynamicCache()
    layers: list[Any] = cache.layers
    for number, layer in enumerate(layers):
        chosen = places.to(layer.keys.device)
        found.update(layer.keys[chosen], layer.values[chosen], number)
    return found


def _common(texts: list[Asked]) -> int:
    """How many tokens all texts begin with; at least one token of each is left over."""
    shortest = min(len(one.ids) for one in texts) - 1
    first = texts[0].ids
    return next((i for i in range(shortest) if any(one.ids[i] != first[i] for one in texts)), shortest)


def batches(lengths: list[int], batch_tokens: int) -> list[slice]:
    """Neighbours of rising length together, at most `batch_tokens` padded tokens a batch, at least one text."""
    found: list[slice] = []
    begin = 0
    for end, length in enumerate(lengths):
        if end > begin and length * (end + 1 - begin) > batch_tokens:
            found.append(slice(begin, end))
            begin = end
    return [*found, slice(begin, len(lengths))] if lengths else []
