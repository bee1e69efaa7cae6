"""`--mode lora` and `--mode full`: the language model itself is trained to judge, from the zero-shot judge on.

Loss: binary cross-entropy plus a pairwise term within each problem. A forward pass holds programs of one problem; on a
GPU, where a small pass costs as much as a larger one, those of several problems, with the same loss.
Some of the train problems (the dev problems) are held out and say when to stop. Each epoch is a folder with weights and
optimiser state: a killed training goes on from the last whole one and, on a CPU, comes to the same weights.
"""

import hashlib
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModel, DynamicCache

from fractal import console
from fractal.critic import critic
from fractal.critic.critic import About, Array, Asker, Flags, Floats, Groups, Head
from fractal.critic.features import Asked, device, read
from fractal.errors import InputError, OutsideError
from fractal.generate.memory import is_out_of_memory, release
from fractal.generate.models import ModelFiles, preferred_dtype

DEV_SHARE = 0.2  # of the train problems, held out to say when to stop
WARM_UP = 0.1  # of all steps, in which the learning rate rises from 0; then it falls to 0
CLIP = 1.0  # norm of the gradient
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RATES = {"lora": 1e-4, "full": 1e-5}
OPTIMISER = "optimiser.pt"
# What is tried in turn when memory runs out: batch_tokens divided by the first; gradient checkpointing. Halving comes
# first: passes of 2,048 tokens still fill a GPU, while checkpointing runs each layer forward twice (6 to 8 FLOPs for a
# parameter and token, LoRA 4 to 6). The last has about a tenth of the activations of the first.
FALLBACKS = ((1, False), (2, False), (2, True))


class Diverged(Exception):
    """The loss is no number any more."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the model is trained. Checked when made; raises InputError."""

    mode: Literal["lora", "full"]
    epochs: int = 4
    learning_rate: float | None = None  # default: RATES
    batch_tokens: int = 4096  # padded tokens in one forward pass; out of memory: FALLBACKS
    problems: int = 8  # whose gradients are added up before a step
    rank: int = 16  # of LoRA's matrices
    patience: int = 2  # epochs without a better dev AUC before it stops
    seed: int = 0
    dropout: float = 0.0  # of what LoRA's matrices read; it was 0.05 before this was a field, and cost a pass each time

    def __post_init__(self) -> None:
        for name, low, high in (("epochs", 1, 1000), ("batch_tokens", 64, 1 << 24), ("rank", 1, 1024)):
            if not low <= getattr(self, name) <= high:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be from {low} to {high}.")
        if self.learning_rate is not None and not 0 < self.learning_rate <= 1:
            raise InputError(f"--learning-rate {self.learning_rate}: must be above 0 and at most 1.")

    @property
    def rate(self) -> float:
        return self.learning_rate or RATES[self.mode]

    def inputs(self) -> dict[str, Any]:
        """The fields that decide what comes out, for `About.inputs`. Dropout is LoRA's alone."""
        fields = asdict(self)
        if self.mode == "full":
            del fields["dropout"]
        return fields


@dataclass(frozen=True, slots=True)
class Placement:
    """How training uses a device."""

    device: str  # cpu or cuda
    autocast: bool  # products in bfloat16; what is trained stays float32
    fused: bool  # AdamW in one kernel
    pinned: bool  # batches are sent from pinned memory, while the device computes
    packed: bool  # several problems in one forward pass; a CPU would pay for the padding
    watched: bool  # the loss is looked at after each step; else after the epoch: looking makes the host wait


def placement(device: str, dtype: str) -> Placement:
    """`dtype`: models.preferred_dtype.

    No TF32 on a GPU: under autocast no large product is of float32, and it would round what is: the angles of the
    rotary embedding (position times frequency) and the head's logits.
    """
    gpu = device == "cuda"
    return Placement(device, dtype == "bfloat16", fused=gpu, pinned=gpu, packed=gpu, watched=not gpu)


@dataclass(frozen=True, slots=True)
class Example:
    """A program with its verdict; the same program drawn again counts in `weight`."""

    task_id: int
    ids: list[int]
    passed: bool
    weight: int


# --- plans: pure ------------------------------------------------------------------------------------------------------


