"""The soft verifier: a language model's frozen features and a scalar head that gives the logit of "passes".

Features are the hidden states at the last token of a question about problem and program; the head is linear. The
head's loss is binary cross-entropy plus a pairwise term within each problem. Layer and ridge are chosen by
cross-validation grouped by problem, inside the train problems only.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from scipy.optimize import minimize_scalar
from sklearn.model_selection import GroupKFold
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer

from fractal import console, metrics
from fractal.models import context_length, preferred_dtype
from fractal.records import Problem, Sample

PROMPT_VERSION = 1
SHARD = 64  # sequences whose features are written together
BATCH_TOKENS = 4096  # padded tokens in one forward pass
LAYERS = 8  # layers kept, evenly spaced from a third of the depth to the last
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)  # weight of the squared norm of the head
EPOCHS = 5  # rounds of L-BFGS; the loss is convex, so more only polish
FOLDS = 5

Array = NDArray[np.float32]
Flags = NDArray[np.bool_]


def question(problem: Problem, code: str) -> str:
    """What the critic is asked. It sees what the generator saw (the first test) and the program."""
    return (
        f"Task:\n{problem.prompt}\n\nIt should pass this test and others that are not shown:\n{problem.tests[0]}\n\n"
        f"Program:\n```python\n{code.strip()}\n```\n\nDoes the program pass all tests? Answer Yes or No."
    )


# --- features ---------------------------------------------------------------------------------------------------------


class Features:
    """Hidden states of texts, kept on disk by content: a second look costs seconds, and a kill loses one shard."""

    def __init__(self, model: Path, model_digest: str, cache: Path) -> None:
        self._model = model
        config = json.loads((model / "config.json").read_bytes())
        depth = int(config["num_hidden_layers"])
        self.layers = sorted({round(x) for x in np.linspace(depth / 3, depth, LAYERS)})
        self._cache = cache
        self._salt = f"{model_digest}/{PROMPT_VERSION}/{self.layers}"
        self._known: dict[str, NDArray[np.float16]] = {}
        for shard in sorted(cache.glob("*.npz")):
            with np.load(shard) as data:
                self._known |= dict(zip(data["keys"].tolist(), data["states"], strict=True))

    def _key(self, text: str) -> str:
        return hashlib.sha256(f"{self._salt}/{text}".encode("utf-8", "surrogatepass")).hexdigest()

    def of(self, pairs: list[tuple[Problem, Sample]]) -> Array:
        """Hidden states (N, layers, width) at the last token of each pair's question."""
        texts = [question(problem, sample.code) for problem, sample in pairs]
        keys = [self._key(text) for text in texts]
        missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in self._known}
        if missing:
            self._compute(missing)
        return np.stack([self._known[key] for key in keys]).astype(np.float32)

    @torch.inference_mode()
    def _compute(self, texts: dict[str, str]) -> None:
        with console.quiet("loading the critic's model"):
            tokenizer = AutoTokenizer.from_pretrained(self._model)
            device = "cuda" if torch.cuda.is_available() else "cpu"
            model = AutoModel.from_pretrained(self._model, dtype=_dtype()).to(device).eval()
        limit = context_length(self._model)
        asked = {key: _ask(tokenizer, text, limit) for key, text in texts.items()}
        order = sorted(asked, key=lambda key: len(asked[key]))
        with console.bar("features", len(order)) as bar:
            for start in range(0, len(order), SHARD):
                shard = order[start : start + SHARD]
                states: dict[str, NDArray[np.float16]] = {}
                for batch in _batches(shard, asked):
                    ids = [torch.tensor(asked[key]) for key in batch]
                    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(device)  # (B, T), right-padded
                    last = torch.tensor([len(row) - 1 for row in ids])
                    mask = (torch.arange(padded.shape[1])[None] <= last[:, None]).to(device)
                    hidden = model(padded, attention_mask=mask, output_hidden_states=True).hidden_states
                    rows = torch.arange(len(batch))
                    kept = torch.stack([hidden[layer][rows, last] for layer in self.layers], dim=1)  # (B, layers, D)
                    values = kept.float().cpu().numpy().astype(np.float16)
                    states |= dict(zip(batch, values, strict=True))
                    bar.advance(len(batch))
                self._keep(states)

    def _keep(self, states: dict[str, NDArray[np.float16]]) -> None:
        self._cache.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256("".join(states).encode()).hexdigest()[:16]
        draft = self._cache / f".{name}"
        with draft.open("wb") as out:
            np.savez(out, keys=np.array(list(states)), states=np.stack(list(states.values())))
        draft.replace(self._cache / f"{name}.npz")
        self._known |= states


