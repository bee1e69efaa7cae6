"""States of questions: against a plain forward pass of each, the cache, and memory. A tiny real Qwen2."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel

from fractal import console
from fractal.critic import features, forward
from fractal.critic.features import Features
from fractal.critic.head import zero_shot_head
from fractal.critic.prompt import PromptTokenizer, TokenizedPrompt, question
from fractal.errors import OutsideError
from fractal.records import Problem, Sample
from tests.judged import DEPTH, WIDTH, tiny_qwen

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Path:
    return tiny_qwen(tmp_path_factory.mktemp("models") / "tiny", small_model)


def pairs(count: int = 3) -> list[tuple[Problem, Sample]]:
    found = []
    for task in range(count):
        problem = Problem(str(task), f"Task {task}: " + "do it " * task, "", ["assert f(1) == 1"], "", "f", "train")
        for i in range(4):
            code = "def f(x):\n" + f"    x += {i}\n" * (1 + 3 * i) + "    return x\n"
            found.append((problem, Sample(str(task), i, "", code, "stop", 1, -1.0, 0, "m")))
    return found


def plain(qwen: Path, layers: list[int], pair: tuple[Problem, Sample]) -> np.ndarray:
    """(layers, D) by one forward pass of this text alone."""
    model = AutoModel.from_pretrained(qwen, dtype=torch.float32).eval()
    ids = torch.tensor([PromptTokenizer(qwen).token_ids(question(pair[0], pair[1].code))])
    with torch.inference_mode():
        hidden = model(ids, output_hidden_states=True).hidden_states
        return torch.stack([hidden[n][0, -1] if n == DEPTH else model.norm(hidden[n][0, -1]) for n in layers]).numpy()


def test_states_are_those_of_a_plain_forward_pass(qwen: Path, tmp_path: Path) -> None:
    """Shared prefixes, padding and batches change nothing."""
    some = Features(qwen, "d", tmp_path / "cache", dtype="float32")
    assert some.layers[-1] == DEPTH
    states = some.of(pairs())
    assert states.shape == (12, len(some.layers), WIDTH)
    for i in (0, 3, 5, 11):
        assert np.allclose(states[i], plain(qwen, some.layers, pairs()[i]), atol=5e-3)


def test_the_last_state_times_the_answer_direction_is_yes_minus_no(qwen: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    pair = pairs()[2]
    states = Features(qwen, "d", tmp_path / "cache", dtype="float32").of([pair])
    tokenizer = PromptTokenizer(qwen)
    model = AutoModelForCausalLM.from_pretrained(qwen, dtype=torch.float32).eval()
    with torch.inference_mode():
        logits = model(torch.tensor([tokenizer.token_ids(question(pair[0], pair[1].code))])).logits[0, -1]
    yes, no = tokenizer.answers()
    found = zero_shot_head(qwen).logits(states[:, -1])[0]
    assert found == pytest.approx(float(logits[yes] - logits[no]), abs=0.01)


def test_a_second_look_runs_no_model(qwen: Path, tmp_path: Path) -> None:
    first = Features(qwen, "d", tmp_path / "cache").of(pairs())

    def refuse() -> None:
        raise AssertionError("the model was loaded")

    again = Features(qwen, "d", tmp_path / "cache", load=refuse)
    assert np.array_equal(again.of(pairs()[::-1]), first[::-1])
    other = Features(qwen, "another model", tmp_path / "cache", load=refuse)
    with pytest.raises(AssertionError):
        other.of(pairs())


def test_a_torn_shard_costs_its_features_and_no_more(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(features, "SHARD", 4)
    first = Features(qwen, "d", tmp_path / "cache").of(pairs())
    shards = sorted((tmp_path / "cache").glob("*.npz"))
    assert len(shards) == 3
    shards[0].write_bytes(shards[0].read_bytes()[:200])
    read: list[int] = []
    original = features.read

    def count(model: object, asked: list[TokenizedPrompt], *rest: object) -> object:
        read.append(len(asked))
        return original(model, asked, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(features, "read", count)
    assert np.allclose(Features(qwen, "d", tmp_path / "cache").of(pairs()), first, atol=5e-3)
    assert read == [4]


def test_out_of_memory_halves_the_batches_and_then_says_what_to_do(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = forward.load_model(qwen, "float32")
    tokenizer = PromptTokenizer(qwen)
    asked = tokenizer.prompts(pairs())
    calm = {
        one.key: row
        for batch, rows in forward.read(model, asked, [DEPTH], tokenizer.pad)
        for one, row in zip(batch, rows, strict=True)
    }
    original = model.forward
    warned: list[str] = []
    monkeypatch.setattr(console, "warn", warned.append)

    def small(*args: object, **kwargs: object) -> object:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids.numel() > limit[0]:  # type: ignore[union-attr]
            raise torch.OutOfMemoryError
        return original(*args, **kwargs)

    monkeypatch.setattr(model, "forward", small)
    limit = [250]
    found = {
        one.key: row
        for batch, rows in forward.read(model, asked, [DEPTH], tokenizer.pad, 400)
        for one, row in zip(batch, rows, strict=True)
    }
    assert len(warned) == 1  # 200 tokens are few enough
    assert found.keys() == calm.keys()
    assert all(torch.allclose(found[key], calm[key], atol=1e-4) for key in calm)
    limit = [0]
    with pytest.raises(OutsideError, match=r"out of memory.*smaller --base"):
        list(forward.read(model, asked, [DEPTH], tokenizer.pad, 400))
    assert warned[1:] == [f"out of memory: going on with batches of {n} tokens" for n in (200, 100, 50, 25)]


def test_batches_keep_order_and_bound() -> None:
    lengths = [10, 20, 3000, 3000, 5000]
    found = [lengths[part] for part in forward.batches(lengths, 4096)]
    assert [length for batch in found for length in batch] == lengths
    assert all(len(batch) == 1 or batch[-1] * len(batch) <= 4096 for batch in found)
    assert forward.batches([], 4096) == []


def test_blocks_hold_every_problem_and_keep_those_without_a_prefix_apart() -> None:
    problems = [(shared, [TokenizedPrompt(str(i), i, [0] * 200)]) for i, shared in enumerate([50, 0, 30, 60, 0, 40])]
    assert [[shared for shared, _ in block] for block in forward.blocks(problems, 110)] == [
        [0, 0],
        [30, 40],
        [50],
        [60],
    ]
    assert [[shared for shared, _ in block] for block in forward.blocks(problems, 1000)] == [[0, 0], [30, 40, 50, 60]]


def test_problems_read_together_have_the_states_that_they_have_alone(qwen: Path) -> None:
    """A GPU's way, on the CPU, in float32: different prefixes, some problems of one text, and far fewer passes."""
    model, tokenizer = forward.load_model(qwen, "float32"), PromptTokenizer(qwen)
    some = [pair for i, pair in enumerate(pairs(5)) if pair[0].task_id not in ("1", "3") or i % 4 == 0]
    asked = tokenizer.prompts(some)
    layers = [1, DEPTH]
    passes = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    found = {}
    for across in (False, True):
        passes.clear()
        found[across] = {
            one.key: row
            for batch, rows in forward.read(model, asked, layers, tokenizer.pad, 4096, across)
            for one, row in zip(batch, rows, strict=True)
        }
        assert len(passes) == (3 if across else 8)
    assert found[True].keys() == found[False].keys() == {one.key for one in asked}
    scale = max(row.abs().max() for row in found[False].values())
    assert all(torch.allclose(found[True][key], found[False][key], rtol=0, atol=1e-4 * scale) for key in found[True])


