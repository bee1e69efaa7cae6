"""Training the model itself: plans, the loss in parts, checkpoints, resumption, and what goes wrong. A tiny real Qwen2."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fractal import console
from fractal.critic import batching, checkpoint, finetune, train_stage
from fractal.critic.batching import Example
from fractal.critic.loss import loss as critic_loss
from fractal.critic.prompt import PromptTokenizer, question
from fractal.critic.training_data import TrainError
from fractal.critic.training_settings import TrainingSettings, learning_rate
from fractal.errors import InputError, OutsideError
from fractal.generate import models
from fractal.jsonl import read_jsonl, write_jsonl
from fractal.records import Label, Sample
from fractal.rundir import RunDir
from tests.judged import run_folder, tiny_qwen

programs = st.lists(st.tuples(st.integers(1, 60), st.booleans()), min_size=1, max_size=20)


# --- plans


@given(programs, st.integers(64, 400))
def test_micro_batches_hold_every_program_once_within_the_bound(data: list[tuple[int, bool]], bound: int) -> None:
    examples = [Example("1", [i] * length, passed, 1) for i, (length, passed) in enumerate(data)]
    found = batching.micro_batches(examples, bound)
    assert sorted(id(e) for batch in found for e in batch) == sorted(id(e) for e in examples)
    assert all(len(b) == 1 or max(len(e.token_ids) for e in b) * len(b) <= bound for b in found)


def test_a_problem_that_is_split_keeps_both_kinds_in_each_batch() -> None:
    examples = [Example("1", [0] * 50, i % 2 == 0, 1) for i in range(16)]
    found = batching.micro_batches(examples, 200)
    assert len(found) == 4
    assert all({e.passed for e in batch} == {True, False} for batch in found)


def test_an_epoch_has_every_program_once_in_an_order_of_its_own() -> None:
    examples = [Example(str(task), [task], i == 0, 1) for task in range(20) for i in range(3)]
    training = TrainingSettings("lora", problems=8)
    first, again, second = (batching.steps_of_epoch(examples, training, epoch) for epoch in (1, 1, 2))
    assert first == again != second
    assert [len(step) for step in first] == [24, 24, 12]
    assert sorted(e.task_id for step in first for e in step) == sorted(e.task_id for e in examples)
    assert all(len({e.task_id for e in step}) * 3 == len(step) for step in first)


@given(st.sets(st.integers(1, 974).map(str), max_size=60))
def test_dev_problems_are_some_of_the_train_problems(tasks: set[str]) -> None:
    dev = batching.dev_problems(tasks)
    assert dev <= tasks
    assert len(dev) == (max(1, round(0.2 * len(tasks))) if len(tasks) >= 5 else 0)


def test_the_learning_rate_rises_and_falls_to_nothing() -> None:
    rates = [learning_rate(step, 100, 1e-3) for step in range(100)]
    assert max(rates) == pytest.approx(1e-3)
    assert rates.index(max(rates)) == 9
    assert 0 < rates[-1] < 2e-5
    assert learning_rate(0, 1, 1e-3) > 0


def part_of(logits: torch.Tensor, groups: list[list[Example]], share: float, total: int, mixed: int) -> torch.Tensor:
    return batching.batch_loss(logits, *batching.loss_weights(groups, share, total, mixed, logits.dtype))


def test_the_loss_of_a_step_is_the_sum_of_its_parts() -> None:
    """Two problems in one step: entropy over all, pairs a mean within each problem."""
    torch.manual_seed(0)
    batches = [
        [Example(t, [0], p, 1) for p in kinds] for t, kinds in (("1", [True, False, False]), ("2", [True, True, False]))
    ]
    logits = [torch.randn(3), torch.randn(3)]
    parts = sum(part_of(x, [b], 0.5, 6, 2) for x, b in zip(logits, batches, strict=True))
    y = torch.tensor([1.0, 0, 0, 1, 1, 0])
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(torch.cat(logits), y)
    pairs = [critic_loss(x, yy, torch.tensor(p), 0.5) - critic_loss(x, yy, torch.zeros(0, 2, dtype=torch.long), 0.5)
             for x, yy, p in ((logits[0], y[:3], [[0, 1], [0, 2]]), (logits[1], y[3:], [[0, 2], [1, 2]]))]  # fmt: skip
    assert float(parts) == pytest.approx(float(entropy + sum(pairs) / 2), rel=1e-5)


def test_a_program_drawn_twice_counts_twice() -> None:
    once = [Example("1", [0], True, 2), Example("1", [0], False, 1)]
    twice = [Example("1", [0], True, 1), Example("1", [0], True, 1), Example("1", [0], False, 1)]
    a = part_of(torch.tensor([0.3, -0.2]), [once], 2 / 3, 3, 1)
    b = part_of(torch.tensor([0.3, 0.3, -0.2]), [twice], 2 / 3, 3, 1)
    assert float(a) == pytest.approx(float(b), rel=1e-6)


step_of_groups = st.lists(
    st.lists(st.tuples(st.booleans(), st.integers(1, 3), st.integers(1, 60)), min_size=1, max_size=6),
    min_size=1,
    max_size=5,
)


def groups_of(data: list[list[tuple[bool, int, int]]]) -> list[list[Example]]:
    return [[Example(str(t), [0] * size, p, w) for p, w, size in group] for t, group in enumerate(data)]


@given(step_of_groups, st.integers(0, 400))
def test_packing_splits_no_group_and_keeps_the_bound(data: list[list[tuple[bool, int, int]]], bound: int) -> None:
    groups = groups_of(data)
    found = batching.pack(groups, bound)
    assert sorted(id(group) for some in found for group in some) == sorted(map(id, groups))
    for some in found:
        batch = [e for group in some for e in group]
        assert len(some) == 1 or max(len(e.token_ids) for e in batch) * len(batch) <= bound


def test_small_problems_share_a_pass() -> None:
    groups = groups_of([[(True, 1, 10), (False, 1, 12)]] * 4 + [[(True, 1, 100), (False, 1, 90)]])
    assert [len(some) for some in batching.pack(groups, 200)] == [4, 1]
    assert [len(some) for some in batching.pack(groups, 0)] == [1] * 5


@settings(deadline=None)
@given(step_of_groups, st.integers(0, 1000))
def test_a_packed_loss_and_its_gradients_are_those_of_its_groups(
    data: list[list[tuple[bool, int, int]]], seed: int
) -> None:
    """In float64, to 1e-12; the oracle goes through all pairs of each group alone."""
    groups = groups_of(data)
    total = sum(e.weight for group in groups for e in group)
    mixed = sum(len({e.passed for e in group}) == 2 for group in groups)
    logits = torch.randn(sum(map(len, groups)), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3
    logits.requires_grad_()
    together = part_of(logits, groups, 0.3, total, mixed)
    alone = sum(
        part_of(x, [group], 0.3, total, mixed)
        for x, group in zip(logits.split([len(group) for group in groups]), groups, strict=True)
    )
    oracle, start = 0.0, 0
    for group in groups:
        rows = [(float(logits[start + i].detach()), e) for i, e in enumerate(group)]
        start += len(group)
        for x, e in rows:
            oracle += (0.5 / 0.3 if e.passed else 0.5 / 0.7) * e.weight * np.logaddexp(0, -x if e.passed else x) / total
        pairs = [(a.weight * b.weight, np.logaddexp(0, y - x)) for x, a in rows for y, b in rows if a.passed > b.passed]
        if pairs:
            oracle += sum(w * loss for w, loss in pairs) / sum(w for w, _ in pairs) / mixed
    (a,), (b,) = (torch.autograd.grad(value, logits) for value in (together, alone))
    assert float(together.detach()) == pytest.approx(float(alone.detach()), abs=1e-12)
    assert float(together.detach()) == pytest.approx(oracle, abs=1e-8)  # softplus is linear beyond 20
    assert torch.allclose(a, b, rtol=0, atol=1e-12)


def test_how_a_device_is_used() -> None:
    cpu, gpu = {"fused": False, "packed": False}, {"fused": True, "packed": True}
    assert finetune.placement("cpu", "float32") == finetune.Placement("cpu", autocast=False, **cpu)
    assert finetune.placement("cpu", "bfloat16") == finetune.Placement("cpu", autocast=True, **cpu)
    assert finetune.placement("cuda", "bfloat16") == finetune.Placement("cuda", autocast=True, **gpu)


def test_inputs_tell_the_old_lora_apart_and_know_the_old_full() -> None:
    """A run made before dropout was a field is trained again in LoRA, which had 0.05, and not in full, which had none."""
    before = {"epochs": 4, "learning_rate": None, "batch_tokens": 4096, "problems": 8, "rank": 16, "patience": 2,
              "seed": 0}  # fmt: skip
    assert TrainingSettings("full").inputs() == {"mode": "full"} | before
    assert TrainingSettings("lora").inputs() == {"mode": "lora", "dropout": 0.0} | before


def test_a_recipe_out_of_range_names_the_option() -> None:
    wrong: list[dict[str, Any]] = [{"epochs": 0}, {"rank": 0}, {"batch_tokens": 1}, {"learning_rate": 0.0}]
    for fields in [*wrong, {"learning_rate": 2.0}]:
        name = next(iter(fields)).replace("_", "-")
        with pytest.raises(InputError, match=f"--{name}"):
            TrainingSettings("lora", **fields)


# --- with a model

RATE = {"lora": 2e-3, "full": 1e-3}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Path:
    return tiny_qwen(tmp_path_factory.mktemp("models") / "tiny", small_model)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trained(run: Path, mode: str, **training: Any) -> list[dict[str, Any]]:
    with RunDir(run) as folder:
        train_stage.run(folder, None, mode, **({"learning_rate": RATE[mode], "epochs": 2} | training))
    return [json.loads(line) for line in (run / "critic/metrics.jsonl").read_text().splitlines()]


@pytest.mark.model
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_training_learns_and_leaves_a_checkpoint_of_each_epoch(mode: str, qwen: Path, tmp_path: Path) -> None:
    rows = trained(run_folder(tmp_path / "run", qwen), mode, epochs=3)
    assert [row["epoch"] for row in rows] == list(range(len(rows)))
    assert rows[0]["train_loss"] is None
    assert sum(row["chosen"] for row in rows) == 1
    assert rows[-1]["train_loss"] < rows[1]["train_loss"]
    weights = "adapter_model.safetensors" if mode == "lora" else "model.safetensors"
    for row in rows[1:]:
        folder = tmp_path / f"run/critic/epoch-{row['epoch']}"
        assert {weights, "head.safetensors", checkpoint.INFO_FILE} <= {p.name for p in folder.iterdir()}
        assert (folder / finetune.OPTIMISER).exists() == (row is rows[-1])
    _, about = checkpoint.load(tmp_path / "run/critic/best")
    assert rows[about.epoch]["chosen"]
    assert (tmp_path / "run/critic/best" / weights).exists()


@pytest.mark.model
def test_epoch_zero_is_the_zero_shot_critic(qwen: Path, tmp_path: Path) -> None:
    """Both ways to it agree: frozen features times the answer direction, and the untrained model of lora."""
    run = run_folder(tmp_path / "run", qwen)
    lora = trained(run, "lora", epochs=1)[0]
    with RunDir(run) as folder:
        train_stage.run(folder, None, "probe")
    probed = json.loads((run / "critic/metrics.jsonl").read_text().splitlines()[0])
    assert lora["val_within_auc"] == pytest.approx(probed["val_within_auc"], abs=0.1)
    assert lora["val_acc"] == pytest.approx(probed["val_acc"], abs=0.1)


COMMAND = """
import sys, torch
from pathlib import Path
from fractal.critic import train_stage
from fractal.rundir import RunDir
torch.set_num_threads(1)
with RunDir(Path(sys.argv[1])) as folder:
    train_stage.run(folder, None, sys.argv[2], learning_rate=float(sys.argv[3]), epochs=3)