def dev_problems(task_ids: Groups, seed: int = 0, share: float = DEV_SHARE) -> set[int]:
    """Which train problems are held out: a `share` of them, by a hash of the id, so that more problems move none.

    Empty for fewer than five problems.
    """
    known = sorted({int(task) for task in task_ids})
    if len(known) < 5:
        return set()
    order = sorted(known, key=lambda task: hashlib.sha256(f"dev/{seed}/{task}".encode()).digest())
    return set(order[: max(1, round(share * len(known)))])


def micro_batches(examples: list[Example], batch_tokens: int) -> list[list[Example]]:
    """One problem's programs in as few batches as hold `batch_tokens` padded tokens, like lengths together.

    Each batch gets its share of passing and of failing ones, so that pairs are left. A program longer than a batch
    stands alone.
    """
    ordered = sorted(examples, key=lambda one: len(one.ids))
    count = max(1, math.ceil(len(ordered[-1].ids) * len(ordered) / batch_tokens))
    while count < len(ordered):
        kinds = [[one for one in ordered if one.passed is kind] for kind in (True, False)]
        found = [
            [one for kind in kinds for one in kind[len(kind) * i // count : len(kind) * (i + 1) // count]]
            for i in range(count)
        ]
        if all(max(len(one.ids) for one in batch) * len(batch) <= batch_tokens for batch in found if batch):
            return [batch for batch in found if batch]
        count += 1
    return [ordered] if count == 1 else [[one] for one in ordered]


def packed(groups: list[list[Example]], batch_tokens: int) -> list[list[list[Example]]]:
    """Groups (of `micro_batches`) that go through the model together: at most `batch_tokens` padded tokens a pass.

    Like lengths together. A group is never split, so pairs are those of unpacked groups; 0 leaves each group alone.
    """
    found: list[list[list[Example]]] = []
    rows = 0
    for group in sorted(groups, key=lambda one: max(len(e.ids) for e in one)) if batch_tokens else groups:
        rows += len(group)
        if not found or max(len(e.ids) for e in group) * rows > batch_tokens:
            found.append([])
            rows = len(group)
        found[-1].append(group)
    return found


def steps_of_epoch(examples: list[Example], recipe: Recipe, epoch: int) -> list[list[Example]]:
    """The epoch's steps, each with the programs of `recipe.problems` problems; epoch and seed decide the order."""
    by_problem: dict[int, list[Example]] = {}
    for one in examples:
        by_problem.setdefault(one.task_id, []).append(one)
    tasks = sorted(by_problem)
    order = np.random.default_rng([recipe.seed, epoch]).permutation(len(tasks))
    return [
        [one for i in order[start : start + recipe.problems] for one in by_problem[tasks[i]]]
        for start in range(0, len(tasks), recipe.problems)
    ]


def learning_rate(step: int, steps: int, rate: float) -> float:
    """Rises linearly over the first WARM_UP of the steps and then falls linearly to 0; step counts from 0."""
    warm = max(1, round(WARM_UP * steps))
    return rate * min((step + 1) / warm, (steps - step) / max(1, steps - warm + 1))


# --- the model --------------------------------------------------------------------------------------------------------


class Judge:
    """A model that is trained to judge: backbone, head and optimiser."""

    def __init__(
        self, files: ModelFiles, recipe: Recipe, *, checkpointing: bool = False, where: Placement | None = None
    ) -> None:
        from peft import LoraConfig, get_peft_model
        from peft.tuners.lora import LoraLayer

        torch.manual_seed(recipe.seed)  # before LoRA's random matrices are made
        self.files, self.recipe = files, recipe
        dtype = preferred_dtype()
        self.where = where or placement(device(), dtype)
        backbone: Any = AutoModel.from_pretrained(
            files.path, dtype=torch.float32 if recipe.mode == "full" else getattr(torch, dtype)
        )
        self.depth = int(backbone.config.num_hidden_layers)
        if checkpointing:
            backbone.gradient_checkpointing_enable()
        if recipe.mode == "lora":
            adapter = LoraConfig(
                r=recipe.rank, lora_alpha=2 * recipe.rank, lora_dropout=recipe.dropout, target_modules=TARGETS
            )
            backbone = get_peft_model(backbone, adapter)  # its matrices are float32
            for layer in backbone.modules():
                if isinstance(layer, LoraLayer):  # else states are cast to float32 before each matrix
                    layer.cast_input_dtype_enabled = not self.where.autocast
        self.backbone = backbone.to(self.where.device)
        start = torch.tensor(critic.answer_direction(files.path), device=self.where.device)
        self.weight = torch.nn.Parameter(start)
        self.bias = torch.nn.Parameter(torch.zeros((), device=self.where.device))
        self.shift = 0.0  # of the prior (critic.prior_shift): what training with balanced classes leaves out
        self.parameters = [p for p in self.backbone.parameters() if p.requires_grad] + [self.weight, self.bias]
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=recipe.rate, weight_decay=0.01, fused=True if self.where.fused else None
        )

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.where.device, torch.bfloat16) if self.where.autocast else nullcontext()

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        """To the device, without waiting for it."""
        return (tensor.pin_memory() if self.where.pinned else tensor).to(self.where.device, non_blocking=True)

    def logits(self, batch: list[Example], pad: int) -> torch.Tensor:
        """(B,) with gradients.

        Padding is on the right, where no earlier token looks: causal attention needs no mask for it, and takes the
        device's fastest kernel. The empty cache says so to transformers, which would otherwise read positions or a mask
        back from the device to find out.
        """
        rows = [torch.tensor(one.ids) for one in batch]
        padded = self.send(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad))  # (B, T)
        last = self.send(torch.tensor([[i, len(row) - 1] for i, row in enumerate(rows)]).T.contiguous())
        with self.autocast():
            states = self.backbone(input_ids=padded, past_key_values=DynamicCache(), use_cache=False).last_hidden_state
        kept = states[last[0], last[1]].float()  # (B, D)
        logits: torch.Tensor = kept @ self.weight + self.bias
        return logits

    def judge(self, asked: list[Asked], pad: int) -> Floats:
        """Logits (N,) without gradients, in the order asked; `key` of each is unique."""
        self.backbone.eval()
        found: dict[str, float] = {}
        head = self.head()
        with self.autocast(), console.bar("held-out problems", len(asked)) as bar:
            for batch, states in read(self.backbone, asked, [self.depth], pad):
                found |= dict(zip([one.key for one in batch], head.logits(states[:, 0].cpu().numpy()), strict=True))
                bar.advance(len(batch))
        return np.array([found[one.key] for one in asked])

    def head(self) -> Head:
        weight: Array = self.weight.detach().float().cpu().numpy().copy()
        return Head(weight, float(self.bias.detach()) + self.shift)

    def save(self, folder: Path, about: About) -> None:
        """Write a checkpoint; it appears whole or not at all."""
        draft = folder.with_name(f".{folder.name}")
        shutil.rmtree(draft, ignore_errors=True)
        with console.quiet("writing the checkpoint"):
            self.backbone.save_pretrained(draft)
        (draft / "README.md").unlink(missing_ok=True)  # peft's empty form
        torch.save({"optimiser": self.optimiser.state_dict(), "bias": self.bias.detach()}, draft / OPTIMISER)
        critic.save(draft, self.head(), about)
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)

    def restore(self, folder: Path) -> None:
        """Take up a checkpoint that `critic.load` found whole."""
        if self.recipe.mode == "lora":
            from peft import set_peft_model_state_dict

            set_peft_model_state_dict(self.backbone, load_file(folder / "adapter_model.safetensors"))
        else:
            self.backbone.load_state_dict(critic.weights(folder, "model*.safetensors"))
        state = torch.load(folder / OPTIMISER, map_location=self.where.device, weights_only=True)
        head, _ = critic.load(folder)
        with torch.no_grad():
            self.weight.copy_(torch.tensor(head.weight))
            self.bias.copy_(state["bias"])
        self.optimiser.load_state_dict(state["optimiser"])


