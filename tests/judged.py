"""A tiny real Qwen2 and a small run folder with samples and labels, for tests of the critic that need no sandbox."""

import json
import shutil
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from fractal.jsonl import write_jsonl
from fractal.problems import sets
from fractal.records import Label, Sample, code_sha256
from fractal.rundir import RunDir

DEPTH, WIDTH = 4, 64  # two heads of 32: vLLM on a CPU knows no smaller ones


def tiny_qwen(folder: Path, tokenizer: Path, seed: int = 0) -> Path:
    """Random weights, float32, untied output layer; the tokenizer and chat template of another model's folder."""
    words = json.loads((tokenizer / "config.json").read_bytes())["vocab_size"]
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=words, hidden_size=WIDTH, intermediate_size=128, num_hidden_layers=DEPTH, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=2048, tie_word_embeddings=False, use_cache=True,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():  # so that states tell texts apart
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    for file in tokenizer.iterdir():
        if file.name.startswith(("tokenizer", "vocab", "merges", "special_tokens", "chat_template")):
            shutil.copy(file, folder / file.name)
    return folder


def run_folder(path: Path, model: Path, *, per_split: int = 8, n: int = 4) -> Path:
    """A run of the starter problems: the passing programs are the references, the others return nothing."""
    chosen = sets.load("starter", "train,validation,test", per_split).problems
    samples, labels = [], []
    for problem in chosen:
        for i in range(n):
            good = (int(problem.task_id) + i) % 2 == 0
            code = (
                f"{problem.reference.strip()}\n# {i}\n" if good else f"def {problem.entry_point}(*a):\n    return {i}\n"
            )
            samples.append(
                Sample(
                    problem.task_id, i, f"```python\n{code}```", code, "stop", 20 + i, -3.0 - i - (not good), i, "tiny"
                )
            )
            status = "passed" if good else "failed"
            labels.append(
                Label(problem.task_id, i, status, good, [status] * len(problem.tests), 0.0, 0.0, "", code_sha256(code))
            )
    with RunDir(path, create=True) as folder:
        folder.set_problems(chosen)
        folder.configure("problems", {"name": "starter", "digest": "0"})
        folder.configure("generate", {"model": model.name, "n": n})
        folder.manifest["model_paths"] = {model.name: str(model)}
        folder.save()
        write_jsonl(folder.file("samples.jsonl"), samples)
        write_jsonl(folder.file("labels.jsonl"), labels)
    return path
