"""The soft verifier: a language model asked whether a program passes, with a scalar head on the last token's state.

    logit = rms_norm(state of the last token after `depth` layers) @ weight + bias

`depth` is the whole model's for a critic that was fine-tuned, and a layer that cross-validation chose for a probe. vLLM
calls such a critic a sequence classification model (`export`). The head starts as the row of
"Yes" minus the row of "No" of the model's own output layer: the zero-shot judge. What trains it is in probe.py (frozen
features) and tune.py (LoRA and full); this module holds what they share, and the files.
"""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_tensors
from scipy.optimize import minimize_scalar
from torch.nn import functional
from transformers import AutoTokenizer

from fractal.errors import InputError
from fractal.generate.models import ModelFiles, context_length
from fractal.records import Problem

PROMPT_VERSION = 1
ANSWERS = ("Yes", "No")
REMEDY = "Train it again (`fractal train`), or give another --critic."
ABOUT = "critic.json"  # not config.json: a fully trained model has its own

Array = NDArray[np.float32]
Half = NDArray[np.float16]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Groups = NDArray[np.int64]


class BrokenCritic(InputError):
    """A critic's folder that cannot be used: what is wrong with which file, and what to do."""


# --- what it is asked -------------------------------------------------------------------------------------------------


def question(problem: Problem, code: str) -> str:
    """What the critic is asked. It sees what the generator saw (the first test) and the program.

    The problem comes first: its tokens are the same for all samples, so that their states are computed once.
    """
    return (
        f"Task:\n{problem.prompt}\n\nIt should pass this test and others that are not shown:\n{problem.tests[0]}\n\n"
        f"Program:\n```python\n{code.strip()}\n```\n\nDoes the program pass all tests? Answer Yes or No."
    )


