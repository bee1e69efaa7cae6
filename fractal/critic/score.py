"""Stage 4, the soft verifier: samples and a critic -> scores.jsonl. Runs no program.

transformers reads each problem's tokens once for all of its samples; vLLM's pooling runner does so with its prefix
cache. Both rank alike (tests/test_score.py).
"""

import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fractal import console
from fractal.errors import InputError
from fractal.generate import models, stage
from fractal.generate.memory import read_shape
from fractal.install import gpu
from fractal.jsonl import read_jsonl, unique, write_jsonl
from fractal.records import Problem, Sample, Score
from fractal.rundir import RunDir

BACKENDS = ("auto", "transformers", "vllm")

if TYPE_CHECKING:
    from fractal.critic.critic import About, Head

Pairs = list[tuple[Problem, Sample]]
Loaded = tuple["Head", "About"]  # of critic.load
Logits = NDArray[np.float64]


class Judged(NamedTuple):
    """What is said of N pairs, in their order."""

    critic: Logits  # (N,)
    zero_shot: Logits  # (N,) Yes minus No of the model before any training


def run(folder: RunDir, critic_dir: Path | None = None, backend: str = "auto", base: str | None = None) -> None:
    """Score every sample of the run, unless this critic has done so. Raises InputError."""
    from fractal.critic import critic

    where = critic_dir or folder.file("critic/best")
    if not where.is_dir():
        raise InputError(f"{where}: holds no critic. Run `fractal train --run {folder.path}` first, or give --critic.")
    head, about = critic.load(where)
    chosen = choose_backend(backend, about.mode)
    path = folder.file("samples.jsonl")
    samples = unique(read_jsonl(path, Sample), path)
    if not samples:
        raise InputError(f"{folder.path}: has no samples yet. Run `fractal generate --run {folder.path}` first.")
    problems = folder.problems()
    digest = hashlib.sha256((where / "critic.json").read_bytes()).hexdigest()  # which holds the digests of the rest
    known = folder.manifest["config"].get("score", {})
    done = unique(read_jsonl(folder.file("scores.jsonl"), Score), folder.file("scores.jsonl"))
    if known.get("critic_sha256") == digest and done.keys() == samples.keys():
        console.say(f"score: {len(done)} scores are there, nothing to do")
        return
    files = models.resolve(base or folder.model_path(about.base))
    critic.check_base(where, about, files)
    pairs = [(problems[s.task_id], s) for s in samples.values()]
    with folder.stage("score", "scores.jsonl") as entry:
        cache = folder.file("critic/features")
        loaded = head, about
        judge: Any = (
            VllmJudge(where, loaded, files) if chosen == "vllm" else TransformersJudge(where, loaded, files, cache)
        )
        logits, zero_shot = judge.judge(pairs)
        if not np.isfinite(logits).all():
            bad = [f"{s.task_id}/{s.sample_id}" for (_, s), x in zip(pairs, logits, strict=True) if not np.isfinite(x)]
            raise InputError(f"{where}: gives no number for {len(bad)} samples ({', '.join(bad[:5])}). Train it again.")
        write_jsonl(folder.file("scores.jsonl"), scores(pairs, logits, zero_shot, about))
        entry["backend"] = chosen
        console.say(f"score: {len(pairs)} samples scored by {where} ({about.mode} on {about.base}, {chosen})")
    folder.manifest["config"]["score"] = {"critic_sha256": digest, "backend": chosen}
    folder.save()


def scores(pairs: Pairs, logits: Logits, zero_shot: Logits, about: Any) -> list[Score]:
    """One Score for each pair; logits and zero_shot (N,)."""
    chances = 1 / (1 + np.exp(-np.clip(logits / about.temperature, -500, 500)))
    found = []
    for (_, sample), logit, chance, zero in zip(pairs, logits, chances, zero_shot, strict=True):
        both = about.combination.logit(float(logit), sample.mean_logprob) if about.combination else None
        found.append(Score(sample.task_id, sample.sample_id, float(logit), float(chance), float(zero), both))
    return found