def _ask(tokenizer: Any, text: str, limit: int) -> list[int]:
    """Token ids of the question in the chat template; a program too long for the context loses its middle."""
    messages = [{"role": "user", "content": text}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    return ids if len(ids) <= limit else ids[: limit // 2] + ids[-(limit - limit // 2) :]


def _batches(keys: list[str], asked: dict[str, list[int]]) -> list[list[str]]:
    """Neighbours in length together, at most BATCH_TOKENS padded tokens a batch."""
    batches: list[list[str]] = [[]]
    for key in keys:
        if batches[-1] and len(asked[key]) * (len(batches[-1]) + 1) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(key)
    return batches


def _dtype() -> torch.dtype:
    """bfloat16 where the hardware computes in it (twice as fast here on AVX-512 BF16, see docs/log.md)."""
    return getattr(torch, preferred_dtype())  # type: ignore[no-any-return]


# --- the head ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """logit = ((x - mean) / scale) @ weight + bias, x being one layer's state; see `temperature` for probabilities."""

    layer: int  # place in Features.layers
    ridge: float
    weight: Array  # (D,)
    bias: float
    mean: Array  # (D,)
    scale: Array  # (D,)
    temperature: float = 1.0  # probability = sigmoid(logit / temperature)

    def logits(self, states: Array) -> NDArray[np.float64]:
        """states (N, layers, D) -> (N,)."""
        x = (states[:, self.layer] - self.mean) / self.scale
        return np.asarray(x @ self.weight + self.bias, dtype=np.float64)

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {
            "weight": self.weight,
            "mean": self.mean,
            "scale": self.scale,
            "bias": np.array([self.bias], dtype=np.float32),
        }
        save_file(arrays, folder / "head.safetensors")
        fields = {"layer": self.layer, "ridge": self.ridge, "temperature": self.temperature, **about}
        (folder / "config.json").write_text(json.dumps(fields, indent=1) + "\n")

    @staticmethod
    def load(folder: Path) -> "Head":
        arrays, fields = load_file(folder / "head.safetensors"), json.loads((folder / "config.json").read_bytes())
        return Head(
            layer=fields["layer"],
            ridge=fields["ridge"],
            weight=arrays["weight"],
            bias=float(arrays["bias"][0]),
            mean=arrays["mean"],
            scale=arrays["scale"],
            temperature=fields["temperature"],
        )


def loss(logits: torch.Tensor, passed: torch.Tensor, pairs: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy with both classes weighing the same, plus the mean of -log sigmoid(better - worse).

    logits (N,), passed (N,) of 0 and 1, pairs (P, 2): a passing and a failing sample of one problem. The pairwise term
    is RankNet's: Burges et al. 2005, "Learning to rank using gradient descent", section 3.
    """
    share = passed.mean().clamp(1e-6, 1 - 1e-6)
    weights = passed * 0.5 / share + (1 - passed) * 0.5 / (1 - share)
    total = functional.binary_cross_entropy_with_logits(logits, passed, weight=weights)
    if len(pairs):
        total = total + functional.softplus(logits[pairs[:, 1]] - logits[pairs[:, 0]]).mean()
    return total


def problem_pairs(passed: Flags, groups: NDArray[np.int64], most: int = 64) -> NDArray[np.int64]:
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


class HeadFit:
    """The convex problem of one layer and ridge, solved by L-BFGS in rounds (`epoch`), from zero: no random start."""

    def __init__(self, states: Array, passed: Flags, groups: NDArray[np.int64], layer: int, ridge: float) -> None:
        self.layer, self.ridge = layer, ridge
        x = states[:, layer]
        self.mean, self.scale = x.mean(axis=0), x.std(axis=0) + 1e-4
        self._x = torch.tensor((x - self.mean) / self.scale, dtype=torch.float64)
        self._y = torch.tensor(passed, dtype=torch.float64)
        # The loss weighs both classes the same; the head's logits are to mean the share that really passes. King and
        # Zeng 2001, "Logistic regression in rare events data", section 4.1 (prior correction). Rankings do not change.
        self._prior = float(np.log(passed.mean() / (1 - passed.mean())))
        self._pairs = torch.tensor(problem_pairs(passed, groups))
        self._w = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
        self._b = torch.zeros((), dtype=torch.float64, requires_grad=True)
        self._steps = torch.optim.LBFGS([self._w, self._b], max_iter=20, line_search_fn="strong_wolfe")

    def epoch(self) -> float:
        """One round of steps; returns the loss before the penalty."""

        def closure() -> torch.Tensor:
            self._steps.zero_grad()
            value = self._loss() + self.ridge * self._w.square().sum()
            value.backward()  # type: ignore[no-untyped-call]
            return value

        self._steps.step(closure)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            return float(self._loss())

    def _loss(self) -> torch.Tensor:
        return loss(self._x @ self._w + self._b, self._y, self._pairs)

    def head(self, temperature: float = 1.0) -> Head:
        weight = self._w.detach().numpy().astype(np.float32)
        return Head(
            self.layer, self.ridge, weight, float(self._b.detach()) + self._prior, self.mean, self.scale, temperature
        )


@dataclass(frozen=True)
class Choice:
    """Layer, ridge and temperature, as grouped cross-validation within the train problems chose them."""

    layer: int
    ridge: float
    temperature: float
    within_auc: float | None  # of the held-out folds, over pairs of one problem
    pooled_auc: float | None
    table: list[dict[str, Any]]  # every combination with its figures


def cross_validate(states: Array, passed: Flags, groups: NDArray[np.int64], layers: list[int]) -> Choice:
    """Try every layer and ridge on folds of whole problems. Needs at least two problems and both classes."""
    folds = list(GroupKFold(n_splits=min(FOLDS, len(np.unique(groups)))).split(states, passed, groups))
    table: list[dict[str, Any]] = []
    held_out: list[NDArray[np.float64]] = []
    with console.bar("cross-validation", len(layers) * len(RIDGES)) as bar:
        for place, layer in enumerate(layers):
            for ridge in RIDGES:
                logits = np.zeros(len(passed))
                for train, test in folds:
                    if passed[train].all() or not passed[train].any():
                        continue  # one class only: nothing to fit, the logit stays 0
                    fit = HeadFit(states[train], passed[train], groups[train], place, ridge)
                    fit.epoch()
                    logits[test] = fit.head().logits(states[test])
                within, pooled = (
                    metrics.within_problem_auc(logits, passed, groups.tolist()).auc,
                    metrics.auc(logits, passed),
                )
                table.append({"layer": layer, "ridge": ridge, "within_auc": within, "pooled_auc": pooled})
                held_out.append(logits)
                bar.advance()
    best = max(
        range(len(table)),
        key=lambda i: (_known(table[i]["within_auc"]), _known(table[i]["pooled_auc"]), table[i]["ridge"]),
    )
    return Choice(
        layer=best // len(RIDGES),
        ridge=table[best]["ridge"],
        temperature=temperature_of(held_out[best], passed),
        within_auc=table[best]["within_auc"],
        pooled_auc=table[best]["pooled_auc"],
        table=table,
    )


def _known(value: float | None) -> float:
    return 0.5 if value is None else value


def temperature_of(logits: NDArray[np.float64], passed: Flags) -> float:
    """The T that makes sigmoid(logit / T) likeliest on held-out samples.

    Temperature scaling: Guo et al. 2017, arXiv:1706.04599, section 4.2.
    """

    def unlikeliness(log_t: float) -> float:
        z = logits / np.exp(log_t)
        return float(np.mean(np.logaddexp(0, z) - passed * z))

    return float(np.exp(minimize_scalar(unlikeliness, bounds=(-4, 6), method="bounded").x))


def about(choice: Choice) -> dict[str, Any]:
    fields = asdict(choice)
    del fields["table"]
    return fields