def tuned_model(
    folder: Path, about: About, files: ModelFiles, dtype: str | None = None, place: str | None = None
) -> Any:
    """The backbone of a trained critic, for reading, on the device `place`."""
    kind = getattr(torch, dtype or preferred_dtype())
    if about.mode == "full":
        return AutoModel.from_pretrained(folder, dtype=kind).to(place or device()).eval()
    from peft import PeftModel

    base = AutoModel.from_pretrained(files.path, dtype=kind)
    return PeftModel.from_pretrained(base, folder).merge_and_unload().to(place or device()).eval()


# --- the loop ---------------------------------------------------------------------------------------------------------


def fit(
    examples: list[Example],
    files: ModelFiles,
    recipe: Recipe,
    target: Path,
    about: About,
    done: int,
    known: set[int],
    evaluate: Callable[[Judge, int, float | None, float | None], bool],
) -> None:
    """Train to the end of the recipe, from epoch `done` on, the last whole checkpoint in `target`; 0 is none.

    `evaluate(judge, epoch, train_loss, seconds)` is told of each epoch that is not in `known` (0 is the untrained
    judge) and says whether to go on. Raises Diverged if the loss is no number; the checkpoints before it stay.
    """
    pad = Asker(files.path).pad
    shift = critic.prior_shift(np.repeat([e.passed for e in examples], [e.weight for e in examples]))

    def attempt(batch_tokens: int, checkpointing: bool) -> None:
        nonlocal done, known
        with console.quiet("loading the critic's model"):
            judge = Judge(files, recipe, checkpointing=checkpointing)
        if done:
            judge.restore(target / f"epoch-{done}")
            console.say(f"train: going on after epoch {done}")
        if not done and 0 not in known:
            known = known | {0}
            if not evaluate(judge, 0, None, None):
                return
        judge.shift = shift
        if done and done not in known:  # killed between a checkpoint and its evaluation
            figures = critic.load(target / f"epoch-{done}")[1].figures
            if not evaluate(judge, done, figures["train_loss"], figures["seconds"]):
                return
        for epoch in range(done + 1, recipe.epochs + 1):
            begin = time.monotonic()
            loss = train_epoch(judge, examples, epoch, batch_tokens, pad)
            seconds = time.monotonic() - begin
            figures = {"train_loss": loss, "seconds": round(seconds, 3)}
            judge.save(target / f"epoch-{epoch}", replace(about, epoch=epoch, figures=figures))
            for older in target.glob(f"epoch-*/{OPTIMISER}"):
                if older.parent.name != f"epoch-{epoch}":
                    critic.forget(older.parent, OPTIMISER)
            done, known = epoch, known | {epoch}
            if not evaluate(judge, epoch, loss, round(seconds, 3)):
                return

    for number, (divisor, checkpointing) in enumerate(FALLBACKS, 1):
        batch_tokens = recipe.batch_tokens // divisor
        way = f"--batch-tokens {batch_tokens}{' and gradient checkpointing' if checkpointing else ''}"
        if number > 1:
            release()  # here, outside of `except`: the error held the tensors
            console.warn(f"train: out of memory; this epoch again with {way}")
        try:
            attempt(batch_tokens, checkpointing)
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if number == len(FALLBACKS):
                raise OutsideError(
                    f"out of memory while training, also with {way}. Take a smaller --base, --mode lora or probe, or a "
                    "machine with more memory."
                ) from error


