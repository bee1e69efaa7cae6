"""The critic's speed, as ratios in one run: `invoke bench --what=critic`, or `python benchmarks/critic.py --help`.

Scoring the same programs by transformers (each problem's tokens read once), by transformers as others do (every text
from its start), and by vLLM's pooling runner; a probe's features again from the cache; and a training epoch of LoRA and
of the whole model, with model FLOP utilisation, on a GPU also without packing problems into a forward pass. Each turn
is a process of its own; starting (imports, loading, a first pass) is told apart. Ratios are taken within a round, and
their median is told.

Exit codes: 0 done; 1 a contestant failed; 2 bad input or usage; 3 something outside is missing; 130 interrupted.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this is run as a script

from benchmarks.verify import BenchError, chosen, machine, order, outcome, save, show
from fractal import console
from fractal.errors import InputError
from fractal.generate import models
from fractal.generate.backends import why_no_vllm
from fractal.generate.memory import read_shape
from fractal.install import gpu
from fractal.problems.sets import load
from fractal.records import Problem, Sample

TITLES = {
    "shared": "transformers, problem read once",
    "plain": "transformers, each text alone",
    "vllm": "vLLM, pooling with prefix cache",
    "cached": "features from the cache",
    "lora": "training epoch, LoRA",
    "full": "training epoch, whole model",
    "lora-unpacked": "training epoch, LoRA, unpacked",
    "full-unpacked": "training epoch, whole model, unpacked",
}
UNPACKED = ["lora-unpacked", "full-unpacked"]  # on a CPU nothing is packed
RATIOS = [
    ("ours to plain", "shared", "plain"),
    ("vLLM to ours", "vllm", "shared"),
    ("vLLM to plain", "vllm", "plain"),
    ("packed to unpacked, LoRA", "lora", "lora-unpacked"),
    ("packed to unpacked, whole model", "full", "full-unpacked"),
]
# FLOPs of a step for each parameter and token: forward 2, gradients of states 2, gradients of weights 2 (Kaplan et al.
# 2020, arXiv:2001.08361, section 2.1); LoRA's own matrices are under 2 % and left out, and so is attention.
FLOPS = {"lora": 4, "full": 6}
# Dense bfloat16 peak in TFLOP/s, from NVIDIA's data sheets; half of what they give with sparsity: H100 SXM, H200 and
# GH200 1,979, H100 PCIe 1,513, HGX B200 4,500 for each GPU.
PEAKS = {
    "H100 PCIe": 756.0,
    "A100": 312.0,
    "H100": 989.0,
    "H200": 989.0,
    "GH200": 989.0,
    "B200": 2250.0,
    "A10": 125.0,
    "L4": 121.0,
    "L40S": 362.0,
    "A6000": 155.0,
}


@dataclass(frozen=True)
class Plan:
    """What is asked for."""

    contestants: list[str]
    model: str
    problems: str
    limit: int = 4
    n: int = 6
    rounds: int = 3


@dataclass(frozen=True)
class Turn:
    """One contestant, once."""

    round: int
    contestant: str
    samples: int
    tokens: int
    seconds: float
    flops: float = 0.0  # of the model, in training
    start_s: float = 0.0  # from the call to the end of a first small pass: imports, loading, an engine's start

    @property
    def rate(self) -> float:
        return self.samples / self.seconds


def programs(plan: Plan) -> list[tuple[Problem, Sample]]:
    """Different programs for each problem: the reference with its lines repeated in comments, longer and longer."""
    found = []
    for problem in load(plan.problems, None, plan.limit).problems:
        lines = problem.reference.strip().splitlines()
        for i in range(plan.n):
            code = "\n".join([*lines, *(f"# {line}" for line in lines[: 2 * i]), f"# {i}"])
            found.append((problem, Sample(problem.task_id, i, "", code, "stop", 1, -1.0, None, "bench")))
    return found


# --- one turn, in a process of its own --------------------------------------------------------------------------------


def turn(plan: Plan, contestant: str) -> Turn:
    """Load, then measure."""
    called = time.perf_counter()
    from fractal.critic.features import Features
    from fractal.critic.forward import load_model, read
    from fractal.critic.prompt import PromptTokenizer

    files = models.resolve(plan.model)
    pairs = programs(plan)
    tokenizer = PromptTokenizer(files.path)
    prompts = tokenizer.prompts(pairs)
    tokens = sum(len(prompt.token_ids) for prompt in prompts)
    depth = read_shape(files.path).layers
    if contestant in ("shared", "plain"):
        model = load_model(files.path)
        if contestant == "plain":  # no two prompts of one problem, so none shares its beginning
            prompts = [replace(prompt, task_id=str(number)) for number, prompt in enumerate(prompts)]
        list(read(model, prompts[:1], [depth], tokenizer.pad))  # the first pass sets things up
        begin = time.perf_counter()
        done = sum(
            len(batch) for batch, states in read(model, prompts, [depth], tokenizer.pad) if states.isfinite().all()
        )
        return Turn(0, contestant, done, tokens, time.perf_counter() - begin, start_s=begin - called)
    if contestant == "vllm":
        from fractal.critic.head import zero_shot_head
        from fractal.critic.vllm_export import export
        from fractal.critic.vllm_pooling import PoolingEngine

        texts = [prompt.token_ids for prompt in prompts]
        with tempfile.TemporaryDirectory() as folder:
            export(files.path, zero_shot_head(files.path).weight[None], Path(folder) / "c")
            engine = PoolingEngine(Path(folder) / "c", models.preferred_dtype(), max(map(len, texts)))
            list(engine.logits([texts[0][:-1]]))
            begin = time.perf_counter()
            done = len(list(engine.logits(texts)))
            return Turn(0, contestant, done, tokens, time.perf_counter() - begin, start_s=begin - called)
    if contestant == "cached":
        with tempfile.TemporaryDirectory() as folder:
            Features(files.path, files.digest, Path(folder)).of(pairs)
            begin = time.perf_counter()
            Features(files.path, files.digest, Path(folder)).of(pairs)
            return Turn(0, contestant, len(pairs), tokens, time.perf_counter() - begin, start_s=begin - called)
    return _training(plan, contestant, [(p.task_id, p.token_ids) for p in prompts], tokens, tokenizer.pad, called)


def _training(
    plan: Plan, contestant: str, texts: list[tuple[str, list[int]]], tokens: int, pad: int, called: float
) -> Turn:
    from fractal.critic import finetune
    from fractal.critic.batching import Example
    from fractal.critic.forward import device
    from fractal.critic.training_settings import TrainingSettings

    mode: Any = contestant.removesuffix("-unpacked")
    settings = TrainingSettings(mode)
    where = finetune.placement(device(), models.preferred_dtype())
    if contestant in UNPACKED:
        where = replace(where, packed=False)
    model = finetune.TrainableCritic(models.resolve(plan.model), settings, where=where)
    examples = [Example(task, ids, i % 2 == 0, 1) for i, (task, ids) in enumerate(texts)]
    size = sum(p.numel() for n, p in model.backbone.named_parameters() if "lora_" not in n and "embed" not in n)
    finetune.train_epoch(model, examples[:2], 1, settings.batch_tokens, pad)
    begin = time.perf_counter()
    finetune.train_epoch(
        model, examples, 1, settings.batch_tokens, pad
    )  # its last act reads the loss: the GPU has finished
    seconds = time.perf_counter() - begin
    return Turn(0, contestant, len(examples), tokens, seconds, FLOPS[mode] * size * tokens, begin - called)


# --- all of them ------------------------------------------------------------------------------------------------------


def measure(plan: Plan) -> list[Turn]:
    turns = []
    with console.bar("bench", plan.rounds * len(plan.contestants)) as bar:
        for number in range(1, plan.rounds + 1):
            for contestant in order(plan.contestants, number, 0):
                command = [sys.executable, __file__, "--worker", contestant, "--plan", json.dumps(asdict(plan))]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise BenchError(f"{contestant}: {(done.stderr.strip().splitlines() or ['no word'])[-1][:300]}")
                found = Turn(**json.loads(done.stdout.splitlines()[-1]) | {"round": number})
                turns.append(found)
                bar.advance(1, f"{contestant} {found.rate:.1f} a second")
    return turns


def summary(turns: list[Turn]) -> dict[str, Any]:
    """Medians by contestant, and medians of the ratios within a round, with the smallest and the largest."""
    rates: dict[str, dict[int, float]] = {}
    for one in turns:
        rates.setdefault(one.contestant, {})[one.round] = one.rate
    ratios = {}
    for name, above, below in RATIOS:
        if both := [rates[above][n] / rates[below][n] for n in rates.get(above, {}) if n in rates.get(below, {})]:
            ratios[name] = {"median": statistics.median(both), "low": min(both), "high": max(both)}
    of = {c: [t for t in turns if t.contestant == c] for c in rates}
    return {
        "rates": {c: statistics.median(by.values()) for c, by in rates.items()},
        "seconds": {c: statistics.median(t.seconds for t in some) for c, some in of.items()},
        "start_s": {c: statistics.median(t.start_s for t in some) for c, some in of.items()},
        "flops_per_s": {
            c: statistics.median(t.flops / t.seconds for t in some) for c, some in of.items() if some[0].flops
        },
        "ratios": ratios,
    }


def peak_of(name: str) -> float | None:
    """FLOP/s dense in bfloat16 of a GPU by the name that its driver gives; None for an unknown one."""
    words = name.replace("-", " ").split()
    return next((1e12 * tera for known, tera in PEAKS.items() if set(known.split()) <= set(words)), None)


def peak_flops() -> float | None:
    """Of the GPU here; None where there is none, or an unknown one."""
    return peak_of(gpu.gpus()[0].name) if gpu.usable() else None


def utilisation(found: dict[str, Any], peak: float | None) -> dict[str, float]:
    """Model FLOP utilisation of each contestant that trains; empty where the peak is not known."""
    return {c: flops / peak for c, flops in found["flops_per_s"].items()} if peak else {}


def tables(found: dict[str, Any], used: dict[str, float]) -> list[Table]:
    """`found` of `summary`, `used` of `utilisation`."""
    rates = Table(box=box.SIMPLE, title="The critic", title_justify="left")
    for name in ("", "samples/s", "seconds", "start, s", "GFLOP/s", "MFU"):
        rates.add_column(name, justify="left" if not name else "right")
    for contestant, rate in found["rates"].items():
        flops = found["flops_per_s"].get(contestant)
        rates.add_row(
            TITLES[contestant],
            f"{rate:,.2f}",
            f"{found['seconds'][contestant]:,.1f}",
            f"{found['start_s'][contestant]:,.1f}",
            f"{flops / 1e9:,.0f}" if flops else "",
            f"{used[contestant]:.1%}" if contestant in used else "",
        )
    ratios = Table(box=box.SIMPLE, title="Ratios within a round", title_justify="left")
    for name in ("", "median", "low", "high"):
        ratios.add_column(name, justify="left" if not name else "right")
    for name, one in found["ratios"].items():
        ratios.add_row(name, *(f"{one[key]:.2f}" for key in ("median", "low", "high")))
    return [rates, ratios]


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="benchmarks/critic.py", description=(__doc__ or "").partition("\n")[0])
    add = found.add_argument
    add("--model", default=models.EMBEDDED, help=f"a folder or a hub id [{models.EMBEDDED}]")
    add("--problems", default="starter", help="as for fractal generate [starter]")
    add("--limit", type=int, default=4, help="problems of each split [4]")
    add("--n", type=int, default=6, help="programs a problem [6]")
    add("--rounds", type=int, default=3, help="turns of each contestant [3]")
    add("--only", help=f"some of: {','.join(TITLES)}")
    add("--quick", action="store_true", help="a smoke run: 2 problems a split, 2 programs, one round")
    add("--out", type=Path, default=Path("runs/bench"), help="folder of the JSON files [runs/bench]")
    add("--worker", help=argparse.SUPPRESS)
    add("--plan", help=argparse.SUPPRESS)
    return found


def plan_of(given: argparse.Namespace) -> Plan:
    """The options, checked. Raises InputError."""
    contestants = chosen(given.only, TITLES)
    if min(given.limit, given.n, given.rounds) < 1:
        raise InputError("--limit, --n and --rounds must be positive.")
    if not gpu.usable() and not given.only:
        contestants = [one for one in contestants if one not in UNPACKED]
    if "vllm" in contestants and (problem := why_no_vllm()):
        console.warn(f"bench: left out vllm: {problem}")
        contestants.remove("vllm")
    size = (
        {"limit": 2, "n": 2, "rounds": 1}
        if given.quick
        else {"limit": given.limit, "n": given.n, "rounds": given.rounds}
    )
    return Plan(contestants, given.model, given.problems, **size)


def run(given: argparse.Namespace) -> Path:
    """Measure, print, and return the path of the figures."""
    plan = plan_of(given)
    load(plan.problems, None, plan.limit)
    models.resolve(plan.model)
    facts = machine()
    turns = measure(plan)
    found = summary(turns)
    used = utilisation(found, peak_flops())
    for one in tables(found, used):
        show(one)
    facts = {"machine": facts, **found, "utilisation": used, "turns": [asdict(t) for t in turns]}
    return save(given.out, "critic", plan, facts)


def main() -> int:
    given = parser().parse_args()
    if given.worker:
        found = turn(Plan(**json.loads(given.plan)), given.worker)
        print(json.dumps(asdict(found)), flush=True)
        os._exit(0)  # vLLM's threads would delay a normal exit
    return outcome(lambda: run(given))


if __name__ == "__main__":
    sys.exit(main())
