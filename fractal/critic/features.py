"""Last-token states of the critic's prompts: computed once (forward.py), kept on disk by content."""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from fractal import console
from fractal.critic.arrays import Half
from fractal.critic.checkpoint import PROMPT_VERSION
from fractal.critic.forward import load_model, read
from fractal.critic.prompt import PromptTokenizer, TokenizedPrompt, question
from fractal.generate.memory import read_shape
from fractal.generate.models import preferred_dtype
from fractal.jsonl import write_whole
from fractal.records import Problem, Sample

SHARD = 64  # prompts, at least, whose features are written together
LAYERS = 12  # layers kept, evenly spaced from a third of the depth to the last

Pairs = list[tuple[Problem, Sample]]


class Features:
    """States of prompts, kept on disk by content: computed once, and a kill loses one shard at most."""

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
        self._shards: dict[str, Path] = {}  # by key; states are read when they are needed, another model's never
        for shard in sorted(cache.glob("*.npz")):
            if (keys := _read_shard(shard, "keys")) is not None:
                self._shards |= dict.fromkeys(keys.tolist(), shard)

    def of(self, pairs: Pairs) -> Half:
        """States (N, layers, width) at the last token of each pair's question, after the model's last norm."""
        texts = [question(problem, sample.code) for problem, sample in pairs]
        salted = (f"{self._salt}/{text}".encode("utf-8", "surrogatepass") for text in texts)
        keys = [hashlib.sha256(data).hexdigest() for data in salted]
        for shard in {self._shards[key]: None for key in keys if key in self._shards and key not in self._known}:
            names, states = _read_shard(shard, "keys"), _read_shard(shard, "states")
            if names is not None and states is not None:
                self._known |= dict(zip(names.tolist(), states, strict=True))
        tasks = [problem.task_id for problem, _ in pairs]
        asked = dict(zip(keys, zip(tasks, texts, strict=True), strict=True))
        if missing := {key: question for key, question in asked.items() if key not in self._known}:
            self._compute(missing)
        return np.stack([self._known[key] for key in keys])

    def _compute(self, texts: dict[str, tuple[str, str]]) -> None:
        with console.quiet("loading the critic's model"):
            tokenizer, model = PromptTokenizer(self._model), self._load()
        prompts = [TokenizedPrompt(key, task, tokenizer.token_ids(text)) for key, (task, text) in texts.items()]
        unwritten: dict[str, Half] = {}
        try:
            with console.bar("features", len(prompts)) as bar:
                for batch, states in read(model, prompts, self.layers, tokenizer.pad):
                    half = states.cpu().numpy().astype(np.float16)
                    unwritten |= {prompt.key: row for prompt, row in zip(batch, half, strict=True)}
                    bar.advance(len(batch))
                    if len(unwritten) >= SHARD:
                        self._write(unwritten)
                        unwritten = {}
        finally:  # Ctrl-C, too
            if unwritten:
                self._write(unwritten)

    def _write(self, states: dict[str, Half]) -> None:
        out = io.BytesIO()
        np.savez(out, keys=np.array(list(states)), states=np.stack(list(states.values())))
        name = hashlib.sha256("".join(states).encode()).hexdigest()[:16]
        write_whole(self._cache / f"{name}.npz", out.getvalue())
        self._known |= states


def _read_shard(shard: Path, name: str) -> NDArray[Any] | None:
    """One array of a shard; None, with a warning, if it cannot be read."""
    try:
        with np.load(shard) as data:
            return np.asarray(data[name])
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        console.warn(f"{shard}: left out, its features are computed again: {error}")
        return None