def last_epoch(target: Path, about: About) -> int:
    """The last epoch with a whole checkpoint, its optimiser state, and the same inputs; 0 if there is none."""
    for folder in sorted(target.glob("epoch-*"), key=lambda one: -_number(one)):
        try:
            _, found = critic.load(folder)
        except critic.BrokenCritic as error:
            console.warn(f"train: {error} Going on from the checkpoint before it.")
            continue
        if found.inputs == about.inputs and (folder / OPTIMISER).exists():
            return _number(folder)
    return 0


def _number(folder: Path) -> int:
    tail = folder.name.rpartition("-")[2]
    return int(tail) if tail.isdigit() else 0


def train_epoch(judge: Judge, examples: list[Example], epoch: int, batch_tokens: int, pad: int) -> float:
    """One pass over all examples; returns the mean loss over its steps. Raises Diverged.

    Where the placement is not watched, nothing is read from the device before the last step.
    """
    recipe = judge.recipe
    torch.manual_seed(recipe.seed * 1_000_003 + epoch)  # dropout, where there is any: the same after a resumption
    judge.backbone.train()
    steps = steps_of_epoch(examples, recipe, epoch)
    share = sum(e.weight for e in examples if e.passed) / sum(e.weight for e in examples)
    losses = torch.zeros(len(steps), dtype=torch.float64, device=judge.where.device)
    norms = torch.zeros(len(steps), device=judge.where.device)

    def check(first: int, after: int) -> None:
        good = (losses[first:after].isfinite() & norms[first:after].isfinite()).tolist()
        if not all(good):
            number = first + good.index(False)
            tasks = sorted({e.task_id for e in steps[number]})[:8]
            raise Diverged(
                f"the loss is no number any more (epoch {epoch}, step {number + 1} of {len(steps)}; problems "
                f"{', '.join(map(str, tasks))}). Checkpoints of earlier epochs are kept. Try a lower --learning-rate "
                f"than {recipe.rate:g}."
            )

    begin = time.monotonic()
    seen = 0
    with console.bar(f"epoch {epoch}", len(examples)) as bar:
        for number, step in enumerate(steps):
            for group in judge.optimiser.param_groups:
                group["lr"] = learning_rate((epoch - 1) * len(steps) + number, recipe.epochs * len(steps), recipe.rate)
            for batch, part in parts(judge, step, share, batch_tokens, pad):
                losses[number] += part
                seen += len(batch)
                loss = f"loss {float(losses[number]):.3f}, " if judge.where.watched else ""
                bar.advance(len(batch), f"{loss}{seen / (time.monotonic() - begin):.1f} samples/s")
            norms[number] = torch.nn.utils.clip_grad_norm_(judge.parameters, CLIP)
            if judge.where.watched:
                check(number, number + 1)
            judge.optimiser.step()
            judge.optimiser.zero_grad(set_to_none=True)
    check(0, len(steps))
    return float(losses.mean())


