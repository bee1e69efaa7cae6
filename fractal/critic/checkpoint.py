"""A critic's folder: head.safetensors, critic.json, and the weights of one that was fine-tuned."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from fractal.errors import InputError
from fractal.jsonl import write_whole

if TYPE_CHECKING:
    from fractal.critic.head import Head
    from fractal.generate.models import ModelFiles

PROMPT_VERSION = 1  # of critic/prompt.py: with another question, a critic is another one
REMEDY = "Train it again (`fractal train`), or give another --critic."
INFO_FILE = "critic.json"  # not config.json: a fully trained model has its own


class BrokenCriticError(InputError):
    """A critic's folder that cannot be used: what is wrong with which file, and what to do."""


@dataclass(frozen=True, slots=True)
class Combination:
    """A logit of critic and log-probability together; the weights are fitted on train problems held out of training."""

    critic: float
    mean_logprob: float
    bias: float

    def logit(self, logit: float, mean_logprob: float | None) -> float | None:
        return None if mean_logprob is None else self.critic * logit + self.mean_logprob * mean_logprob + self.bias


@dataclass(frozen=True, slots=True)
class CriticInfo:
    """The content of critic.json: what scoring needs to use a critic rightly."""

    mode: str  # probe, lora or full
    base: str  # the base model's name
    weights_sha256: str  # of the base model
    tokenizer_sha256: str
    depth: int  # layers that are run
    inputs: dict[str, Any]  # what it was made from: with other inputs, a critic is another one
    temperature: float = 1.0  # probability = sigmoid(logit / temperature)
    combination: Combination | None = None
    prompt_version: int = PROMPT_VERSION
    epoch: int = 0
    figures: dict[str, Any] = field(default_factory=dict)  # of held-out train problems
    files: dict[str, str] = field(default_factory=dict)  # sha256 of each other file, so that a truncated copy is found


def save(folder: Path, head: "Head", info: CriticInfo) -> None:
    """Write head and critic.json into a folder that may hold weights already; critic.json comes last."""
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {"weight": head.weight, "bias": np.array([head.bias], dtype=np.float32)}
    save_file(arrays, folder / "head.safetensors")
    files = {p.name: _sha256(p) for p in sorted(folder.iterdir()) if p.is_file() and p.name != INFO_FILE}
    _write_info(folder, asdict(info) | {"files": files})


def update(folder: Path, **fields: Any) -> None:
    """Change fields of a critic's critic.json."""
    _write_info(folder, asdict(read_info(folder)) | fields)


def remove_file(folder: Path, name: str) -> None:
    """Remove a file of a critic's folder, and its digest from critic.json."""
    files = read_info(folder).files
    files.pop(name, None)
    update(folder, files=files)
    (folder / name).unlink(missing_ok=True)


def _write_info(folder: Path, fields: dict[str, Any]) -> None:
    write_whole(folder / INFO_FILE, (json.dumps(fields, indent=1, default=asdict) + "\n").encode())


def read_info(folder: Path) -> CriticInfo:
    """Read critic.json; the folder's other files are not looked at. Raises BrokenCriticError."""
    try:
        return msgspec.json.decode((folder / INFO_FILE).read_bytes(), type=CriticInfo)
    except FileNotFoundError:
        raise BrokenCriticError(f"{folder}: holds no critic ({INFO_FILE} is missing). {REMEDY}") from None
    except msgspec.DecodeError as error:
        raise BrokenCriticError(f"{folder}/{INFO_FILE}: not a critic's: {error}. {REMEDY}") from error


def verify(folder: Path) -> CriticInfo:
    """Check a critic's files against critic.json. Raises BrokenCriticError. Loads no library of arrays."""
    info = read_info(folder)
    for name, digest in info.files.items():
        if not (folder / name).is_file() or _sha256(folder / name) != digest:
            raise BrokenCriticError(f"{folder}/{name}: is missing, damaged or cut short: its sha256 differs. {REMEDY}")
    if info.prompt_version != PROMPT_VERSION:
        raise BrokenCriticError(
            f"{folder}: was made for version {info.prompt_version} of the critic's question, this is version "
            f"{PROMPT_VERSION}. {REMEDY}"
        )
    return info


def digest(folder: Path) -> str:
    """sha256 of a critic, as hexadecimal: that of its INFO_FILE, which holds the digests of all its other files."""
    return _sha256(folder / INFO_FILE)


def load(folder: Path) -> "tuple[Head, CriticInfo]":
    """Verify and read a critic. Raises BrokenCriticError."""
    from safetensors.numpy import load_file

    from fractal.critic.head import Head

    info = verify(folder)
    arrays = load_file(folder / "head.safetensors")
    return Head(arrays["weight"], float(arrays["bias"][0])), info


def check_base(folder: Path, info: CriticInfo, files: "ModelFiles") -> None:
    """Raise BrokenCriticError unless the model is the one, with the tokenizer, that the critic was made from."""
    from fractal.critic.prompt import tokenizer_digest

    for what, now, before in (
        ("another tokenizer or chat template", tokenizer_digest(files.path), info.tokenizer_sha256),
        ("other weights", files.digest, info.weights_sha256),
    ):
        if now != before:
            raise BrokenCriticError(
                f"{folder}: was trained on {info.base} with {what} than {files.name} has now. Give the model "
                "that it was trained on, or train it again."
            )


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