class Asker:
    """Turns questions into token ids by the chat template of one model."""

    def __init__(self, model: Path) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self._limit = context_length(model)
        self.pad = int(
            next(i for i in (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id, 0) if i is not None)
        )

    def ids(self, text: str) -> list[int]:
        """Token ids of a question; a program too long for the context loses its middle."""
        messages = [{"role": "user", "content": text}]
        prompt = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = list(self._tokenizer(prompt, add_special_tokens=False)["input_ids"])
        return ids if len(ids) <= self._limit else ids[: self._limit // 2] + ids[-(self._limit - self._limit // 2) :]

    def answers(self) -> tuple[int, int]:
        """The tokens with which a reply of "Yes" and one of "No" begin."""
        yes, no = (int(self._tokenizer(word, add_special_tokens=False)["input_ids"][0]) for word in ANSWERS)
        return yes, no


def answer_direction(model: Path) -> Array:
    """(D,) row of "Yes" minus row of "No" of the output layer: its product with the last state is the zero-shot logit.

    With tied embeddings the output layer is the input embedding. Raises InputError if the model has neither.
    """
    yes, no = Asker(model).answers()
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        for file in sorted(model.glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                names: list[str] = list(tensors.keys())
                if name in names:
                    rows = tensors.get_slice(name)
                    found = rows[yes : yes + 1].float() - rows[no : no + 1].float()
                    return np.asarray(found[0].numpy(), dtype=np.float32)
    raise InputError(f"--base {model}: has no output layer (lm_head or tied embeddings) in *.safetensors.")


def tokenizer_digest(model: Path) -> str:
    """sha256 of what turns text into tokens: another tokenizer, another critic."""
    total = hashlib.sha256()
    for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja"):
        if (model / name).exists():
            total.update(name.encode() + (model / name).read_bytes())
    return total.hexdigest()


# --- the head ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Head:
    """logit = state @ weight + bias, of normalised last states."""

    weight: Array  # (D,)
    bias: float

    def logits(self, states: NDArray[Any]) -> Floats:
        """states (N, D) -> (N,)."""
        return np.asarray(states.astype(np.float32) @ self.weight + self.bias, dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Combination:
    """logit of critic and log-probability together: the weights are fitted on train problems held out of training."""

    critic: float
    mean_logprob: float
    bias: float

    def logit(self, logit: float, mean_logprob: float | None) -> float | None:
        return None if mean_logprob is None else self.critic * logit + self.mean_logprob * mean_logprob + self.bias


def loss(logits: torch.Tensor, passed: torch.Tensor, pairs: torch.Tensor, share: float | None = None) -> torch.Tensor:
    """Binary cross-entropy with both classes weighing the same, plus the mean of -log sigmoid(better - worse).

    logits (N,), passed (N,) of 0 and 1, pairs (P, 2): a passing and a failing sample of one problem. `share` of the
    training samples that pass; of these ones if not given. The pairwise term is RankNet's: Burges et al. 2005,
    "Learning to rank using gradient descent", section 3.
    """
    p = float(passed.mean()) if share is None else share
    p = min(max(p, 1e-6), 1 - 1e-6)
    weights = passed * 0.5 / p + (1 - passed) * 0.5 / (1 - p)
    total = functional.binary_cross_entropy_with_logits(logits, passed, weight=weights)
    if len(pairs):
        total = total + functional.softplus(logits[pairs[:, 1]] - logits[pairs[:, 0]]).mean()
    return total


def problem_pairs(passed: Flags, groups: Groups, most: int = 64) -> Groups:
    """(P, 2) places of a passing and a failing sample of the same problem, at most `most` of each problem."""
    rng = np.random.default_rng(0)
    found = []
    for group in np.unique(groups):
        good, bad = np.flatnonzero((groups == group) & passed), np.flatnonzero((groups == group) & ~passed)
        pairs = np.array([(a, b) for a in good for b in bad], dtype=np.int64).reshape(-1, 2)
        if len(pairs) > most:
            pairs = pairs[rng.choice(len(pairs), most, replace=False)]
        found.append(pairs)
    return np.concatenate(found) if found else np.zeros((0, 2), dtype=np.int64)


def prior_shift(passed: Flags) -> float:
    """What to add to a logit trained with both classes weighing the same, so that it means the share that passes.

    King and Zeng 2001, "Logistic regression in rare events data", section 4.1 (prior correction).
    """
    return float(np.log(passed.mean() / (1 - passed.mean())))


# --- calibration, and the company of the log-probability --------------------------------------------------------------


def temperature_of(logits: Floats, passed: Flags) -> float:
    """The T that makes sigmoid(logit / T) likeliest on held-out samples.

    Temperature scaling: Guo et al. 2017, arXiv:1706.04599, section 4.2.
    """

    def unlikeliness(log_t: float) -> float:
        z = logits / np.exp(log_t)
        return float(np.mean(np.logaddexp(0, z) - passed * z))

    return float(np.exp(minimize_scalar(unlikeliness, bounds=(-4, 6), method="bounded").x))


def combine(logits: Floats, mean_logprobs: Floats, passed: Flags, groups: Groups) -> Combination | None:
    """Weights of critic and mean log-probability that minimise `loss` on held-out samples; None if they allow none.

    logits, mean_logprobs (N,), NaN where there is no log-probability: such samples are left out.
    """
    known = np.isfinite(mean_logprobs)
    x = np.stack([logits[known], mean_logprobs[known]], axis=1)
    y = passed[known]
    if len(x) < 10 or y.all() or not y.any():
        return None
    mean, scale = x.mean(axis=0), x.std(axis=0) + 1e-9
    inputs = torch.tensor((x - mean) / scale)
    truth, pairs = torch.tensor(y, dtype=torch.float64), torch.tensor(problem_pairs(y, groups[known]))
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    steps = torch.optim.LBFGS([w], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        steps.zero_grad()
        value = loss(inputs @ w[:2] + w[2], truth, pairs) + 1e-4 * w.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    steps.step(closure)  # type: ignore[no-untyped-call]
    fitted = w.detach().numpy()
    a, b = fitted[:2] / scale
    return Combination(float(a), float(b), float(fitted[2] - (fitted[:2] * mean / scale).sum()))


# --- files ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class About:
    """What a critic's folder says of itself (critic.json); what scoring needs to use it rightly."""

    mode: str  # probe, lora or full
    base: str  # model's name
    weights_sha256: str  # of the base model
    tokenizer_sha256: str
    depth: int  # layers that are run
    inputs: dict[str, Any]  # what it was made from: another input, another critic
    temperature: float = 1.0  # probability = sigmoid(logit / temperature)
    combination: Combination | None = None
    prompt_version: int = PROMPT_VERSION
    epoch: int = 0
    figures: dict[str, Any] = field(default_factory=dict)  # of held-out train problems
    files: dict[str, str] = field(default_factory=dict)  # sha256 of each other file: a copy cut short is found out


def save(folder: Path, head: Head, about: About) -> None:
    """Write head and critic.json into a folder that may hold weights already; critic.json comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {"weight": head.weight, "bias": np.array([head.bias], dtype=np.float32)}
    save_file(arrays, folder / "head.safetensors")
    files = {p.name: _sha256(p) for p in sorted(folder.iterdir()) if p.is_file() and p.name != ABOUT}
    _describe(folder, asdict(about) | {"files": files})


def forget(folder: Path, name: str) -> None:
    """Remove a file of a critic's folder, and from the list of those that it promises."""
    fields = json.loads((folder / ABOUT).read_bytes())
    fields["files"].pop(name, None)
    _describe(folder, fields)
    (folder / name).unlink()


def _describe(folder: Path, fields: dict[str, Any]) -> None:
    draft = folder / f".{ABOUT}"
    draft.write_text(json.dumps(fields, indent=1) + "\n")
    draft.replace(folder / ABOUT)


def read_about(folder: Path) -> About:
    """What a critic says of itself; its other files are not looked at. Raises BrokenCritic."""
    try:
        fields = json.loads((folder / ABOUT).read_bytes())
        both = fields.pop("combination")
        return About(**fields, combination=Combination(**both) if both else None)
    except FileNotFoundError:
        raise BrokenCritic(f"{folder}: holds no critic ({ABOUT} is missing). {REMEDY}") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BrokenCritic(f"{folder}/{ABOUT}: not a critic's: {error}. {REMEDY}") from error


def load(folder: Path) -> tuple[Head, About]:
    """Read a critic. Raises BrokenCritic if a file is missing, cut short or of another version."""
    about = read_about(folder)
    for name, digest in about.files.items():
        if not (folder / name).is_file():
            raise BrokenCritic(f"{folder}/{name}: is missing. {REMEDY}")
        if _sha256(folder / name) != digest:
            raise BrokenCritic(f"{folder}/{name}: is damaged or was cut short: its sha256 differs. {REMEDY}")
    if about.prompt_version != PROMPT_VERSION:
        raise BrokenCritic(
            f"{folder}: was made for version {about.prompt_version} of the critic's question, this is version "
            f"{PROMPT_VERSION}. {REMEDY}"
        )
    try:
        arrays = load_file(folder / "head.safetensors")
        head = Head(arrays["weight"], float(arrays["bias"][0]))
    except (OSError, SafetensorError, KeyError) as error:
        raise BrokenCritic(f"{folder}/head.safetensors: cannot be read: {error}. {REMEDY}") from error
    return head, about


def check_base(folder: Path, about: About, files: ModelFiles) -> None:
    """Raise BrokenCritic unless the model is the one, with the tokenizer, that the critic was made from."""
    if tokenizer_digest(files.path) != about.tokenizer_sha256:
        raise BrokenCritic(
            f"{folder}: was made with another tokenizer or chat template than {files.name} has now. Give the model "
            "that it was trained on, or train it again."
        )
    if files.digest != about.weights_sha256:
        raise BrokenCritic(
            f"{folder}: was trained on another version of {about.base}: its weights differ now. Give that version, or "
            "train it again."
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def export(base: Path, heads: Array, target: Path) -> None:
    """Write a sequence classification model for vLLM into `target`, made anew: one label for each of `heads` (L, D).

    Gigabytes are not copied: the base's weights are linked, and only heads and configuration are written. The heads
    have no bias: vLLM cannot exchange the weights of a model whose head has one (VllmScorer.exchange).
    """
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    index = base / "model.safetensors.index.json"  # a folder may hold the same weights in other files, too
    names = set(json.loads(index.read_bytes())["weight_map"].values()) if index.exists() else None
    for file in base.iterdir():
        if file.suffix == ".safetensors" and (names is None or file.name in names):
            (target / file.name).symlink_to(file.absolute())
        elif file.name.startswith(("tokenizer", "vocab", "merges", "special_tokens", "chat_template")):
            shutil.copy(file, target / file.name)
    save_file({"score.weight": heads}, target / "score.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_bytes())
    labels = {str(i): f"head {i}" for i in range(len(heads))}
    config |= {
        "architectures": [config["architectures"][0].replace("ForCausalLM", "ForSequenceClassification")],
        "num_labels": len(heads),
        "id2label": labels,
        "label2id": {name: int(i) for i, name in labels.items()},
        "problem_type": "multi_label_classification",  # one label alone means regression
    }
    (target / "config.json").write_text(json.dumps(config, indent=1))


def weights(folder: Path, files: str = "*.safetensors") -> dict[str, torch.Tensor]:
    """The tensors of a folder's files by their names."""
    return {name: tensor for file in sorted(folder.glob(files)) for name, tensor in load_tensors(file).items()}
