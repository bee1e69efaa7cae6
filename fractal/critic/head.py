"""The critic's head: a linear function of the normalised last state, and the one that a model has without training."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from fractal.critic.arrays import Array, Floats
from fractal.errors import InputError


@dataclass(frozen=True, slots=True)
class Head:
    """logit = state @ weight + bias, of normalised last states."""

    weight: Array  # (D,)
    bias: float

    def logits(self, states: NDArray[Any]) -> Floats:
        """states (N, D) -> (N,)."""
        return np.asarray(states.astype(np.float32) @ self.weight + self.bias, dtype=np.float64)


def zero_shot_head(model: Path) -> Head:
    """The head of the untrained critic: row of "Yes" minus row of "No" of the model's output layer, (D,), without bias.

    With tied embeddings the output layer is the input embedding. Raises InputError if the model has neither.
    """
    from fractal.critic.prompt import PromptTokenizer  # imports transformers, which takes two seconds

    yes, no = PromptTokenizer(model).answers()
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        for file in sorted(model.glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                names: list[str] = list(tensors.keys())
                if name in names:
                    rows = tensors.get_slice(name)
                    weight = rows[yes : yes + 1].float() - rows[no : no + 1].float()
                    return Head(np.asarray(weight[0].numpy(), dtype=np.float32), 0.0)
    raise InputError(f"--base {model}: has no output layer (lm_head or tied embeddings) in *.safetensors.")
