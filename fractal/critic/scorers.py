"""What scores samples: a critic run by transformers, or by vLLM's pooling runner.

transformers reads each problem's tokens once for all of its samples; vLLM does so with its prefix cache. Both rank
alike (tests/test_score.py).
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from fractal import console
from fractal.critic import checkpoint
from fractal.critic.arrays import Array, Floats
from fractal.critic.checkpoint import CriticInfo
from fractal.critic.features import Features
from fractal.critic.finetune import tuned_model
from fractal.critic.head import zero_shot_head
from fractal.critic.prompt import PromptTokenizer
from fractal.critic.vllm_export import export
from fractal.generate import models
from fractal.generate.memory import read_shape
from fractal.records import Problem, Sample, Score, task_order

Pairs = list[tuple[Problem, Sample]]


class Logits(NamedTuple):
    """The logits of N pairs, in their order."""

    critic: Floats  # (N,)
    zero_shot: Floats  # (N,) Yes minus No of the model before any training


class Scorer(Protocol):
    """A critic, loaded when it scores."""

    def score(self, pairs: Pairs) -> Logits: ...


def to_scores(pairs: Pairs, logits: Logits, info: CriticInfo) -> list[Score]:
    """One Score for each pair."""
    probabilities = 1 / (1 + np.exp(-np.clip(logits.critic / info.temperature, -500, 500)))
    scores = []
    for (_, sample), logit, probability, zero_shot in zip(
        pairs, logits.critic, probabilities, logits.zero_shot, strict=True
    ):
        combined = info.combination.logit(float(logit), sample.mean_logprob) if info.combination else None
        scores.append(
            Score(sample.task_id, sample.sample_id, float(logit), float(probability), float(zero_shot), combined)
        )
    return scores


class TransformersScorer:
    """A critic that reads with transformers; the states are kept in `cache`."""

    def __init__(self, folder: Path, files: models.ModelFiles, cache: Path, dtype: str | None = None) -> None:
        self._folder, self._files, self._cache, self._dtype = folder, files, cache, dtype
        self._head, self._info = checkpoint.load(folder)

    def score(self, pairs: Pairs) -> Logits:
        base = Features(self._files.path, self._files.digest, self._cache, dtype=self._dtype)
        states = base.of(pairs)
        zero_shot = zero_shot_head(self._files.path).logits(states[:, -1])
        if self._info.mode == "probe":
            return Logits(self._head.logits(states[:, base.layers.index(self._info.depth)]), zero_shot)
        tuned = Features(
            self._files.path,
            checkpoint.digest(self._folder),
            self._cache,
            layers=[self._info.depth],
            load=lambda: tuned_model(self._folder, self._info, self._files, self._dtype),
            dtype=self._dtype,
        )
        return Logits(self._head.logits(tuned.of(pairs)[:, 0]), zero_shot)


class VllmScorer:
    """A critic and the zero-shot critic as two labels of one model in vLLM: one engine for both."""

    def __init__(self, folder: Path, files: models.ModelFiles, dtype: str | None = None) -> None:
        self._folder, self._files, self._dtype = folder, files, dtype
        self._head, self._info = checkpoint.load(folder)

    def score(self, pairs: Pairs) -> Logits:
        """Reads all pairs twice, for the critic and the zero-shot critic; once if layers and weights are equal."""
        from fractal.critic.vllm_pooling import PoolingEngine

        tokenizer = PromptTokenizer(self._files.path)
        # A problem's samples stand together: the common prefix of their prompts is read once.
        pairs_in_order = sorted(enumerate(pairs), key=lambda numbered: task_order(numbered[1][0].task_id))
        prompts = [prompt.token_ids for prompt in tokenizer.prompts([pair for _, pair in pairs_in_order])]
        order = [number for number, _ in pairs_in_order]
        heads = np.stack([self._head.weight, zero_shot_head(self._files.path).weight])
        is_tuned = self._info.mode != "probe"
        once = not is_tuned and self._info.depth == read_shape(self._files.path).layers
        with (
            tempfile.TemporaryDirectory(prefix="fractal-critic-") as folder,
            console.bar("score", len(prompts) * (1 if once else 2)) as bar,
        ):

            def read() -> Floats:
                logits = np.zeros((len(pairs), len(heads)))
                for index, row in engine.logits(prompts):
                    logits[order[index]] = row
                    bar.advance()
                return logits

            target = Path(folder) / "critic"
            with console.quiet("loading the critic into vLLM"):
                export(self._files.path, heads, target)
                engine = PoolingEngine(target, self._dtype or models.preferred_dtype(), max(map(len, prompts)))
            base = read()
            if is_tuned:
                with console.quiet("loading the critic's weights"):
                    engine.exchange(self._weights(heads))
            elif not once:
                engine.shorten(self._info.depth)
            own = base if once else read()
            engine.close()
        return Logits(own[:, 0] + self._head.bias, base[:, 1])

    def _weights(self, heads: Array) -> Iterator[tuple[str, Any]]:
        """Of the trained model, merged on the CPU: the GPU's memory is vLLM's."""
        model = tuned_model(self._folder, self._info, self._files, self._dtype, to="cpu")
        for name, tensor in model.state_dict().items():
            yield f"model.{name}", tensor
        yield "score.weight", torch.tensor(heads)
