"""How a language model is fine-tuned as a critic: the options of `--mode lora` and `--mode full`; the learning rate.

Loads no torch.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from fractal.errors import InputError

LEARNING_RATES = {"lora": 1e-4, "full": 1e-5}  # the highest of the schedule
WARM_UP = 0.1  # of all steps, in which the learning rate rises from 0; then it falls to 0


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """How the model is trained. Checked when made; raises InputError."""

    mode: Literal["lora", "full"]
    epochs: int = 4
    learning_rate: float | None = None  # default: LEARNING_RATES
    batch_tokens: int = 4096  # padded tokens in one forward pass; out of memory: finetune.FALLBACKS
    problems: int = 8  # whose gradients are added up before a step
    rank: int = 16  # of LoRA's matrices
    patience: int = 2  # epochs without a better dev AUC before it stops
    seed: int = 0
    dropout: float = 0.0  # of what LoRA's matrices read; it was 0.05 before this was a field, and cost a pass each time

    def __post_init__(self) -> None:
        limits = (("epochs", 1, 1000), ("batch_tokens", 64, 1 << 24), ("rank", 1, 1024))
        for name, low, high in limits:
            if not low <= getattr(self, name) <= high:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be from {low} to {high}.")
        if self.learning_rate is not None and not 0 < self.learning_rate <= 1:
            raise InputError(f"--learning-rate {self.learning_rate}: must be above 0 and at most 1.")

    @property
    def rate(self) -> float:
        return self.learning_rate or LEARNING_RATES[self.mode]

    def inputs(self) -> dict[str, Any]:
        """The fields that decide the result, for `CriticInfo.inputs`. Dropout is LoRA's alone."""
        fields = asdict(self)
        if self.mode == "full":
            del fields["dropout"]
        return fields


def learning_rate(step: int, steps: int, rate: float) -> float:
    """Rises linearly over the first WARM_UP of the steps and then falls linearly to 0; step counts from 0."""
    warm = max(1, round(WARM_UP * steps))
    return rate * min((step + 1) / warm, (steps - step) / max(1, steps - warm + 1))