def test_states_of_another_model_are_not_read(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Features(qwen, "another", tmp_path / "cache").of(pairs())
    first = Features(qwen, "d", tmp_path / "cache").of(pairs())
    read: list[str] = []
    original = features._read_shard

    def watch(shard: Path, name: str) -> object:
        read.append(name)
        return original(shard, name)

    monkeypatch.setattr(features, "_read_shard", watch)
    again = Features(qwen, "d", tmp_path / "cache").of(pairs())
    assert np.array_equal(again, first)
    assert read == ["keys", "keys", "keys", "states"]  # both shards' keys, then the one with these states


def test_a_shard_whose_states_are_damaged_costs_its_features(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Features(qwen, "d", tmp_path / "cache").of(pairs())
    (shard,) = (tmp_path / "cache").glob("*.npz")
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 255  # within the states: the keys come first and are small
    shard.write_bytes(bytes(data))
    warned: list[str] = []
    monkeypatch.setattr(console, "warn", warned.append)
    assert np.allclose(Features(qwen, "d", tmp_path / "cache").of(pairs()), first, atol=5e-3)
    assert len(warned) == 1
    assert "computed again" in warned[0]


def test_a_program_too_long_for_the_context_loses_its_middle(qwen: Path) -> None:
    problem = pairs()[0][0]
    tokenizer = PromptTokenizer(qwen)
    ids = tokenizer.token_ids(question(problem, "x = 1\n" * 3000))
    short = tokenizer.token_ids(question(problem, "x = 1"))
    assert len(ids) == 2048
    assert ids[:20] == short[:20]
    assert ids[-10:] == short[-10:]
