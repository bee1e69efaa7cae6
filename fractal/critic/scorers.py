"""What scores samples: a critic run by transformers, or by vLLM's pooling runner; both rank alike."""

import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fractal import console
from fractal.critic import checkpoint
from fractal.critic.arrays import Floats
from fractal.critic.checkpoint import CriticInfo
from fractal.critic.features import Features
from fractal.critic.finetune import tuned_model
from fractal.critic.head import zero_shot_head
from fractal.critic.prompt import PromptTokenizer
from fractal.generate import models
from fractal.records import Problem, Sample, Score, task_order

Pairs = list[tuple[Problem, Sample]]


class Logits(NamedTuple):
    """The logits of N pairs, in their order."""

    critic: Floats  # (N,)
    zero_shot: Floats  # (N,) Yes minus No of the model before any training


def to_scores(pairs: Pairs, logits: Logits, info: CriticInfo) -> list[Score]:
    """One Score for each pair."""
    probabilities = 1 / (1 + np.exp(-np.clip(logits.critic / info.temperature, -500, 500)))
    columns = (column.tolist() for column in (logits.critic, probabilities, logits.zero_shot))
    scores = []
    for (_, sample), logit, probability, zero_shot in zip(pairs, *columns, strict=True):
        combined = info.combination.logit(logit, sample.mean_logprob) if info.combination else None
        scores.append(Score(sample.task_id, sample.sample_id, logit, probability, zero_shot, combined))
    return scores


def score_by_transformers(
    folder: Path, files: models.ModelFiles, pairs: Pairs, cache: Path, dtype: str | None = None
) -> Logits:
    """The logits of a critic that reads with transformers; the states are kept in `cache`."""
    head, info = checkpoint.load(folder)
    base = Features(files.path, files.digest, cache, dtype=dtype)
    states = base.of(pairs)
    zero_shot = zero_shot_head(files.path).logits(states[:, -1])
    if info.mode == "probe":
        return Logits(head.logits(states[:, base.layers.index(info.depth)]), zero_shot)
    tuned = Features(
        files.path,
        checkpoint.digest(folder),
        cache,
        layers=[info.depth],
        load=lambda: tuned_model(folder, info, files, dtype),
        dtype=dtype,
    )
    return Logits(head.logits(tuned.of(pairs)[:, 0]), zero_shot)


def score_by_vllm(folder: Path, files: models.ModelFiles, pairs: Pairs, dtype: str | None = None) -> Logits:
    """The logits of a fine-tuned critic and of the zero-shot critic, as two labels of one model in vLLM.

    One engine, which is slow to start, reads all pairs twice: with the base model's weights and with the critic's.
    """
    from fractal.critic.vllm_export import export
    from fractal.critic.vllm_pooling import PoolingEngine

    head, info = checkpoint.load(folder)
    # A problem's samples stand together: the common prefix of their prompts is read once.
    order = sorted(range(len(pairs)), key=lambda number: task_order(pairs[number][0].task_id))
    tokenizer = PromptTokenizer(files.path)
    prompts = [prompt.token_ids for prompt in tokenizer.prompts([pairs[number] for number in order])]
    heads = np.stack([head.weight, zero_shot_head(files.path).weight])
    with (
        tempfile.TemporaryDirectory(prefix="fractal-critic-") as temporary,
        console.bar("score", 2 * len(prompts)) as bar,
    ):

        def read() -> Floats:
            logits = np.zeros((len(pairs), len(heads)))
            for index, row in engine.logits(prompts):
                logits[order[index]] = row
                bar.advance()
            return logits

        target = Path(temporary) / "critic"
        with console.quiet("loading the critic into vLLM"):
            export(files.path, heads, target)
            engine = PoolingEngine(target, dtype or models.preferred_dtype(), max(map(len, prompts)))
        base = read()
        with console.quiet("loading the critic's weights"):
            model = tuned_model(folder, info, files, dtype, to="cpu")  # the GPU's memory is vLLM's
            weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
            engine.exchange({**weights, "score.weight": torch.tensor(heads)})
            del model, weights
        own = read()
        engine.close()
    return Logits(own[:, 0] + head.bias, base[:, 1])