def choose_backend(backend: str, mode: str) -> str:
    """vLLM on a GPU where it is installed, for a critic of its own weights; else transformers.

    A probe reads with the base: what training has read is kept, one pass gives both heads' states, and no engine needs
    to start.
    """
    if backend not in BACKENDS:
        raise InputError(f"--score-backend {backend}: unknown; known: {', '.join(BACKENDS)}.")
    trouble = stage.vllm_trouble()
    if backend == "vllm" and trouble:
        raise InputError(f"--score-backend vllm: {trouble}. Or take transformers.")
    if backend != "auto":
        return backend
    return "vllm" if mode != "probe" and gpu.usable() and not trouble else "transformers"


class TransformersJudge:
    """A critic that reads with transformers; what it has read is kept in `cache`."""

    def __init__(
        self, where: Path, loaded: Loaded, files: models.ModelFiles, cache: Path, dtype: str | None = None
    ) -> None:
        from fractal.critic.features import Features

        self._where, self._files, self._cache, self._dtype = where, files, cache, dtype
        self._head, self._about = loaded
        self._base = Features(files.path, files.digest, cache, dtype=dtype)

    def judge(self, pairs: Pairs) -> Judged:
        from fractal.critic import critic

        states = self._base.of(pairs)
        zero_shot = critic.Head(critic.answer_direction(self._files.path), 0.0).logits(states[:, -1])
        if self._about.mode == "probe":
            return Judged(self._head.logits(states[:, self._base.layers.index(self._about.depth)]), zero_shot)
        from fractal.critic.features import Features
        from fractal.critic.finetune import tuned_model

        digest = hashlib.sha256((self._where / "critic.json").read_bytes()).hexdigest()
        tuned = Features(
            self._files.path,
            digest,
            self._cache,
            layers=[self._about.depth],
            load=lambda: tuned_model(self._where, self._about, self._files, self._dtype),
            dtype=self._dtype,
        )
        return Judged(self._head.logits(tuned.of(pairs)[:, 0]), zero_shot)


class VllmJudge:
    """A critic and the zero-shot judge as two labels of one model in vLLM: one engine for both."""

    def __init__(self, where: Path, loaded: Loaded, files: models.ModelFiles, dtype: str | None = None) -> None:
        self._where, self._files, self._dtype = where, files, dtype
        self._head, self._about = loaded

    def judge(self, pairs: Pairs) -> Judged:
        """Two passes, since the critic is of other layers or weights than the zero-shot judge; one if of the same."""
        from fractal.critic import critic
        from fractal.critic.vllm_pooling import VllmScorer

        asker = critic.Asker(self._files.path)
        order = sorted(range(len(pairs)), key=lambda i: pairs[i][0].task_id)  # neighbours share their prefix
        asked = [asker.ids(critic.question(pairs[i][0], pairs[i][1].code)) for i in order]
        heads = np.stack([self._head.weight, critic.answer_direction(self._files.path)])
        tuned = self._about.mode != "probe"
        once = not tuned and self._about.depth == read_shape(self._files.path).layers
        with (
            tempfile.TemporaryDirectory(prefix="fractal-critic-") as place,
            console.bar("score", len(asked) * (1 if once else 2)) as bar,
        ):

            def read() -> Logits:
                found = np.zeros((len(pairs), len(heads)))
                for place_in_order, logits in scorer.logits(asked):
                    found[order[place_in_order]] = logits
                    bar.advance()
                return found

            with console.quiet("loading the critic into vLLM"):
                critic.export(self._files.path, heads, Path(place) / "critic")
                scorer = VllmScorer(
                    Path(place) / "critic", self._dtype or models.preferred_dtype(), max(map(len, asked))
                )
            whole = read()
            if tuned:
                with console.quiet("loading the critic's weights"):
                    scorer.exchange(self._weights(heads))
            elif not once:
                scorer.shorten(self._about.depth)
            own = whole if once else read()
            scorer.close()
        return Judged(own[:, 0] + self._head.bias, whole[:, 1])

    def _weights(self, heads: Any) -> Iterator[tuple[str, Any]]:
        """Of the trained model, merged on the CPU: the GPU belongs to vLLM."""
        import torch

        from fractal.critic.finetune import tuned_model

        model = tuned_model(self._where, self._about, self._files, self._dtype, place="cpu")
        for name, tensor in model.state_dict().items():
            yield f"model.{name}", tensor
        yield "score.weight", torch.tensor(heads)
