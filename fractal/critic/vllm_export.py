"""Writes a critic's base model with linear heads as vLLM's pooling runner reads it. Needs no vLLM."""

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from fractal.critic.arrays import Array

TOKENIZER_PREFIXES = ("tokenizer", "vocab", "merges", "special_tokens", "chat_template")


def export(base: Path, heads: Array, target: Path) -> None:
    """Write the model in `base` with linear heads into the new folder `target`: one label for each of `heads` (L, D).

    The base's weights, gigabytes, are linked; only heads and configuration are written. The heads have no bias: vLLM
    cannot exchange the weights of a model whose head has one (PoolingEngine.exchange).
    """
    target.mkdir()
    index = base / "model.safetensors.index.json"  # a folder may hold the same weights in other files, too
    names = set(json.loads(index.read_bytes())["weight_map"].values()) if index.exists() else None
    for file in base.iterdir():
        if file.suffix == ".safetensors" and (names is None or file.name in names):
            (target / file.name).symlink_to(file.absolute())
        elif file.name.startswith(TOKENIZER_PREFIXES):
            shutil.copy(file, target / file.name)
    save_file({"score.weight": heads}, target / "score.safetensors", metadata={"format": "pt"})
    config: dict[str, Any] = json.loads((base / "config.json").read_bytes())
    labels = {str(i): f"head {i}" for i in range(len(heads))}
    config |= {
        "architectures": [config["architectures"][0].replace("ForCausalLM", "ForSequenceClassification")],
        "num_labels": len(heads),
        "id2label": labels,
        "label2id": {name: int(i) for i, name in labels.items()},
        "problem_type": "multi_label_classification",  # one label alone means regression
    }
    (target / "config.json").write_text(json.dumps(config, indent=1))
