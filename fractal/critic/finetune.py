"""`--mode lora` and `--mode full`: the language model itself is trained, starting from the zero-shot critic.

Each epoch is a folder with weights and optimiser state: a killed training goes on from the last whole one and, on a
CPU, comes to the same weights.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModel, DynamicCache

from fractal import console
from fractal.critic import checkpoint
from fractal.critic.arrays import Array, Floats
from fractal.critic.batching import Example, batch_loss, by_problem, loss_weights, micro_batches, pack, steps_of_epoch
from fractal.critic.checkpoint import CriticInfo
from fractal.critic.forward import device, read
from fractal.critic.head import Head, zero_shot_head
from fractal.critic.loss import prior_shift
from fractal.critic.prompt import PromptTokenizer, TokenizedPrompt
from fractal.critic.training_settings import TrainingSettings, learning_rate
from fractal.errors import OutsideError
from fractal.generate.memory import is_out_of_memory, release
from fractal.generate.models import ModelFiles, preferred_dtype
from fractal.records import task_order

CLIP = 1.0  # norm of the gradient
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPTIMISER = "optimiser.pt"
# What is tried in turn when memory runs out: batch_tokens divided by the first; gradient checkpointing. Halving comes
# first: passes of 2,048 tokens still fill a GPU, while checkpointing runs each layer forward twice (6 to 8 FLOPs for a
# parameter and token, LoRA 4 to 6). The last has about a tenth of the activations of the first.
FALLBACKS = ((1, False), (2, False), (2, True))


class DivergedError(Exception):
    """The loss is no number any more."""


@dataclass(frozen=True, slots=True)
class Placement:
    """How training uses a device."""

    device: str  # cpu, or cuda: batches are sent from pinned memory, while it computes
    autocast: bool  # products in bfloat16; what is trained stays float32
    fused: bool  # AdamW in one kernel
    packed: bool  # several problems in one forward pass; a CPU would pay for the padding


def placement(device: str, dtype: str) -> Placement:
    """`dtype`: models.preferred_dtype.

    No TF32 on a GPU: under autocast no large product is of float32, and it would round what is: the angles of the
    rotary embedding (position times frequency) and the head's logits.
    """
    return Placement(device, autocast=dtype == "bfloat16", fused=device == "cuda", packed=device == "cuda")


class TrainableCritic:
    """A model that is trained as a critic: backbone, head and optimiser."""

    def __init__(
        self,
        files: ModelFiles,
        settings: TrainingSettings,
        *,
        checkpointing: bool = False,
        where: Placement | None = None,
    ) -> None:
        from peft import LoraConfig, get_peft_model
        from peft.tuners.lora import LoraLayer

        torch.manual_seed(settings.seed)  # before LoRA's random matrices are made
        self.files, self.settings = files, settings
        dtype = preferred_dtype()
        self.where = where or placement(device(), dtype)
        backbone: Any = AutoModel.from_pretrained(
            files.path, dtype=torch.float32 if settings.mode == "full" else getattr(torch, dtype)
        )
        self.depth = int(backbone.config.num_hidden_layers)
        if checkpointing:
            backbone.gradient_checkpointing_enable()
        if settings.mode == "lora":
            adapter = LoraConfig(
                r=settings.rank, lora_alpha=2 * settings.rank, lora_dropout=settings.dropout, target_modules=TARGETS
            )
            backbone = get_peft_model(backbone, adapter)  # its matrices are float32
            for layer in backbone.modules():
                if isinstance(layer, LoraLayer):  # else states are cast to float32 before each matrix
                    layer.cast_input_dtype_enabled = not self.where.autocast
        self.backbone = backbone.to(self.where.device)
        weight = torch.tensor(zero_shot_head(files.path).weight, device=self.where.device)
        self.weight = torch.nn.Parameter(weight)
        self.bias = torch.nn.Parameter(torch.zeros((), device=self.where.device))
        self.shift = 0.0  # prior_shift, which training with balanced classes leaves out
        self.parameters = [p for p in self.backbone.parameters() if p.requires_grad] + [self.weight, self.bias]
        self.optimiser = torch.optim.AdamW(
            self.parameters, lr=settings.rate, weight_decay=0.01, fused=True if self.where.fused else None
        )

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.where.device, torch.bfloat16) if self.where.autocast else nullcontext()

    def send(self, tensor: torch.Tensor) -> torch.Tensor:
        """To the device, without waiting for it."""
        return (tensor.pin_memory() if self.where.device == "cuda" else tensor).to(self.where.device, non_blocking=True)

    def logits(self, batch: list[Example], pad: int) -> torch.Tensor:
        """(B,) with gradients.

        Padding is on the right, where no earlier token looks: causal attention needs no mask for it, and takes the
        device's fastest kernel. The empty cache says so to transformers, which would otherwise read positions or a mask
        back from the device to find out.
        """
        rows = [torch.tensor(example.token_ids) for example in batch]
        padded = self.send(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad))  # (B, T)
        last = self.send(torch.tensor([[i, len(row) - 1] for i, row in enumerate(rows)]).T.contiguous())
        with self.autocast():
            states = self.backbone(input_ids=padded, past_key_values=DynamicCache(), use_cache=False).last_hidden_state
        kept = states[last[0], last[1]].float()  # (B, D)
        logits: torch.Tensor = kept @ self.weight + self.bias
        return logits

    def score(self, prompts: list[TokenizedPrompt], pad: int) -> Floats:
        """Logits (N,) without gradients, in the order of `prompts`."""
        self.backbone.eval()
        logits: dict[str, float] = {}
        head = self.head()
        with self.autocast(), console.bar("held-out problems", len(prompts)) as bar:
            for batch, states in read(self.backbone, prompts, [self.depth], pad):
                values = head.logits(states[:, 0].cpu().numpy())
                logits |= {prompt.key: float(value) for prompt, value in zip(batch, values, strict=True)}
                bar.advance(len(batch))
        return np.array([logits[prompt.key] for prompt in prompts])

    def head(self) -> Head:
        weight: Array = self.weight.detach().float().cpu().numpy().copy()
        return Head(weight, float(self.bias.detach()) + self.shift)

    def save(self, folder: Path, info: CriticInfo) -> None:
        """Write a checkpoint; it appears whole or not at all."""
        draft = folder.with_name(f".{folder.name}")
        shutil.rmtree(draft, ignore_errors=True)
        with console.quiet("writing the checkpoint"):
            self.backbone.save_pretrained(draft)
        (draft / "README.md").unlink(missing_ok=True)  # peft's empty form
        torch.save({"optimiser": self.optimiser.state_dict(), "bias": self.bias.detach()}, draft / OPTIMISER)
        checkpoint.save(draft, self.head(), info)
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)

    def restore(self, folder: Path) -> None:
        """Continue from a checkpoint that has been verified."""
        if self.settings.mode == "lora":
            from peft import set_peft_model_state_dict

            set_peft_model_state_dict(self.backbone, load_file(folder / "adapter_model.safetensors"))
        else:
            shards = folder.glob("model*.safetensors")
            self.backbone.load_state_dict({name: part for file in shards for name, part in load_file(file).items()})
        state = torch.load(folder / OPTIMISER, map_location=self.where.device, weights_only=True)
        head, _ = checkpoint.load(folder)
        with torch.no_grad():
            self.weight.copy_(torch.tensor(head.weight))
            self.bias.copy_(state["bias"])
        self.optimiser.load_state_dict(state["optimiser"])


def tuned_model(
    folder: Path, info: CriticInfo, files: ModelFiles, dtype: str | None = None, to: str | None = None
) -> Any:
    """The backbone of a fine-tuned critic, for reading, on the device `to`."""
    kind = getattr(torch, dtype or preferred_dtype())
    if info.mode == "full":
        return AutoModel.from_pretrained(folder, dtype=kind).to(to or device()).eval()
    from peft import PeftModel

    base = AutoModel.from_pretrained(files.path, dtype=kind)
    return PeftModel.from_pretrained(base, folder).merge_and_unload().to(to or device()).eval()


def fit(
    examples: list[Example],
    files: ModelFiles,
    settings: TrainingSettings,
    target: Path,
    info: CriticInfo,
    evaluate: Callable[[TrainableCritic, int, dict[str, Any]], bool],
) -> None:
    """Train up to `settings.epochs`, from the last whole checkpoint in `target` on.

    `evaluate` gets the model, the epoch and its figures, and says whether to go on; it is also called for the epoch
    from which training starts: 0, the untrained model, or one that was perhaps evaluated before. When memory runs out,
    FALLBACKS are tried in turn. Raises DivergedError where the loss is no number; the checkpoints before it stay.
    """
    pad = PromptTokenizer(files.path).pad
    shift = prior_shift(np.repeat([e.passed for e in examples], [e.weight for e in examples]))

    def attempt(batch_tokens: int, checkpointing: bool) -> None:
        with console.quiet("loading the critic's model"):
            model = TrainableCritic(files, settings, checkpointing=checkpointing)
        done, figures = last_epoch(target, info), {}
        if done:
            model.restore(target / f"epoch-{done}")
            model.shift = shift
            figures = checkpoint.read_info(target / f"epoch-{done}").figures
            console.say(f"train: going on after epoch {done}")
        goes_on = evaluate(model, done, figures)
        model.shift = shift
        while goes_on and done < settings.epochs:
            done += 1
            begin = time.monotonic()
            loss = train_epoch(model, examples, done, batch_tokens, pad)
            figures = {"train_loss": loss, "seconds": round(time.monotonic() - begin, 3)}
            model.save(target / f"epoch-{done}", replace(info, epoch=done, figures=figures))
            for older in target.glob(f"epoch-*/{OPTIMISER}"):
                if older.parent.name != f"epoch-{done}":
                    checkpoint.remove_file(older.parent, OPTIMISER)
            goes_on = evaluate(model, done, figures)

    for number, (divisor, checkpointing) in enumerate(FALLBACKS, 1):
        batch_tokens = settings.batch_tokens // divisor
        tried = f"--batch-tokens {batch_tokens}{' and gradient checkpointing' if checkpointing else ''}"
        if number > 1:
            release()  # here, outside of `except`: the error held the tensors
            console.warn(f"train: out of memory; this epoch again with {tried}")
        try:
            attempt(batch_tokens, checkpointing)
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if number == len(FALLBACKS):
                raise OutsideError(
                    f"out of memory while training, also with {tried}. Take a smaller --base, --mode lora or probe, "
                    "or a machine with more memory."
                ) from error


def last_epoch(target: Path, info: CriticInfo) -> int:
    """The last epoch with a whole checkpoint, its optimiser state, and the same inputs; 0 if there is none."""
    last = 0
    for state in target.glob(f"epoch-*/{OPTIMISER}"):
        try:
            found = checkpoint.verify(state.parent)
            last = max(last, found.epoch if found.inputs == info.inputs else 0)
        except checkpoint.BrokenCriticError as error:
            console.warn(f"train: {error} Going on from the checkpoint before it.")
    return last


def train_epoch(model: TrainableCritic, examples: list[Example], epoch: int, batch_tokens: int, pad: int) -> float:
    """One pass over all examples; returns the mean loss over its steps. Raises DivergedError.

    Nothing is read from the device before the last step: that makes the host wait.
    """
    settings = model.settings
    torch.manual_seed(settings.seed * 1_000_003 + epoch)  # dropout, where there is any: the same after a resumption
    model.backbone.train()
    steps = steps_of_epoch(examples, settings, epoch)
    share = sum(e.weight for e in examples if e.passed) / sum(e.weight for e in examples)
    losses = torch.zeros(len(steps), dtype=torch.float64, device=model.where.device)
    norms = torch.zeros(len(steps), device=model.where.device)
    before, total = (epoch - 1) * len(steps), settings.epochs * len(steps)
    with console.bar(f"epoch {epoch}", len(examples)) as bar:
        for number, step in enumerate(steps):
            for group in model.optimiser.param_groups:
                group["lr"] = learning_rate(before + number, total, settings.rate)
            for batch, part in accumulate(model, step, share, batch_tokens, pad):
                losses[number] += part
                bar.advance(len(batch))
            norms[number] = torch.nn.utils.clip_grad_norm_(model.parameters, CLIP)
            model.optimiser.step()
            model.optimiser.zero_grad(set_to_none=True)
    finite = (losses.isfinite() & norms.isfinite()).tolist()
    if not all(finite):
        number = finite.index(False)
        tasks = sorted({e.task_id for e in steps[number]}, key=task_order)[:8]
        raise DivergedError(
            f"the loss is no number any more (epoch {epoch}, step {number + 1} of {len(steps)}; problems "
            f"{', '.join(tasks)}). Checkpoints of earlier epochs are kept. Try a lower --learning-rate "
            f"than {settings.rate:g}."
        )
    return float(losses.mean())


def accumulate(
    model: TrainableCritic, step: list[Example], share: float, batch_tokens: int, pad: int
) -> Iterator[tuple[list[Example], torch.Tensor]]:
    """Run a step's forward passes and add up their gradients; yields each one's examples and part of the step's loss.

    The part is a scalar on the device: to read it is to wait for it.
    """
    groups = [group for problem in by_problem(step).values() for group in micro_batches(problem, batch_tokens)]
    total = sum(example.weight for example in step)
    mixed = sum(len({example.passed for example in group}) == 2 for group in groups)
    for packed in pack(groups, batch_tokens if model.where.packed else 0):
        batch = [example for group in packed for example in group]
        logits = model.logits(batch, pad)
        entropy, pairs = loss_weights(packed, share, total, mixed, logits.dtype)
        value = batch_loss(logits, model.send(entropy), model.send(pairs))
        value.backward()  # type: ignore[no-untyped-call]
        yield batch, value.detach()