def parts(
    judge: Judge, step: list[Example], share: float, batch_tokens: int, pad: int
) -> Iterator[tuple[list[Example], torch.Tensor]]:
    """Run a step's forward passes and add up their gradients; yields each one's examples and part of the step's loss.

    The part is a scalar on the device: to read it is to wait for it.
    """
    by_problem: dict[int, list[Example]] = {}
    for one in step:
        by_problem.setdefault(one.task_id, []).append(one)
    groups = [group for problem in by_problem.values() for group in micro_batches(problem, batch_tokens)]
    total = sum(one.weight for one in step)
    mixed = sum(len({one.passed for one in group}) == 2 for group in groups)
    for some in packed(groups, batch_tokens if judge.where.packed else 0):
        batch = [one for group in some for one in group]
        logits = judge.logits(batch, pad)
        entropy, pairs = (judge.send(w) for w in loss_weights(some, share, total, mixed, logits.dtype))
        value = batch_loss(logits, entropy, pairs)
        value.backward()  # type: ignore[no-untyped-call]
        yield batch, value.detach()


def loss_weights(
    groups: list[list[Example]], share: float, total: int, mixed: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the terms of `batch_loss` weigh, on the CPU: (2, B) of passing and of failing, and (B, B) of pairs.

    Rows of `groups` in order; pairs (passing, failing) are of one group. `share` of all training samples that pass;
    `total` weight of the step; `mixed` groups of the step that have pairs.
    """
    batch = [one for group in groups for one in group]
    y = np.array([one.passed for one in batch], dtype=np.float64)
    w = np.array([one.weight for one in batch], dtype=np.float64)
    entropy = np.stack([w * y * 0.5 / share, w * (1 - y) * 0.5 / (1 - share)]) / total
    pairs = np.zeros((len(batch), len(batch)))
    start = 0
    for group in groups:
        own = slice(start, start + len(group))
        start += len(group)
        both = np.outer(w[own] * y[own], w[own] * (1 - y[own]))
        if both.any():
            pairs[own, own] = both / both.sum() / mixed
    return torch.tensor(entropy, dtype=dtype), torch.tensor(pairs, dtype=dtype)


def batch_loss(logits: torch.Tensor, entropy: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """A forward pass's part of a step's loss: `critic.loss` with the weights of `loss_weights`; logits (B,)."""
    value = (functional.softplus(-logits) * entropy[0] + functional.softplus(logits) * entropy[1]).sum()
    return value + (functional.softplus(logits[None, :] - logits[:, None]) * pairs).sum()


def examples_of(
    asker: Asker, rows: list[tuple[int, str, bool]], keep: Callable[[int], bool] = lambda task: True
) -> list[Example]:
    """Training examples from (task_id, question, passed): equal questions once, with their number as weight."""
    counts: dict[tuple[int, str, bool], int] = {}
    for row in rows:
        if keep(row[0]):
            counts[row] = counts.get(row, 0) + 1
    return [Example(task, asker.ids(text), passed, count) for (task, text, passed), count in counts.items()]


def mixed_problems(passed: Flags, groups: Groups) -> int:
    return sum(0 < passed[groups == task].mean() < 1 for task in np.unique(groups))
