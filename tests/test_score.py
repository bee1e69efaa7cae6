"""Scoring: both backends rank alike, the order is kept, and critics that do not fit are refused. A tiny real Qwen2."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fractal.critic import checkpoint, score_stage, train_stage
from fractal.critic.scorers import score_by_transformers
from fractal.errors import InputError
from fractal.generate import models
from fractal.generate.backends import why_no_vllm
from fractal.install import gpu
from fractal.jsonl import read_jsonl
from fractal.records import Sample, Score
from fractal.rundir import RunDir
from tests.judged import run_folder, tiny_qwen

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Path:
    return tiny_qwen(tmp_path_factory.mktemp("models") / "tiny", small_model)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, qwen: Path) -> Path:
    """A run with a probe."""
    path = run_folder(tmp_path_factory.mktemp("runs") / "run", qwen)
    with RunDir(path) as folder:
        train_stage.run(folder, None, "probe")
        score_stage.run(folder, backend="transformers")
    return path


BOTH = """
import sys, numpy as np
from pathlib import Path
from fractal.critic import scorers, vllm_pooling
from fractal.generate import models
from fractal.jsonl import read_jsonl
from fractal.records import Sample
from fractal.rundir import RunDir
start, starts = vllm_pooling.PoolingEngine.__init__, []
def counted(self, *rest):
    starts.append(rest)
    start(self, *rest)
vllm_pooling.PoolingEngine.__init__ = counted
where, run, out = (Path(word) for word in sys.argv[1:4])
files = models.resolve(sys.argv[4])
with RunDir(run) as folder:
    problems = folder.problems()
pairs = [(problems[s.task_id], s) for s in read_jsonl(run / "samples.jsonl", Sample)]
found = [
    scorers.score_by_transformers(where, files, pairs, out / "features", "float32"),
    scorers.score_by_vllm(where, files, pairs, "float32"),
]
assert len(starts) == 1, starts  # one engine for both heads
np.save(out / "logits.npy", [one.critic for one in found])
np.save(out / "zero.npy", [one.zero_shot for one in found])
import os; os._exit(0)  # vLLM's threads
"""


@pytest.mark.long
@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.skipif(why_no_vllm() is not None, reason="vLLM is not here")
def test_vllm_and_transformers_rank_alike(mode: str, run: Path, qwen: Path, tmp_path: Path) -> None:
    """The same logits but for rounding, so every pair that is further apart than that stands in the same order."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    with RunDir(copy) as folder:
        train_stage.run(folder, None, mode, epochs=1, learning_rate=1e-2 if mode == "lora" else 1e-3)
    command = [sys.executable, "-c", BOTH, str(copy / "critic/best"), str(copy), str(tmp_path), str(qwen)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("logits", "zero"):
        ours, theirs = np.load(tmp_path / f"{name}.npy")
        spread = ours.std()
        assert spread > 0
        assert np.abs(ours - theirs).max() < 0.02 * spread, name
        gaps = ours[:, None] - ours[None]
        far = np.abs(gaps) > 0.05 * spread
        assert (np.sign(gaps)[far] == np.sign(theirs[:, None] - theirs[None])[far]).all(), name


def test_a_probe_reads_with_transformers_and_others_with_vllm_where_there_is_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(score_stage, "why_no_vllm", lambda: None)
    monkeypatch.setattr(gpu, "usable", lambda: True)
    found = {mode: score_stage.choose_backend("auto", mode) for mode in train_stage.MODES}
    assert found == {"probe": "transformers", "lora": "vllm", "full": "vllm"}
    with pytest.raises(InputError, match="a probe is read by transformers alone"):
        score_stage.choose_backend("vllm", "probe")
    monkeypatch.setattr(gpu, "usable", lambda: False)
    assert score_stage.choose_backend("auto", "lora") == "transformers"
    with pytest.raises(InputError, match="unknown; known: auto"):
        score_stage.choose_backend("best", "probe")


@pytest.mark.skipif(why_no_vllm() is not None, reason="vLLM is not here")
def test_weights_are_linked_and_only_those_that_the_index_names(run: Path, qwen: Path, tmp_path: Path) -> None:
    from fractal.critic.vllm_export import export

    base = tmp_path / "base"
    shutil.copytree(qwen, base)
    (base / "consolidated.safetensors").write_bytes(b"the same weights by other names")
    (base / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "model.safetensors"}}')
    export(base, np.ones((2, 64), dtype=np.float32), tmp_path / "out")
    weights = {p.name: p for p in (tmp_path / "out").glob("*.safetensors")}
    assert weights.keys() == {"model.safetensors", "score.safetensors"}
    assert weights["model.safetensors"].resolve() == (base / "model.safetensors").resolve()
    assert json.loads((tmp_path / "out/config.json").read_bytes())["num_labels"] == 2


