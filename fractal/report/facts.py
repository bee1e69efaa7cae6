"""What the manifest and the stages' own files tell of a run, and its records do not."""

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from fractal.errors import RecordError
from fractal.jsonl import read_jsonl
from fractal.rundir import RunDir


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """One epoch of the critic's training; epoch 0 is the zero-shot critic and has no train_loss."""

    epoch: int
    train_loss: float | None
    val_acc: float | None  # 0..1, over validation samples
    val_within_auc: float | None = None  # AUC within a problem, over validation samples
    dev_within_auc: float | None = None  # the same over train problems held out of training: decides when to stop
    chosen: bool = False  # the checkpoint that scored


@dataclass(frozen=True, slots=True)
class SplitAccuracy:
    """A critic under one way to split the same train samples (critic/splits.json, stage 3)."""

    by: str  # "sample": those of one problem lie on both sides; "problem": the honest one
    accuracy: float
    auc: float | None
    within_auc: float | None
    lookup_accuracy: float  # the majority label of the same problem on the training side; majority class if it has none


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """None is "not known"."""

    run: str
    date: str  # ISO 8601, of the run's end
    command: str  # recomputes the page from the run folder
    model: str
    model_revision: str | None = None
    weights_digest: str | None = None
    backend: str | None = None
    seed: int | None = None
    temperature: float | None = None
    n: int | None = None  # samples per problem that the run was to draw
    problem_set: str | None = None
    problem_set_digest: str | None = None
    stage_seconds: Mapping[str, float] = field(default_factory=dict)  # in the order of the stages
    generate_tokens: int | None = None  # drawn in generate_seconds: a resumed run counts both or neither
    generate_seconds: float | None = None
    sandbox_image: str | None = None
    sandbox_digest: str | None = None
    git_commit: str | None = None
    git_dirty: bool | None = None
    packages: Mapping[str, str] = field(default_factory=dict)
    critic: str | None = None  # base model and mode
    epochs: Sequence[Epoch] = ()
    skipped: Mapping[str, int] = field(default_factory=dict)  # problems left out before generation: reason -> count
    warnings: Sequence[str] = ()


def read_facts(folder: RunDir) -> Facts:
    manifest = folder.manifest
    config, stages = manifest["config"], manifest["stages"]
    generate, critic, problems = config.get("generate", {}), config.get("train"), config.get("problems", {})
    generation = stages.get("generate", {})
    sandbox = manifest["images"].get("sandbox", {})
    finished = {name: entry for name, entry in stages.items() if name != "report"}
    skipped = len(generation.get("skipped", {}))
    return Facts(
        run=manifest["name"],
        date=max([manifest.get("created", ""), *(entry.get("end") or "" for entry in finished.values())]),
        command=f"fractal report --check --run {shlex.quote('runs/' + manifest['name'])}",
        model=generate.get("model", "unknown"),
        model_revision=generate.get("revision"),
        weights_digest=generate.get("weights_sha256"),
        backend=generate.get("backend"),
        seed=generate.get("seed"),
        temperature=generate.get("temperature"),
        n=generate.get("n"),
        problem_set=problems.get("name"),
        problem_set_digest=problems.get("digest"),
        stage_seconds={name: entry["seconds"] for name, entry in finished.items() if "seconds" in entry},
        generate_tokens=generation.get("tokens"),
        generate_seconds=generation.get("decode_seconds"),
        sandbox_image=sandbox.get("name"),
        sandbox_digest=sandbox.get("digest"),
        warnings=_image_warnings(sandbox.get("labelled_by", [])),
        git_commit=manifest["git_commit"],
        git_dirty=manifest["git_dirty"],
        packages={name: version for name, version in manifest["packages"].items() if version},
        critic=f"{critic['mode']} on {critic['base']}" if critic else None,
        epochs=read_jsonl(folder.file("critic/metrics.jsonl"), Epoch),
        skipped={"prompt and reply do not fit the model's context": skipped} if skipped else {},
    )


def read_split_accuracies(folder: RunDir) -> list[SplitAccuracy]:
    """Stage 3's comparison of two ways to split. Raises RecordError."""
    file = folder.file("critic/splits.json")
    if not file.exists():
        return []
    try:
        return msgspec.json.decode(file.read_bytes(), type=list[SplitAccuracy])
    except msgspec.DecodeError as error:
        raise RecordError(f"{file}: not a list of split accuracies: {error}. Train again: fractal train.") from error


def _image_warnings(labelled_by: list[dict[str, Any]]) -> list[str]:
    """A warning where the labels come from different sandbox images; `labelled_by`: verify/provenance.py."""
    counts: Counter[str] = Counter()
    for image in labelled_by:
        counts[f"{image['name']} ({image['digest'][:19]})"] += image["labels"]
    images = [f"{name}: {count:,}" for name, count in counts.items() if count]
    if len(images) < 2:
        return []
    return [f"The labels come from {len(images)} sandbox images, which may judge differently: {', '.join(images)}."]