"""


@pytest.mark.model
def test_interrupted_and_resumed_it_comes_to_the_same_weights(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C between a checkpoint and its evaluation, in this process; killed ones are below."""
    straight, stopped = (run_folder(tmp_path / name, qwen) for name in ("straight", "stopped"))
    trained(straight, "lora")
    original = finetune.TrainableCritic.save

    def interrupted(self: finetune.TrainableCritic, folder: Path, info: checkpoint.CriticInfo) -> None:
        original(self, folder, info)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finetune.TrainableCritic, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trained(stopped, "lora")
    assert not (stopped / "critic/best").exists()
    trained(stopped, "lora")
    for name in ("head.safetensors", "adapter_model.safetensors"):
        assert (straight / "critic/best" / name).read_bytes() == (stopped / "critic/best" / name).read_bytes(), name


@pytest.mark.model
@pytest.mark.long
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_killed_and_resumed_it_comes_to_the_same_weights(mode: str, qwen: Path, tmp_path: Path) -> None:
    runs = [run_folder(tmp_path / name, qwen) for name in ("straight", "killed")]
    command = [[sys.executable, "-c", COMMAND, str(run), mode, str(RATE[mode])] for run in runs]
    subprocess.run(command[0], check=True, timeout=300, capture_output=True)
    child = subprocess.Popen(command[1], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while child.poll() is None and not (runs[1] / "critic/epoch-1").exists():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (runs[1] / "critic/best").exists()
    done = subprocess.run(command[1], check=True, timeout=300, capture_output=True, text=True)
    assert "going on after epoch" in done.stdout
    for name in ("head.safetensors", "adapter_model.safetensors" if mode == "lora" else "model.safetensors"):
        assert (runs[0] / "critic/best" / name).read_bytes() == (runs[1] / "critic/best" / name).read_bytes(), name
    rows = [[json.loads(line) for line in (run / "critic/metrics.jsonl").read_text().splitlines()] for run in runs]
    assert [{**row, "seconds": 0} for row in rows[0]] == [{**row, "seconds": 0} for row in rows[1]]


@pytest.mark.model
def test_a_checkpoint_cut_short_costs_one_epoch(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_folder(tmp_path / "run", qwen)
    trained(run, "lora", epochs=2)
    warned: list[str] = []
    monkeypatch.setattr(console, "warn", warned.append)
    file = run / "critic/epoch-2/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    for best in (run / "critic/best").iterdir():  # hard links to the same files: the chosen one is damaged, too
        best.unlink()
    (run / "critic/best").rmdir()
    trained(run, "lora", epochs=2)
    assert any("epoch-2" in text and "cut short" in text for text in warned)
    checkpoint.load(run / "critic/epoch-2")
    checkpoint.load(run / "critic/best")


@pytest.mark.model
def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_epoch(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_folder(tmp_path / "run", qwen)
    original = finetune.batch_loss
    calls = [0]

    def late(*args: Any) -> torch.Tensor:
        calls[0] += 1
        return original(*args) * (float("nan") if calls[0] > 8 else 1.0)

    monkeypatch.setattr(finetune, "batch_loss", late)
    with pytest.raises(TrainError, match=r"no number any more \(epoch 2.*--learning-rate.*epoch 1's") as error:
        trained(run, "lora")
    assert error.value.kept
    _, about = checkpoint.load(run / "critic/best")
    assert about.epoch == 1


@pytest.mark.model
def test_out_of_memory_halves_the_batch_then_checkpoints_then_gives_up(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = finetune.TrainableCritic.logits
    tried: list[tuple[int, bool]] = []
    room = {False: 2, True: 2}  # programs at once, with checkpointing and without

    def small(self: finetune.TrainableCritic, batch: list[Example], pad: int) -> torch.Tensor:
        checkpointing = bool(self.backbone.base_model.model.is_gradient_checkpointing)
        tried.append((len(batch), checkpointing))
        if len(batch) > room[checkpointing]:
            raise torch.OutOfMemoryError
        return original(self, batch, pad)

    monkeypatch.setattr(finetune.TrainableCritic, "logits", small)
    run = run_folder(tmp_path / "run", qwen)
    longest = 4 * max(map(len, _questions(run, qwen)))
    rows = trained(run, "lora", epochs=1, batch_tokens=longest)
    assert [row["epoch"] for row in rows] == [0, 1]  # the untrained model is not scored again
    assert tried[0][0] > 2
    assert {size for size, _ in tried[1:]} <= {1, 2}
    assert not any(checkpointing for _, checkpointing in tried)
    tried.clear()
    room[False] = 0
    trained(run_folder(tmp_path / "checkpointed", qwen), "lora", epochs=1, batch_tokens=longest)
    assert [checkpointing for _, checkpointing in tried[:3]] == [False, False, True]
    room[True] = 0
    with pytest.raises(OutsideError, match=r"out of memory.*--batch-tokens \d+ and gradient checkpointing"):
        trained(run_folder(tmp_path / "other", qwen), "lora", epochs=1, batch_tokens=longest)


def examples_of(qwen: Path, tmp_path: Path, problems: int = 5) -> list[Example]:
    """Programs of different lengths; weights of 1 and 2; one problem with passing ones only."""
    run = run_folder(tmp_path / "examples", qwen, per_split=problems)
    tokenizer = PromptTokenizer(qwen)
    known = {p.task_id: p for p in _problems(run) if p.split == "train"}
    return [
        Example(s.task_id, tokenizer.token_ids(question(known[s.task_id], s.code)), s.sample_id % 2 == 0, 1 + i % 2)
        for i, s in enumerate(s for s in read_jsonl(run / "samples.jsonl", Sample) if s.task_id in known)
        if s.task_id != min(known, key=int) or s.sample_id % 2 == 0
    ]


def gradients(
    model: finetune.TrainableCritic, examples: list[Example], batch_tokens: int
) -> tuple[float, int, list[torch.Tensor]]:
    """Loss of a step of all examples, its number of passes, and what it leaves at each parameter."""
    model.backbone.train()
    found = [float(value) for _, value in finetune.accumulate(model, examples, 0.4, batch_tokens, 0)]
    return sum(found), len(found), [p.grad.clone() for p in model.parameters if p.grad is not None]


@pytest.mark.model
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_packed_and_checkpointed_steps_have_the_gradients_of_plain_ones(
    mode: Any, qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32: the loss to 1e-6, gradients to 1e-4 of the largest of each parameter."""
    monkeypatch.setattr(finetune, "preferred_dtype", lambda: "float32")
    examples = examples_of(qwen, tmp_path)
    plain = finetune.placement("cpu", "float32")
    results = {}
    for name, where, checkpointing in (
        ("plain", plain, False),
        ("packed", replace(plain, packed=True), False),
        ("checkpointed", plain, True),
    ):
        model = finetune.TrainableCritic(
            models.resolve(str(qwen)), TrainingSettings(mode), checkpointing=checkpointing, where=where
        )
        with torch.no_grad():
            for parameter in model.parameters:  # LoRA's second matrix starts at zero, which would hide the first
                parameter.add_(0.01)
        results[name] = gradients(model, examples, 4096)
    assert results["plain"][1] > results["packed"][1] >= 1
    for name in ("packed", "checkpointed"):
        assert results[name][0] == pytest.approx(results["plain"][0], rel=1e-6), name
        assert len(results[name][2]) == len(results["plain"][2])
        for a, b in zip(results[name][2], results["plain"][2], strict=True):
            assert (a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-9, name


class Calls(TorchDispatchMode):
    """What reaches torch's operators: those that make the host wait for a GPU, and products of float32."""

    WAIT = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.products: set[tuple[torch.Size, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        if name in self.WAIT:
            self.waits.append(name)
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            matrices = args[-2:]
            if matrices[0].dtype == torch.float32:
                self.products.add(tuple(m.shape for m in matrices))
        return func(*args, **(kwargs or {}))


@pytest.mark.model
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_an_epoch_on_a_gpu_waits_once_and_multiplies_in_bfloat16(mode: Any, qwen: Path, tmp_path: Path) -> None:
    """All of a GPU's settings but pinned memory, on the CPU."""
    examples = examples_of(qwen, tmp_path, problems=8)
    gpu = replace(finetune.placement("cuda", "bfloat16"), device="cpu")
    settings = TrainingSettings(mode, problems=2)
    model = finetune.TrainableCritic(models.resolve(str(qwen)), settings, where=gpu)
    with Calls() as calls:
        assert np.isfinite(finetune.train_epoch(model, examples, 1, 1024, 0))
    assert calls.waits == ["_local_scalar_dense"]  # the mean loss, after the last step
    # Of float32 is the outer product of positions and frequencies (rotary embedding), with one inner place.
    assert all(left[-1] == 1 for left, _ in calls.products), calls.products


@pytest.mark.model
def test_a_loss_that_is_no_number_is_found_after_the_epoch(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = finetune.batch_loss, [0]

    def once(*args: Any) -> torch.Tensor:
        calls[0] += 1
        return original(*args) * (float("nan") if calls[0] == 2 else 1.0)

    monkeypatch.setattr(finetune, "batch_loss", once)
    where = finetune.placement("cpu", "float32")
    model = finetune.TrainableCritic(models.resolve(str(qwen)), TrainingSettings("lora", problems=1), where=where)
    with pytest.raises(finetune.DivergedError, match=r"epoch 1, step 2 of 5; problems \d+\)"):
        finetune.train_epoch(model, examples_of(qwen, tmp_path), 1, 4096, 0)


@pytest.mark.model
def test_a_critic_stays_until_the_next_one_is_whole(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_folder(tmp_path / "run", qwen)
    with RunDir(run) as folder:
        train_stage.run(folder, None, "probe")
    before = checkpoint.load(run / "critic/best")[1].inputs
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "batch_loss", lambda logits, *rest: logits.sum() * float("nan"))
        with pytest.raises(TrainError, match="no number any more"):
            trained(run, "lora")
    assert checkpoint.load(run / "critic/best")[1].inputs == before
    trained(run, "lora", epochs=1)
    assert checkpoint.load(run / "critic/best")[1].mode == "lora"
    assert {p.name for p in (run / "critic").iterdir() if p.name.startswith(".")} == set()


def _questions(run: Path, qwen: Path) -> list[list[int]]:
    tokenizer = PromptTokenizer(qwen)
    with RunDir(run) as folder:
        problems = folder.problems()
    return [
        tokenizer.token_ids(question(problems[s.task_id], s.code)) for s in read_jsonl(run / "samples.jsonl", Sample)
    ]


# --- what the labels do not allow


def relabel(run: Path, passed: Any) -> None:
    labels = read_jsonl(run / "labels.jsonl", Label)
    write_jsonl(
        run / "labels.jsonl",
        [replace(v, passed=p, status="passed" if p else "failed") for v in labels for p in [passed(v)]],
    )


@pytest.mark.model
@pytest.mark.parametrize("mode", ["probe", "lora"])
def test_labels_of_one_class_train_nothing(mode: str, qwen: Path, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", qwen)
    relabel(run, lambda v: False)
    with RunDir(run) as folder, pytest.raises(TrainError, match="all 32 train samples fail") as error:
        train_stage.run(folder, None, mode)
    assert not error.value.kept


@pytest.mark.model
@pytest.mark.parametrize("mode", ["probe", "lora"])
def test_few_problems_with_one_sample_each_and_nothing_held_out_still_train(
    mode: str, qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_folder(tmp_path / "run", qwen, per_split=3, n=1)
    relabel(run, lambda v: int(v.task_id) % 2 == 0)
    keep = {p: s for p, s in ((p.task_id, p.split) for p in _problems(run))}
    write_jsonl(
        run / "labels.jsonl", [v for v in read_jsonl(run / "labels.jsonl", Label) if keep[v.task_id] == "train"]
    )
    with RunDir(run) as folder:
        train_stage.run(folder, None, mode, **({} if mode == "probe" else {"epochs": 1}))
    rows = [json.loads(line) for line in (run / "critic/metrics.jsonl").read_text().splitlines()]
    assert all(row["val_acc"] is None for row in rows)
    assert "no labelled sample belongs to a validation problem" in capsys.readouterr().err
    assert checkpoint.load(run / "critic/best")[1].combination is None


def _problems(run: Path) -> list[Any]:
    with RunDir(run) as folder:
        return list(folder.problems().values())


def test_a_run_that_names_no_generator_needs_a_base(tmp_path: Path) -> None:
    with RunDir(run_folder(tmp_path / "run", tmp_path)) as folder:
        del folder.manifest["config"]["generate"]
        with pytest.raises(InputError, match=r"which model drew the samples\. Name the critic's own: --base MODEL"):
            train_stage.run(folder)
        assert not folder.file("critic").exists()


def test_options_of_lora_with_a_probe_are_refused(tmp_path: Path) -> None:
    with RunDir(tmp_path / "run", create=True) as folder:
        with pytest.raises(InputError, match=r"--batch-tokens, --rank: of no use with --mode probe"):
            train_stage.run(folder, None, "probe", batch_tokens=100, rank=4, epochs=None)
        with pytest.raises(InputError, match=r"--mode best: unknown; known: probe, lora, full"):
            train_stage.run(folder, None, "best")