def test_every_sample_has_its_own_score(run: Path) -> None:
    samples, scores = read_jsonl(run / "samples.jsonl", Sample), read_jsonl(run / "scores.jsonl", Score)
    assert [(s.task_id, s.sample_id) for s in scores] == [(s.task_id, s.sample_id) for s in samples]
    assert len({s.score for s in scores}) > 80  # nearly all programs differ
    head, about = checkpoint.load(run / "critic/best")
    for one in scores[:5]:
        assert one.probability == pytest.approx(1 / (1 + np.exp(-one.score / about.temperature)))
        assert one.zero_shot is not None
    with RunDir(run) as folder:
        problems = folder.problems()
        files = models.resolve(str(folder.manifest["model_paths"].popitem()[1]))
        pair = (problems[samples[7].task_id], samples[7])
        alone = score_by_transformers(run / "critic/best", files, [pair], run / "fresh")
        assert alone.critic[0] == pytest.approx(scores[7].score, abs=0.3)
    assert head.weight.shape == (64,)


def test_combined_is_the_weighted_sum_with_the_log_probability(run: Path) -> None:
    samples, scores = read_jsonl(run / "samples.jsonl", Sample), read_jsonl(run / "scores.jsonl", Score)
    _, about = checkpoint.load(run / "critic/best")
    both = about.combination
    assert both is not None
    for sample, one in zip(samples, scores, strict=True):
        mean = (sample.sum_logprob or 0) / sample.tokens
        assert one.combined == pytest.approx(both.critic * one.score + both.mean_logprob * mean + both.bias)


def test_a_second_call_repeats_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "scores.jsonl").stat().st_mtime_ns
    with RunDir(run) as folder:
        score_stage.run(folder, backend="transformers")
    assert (run / "scores.jsonl").stat().st_mtime_ns == before
    assert "nothing to do" in capsys.readouterr().out


def test_scores_that_do_not_cover_the_samples_are_made_again(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    whole = (copy / "scores.jsonl").read_bytes()
    (copy / "scores.jsonl").write_bytes(b"\n".join(whole.split(b"\n")[:10]) + b"\n")
    with RunDir(copy) as folder:
        score_stage.run(folder, backend="transformers")
    assert (copy / "scores.jsonl").read_bytes() == whole


def test_a_critic_of_another_tokenizer_or_model_is_refused(
    run: Path, qwen: Path, tmp_path: Path, small_model: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(qwen, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["added_tokens"][0]["lstrip"] = not tokenizer["added_tokens"][0]["lstrip"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with RunDir(run) as folder:
        (folder.file("scores.jsonl")).unlink()
        with pytest.raises(InputError, match="another tokenizer or chat template"):
            score_stage.run(folder, backend="transformers", base=str(other))
        with pytest.raises(InputError, match="tiny with other weights"):
            score_stage.run(folder, backend="transformers", base=str(tiny_qwen(tmp_path / "tiny", small_model, seed=1)))
        with pytest.raises(InputError, match="holds no critic"):
            score_stage.run(folder, tmp_path / "nothing")
        score_stage.run(folder, backend="transformers")
